"""A convolution on mask cells with a border of their neighbours, in place of the whole dense map.

Each visible cell of side r is gathered with the p positions around it (zeros where those are hidden or beyond the
image) and convolved without padding: the outputs are the visible positions and nothing else. The input's gradient is a
convolution of the same kind, because visible positions are inputs and outputs alike: nothing is added up by index.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leaven.pretext.spark.geometry import Geometry

Pair = tuple[int, int]


def halo_pays(geo: Geometry, r: int, halo: Pair, depthwise: bool) -> bool:
    """Whether the gathered windows are small enough beside the dense map, by what benchmarks/spark_conv.py measured."""
    windows = geo.keep * (r + 2 * halo[0]) * (r + 2 * halo[1])
    return windows < (2.0 if depthwise else 1.5) * geo.grid[0] * geo.grid[1] * r * r


def halo_conv2d(
    values: Tensor, geo: Geometry, r: int, weight: Tensor, bias: Tensor | None, dilation: Pair, groups: int
) -> Tensor:
    """Convolution with stride 1 and the padding that keeps the size, at visible positions.

    Args:
        values: (B, T, C), visible positions of cells of side ``r``.
        geo: where they are.
        r: side of a cell.
        weight: (C', C / groups, kh, kw), kh and kw odd.
        bias: (C',) or None.
        dilation: of height and width.
        groups: as for ``F.conv2d``.

    Returns:
        (B, T, C').
    """
    device = values.device.type
    if torch.is_autocast_enabled(device):
        values, weight = (t.to(torch.get_autocast_dtype(device)) for t in (values, weight))
    kh, kw = weight.shape[2:]
    halo = (dilation[0] * (kh - 1) // 2, dilation[1] * (kw - 1) // 2)
    out = _HaloConv.apply(
        values.flatten(0, 1),
        weight,
        geo.windows(r, halo),
        (r + 2 * halo[0], r + 2 * halo[1]),
        dilation,
        groups,
    )
    out = out.view(*values.shape[:2], -1)
    return out if bias is None else out + bias.to(out.dtype)  # type: ignore[no-any-return]


class _HaloConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, rows: Tensor, side: Pair, dilation: Pair, groups: int
    ) -> Tensor:
        ctx.save_for_backward(values, weight, rows)
        ctx.side, ctx.dilation, ctx.groups = side, dilation, groups
        return _valid(_windows(values, rows, side), weight, dilation, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, rows = ctx.saved_tensors
        side, dilation, groups = ctx.side, ctx.dilation, ctx.groups
        into_values, into_weight = None, None
        if ctx.needs_input_grad[0]:
            turned = weight.flip(2, 3).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
            into_values = _valid(_windows(grad, rows, side), turned, dilation, groups)
        if ctx.needs_input_grad[1]:
            # The windows are gathered anew: saving them would cost more memory than the dense map did.
            windows = _windows(values, rows, side)
            height, width = (
                s - d * (k - 1) for s, d, k in zip(side, dilation, weight.shape[2:], strict=True)
            )
            maps = grad.view(-1, height, width, grad.shape[1]).permute(0, 3, 1, 2)
            into_weight = torch.ops.aten.convolution_backward(
                maps,
                windows,
                weight,
                None,
                [1, 1],
                [0, 0],
                dilation,
                False,
                [0, 0],
                groups,
                [False, True, False],
            )[1]
        return into_values, into_weight, None, None, None, None


def _windows(values: Tensor, rows: Tensor, side: Pair) -> Tensor:
    """(N, C) values to (cells, C, *side), channels last in memory; row N of ``rows`` means zero."""
    padded = torch.cat([values, values.new_zeros(1, values.shape[1])])
    return padded.index_select(0, rows).view(-1, *side, values.shape[1]).permute(0, 3, 1, 2)


def _valid(windows: Tensor, weight: Tensor, dilation: Pair, groups: int) -> Tensor:
    """Convolution without padding, its positions as rows (N, C')."""
    out = F.conv2d(windows, weight, dilation=dilation, groups=groups)
    return out.permute(0, 2, 3, 1).reshape(math.prod(out.shape) // out.shape[1], out.shape[1])
