"""Find the layers that consume the raw input, by following the input and not by module order."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from leaven.backbones.probe import untouched

# fmt: off
# Functions whose result still is the input: moved, cut, copied, resampled, cast, shifted or normalised.
# Names are without underscores: `add` stands for torch.add, Tensor.add_ and Tensor.__add__.
_KEEPS = {
    "cat", "chunk", "clone", "concat", "concatenate", "contiguous", "copy", "detach", "expand",
    "expand_as", "flatten", "flip", "gather", "get", "getitem", "hstack", "index_select", "movedim",
    "moveaxis", "narrow", "pad", "permute", "pixel_shuffle", "pixel_unshuffle", "ravel", "repeat",
    "reshape", "roll", "rot90", "select", "setitem", "split", "split_with_sizes", "squeeze", "stack",
    "swapaxes", "swapdims", "tensor_split", "tile", "transpose", "unbind", "unflatten", "unfold",
    "unsqueeze", "view", "view_as", "vstack", "adaptive_avg_pool2d", "avg_pool2d", "grid_sample",
    "interpolate", "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda",
    "batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm", "dropout", "add", "radd",
    "iadd", "sub", "rsub", "isub", "subtract", "neg", "clamp", "clip", "nan_to_num",
}
# Linear in one operand only: the product of the input with itself is no longer the input.
_SCALES = {
    "mul", "rmul", "imul", "multiply", "div", "truediv", "itruediv", "divide", "true_divide",
}
# Mix the input with weights.
_MIXES = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear",
    "bilinear", "matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot",
}
# fmt: on


def first_layers(model: nn.Module, example: Tensor) -> list[str]:
    """Names of the parameterised layers that consume the input of `model`, in the order in which they run.

    The input is followed through padding, slicing, reshaping, patches, resampling, casts and normalisation,
    up to the convolutions and linear layers that mix it; several layers may share it (parallel branches).
    The model is left untouched; `example` (B, C, H, W) is run once, in eval mode.

    Args:
        model: any module.
        example: a batch that the model accepts.

    Returns:
        Module paths; ``""`` where the weight belongs to `model` itself. Empty if nothing consumes the input.
    """
    found = _FollowInput(model, example)
    handles = []
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(found.enter))
            handles.append(module.register_forward_hook(found.leave, always_call=True))
        with untouched(model), torch.enable_grad(), found:
            for parameter in frozen:  # so that weights derived from parameters can be told from constants
                parameter.requires_grad_(True)
            model(example)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for handle in handles:
            handle.remove()
    return found.names


class _FollowInput(TorchFunctionMode):
    """Remembers which tensors still are the input, and which layers mix them with weights."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.names: list[str] = []
        self._input = {id(example): example}  # the tensors are kept, so that no id is used twice
        self._module_names = {module: name for name, module in model.named_modules()}
        self._owners = {
            p: module for module in model.modules() for p in module._parameters.values() if p is not None
        }
        self._running: list[nn.Module] = []

    def enter(self, module: nn.Module, _args: Any) -> None:
        self._running.append(module)

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._running.pop()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        inputs = [x for x in given if id(x) in self._input]
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        follows = bool(inputs) and self._follows(name, len(inputs), given)
        if name == "setitem" and follows:
            self._input[id(args[0])] = args[0]
        for x in _tensors(result):
            if follows:
                self._input[id(x)] = x
            else:  # an in-place operation may return a tensor that was the input before
                self._input.pop(id(x), None)
        return result

    def _follows(self, name: str, inputs: int, given: list[Tensor]) -> bool:
        if name in _KEEPS or (name in _SCALES and inputs == 1):
            return True
        layer = next(
            (self._owners[x] for x in given if isinstance(x, nn.Parameter) and x in self._owners), None
        )
        if layer is None and name in _MIXES:
            others = [x for x in given if id(x) not in self._input]
            if others and not any(x.requires_grad for x in others):
                return True  # a fixed filter, such as a blur
            if others:  # a weight derived from parameters (standardised, say) belongs to the running module
                layer = self._running[-1]
        if layer is not None:
            path = self._module_names[layer]
            if path not in self.names:
                self.names.append(path)
        return False


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for item in x:
            yield from _tensors(item)
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))
