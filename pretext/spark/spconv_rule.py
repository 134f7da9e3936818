"""The submanifold convolution on spconv's index pairs: ``backend="spconv"``.

spconv finds, per kernel offset, which visible position feeds which. What is done with the pairs is ours on the CPU,
where spconv's own convolution adds rows from several threads at once and is wrong with more than one
(tests/pretext/test_spark_spconv.py keeps an eye on it); on CUDA, in fp32 and fp16, it is spconv's kernel.
"""

from typing import Any

import torch
from torch import Tensor

from leaven.pretext.spark.geometry import Geometry

Pair = tuple[int, int]
Pairs = tuple[Tensor, Tensor]


def require_spconv() -> None:
    """Raise one line if spconv cannot be imported.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import spconv.pytorch  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"backend='spconv' cannot import spconv ({error}): pip install 'leaven[spconv]', or use 'packed'"
        ) from error


def index_pairs(geo: Geometry, r: int, kernel: Pair, dilation: Pair) -> Pairs:
    """spconv's pairs for a kernel over the visible positions of cells of side ``r``.

    Returns:
        Rows (2, kh * kw, N), int32: from (0) and to (1), -1 where there are no more; and their number per offset,
        (kh * kw,), on the CPU, of the offsets up to the centre, whose mirror images have as many.
    """
    from spconv.core import ConvAlgo
    from spconv.pytorch.ops import get_indice_pairs

    (gh, gw), rows = geo.grid, geo.rows(r)
    height, width = gh * r, gw * r
    # spconv reads any other layout or type as garbage, without a word.
    places = torch.stack([rows // (height * width), rows // width % height, rows % width], 1)
    zero, one = [0, 0], [1, 1]
    padding = [d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)]
    _, pairs, counts = get_indice_pairs(
        places.int().contiguous(),
        geo.batch,
        [height, width],
        ConvAlgo.Native,
        list(kernel),
        one,
        padding,
        list(dilation),
        zero,
        True,
    )
    return pairs, counts.cpu()


def spconv_conv2d(
    values: Tensor, geo: Geometry, r: int, weight: Tensor, bias: Tensor | None, dilation: Pair
) -> Tensor:
    """Ungrouped convolution with stride 1 and the padding that keeps the size, at visible positions.

    Args:
        values: (B, T, C), visible positions of cells of side ``r``.
        geo: where they are.
        r: side of a cell.
        weight: (C', C, kh, kw), kh and kw odd.
        bias: (C',) or None.
        dilation: of height and width.

    Returns:
        (B, T, C').
    """
    kernel = (weight.shape[2], weight.shape[3])
    key = (r, kernel, dilation)
    if key not in geo.pairs:
        geo.pairs[key] = torch.compiler.disable(index_pairs)(geo, r, kernel, dilation)
    pairs, counts = geo.pairs[key]
    device = values.device.type
    if torch.is_autocast_enabled(device):
        values, weight = (t.to(torch.get_autocast_dtype(device)) for t in (values, weight))
    rows = values.flatten(0, 1)
    if device == "cuda" and rows.dtype in (torch.float32, torch.float16):
        out = _spconvs_own(rows, weight, pairs, counts)
    else:
        out = _GatherMatmulScatter.apply(rows, weight, pairs, counts)
    out = out.view(*values.shape[:2], -1)
    return out if bias is None else out + bias.to(out.dtype)


def _spconvs_own(rows: Tensor, weight: Tensor, pairs: Tensor, counts: Tensor) -> Tensor:
    from spconv.core import ConvAlgo
    from spconv.pytorch.functional import indice_subm_conv

    filters = weight.permute(0, 2, 3, 1).contiguous()  # spconv's layout
    out: Tensor = indice_subm_conv(rows, filters, pairs, counts, len(rows), ConvAlgo.Native)
    return out


class _GatherMatmulScatter(torch.autograd.Function):
    """Per kernel offset: rows gathered, multiplied, added where they belong. No offset names a row twice."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, pairs: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(values, weight, pairs, counts)
        matrices = weight.flatten(2).permute(2, 1, 0)  # (offset, C, C')
        out = values @ matrices[len(matrices) // 2]
        for offset, source, target in _offsets(pairs, counts):
            out.index_add_(0, target, values.index_select(0, source) @ matrices[offset])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, pairs, counts = ctx.saved_tensors
        matrices = weight.flatten(2).permute(2, 0, 1)  # (offset, C', C)
        centre = len(matrices) // 2
        into_values = grad @ matrices[centre]
        into_weight = torch.zeros_like(matrices)
        into_weight[centre] = grad.T @ values
        for offset, source, target in _offsets(pairs, counts):
            gradient = grad.index_select(0, target)
            into_values.index_add_(0, source, gradient @ matrices[offset])
            into_weight[offset] = gradient.T @ values.index_select(0, source)
        return into_values, into_weight.permute(1, 2, 0).reshape(weight.shape), None, None


def _offsets(pairs: Tensor, counts: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """(offset, from, to) of every offset but the centre, where each position feeds itself."""
    last = pairs.shape[1] - 1
    numbers = [int(counts[min(k, last - k)]) for k in range(last + 1)]
    return [
        (k, pairs[0, k, :n].long(), pairs[1, k, :n].long())
        for k, n in enumerate(numbers)
        if n and k != last // 2
    ]
