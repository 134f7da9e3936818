"""TrAct: train the first layer as if its pre-activations were trained (Petersen et al., NeurIPS 2024)."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leaven.callbacks.callback import Callback, Handle, Progress
from leaven.callbacks.first_layer import LOOK, FirstLayer, weight_of
from leaven.callbacks.hooks import Hook, Switch, watch
from leaven.callbacks.second_moment import reason_against, tract_gradient
from leaven.callbacks.wrappers import AttachError

__all__ = ["TrAct", "remove_tract", "tract", "tract_gradient"]


class TrAct(Callback):
    """Trains the first layer as if its pre-activations were trained: its weight's gradient times (C + lam I)^-1.

    C is the second moment of what the layer saw, of the batch that the gradient is of: directions that vary little in
    the images are learnt faster. Forward passes that no gradient comes back from do not count. Only the gradient of
    the weight changes, before DDP's all-reduce and before clipping; forward pass, state dict and bias are as ever.
    Assumes images normalised to mean 0 and standard deviation 1. Nothing happens in eval mode, nor for a frozen weight.
    Under torch.compile the graph breaks at the first layer.

    Source: Petersen, Borgelt, Ermon, TrAct, NeurIPS 2024 (arXiv 2410.23970).

    Args:
        lam: damping; 0.1 (default), 0.05 for short and 0.2 for long runs in the paper. Or a function of progress in
            [0, 1].
        layers: "auto" follows the input of the model to the layers that mix it first, or their names.
        when: "backward" takes C and gradient of each backward pass, as the paper's code does. "step" makes the
            micro-batches of gradient accumulation count as one batch: .grad is right after each of them.
        sync: take C over all processes of torch.distributed, so that the update does not depend on their number.
            All of them must then make the same number of training passes.

    Raises:
        ValueError: lam is no number greater than 0, no layers, or an unknown `when`.
        AttachError: on attaching: no first layer, an unknown name, a weight that is frozen, shared or derived, or a
            layer that is under `tract`.
    """

    slot = "first-layer-gradient"
    binds = "backbone"

    def __init__(
        self,
        lam: float | Callable[[float], float] = 0.1,
        layers: Literal["auto"] | Sequence[str] = "auto",
        when: Literal["backward", "step"] = "backward",
        sync: bool = True,
    ) -> None:
        if not callable(lam):
            _check_lam(lam)
        if when not in ("backward", "step"):
            raise ValueError(f'when must be "backward" or "step", not {when!r}')
        if isinstance(layers, str) and layers != "auto":
            layers = (layers,)
        if not layers or not all(isinstance(name, str) for name in layers):
            raise ValueError(f'layers must be "auto" or the names of one layer or more, got {layers!r}')
        self.lam, self.layers, self.when, self.sync = lam, layers, when, sync
        self._first: list[FirstLayer] = []

    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterable[Handle]:
        names = _found(model) if isinstance(self.layers, str) else list(dict.fromkeys(self.layers))
        modules = dict(model.named_modules())
        for name in names:
            _check(model, name, modules.get(name))
        self._progress = progress
        self._first = [
            FirstLayer(modules[name], name, self._lam_now, self.when == "step", self.sync) for name in names
        ]
        for first in self._first:
            yield from first.hooks()
            yield first

    def update(self) -> None:
        step = self._progress.step
        for first in self._first:
            if step == 1 or step % LOOK == 0:
                first.report()
            if step % LOOK == 0:
                first.report_silence()

    def __repr__(self) -> str:
        where = ", ".join(first.name for first in self._first) or self.layers
        return f"TrAct(lam={self.lam}, layers={where!r}, when={self.when!r})"

    def _lam_now(self) -> float:
        if not callable(self.lam):
            return self.lam
        lam = self.lam(self._progress.fraction)
        _check_lam(lam, f" at {self._progress}")
        return lam


def _check_lam(lam: float, when: str = "") -> None:
    if not isinstance(lam, Real) or not 0 < lam < math.inf:
        raise ValueError(f"lam must be a number greater than 0, got {lam!r}{when}")


def tract(layer: nn.Module, lam: float = 0.1, sync: bool = True) -> nn.Module:
    """Make one layer a TrAct layer, in place, without `attach`: ``model.conv1 = tract(model.conv1)``.

    Only its hooks change. `remove_tract` takes them off; deep copies do not have them. Source: see `TrAct`.

    Args:
        layer: the first one of a model: Linear, or Conv1d to Conv3d.
        lam: a number greater than 0, see `TrAct`.
        sync: see `TrAct`.

    Returns:
        The same layer.

    Raises:
        ValueError: lam is no number greater than 0, a frozen weight, or a TrAct layer already.
        TypeError: another kind of layer.
    """
    _check_lam(lam)
    if reason := reason_against(layer):
        raise TypeError(f"no TrAct layer: {reason}")
    if not weight_of(layer).requires_grad:
        raise ValueError("the layer's weight is frozen: there is nothing to train")
    if _has_tract(layer):
        raise ValueError("this is a TrAct layer already: remove_tract, or the TrAct that is attached, first")
    for handle in FirstLayer(layer, type(layer).__name__, lambda: lam, False, sync).hooks():
        watch(handle, layer, Switch(), tract.__name__)
    return layer


def remove_tract(layer: nn.Module) -> nn.Module:
    """Undo `tract`, in place.

    Raises:
        ValueError: it is no TrAct layer.
    """
    hooks = list(_tract_hooks(layer))
    if not hooks:
        raise ValueError("this is no TrAct layer")
    for of_kind, key in hooks:
        del of_kind[key]
        layer._forward_hooks_with_kwargs.pop(key, None)  # keys are unique over all hooks
    return layer


def _has_tract(layer: nn.Module) -> bool:
    """By `tract` or attached, to this model or to another that it is part of: twice would be another method."""
    hooks = (weight_of(layer)._backward_hooks or {}).values()
    return any(isinstance(getattr(getattr(h, "function", None), "__self__", None), FirstLayer) for h in hooks)


def _tract_hooks(layer: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
    of_weight: dict[int, Any] = weight_of(layer)._backward_hooks or {}
    for of_kind in (layer._forward_hooks, of_weight):
        for key, hook in list(of_kind.items()):
            if isinstance(hook, Hook) and hook.owner == tract.__name__:
                yield of_kind, key


def _found(model: nn.Module) -> list[str]:
    """The first layers of a model of images, by following an image through it."""
    from leaven.backbones import first_layers
    from leaven.backbones.probe import UNSUITABLE, candidate_images, first_that_runs, reason_of

    def follow(image: Tensor) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return list(first_layers(model, image))

    try:
        _, found = first_that_runs(follow, candidate_images(model, None))
    # Of a model that takes keywords alone, more than images, or a dict.
    except (*UNSUITABLE, TypeError, IndexError, KeyError, AttributeError) as error:
        raise AttachError(
            f"TrAct cannot tell the first layer of {type(model).__name__}, which runs on no image that was tried "
            f'({reason_of(error)}): name it, as in TrAct(layers=["embed"])'
        ) from error
    names: list[str] = found
    if not names:
        raise AttachError(f"TrAct: no convolution or linear layer of {type(model).__name__} sees the input")
    return names


def _check(model: nn.Module, name: str, layer: nn.Module | None) -> None:
    """Raise AttachError where TrAct would not be exact."""
    of = f"{type(model).__name__}.{name}".rstrip(".")
    if layer is None:
        raise AttachError(f"TrAct: {type(model).__name__} has no layer {name!r}")
    if reason := reason_against(layer):
        raise AttachError(f"TrAct cannot train {of}: {reason}")
    weight = weight_of(layer)
    if not weight.requires_grad:
        raise AttachError(
            f"TrAct has nothing to train: the weight of {of} is frozen; unfreeze it, then attach"
        )
    if _has_tract(layer):
        raise AttachError(f"TrAct trains {of} already: remove_tract, or the TrAct that is attached, first")
    owners = [each for each, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(owners) > 1:
        raise AttachError(f"TrAct cannot train {of}: its weight is shared ({', '.join(owners)})")
