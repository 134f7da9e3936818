"""Rules for views, slices and concatenations: exact as long as no operation mixes positions with channels or images."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leaven.pretext.spark.sparse_map import SparseMap, refuse, rule

_T = torch.Tensor


def _ints(args: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else args


@rule(torch.permute, _T.permute)
def permute(func: Any, x: SparseMap, *dims: Any) -> Any:
    """Reorder outer dimensions; the images stay first."""
    order = [d % x.ndim for d in _ints(dims)]
    tags = "".join(x.tags[d] for d in order)
    if tags[0] != "b":
        refuse(func, "it moves the batch dimension")
    channels = [x.channel_dim(d) for d in order if x.tags[d] == "c"]
    values = x.plain(func)
    return x.like(values if channels == sorted(channels) else values.permute(0, 1, *channels), tags)


@rule(torch.transpose, _T.transpose, torch.swapaxes, _T.swapaxes)
def transpose(func: Any, x: SparseMap, dim0: int, dim1: int) -> Any:
    """Swap two outer dimensions."""
    order = list(range(x.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(func, x, order)


@rule(torch.movedim, _T.movedim)
def movedim(func: Any, x: SparseMap, source: int, destination: int) -> Any:
    """Move one outer dimension."""
    order = list(range(x.ndim))
    order.insert(destination % x.ndim, order.pop(source % x.ndim))
    return permute(func, x, order)


def factor(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Match two shapes of one volume into the smallest groups of equal product: (old dims, new dims) per group."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i], [j]
        if i == len(old) or (j < len(new) and new[j] == 1 and old[i] != 1):
            groups.append(([], right))  # a new dimension of size 1
            j += 1
            continue
        if j == len(new) or (old[i] == 1 and new[j] != 1):
            groups.append((left, []))
            i += 1
            continue
        i, j, a, b = i + 1, j + 1, old[i], new[j]
        while a != b:
            if a < b:
                a *= old[i]
                left.append(i)
                i += 1
            else:
                b *= new[j]
                right.append(j)
                j += 1
        groups.append((left, right))
    return groups


@rule(torch.reshape, _T.reshape, _T.view, _T.view_as, _T.reshape_as)
def view(func: Any, x: SparseMap, *shape: Any) -> Any:
    """Split or merge channels, flatten height and width to tokens and back; anything that mixes them is refused."""
    if shape and isinstance(shape[0], torch.dtype):
        refuse(func, "it reinterprets the bytes")
    if shape and isinstance(shape[0], (Tensor, SparseMap)):
        shape = (shape[0].shape,)
    old, new = tuple(x.shape), list(_ints(shape))
    if -1 in new:
        new[new.index(-1)] = prod(old) // -prod(new)
    if prod(new) != prod(old):
        refuse(func, f"from {old} to {tuple(new)}: the sizes do not fit")
    height, width = (g * x.r for g in x.geo.grid)
    tags, channels = "", []
    for left, right in factor(old, new):
        source, sizes = "".join(x.tags[d] for d in left), [new[d] for d in right]
        if set(source) <= {"c"}:  # channels to channels; a new dimension of size 1 counts as one
            tags += "c" * len(sizes)
            channels += sizes
        elif len(left) == len(right) == 1:
            tags += source
        elif (source, len(sizes)) == ("hw", 1):
            tags += "t"
        elif (source, sizes) == ("t", [height, width]):
            tags += "hw"
        else:
            refuse(func, f"from {old} to {tuple(new)} mixes positions, channels or images")
    return x.like(x.plain(func).reshape(*x.values.shape[:2], *channels), tags)


@rule(torch.flatten, _T.flatten)
def flatten(func: Any, x: SparseMap, start_dim: int = 0, end_dim: int = -1) -> Any:
    """As a view."""
    shape, start, end = list(x.shape), start_dim % x.ndim, end_dim % x.ndim
    return view(func, x, [*shape[:start], prod(shape[start : end + 1]), *shape[end + 1 :]])


@rule(torch.unflatten, _T.unflatten)
def unflatten(func: Any, x: SparseMap, dim: int, sizes: Sequence[int]) -> Any:
    """As a view."""
    shape, dim = list(x.shape), dim % x.ndim
    sizes = [s if s != -1 else shape[dim] // -prod(sizes) for s in sizes]
    return view(func, x, [*shape[:dim], *sizes, *shape[dim + 1 :]])


@rule(torch.unsqueeze, _T.unsqueeze)
def unsqueeze(func: Any, x: SparseMap, dim: int) -> Any:
    """A new channel dimension of size 1."""
    dim %= x.ndim + 1
    if dim == 0:
        refuse(func, "it adds a dimension before the batch")
    tags = x.tags[:dim] + "c" + x.tags[dim:]
    return x.like(x.plain(func).unsqueeze(2 + x.tags[:dim].count("c")), tags)


@rule(torch.squeeze, _T.squeeze)
def squeeze(func: Any, x: SparseMap, dim: int) -> Any:
    """Drop a channel dimension of size 1."""
    dim %= x.ndim
    if x.shape[dim] != 1:
        return x
    if x.tags[dim] != "c":
        refuse(func, "it drops a dimension of space")
    return x.like(x.plain(func).squeeze(x.channel_dim(dim)), x.tags[:dim] + x.tags[dim + 1 :])


def _channels_only(func: Any, x: SparseMap, dim: int) -> int:
    if x.tags[dim] != "c":
        refuse(func, f"along dimension {dim % x.ndim}, which is not channels")
    return x.channel_dim(dim)


@rule(torch.chunk, _T.chunk, torch.split, _T.split, torch.tensor_split, _T.tensor_split)
def split(func: Any, x: SparseMap, size: Any, dim: int = 0) -> Any:
    """Along channels."""
    return tuple(x.like(v) for v in func(x.plain(func), size, dim=_channels_only(func, x, dim)))


@rule(torch.narrow, _T.narrow)
def narrow(func: Any, x: SparseMap, dim: int, start: int, length: int) -> Any:
    """Along channels."""
    return x.like(x.plain(func).narrow(_channels_only(func, x, dim), start, length))


@rule(torch.unbind, _T.unbind)
def unbind(func: Any, x: SparseMap, dim: int = 0) -> Any:
    """Along channels."""
    parts = x.plain(func).unbind(_channels_only(func, x, dim))
    dim %= x.ndim
    return tuple(x.like(v, x.tags[:dim] + x.tags[dim + 1 :]) for v in parts)


def _same_geometry(func: Any, maps: Sequence[Any]) -> SparseMap:
    first = maps[0]
    for other in maps:
        if (
            not isinstance(other, SparseMap)
            or other.geo is not first.geo
            or (other.r, other.tags) != (first.r, first.tags)
        ):
            refuse(func, "it joins maps of different geometry")
    return first  # type: ignore[no-any-return]


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(func: Any, tensors: Sequence[Any], dim: int = 0, axis: int | None = None) -> Any:
    """Along channels."""
    first = _same_geometry(func, tensors)
    dim = _channels_only(func, first, dim if axis is None else axis)
    return first.like(torch.cat([x.plain(func) for x in tensors], dim), first.tags)


@rule(torch.stack)
def stack(func: Any, tensors: Sequence[Any], dim: int = 0) -> Any:
    """Along a new channel dimension."""
    return cat(torch.cat, [unsqueeze(func, x, dim) for x in tensors], dim)


@rule(_T.__getitem__)
def getitem(func: Any, x: SparseMap, index: Any) -> Any:
    """Channels by slice or number; space only as ``[..., i::s, j::s]`` with s dividing the cell (Focus stems)."""
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = index[:at] + (slice(None),) * (x.ndim - len(index) + 1) + index[at + 1 :]
    index += (slice(None),) * (x.ndim - len(index))
    if len(index) != x.ndim or any(not isinstance(i, (slice, int)) for i in index):
        refuse(func, f"index {index}")
    steps, channels, tags = {}, [], ""
    for tag, i, size in zip(x.tags, index, x.shape, strict=True):
        if tag == "c":
            channels.append(i)
        elif isinstance(i, slice) and tag in "hw" and (i.stop is None or i.stop >= size):
            steps[tag] = (i.start or 0, i.step or 1)
        elif not isinstance(i, slice) or i.indices(size) != (0, size, 1):
            refuse(func, f"index {index} selects positions or images")
        tags += "" if isinstance(i, int) else tag
    values, r = x.plain(func)[(slice(None), slice(None), *channels)], x.r
    (top, step), (left, step_w) = steps.get("h", (0, 1)), steps.get("w", (0, 1))
    if step != step_w or r % step or not (0 <= top < step and 0 <= left < step):
        refuse(func, f"index {index} is not a regular grid inside the mask cells")
    if step > 1:
        values = cells(values, r, step)[:, :, :, top, :, left].flatten(1, 3)
    return SparseMap(values, x.geo, r // step, tags)


setattr(SparseMap, "__getitem__", lambda self, index: getitem(_T.__getitem__, self, index))  # noqa: B010


def cells(values: Tensor, r: int, s: int) -> Tensor:
    """Packed values (B, T, *C) with every cell cut in s x s blocks: (B, keep, r/s, s, r/s, s, *C)."""
    blocks: Tensor = values.unflatten(1, (-1, r // s, s, r // s, s))
    return blocks


@rule(F.interpolate, F.upsample)
def interpolate(
    func: Any,
    x: SparseMap,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    *_: Any,
    **__: Any,
) -> Any:
    """Nearest, by a whole factor: stays inside the cells."""
    if size is not None:
        size = (size, size) if isinstance(size, int) else tuple(size)
        factors = [a / b for a, b in zip(size, x.shape[2:], strict=True)]
    else:
        factors = list(scale_factor) if isinstance(scale_factor, (tuple, list)) else [scale_factor] * 2
    if x.tags != "bchw" or mode != "nearest" or factors[0] != factors[1] or factors[0] % 1:
        refuse(
            func,
            f"mode {mode}, factors {factors}: only nearest by one whole factor stays inside the mask cells",
        )
    n = int(factors[0])
    values = cells(x.plain(func), x.r, 1)  # (B, keep, r, 1, r, 1, C)
    values = values.expand(-1, -1, -1, n, -1, n, -1).flatten(1, 5)
    return SparseMap(values, x.geo, x.r * n)


@rule(torch.pixel_unshuffle, F.pixel_unshuffle)
def pixel_unshuffle(func: Any, x: SparseMap, downscale_factor: int) -> Any:
    """Blocks of a cell into channels, (C, s, s) in that order as PyTorch does."""
    s = downscale_factor
    if x.tags != "bchw" or x.r % s:
        refuse(func, f"factor {s} does not divide the mask cell's side {x.r}")
    values = cells(x.plain(func), x.r, s).permute(0, 1, 2, 4, 6, 3, 5)
    return SparseMap(values.flatten(4).flatten(1, 3), x.geo, x.r // s)
