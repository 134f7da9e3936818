"""TrAct: train the first layer as if its pre-activations were trained (Petersen et al., NeurIPS 2024)."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from leaven.callbacks.callback import Callback, Handle, NoEffectWarning, Progress
from leaven.callbacks.hooks import Hook, Switch, watch
from leaven.callbacks.second_moment import patch_second_moment, reason_against, solved, tract_gradient
from leaven.callbacks.wrappers import AttachError

__all__ = ["TrAct", "remove_tract", "tract", "tract_gradient"]

# Updates between looks at whether a moment could not be used: on a GPU each look waits for it.
_LOOK = 50


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
        self._first: list[_FirstLayer] = []

    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterable[Handle]:
        names = _found(model) if isinstance(self.layers, str) else list(dict.fromkeys(self.layers))
        modules = dict(model.named_modules())
        for name in names:
            _check(model, name, modules.get(name))
        self._progress = progress
        self._first = [
            _FirstLayer(modules[name], name, self._lam_now, self.when == "step", self.sync) for name in names
        ]
        for first in self._first:
            yield from first.hooks()
            yield first

    def update(self) -> None:
        step = self._progress.step
        for first in self._first:
            if step == 1 or step % _LOOK == 0:
                first.report()
            if step % _LOOK == 0:
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
    if not _weight(layer).requires_grad:
        raise ValueError("the layer's weight is frozen: there is nothing to train")
    if _has_tract(layer):
        raise ValueError("this is a TrAct layer already: remove_tract, or the TrAct that is attached, first")
    for handle in _FirstLayer(layer, type(layer).__name__, lambda: lam, False, sync).hooks():
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
    hooks = (_weight(layer)._backward_hooks or {}).values()
    return any(
        isinstance(getattr(getattr(h, "function", None), "__self__", None), _FirstLayer) for h in hooks
    )


def _tract_hooks(layer: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
    of_weight: dict[int, Any] = _weight(layer)._backward_hooks or {}
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
    weight = _weight(layer)
    if not weight.requires_grad:
        raise AttachError(
            f"TrAct has nothing to train: the weight of {of} is frozen; unfreeze it, then attach"
        )
    if _has_tract(layer):
        raise AttachError(f"TrAct trains {of} already: remove_tract, or the TrAct that is attached, first")
    owners = [each for each, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(owners) > 1:
        raise AttachError(f"TrAct cannot train {of}: its weight is shared ({', '.join(owners)})")


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


class _Moment(NamedTuple):
    """The second moment of what the layer saw in one forward pass: the sum's numbers and the count, in a row."""

    key: object
    packed: Tensor
    work: Any  # that sums it over processes

    def arrived(self, device: torch.device) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.packed.to(device)


class _Sums(NamedTuple):
    """Over the micro-batches of an update."""

    counted: frozenset[object]  # keys of the moments in the sum
    packed: Tensor
    raw: Tensor | None  # gradient as it came
    given: Tensor | None  # what .grad was given for it


