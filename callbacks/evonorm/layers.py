"""timm's EvoNorm layers, made to refuse or to compute exactly where they would break off or overflow."""

from inspect import signature
from typing import Any

import torch
from timm.layers import evo_norm
from torch import Tensor, nn


class _Careful(nn.Module):
    apply_act: bool

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"{type(self).__name__} takes images (B, C, H, W), not {tuple(x.shape)}")
        of_batch = self.training and self.apply_act and hasattr(self, "running_var")
        if of_batch and x.numel() == x.shape[1]:
            raise ValueError(
                f"{type(self).__name__} needs more than one value per channel when training, got {tuple(x.shape)}"
            )
        # The denominators of large activations, x v + std and (x + 1) rms, do not fit into float16.
        y: Tensor = super().forward(x.float() if x.dtype == torch.float16 else x)
        return y.to(x.dtype)


class EvoNormB0(_Careful, evo_norm.EvoNorm2dB0):
    """x / max(std over batch and space, v x + std over space)."""


class EvoNormB1(_Careful, evo_norm.EvoNorm2dB1):
    """x / max(std over batch and space, (x + 1) rms over space)."""


class EvoNormB2(_Careful, evo_norm.EvoNorm2dB2):
    """x / max(std over batch and space, rms over space - x)."""


class EvoNormS0(_Careful, evo_norm.EvoNorm2dS0):
    """x sigmoid(v x) / std of the group."""


class EvoNormS0a(_Careful, evo_norm.EvoNorm2dS0a):
    """S0 that divides without its activation too."""


class EvoNormS1(_Careful, evo_norm.EvoNorm2dS1):
    """x sigmoid(x) / std of the group."""


class EvoNormS1a(_Careful, evo_norm.EvoNorm2dS1a):
    """S1 that divides without its activation too."""


class EvoNormS2(_Careful, evo_norm.EvoNorm2dS2):
    """x sigmoid(x) / rms of the group."""


class EvoNormS2a(_Careful, evo_norm.EvoNorm2dS2a):
    """S2 that divides without its activation too."""


KINDS: dict[str, type[nn.Module]] = {
    cls.__name__.removeprefix("EvoNorm").lower(): cls
    for cls in (
        EvoNormB0,
        EvoNormB1,
        EvoNormB2,
        EvoNormS0,
        EvoNormS0a,
        EvoNormS1,
        EvoNormS1a,
        EvoNormS2,
        EvoNormS2a,
    )
}


# Arguments of timm's that are ours.
_OURS = ("num_features", "groups", "apply_act")


def build(kind: str, num_features: int, groups: int, apply_act: bool, **kwargs: Any) -> nn.Module:
    """See `leaven.callbacks.evo_norm`."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    for name, value in (("groups", groups), ("num_features", num_features)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    # timm's layers take any argument, and leave it.
    taken = signature(KINDS[kind]).parameters.values()
    known = [p.name for p in taken if p.kind is not p.VAR_KEYWORD and p.name not in _OURS]
    if odd := [name for name in kwargs if name not in known]:
        raise TypeError(f"EvoNorm-{kind} has no argument {odd[0]!r}; it has groups, {', '.join(known)}")
    if kind.startswith("s"):
        kwargs["groups"] = max(d for d in range(1, min(groups, num_features) + 1) if num_features % d == 0)
    return KINDS[kind](num_features, apply_act=apply_act, **kwargs)
