"""The optimizer by timm's name, with weight decay only where it belongs."""

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from leaven.recipes.common.flags import UserError
from leaven.recipes.common.start import LoopSettings

# Layer scale, as timm and torchvision call it. timm leaves out what is 1-D; torchvision's is not.
_NO_DECAY = ("*gamma*", "*layer_scale*")


def make_optimizer(
    objective: nn.Module, settings: LoopSettings, lr_scales: Mapping[str, float] | None = None
) -> Optimizer:
    """The optimizer of all trainable parameters, from ``--opt --lr --weight-decay --betas --clip-grad``.

    Gradients are clipped once: an optimizer that clips by itself (timm's LAMB, at norm 1 unless told) is told the
    limit, and `clips_itself` lets the loop know.

    Args:
        objective: what to train.
        settings: the flags.
        lr_scales: parameter name -> share of the learning rate, as `set_schedule` keeps it; see `layer_scales`.

    Raises:
        UserError: unknown name, an optimizer that cannot be had here, or one that has no betas where some are given.
    """
    import timm.optim

    optim: Any = timm.optim
    name = settings.opt.lower()
    known = optim.list_optimizers()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--opt {settings.opt}: timm has no such optimizer{hint}")
    if optim.get_optimizer_info(name).second_order:
        raise UserError(f"--opt {settings.opt} needs second derivatives, which no recipe computes")
    if settings.betas is not None and not optim.get_optimizer_info(name).has_betas:
        raise UserError(f"--opt {settings.opt} does not take betas: add --betas none")
    kwargs: dict[str, Any] = {} if settings.betas is None else {"betas": settings.betas}
    # A decay that starts at zero and rises must still be told apart from none.
    decay = max(settings.weight_decay, settings.weight_decay_end or 0.0)
    own: Any = getattr(objective, "no_weight_decay", tuple)  # timm's convention for a model's own exceptions
    groups = optim.param_groups_weight_decay(objective, decay, no_weight_decay_list={*own(), *_NO_DECAY})
    if lr_scales is not None:
        groups = _by_scale(groups, {p: lr_scales.get(name, 1.0) for name, p in objective.named_parameters()})
    try:
        optimizer: Optimizer = optim.create_optimizer_v2(
            groups, name, lr=settings.lr, weight_decay=decay, **kwargs
        )
    # A rate or a decay out of range, or what timm needs for it is not here.
    except (ValueError, ImportError, AssertionError) as error:
        raise UserError(f"--opt {settings.opt}: {error}") from error
    if clips_itself(optimizer):
        optimizer.defaults["max_grad_norm"] = settings.clip_grad  # where LAMB's step reads it
    return optimizer


def layer_scales(depths: Mapping[str, int], decay: float, prefix: str = "") -> dict[str, float]:
    """Layer-wise decay: the learning rate's share of each parameter, `decay` per group below the classifier's.

    Args:
        depths: parameter name -> depth, from `leaven.backbones.layer_groups`.
        decay: 1 for the same rate everywhere.
        prefix: of the names in the objective.
    """
    top = max(depths.values())
    return {prefix + name: decay ** (top - depth) for name, depth in depths.items()}


def _by_scale(groups: list[dict[str, Any]], scales: Mapping[nn.Parameter, float]) -> list[dict[str, Any]]:
    """Each group split by its parameters' shares of the learning rate, the smallest first."""
    split = []
    for group in groups:
        for scale in sorted({scales[p] for p in group["params"]}):
            split.append(
                group | {"params": [p for p in group["params"] if scales[p] == scale], "lr_scale": scale}
            )
    return split


def clips_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer's own step clips the gradient norm."""
    return "max_grad_norm" in optimizer.defaults
