"""Rules for operations that act on every position alone, and for what combines maps with ordinary tensors."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leaven.pretext.spark.sparse_map import SparseMap, refuse, rule

# Names looked up on torch, torch.Tensor, torch.nn.functional and its C binding, each with its in-place form.
_UNARY = """
abs acos acosh asin asinh atan atanh ceil celu clamp clamp_max clamp_min clip clone contiguous cos cosh detach
dropout elu erf erfc exp exp2 expm1 float double half bfloat16 floor frac gelu hardshrink hardsigmoid hardswish
hardtanh leaky_relu log log10 log1p log2 log_sigmoid logsigmoid logit mish nan_to_num neg negative ones_like
positive reciprocal relu relu6 round rrelu rsqrt selu sigmoid sign silu sin sinc sinh softplus softshrink softsign
sqrt square tan tanh tanhshrink threshold to trunc type type_as zeros_like requires_grad_
"""
_BINARY = """
add sub subtract rsub mul multiply div divide true_divide pow maximum minimum fmod remainder atan2 addcmul addcdiv lerp
where prelu eq ne lt le gt ge logical_and logical_or logical_not copysign
"""
_OPERATORS = """
add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv pow rpow ipow neg abs pos eq ne lt le gt ge
"""


def _functions(names: str) -> set[Any]:
    places = (torch, torch.Tensor, F, torch._C._nn, torch.special)
    found = set()
    for name in names.split():
        for variant in (name, f"{name}_"):
            found |= {getattr(place, variant) for place in places if callable(getattr(place, variant, None))}
    return found


def aligned(func: Any, like: SparseMap, operand: Any) -> Any:
    """An operand of a pointwise operation in the shape of ``like.values``.

    An ordinary tensor must not vary over space: its height and width are 1, or expanded from 1 (stride 0).
    """
    if isinstance(operand, SparseMap):
        if operand.geo is not like.geo or operand.r != like.r or operand.tags != like.tags:
            refuse(func, f"it combines {operand!r} with {like!r}")
        return operand.plain(func)
    if not isinstance(operand, Tensor) or operand.ndim == 0:
        return operand
    if operand.ndim > len(like.tags):
        refuse(func, f"it combines a map with a tensor of more dimensions, {tuple(operand.shape)}")
    tags = like.tags
    operand = operand[(None,) * (len(tags) - operand.ndim)]
    for dim, tag in enumerate(tags):
        if tag in "hwt" and operand.shape[dim] != 1:
            if operand.stride(dim) != 0:
                refuse(func, f"a tensor {tuple(operand.shape)} varies over space")
            operand = operand.narrow(dim, 0, 1)
    channels = [dim for dim, tag in enumerate(tags) if tag == "c"]
    space = [dim for dim, tag in enumerate(tags) if tag in "hwt"]
    operand = operand.permute(0, *space, *channels)
    return operand.reshape(operand.shape[0], 1, *operand.shape[1 + len(space) :])


@rule(*_functions(_UNARY), torch.Tensor.masked_fill, torch.Tensor.masked_fill_)
def unary(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """One map; further arguments are settings."""
    if not isinstance(x, SparseMap):  # tensor.type_as(map)
        if func is torch.Tensor.type_as:
            return x.type_as(args[0].values)
        refuse(func, "its first argument is not the map")
    if kwargs.get("memory_format") is not None:  # layout of the dense map: nothing to do for packed values
        kwargs["memory_format"] = torch.preserve_format
        if func is torch.Tensor.contiguous:
            kwargs = {}
    args = tuple(aligned(func, x, a) if isinstance(a, (SparseMap, Tensor)) else a for a in args)
    return x.like(func(x.plain(func), *args, **kwargs))


@rule(*_functions(_BINARY))
def binary(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Maps and ordinary tensors, broadcast as the dense operation would."""
    if kwargs.get("out") is not None:
        refuse(func, "out= is not supported")
    like = next(a for a in (*args, *kwargs.values()) if isinstance(a, SparseMap))
    if func in _PRELU:  # its weight is per channel, dimension 1, not the last
        weight = args[1].reshape([-1 if dim == 1 else 1 for dim in range(like.dim())])
        values = like.plain(func)
        return like.like(torch.where(values > 0, values, aligned(func, like, weight) * values))
    values = func(
        *(aligned(func, like, a) for a in args), **{k: aligned(func, like, v) for k, v in kwargs.items()}
    )
    owner = args[0] if isinstance(args[0], SparseMap) else like
    return owner.like(values)


_PRELU = _functions("prelu")


def _operator(name: str) -> Any:
    function = getattr(torch.Tensor, f"__{name}__")

    def method(self: SparseMap, *args: Any) -> Any:
        return binary(function, self, *args)

    return function, method


for _name in _OPERATORS.split():
    _function, _forward = _operator(_name)
    rule(_function)(binary)
    setattr(SparseMap, f"__{_name}__", _forward)


def _refused(name: str) -> Any:
    def method(self: SparseMap, *_: Any) -> Any:
        refuse(f"Tensor.{name}", "it has no exact rule for hidden positions")

    return method


for _name in ("__matmul__", "__rmatmul__", "__imatmul__", "__setitem__", "__bool__", "__iter__"):
    setattr(SparseMap, _name, _refused(_name))


@rule(torch.Tensor.new_empty, torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_full)
def new(func: Any, x: SparseMap, *args: Any, **kwargs: Any) -> Any:
    """An ordinary tensor of the map's type (drop path draws its noise so)."""
    return func(x.values, *args, **kwargs)


@rule(torch.Tensor.expand_as)
def expand_as(func: Any, x: Any, other: SparseMap) -> Any:
    """A gate expanded to a map's size: returned unexpanded, the product that follows broadcasts it."""
    if isinstance(x, SparseMap):
        if x.shape != other.shape:
            refuse(func, f"from {tuple(x.shape)} to {tuple(other.shape)}")
        return x
    return x


@rule(torch.is_tensor, torch.is_floating_point)
def predicate(func: Any, x: SparseMap) -> bool:
    """Predicates of the values hold for the map."""
    return bool(func(x.values))