class _FirstLayer:
    """One layer under TrAct: the second moment that its coming gradient is to be multiplied with."""

    def __init__(
        self, layer: nn.Module, name: str, lam: Callable[[], float], whole_step: bool, sync: bool
    ) -> None:
        self.layer, self.name, self.lam = layer, name, lam
        self.weight = _weight(layer)
        self.whole_step, self.sync = whole_step, sync
        # Moments of forward passes that a backward pass has come back to, with the number of that backward pass.
        self.met: list[tuple[int, _Moment]] = []
        self.bad: Tensor | None = None  # whether a moment could not be used
        self.warned = False
        self.silent = True  # no gradient since the last look
        # Of the micro-batches of this update, and the same with the gradient that is on its way to .grad.
        self.sums: _Sums | None = None
        self.coming: _Sums | None = None
        self.left: tuple[int, int] | None = None  # .grad as the last backward pass left it

    def hooks(self) -> Iterator[Handle]:
        # Breaks a compiled graph, whose constants the sums would be otherwise. No decorator: it imports the compiler.
        after_forward = torch.compiler.disable(self.after_forward)
        yield self.layer.register_forward_hook(after_forward, with_kwargs=True)
        yield self.weight.register_hook(self.precondition)
        if self.whole_step:
            yield self.weight.register_post_accumulate_grad_hook(self.remember)

    def after_forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """The moment of this pass; it counts once a gradient of its output comes by."""
        if not (layer.training and output.requires_grad and self.weight.requires_grad):
            return
        # By the layer itself: DataParallel calls replicas, whose weights are no parameters.
        if self.layer.weight is not self.weight:
            self.warn(
                f"TrAct leaves gradients of {self.name} as they are: its weight is another than when it was attached"
            )
            return
        total, count = patch_second_moment(args[0] if args else kwargs["input"], self.layer)
        # The count travels with the sum.
        packed = torch.cat([total.flatten(), total.new_tensor([count])])
        work: Any = None
        if self.sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            work = dist.all_reduce(packed, async_op=True)  # awaited at the end of the backward pass
        moment = _Moment(object(), packed, work)
        output.register_hook(lambda _: self.met.append((torch._C._current_graph_task_id(), moment)))

    def precondition(self, gradient: Tensor) -> Tensor:
        this, self.silent = torch._C._current_graph_task_id(), False
        # Others are of backward passes that did not reach the weight, as for a gradient of the images.
        met = [moment for number, moment in self.met if number == this]
        self.met.clear()
        if not met:
            self.warn(
                f"TrAct leaves a gradient of {self.name} as it is: the forward pass was in eval mode, or went around "
                "the layer's hooks, as that of a model does that was compiled and called before it was attached, or "
                "the loss does not depend on what the layer puts out"
            )
            return gradient
        grad = self.weight.grad
        before = self.sums if grad is not None and self.left == _identity(grad) else None
        if not self.whole_step or before is None:
            before = _Sums(frozenset(), torch.zeros_like(met[0].packed, device=gradient.device), None, None)
        new = [moment for moment in met if moment.key not in before.counted]
        packed = before.packed + sum(moment.arrived(gradient.device) for moment in new)
        raw = gradient if before.raw is None else before.raw + gradient
        now = self.times_inverse(raw, packed)
        if self.whole_step:
            self.coming = _Sums(before.counted | {moment.key for moment in new}, packed, raw, now)
        return now if before.given is None else now - before.given

    def times_inverse(self, gradient: Tensor, packed: Tensor) -> Tensor:
        groups = getattr(self.layer, "groups", 1)
        n = gradient[0].numel()
        result, good = solved(gradient, (packed[:-1] / packed[-1]).view(groups, n, n), self.lam())
        self.bad = ~good if self.bad is None else self.bad | ~good
        return result

    def remember(self, weight: Tensor) -> None:
        """Whoever touches .grad from here on (zeroes, unscales, clips it) ends the update's accumulation."""
        assert weight.grad is not None
        if self.coming is not None:  # not of torch.autograd.grad, which leaves .grad alone
            self.sums, self.coming = self.coming, None
        self.left = _identity(weight.grad)

    def report(self) -> None:
        if self.bad is not None and bool(self.bad):
            self.warn(
                f"TrAct left gradients of {self.name} as they are: its inputs were not finite, or too large to solve "
                "with: give it normalised images"
            )

    def report_silence(self) -> None:
        if self.silent:
            self.warn(
                f"TrAct has seen no gradient of {self.name} in {_LOOK} updates: was the layer replaced or frozen?"
            )
        self.silent = True

    def remove(self) -> None:
        """The end of the training is the last time to say so."""
        self.report()

    def warn(self, line: str) -> None:
        if not self.warned:
            warnings.warn(line, NoEffectWarning, stacklevel=2)
        self.warned = True


def _identity(grad: Tensor) -> tuple[int, int]:
    return id(grad), grad._version
