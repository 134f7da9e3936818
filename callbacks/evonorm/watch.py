"""Run a network on an image, and note what becomes of the outputs of its BatchNorm layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Images (B, C, H, W), or the keyword arguments of a call.
Example = Tensor | Mapping[str, Any]
# What counts as the activation of a pair; gates (sigmoid, tanh) do not.
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardtanh, nn.Softplus,
)  # fmt: skip
_TIMMS = {
    "Swish",
    "HardSwish",
    "HardSwishMe",
    "HardMish",
    "HardMishMe",
    "Mish",
    "GELU",
    "GELUTanh",
    "QuickGELU",
    "PReLU",
}
# SyncBatchNorm is what DDP's users convert to; in eval mode it is the same layer.
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# The same activations, called as functions.
FUNCTIONS = {
    "relu", "relu_", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "celu", "selu", "gelu", "silu", "mish",
    "hardswish", "hardtanh", "softplus",
}  # fmt: skip


def watch_run(model: nn.Module, example: Example | None) -> Watch:
    """A run in eval mode that leaves no trace, as it was seen.

    Raises:
        ValueError: the model does not run on the example, or without one on any image that was tried.
    """
    from leaven.backbones.probe import UNSUITABLE, candidate_images, first_that_runs, reason_of, untouched

    def once(images: Any) -> Watch:
        watch = Watch(model)
        with (
            watch.hooked(),
            untouched(model),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            watch,
        ):
            model(**images) if isinstance(images, Mapping) else model(images)
        return watch

    try:
        images: Any = candidate_images(model, None) if example is None else iter([example])
        _, watch = first_that_runs(once, images)
    except (*UNSUITABLE, TypeError) as error:  # a TypeError: it takes keywords alone, or more than images
        raise ValueError(
            f"cannot see the layers of {type(model).__name__} at work, for it does not run ({reason_of(error)}): "
            "give an example, images or a dict of its keyword arguments"
        ) from error
    found: Watch = watch
    return found


@dataclass
class Call:
    """One output of a BatchNorm, and what became of it."""

    norm: nn.Module
    output: Tensor
    uses: list[tuple[str, nn.Module, nn.Module]] = field(default_factory=list)  # function, within, called by


class Watch(TorchFunctionMode):
    """Runs along and notes who uses the outputs of BatchNorm layers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: dict[nn.Module, list[Call]] = {}
        self.act_calls: Counter[nn.Module] = Counter()
        self.given: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._live: dict[int, Call] = {}
        self._running: list[nn.Module] = []

    def hooked(self) -> ExitStack:
        """Hooks on every module, until the stack is closed."""
        stack = ExitStack()
        for module in self.model.modules():
            stack.callback(module.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
        return stack

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append(module)
        if module not in self.given:  # `...` for tensors, which need not be kept
            without = [... if isinstance(x, Tensor) else x for x in (*args, *kwargs.values())]
            names = dict(zip(kwargs, without[len(args) :], strict=True))
            self.given[module] = tuple(without[: len(args)]), names
        if is_activation(module):
            self.act_calls[module] += 1

    def _leave(self, module: nn.Module, _args: Any, output: Any) -> None:
        self._running.pop()
        if isinstance(module, NORMS) and isinstance(output, Tensor):
            call = Call(module, output)  # keeps the tensor, so that no id is used twice
            self.calls.setdefault(module, []).append(call)
            self._live[id(output)] = call

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        results = [id(x) for x in _tensors(result)]
        if results:
            for x in _tensors((args, kwargs)):
                if call := self._live.get(id(x)):
                    caller = self._running[-2] if len(self._running) > 1 else self._running[-1]
                    call.uses.append((getattr(func, "__name__", str(func)), self._running[-1], caller))
                    if id(x) in results:  # in place: from here on it is the activation's output
                        del self._live[id(x)]
        return result


def is_activation(module: nn.Module) -> bool:
    """Whether a module is one of the activations of a pair; by name for timm's, whose import takes seconds."""
    timms = type(module).__module__.startswith("timm.layers.") and type(module).__name__ in _TIMMS
    return timms or isinstance(module, _ACTIVATIONS)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for item in x:
            yield from _tensors(item)
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))
