"""Rules for convolutions, pools, normalisation and reductions: where hidden positions would otherwise take part."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leaven.pretext.spark.halo import halo_conv2d, halo_pays
from leaven.pretext.spark.shape_rules import cells
from leaven.pretext.spark.sparse_map import SparseMap, refuse, rule
from leaven.pretext.spark.spconv_rule import spconv_conv2d

_T = torch.Tensor


def _pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, (tuple, list)):
        return (value[0], value[-1])
    return (value, value)


@rule(F.pad, torch._C._nn.pad)
def pad(func: Any, x: SparseMap, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    """Constant padding of height and width is deferred to the next convolution or pool; of channels it is done."""
    sides = {tag: tuple(pad[2 * i : 2 * i + 2]) for i, tag in enumerate(reversed(x.tags)) if 2 * i < len(pad)}
    space = (*sides.get("w", (0, 0)), *sides.get("h", (0, 0)))
    if mode != "constant" or min(pad) < 0 or any(sides.get("b", ())) or any(sides.get("t", ())):
        refuse(func, f"padding {tuple(pad)} in mode {mode}")
    if any(sides.get("c", ())):
        if x.tags.count("c") != 1 or any(space):
            refuse(func, f"padding {tuple(pad)} of channels together with space")
        return x.like(F.pad(x.plain(func), sides["c"], value=value or 0.0))
    if not any(space):
        return x
    x.plain(func)  # a second padding is refused
    return SparseMap(x.values, x.geo, x.r, x.tags, pad=(*space, float(value or 0.0)))


def _dense(func: Any, x: SparseMap, fill: float) -> Tensor:
    """The map as an operation over windows sees it: hidden positions look like its padding, as beyond the border."""
    if x.tags != "bchw":
        refuse(func, f"on a {x.tags} map")
    if x.pad is None:
        return x.geo.scatter(x.values, x.r, fill)
    dense = x.geo.scatter(x.values, x.r, x.pad[4])
    return F.pad(dense, x.pad[:4], value=x.pad[4])


def _packed(func: Any, x: SparseMap, dense: Tensor, stride: Any) -> SparseMap:
    """The visible positions of a result; its sides must be the input's divided by the stride, exactly."""
    s, s_w = _pair(stride)
    height, width = (g * x.r for g in x.geo.grid)
    if s != s_w or x.r % s or tuple(dense.shape[2:]) != (height // s, width // s):
        refuse(
            func,
            f"output {dense.shape[2]}x{dense.shape[3]} is not input {height}x{width} divided by stride {s}, "
            f"inside mask cells of side {x.r}",
        )
    return SparseMap(x.geo.gather(dense, x.r // s), x.geo, x.r // s)


def _same_padding(kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    return (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)


def _keeps_size(x: SparseMap, kernel: Any, stride: Any, padding: Any, dilation: Any) -> bool:
    """Whether inputs and outputs of a convolution are the same positions, its kernel centred on each."""
    centred = x.tags == "bchw" and x.pad is None and stride == (1, 1) and kernel[0] % 2 == kernel[1] % 2 == 1
    return centred and (padding == "same" or _pair(padding) == _same_padding(kernel, dilation))


@rule(F.conv2d, torch.conv2d)
def conv2d(
    func: Any,
    input: SparseMap,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """Pointwise and patchifying kernels run on the values alone, others on cells with a halo or the scattered map."""
    x = input
    (kh, kw), (s, s_w) = weight.shape[2:], _pair(stride)
    inside = (
        x.tags == "bchw" and x.pad is None and padding in (0, (0, 0), "valid") and s == s_w and x.r % s == 0
    )
    if inside and kh == kw == 1:
        values = x.values if s == 1 else cells(x.values, x.r, s)[:, :, :, 0, :, 0].flatten(1, 3)
        if groups == 1:
            values = F.linear(values, weight.flatten(1), bias)
        else:
            tokens = values.flatten(0, 1)[:, :, None, None]
            values = F.conv2d(tokens, weight, bias, groups=groups).view(*values.shape[:2], -1)
        return SparseMap(values, x.geo, x.r // s)
    if inside and kh == kw == s and groups == 1 and _pair(dilation) == (1, 1):
        patches = cells(x.values, x.r, s).transpose(3, 4).flatten(4).flatten(1, 3)
        values = F.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), bias)
        return SparseMap(values, x.geo, x.r // s)
    if _keeps_size(x, (kh, kw), (s, s_w), padding, _pair(dilation)):
        # On GPUs the halo was never measured: there the dense map, which is one kernel.
        halo = _same_padding((kh, kw), _pair(dilation))
        if not x.is_cuda and halo_pays(x.geo, x.r, halo, depthwise=groups == x.shape[1]):
            return x.like(halo_conv2d(x.values, x.geo, x.r, weight, bias, _pair(dilation), groups))
        if x.geo.spconv and groups == 1:
            return x.like(spconv_conv2d(x.values, x.geo, x.r, weight, bias, _pair(dilation)))
    return _packed(
        func, x, F.conv2d(_dense(func, x, 0.0), weight, bias, stride, padding, dilation, groups), stride
    )


@rule(F.max_pool2d, torch.max_pool2d)
def max_pool2d(
    func: Any,
    input: SparseMap,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Over visible positions: hidden ones are the lowest number there is.

    Not -inf, which PyTorch's own padding is: of a window that is hidden altogether, inductor would then name a place
    in the padding as its maximum, and find that place out of bounds in the backward pass.
    """
    if return_indices or (input.pad is not None and padding not in (0, (0, 0))):
        refuse(func, "with indices, or with a padding of its own after another")
    stride = kernel_size if stride in (None, []) else stride
    dense = F.max_pool2d(
        _dense(func, input, torch.finfo(input.dtype).min), kernel_size, stride, padding, dilation, ceil_mode
    )
    return _packed(func, input, dense, stride)


@rule(F.avg_pool2d, torch._C._nn.avg_pool2d)
def avg_pool2d(
    func: Any,
    input: SparseMap,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Hidden positions count exactly as padding would: in the divisor if ``count_include_pad``, else not."""
    x = input
    stride = kernel_size if stride in (None, []) else stride
    if _pair(kernel_size) == tuple(x.shape[2:]) and padding in (0, (0, 0)):
        return adaptive_avg_pool2d(F.adaptive_avg_pool2d, x, 1)
    settings = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    dense = F.avg_pool2d(_dense(func, x, 0.0), *settings)
    if not count_include_pad and divisor_override is None and x.pad is None:
        ones = x.values.new_ones(*x.values.shape[:2], 1)
        dense = dense / F.avg_pool2d(x.geo.scatter(ones, x.r), *settings).clamp_min(1e-12)
    return _packed(func, x, dense, stride)


@rule(F.adaptive_avg_pool2d, torch._C._nn.adaptive_avg_pool2d)
def adaptive_avg_pool2d(func: Any, input: SparseMap, output_size: Any) -> Any:
    """To 1x1: the mean over visible positions, an ordinary tensor."""
    if _pair(output_size) != (1, 1) or input.tags != "bchw":
        refuse(func, f"to {output_size}: only 1x1 is a mean over visible positions")
    return input.plain(func).mean(1)[:, :, None, None]


@rule(F.adaptive_max_pool2d)
def adaptive_max_pool2d(func: Any, input: SparseMap, output_size: Any, return_indices: bool = False) -> Any:
    """To 1x1: the maximum over visible positions, an ordinary tensor."""
    if _pair(output_size) != (1, 1) or return_indices or input.tags != "bchw":
        refuse(func, f"to {output_size}: only 1x1 is a maximum over visible positions")
    return input.plain(func).amax(1)[:, :, None, None]


@rule(F.batch_norm, torch.batch_norm)
def batch_norm(func: Any, input: SparseMap, *args: Any, **kwargs: Any) -> Any:
    """On (N, C) values: statistics over visible positions, and their count in the unbiased running variance."""
    if input.tags[1] != "c" or input.tags.count("c") != 1:
        refuse(func, f"on a {input.tags} map")
    values = input.plain(func)
    return input.like(func(values.flatten(0, 1), *args, **kwargs).view_as(values))


@rule(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
def layer_norm(func: Any, input: SparseMap, normalized_shape: Any, *args: Any, **kwargs: Any) -> Any:
    """Over trailing channel dimensions, position by position."""
    if set(input.tags[-len(normalized_shape) :]) != {"c"}:
        refuse(func, f"over {tuple(normalized_shape)} of a {input.tags} map, which is not channels alone")
    return input.like(func(input.plain(func), normalized_shape, *args, **kwargs))


@rule(F.linear, torch._C._nn.linear)
def linear(func: Any, input: SparseMap, *args: Any, **kwargs: Any) -> Any:
    """Over the last dimension, which must be channels."""
    if input.tags[-1] != "c":
        refuse(func, f"over the last dimension of a {input.tags} map, which is not channels")
    return input.like(func(input.plain(func), *args, **kwargs))


@rule(F.group_norm)
def group_norm(func: Any, input: SparseMap, num_groups: int, *args: Any, **kwargs: Any) -> Any:
    """Moments over the visible positions of an image and a group's channels."""
    if input.tags[1] != "c" or input.tags.count("c") != 1:
        refuse(func, f"on a {input.tags} map")
    values = func(input.plain(func).transpose(1, 2), num_groups, *args, **kwargs)
    return input.like(values.transpose(1, 2))


@rule(F.softmax, torch.softmax, _T.softmax, F.log_softmax)
def softmax(func: Any, input: SparseMap, dim: int, *args: Any, **kwargs: Any) -> Any:
    """Over channels."""
    if input.tags[dim] != "c":
        refuse(func, "over positions or images")
    return input.like(func(input.plain(func), input.channel_dim(dim), *args, **kwargs))


@rule(
    *(getattr(place, name) for name in ("mean", "sum", "var", "std", "amax", "amin") for place in (torch, _T))
)
def reduce(func: Any, input: SparseMap, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Over all space (an ordinary tensor comes out), over channels (a map), or both; never over part of space."""
    x, keepdim = input, kwargs.pop("keepdim", None)
    if keepdim is None:
        args, keepdim = ((), args[0]) if args and func.__name__ not in ("var", "std") else (args, False)
    if args or dim is None or isinstance(dim, bool):
        refuse(func, "without dimensions, or with further positional arguments")
    dims = sorted(d % x.ndim for d in ([dim] if isinstance(dim, int) else dim))
    space = {d for d, tag in enumerate(x.tags) if tag in "hwt"}
    if 0 in dims or (space & set(dims) and not space <= set(dims)):
        refuse(func, f"over dimensions {dims} of a {x.tags} map: over images, or over part of space")
    over_space = space <= set(dims)
    inner = [1] * over_space + [x.channel_dim(d) for d in dims if x.tags[d] == "c"]
    values = func(x.plain(func), dim=inner, keepdim=True, **kwargs)
    if over_space:  # (B, 1, *channels with 1 where reduced) to the outer order
        channels = iter(values.shape[2:])
        sizes = [next(channels) if tag == "c" else 1 for tag in x.tags[1:]]
        shape = [size for d, size in enumerate(sizes, 1) if keepdim or d not in dims]
        return values.reshape(values.shape[0], *shape)
    if keepdim:
        return x.like(values)
    for d in reversed(inner):
        values = values.squeeze(d)
    return x.like(values, "".join(tag for d, tag in enumerate(x.tags) if d not in dims))


@rule(torch.norm, _T.norm, torch.linalg.vector_norm)
def norm(
    func: Any, input: SparseMap, p: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Any:
    """The vector p-norm over all space or over channels, as ``reduce``."""
    p = kwargs.pop("ord", p)
    if kwargs or p in ("fro", "nuc") or dim is None:
        refuse(func, f"with p={p}, dim={dim}, {sorted(kwargs)}")
    return reduce(_vector_norm(p), input, dim, keepdim=keepdim)


def _vector_norm(p: float) -> Any:
    def vector_norm(values: Tensor, dim: list[int], keepdim: bool) -> Tensor:
        return torch.linalg.vector_norm(values, p, dim, keepdim)  # type: ignore[no-any-return]

    return vector_norm
