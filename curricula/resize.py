"""Ways to make images smaller that a curriculum can choose from."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from leaven.curricula.fourier import Align, Size, fourier_crop, like, pair, sandwich

Op = Literal["fourier", "lanczos", "bicubic", "bilinear"]
OPS: tuple[str, ...] = get_args(Op)


def resize(x: Tensor, size: int | Size, op: Op = "fourier") -> Tensor:
    """Images (B, C, H, W) as smaller images (B, C, h, w), centre-aligned and antialiased, by any of the four.

    Args:
        x: floating-point images; computed in at least float32 and given back in their own type.
        size: side, or (h, w).
        op: "fourier" is EfficientTrain's (see `fourier_crop`); "lanczos" what EfficientTrain++'s code came to use.

    Raises:
        TypeError: integer images.
        ValueError: an unknown op, or a size larger than the image.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, not {op!r}")
    if op == "fourier":
        return fourier_crop(x, size)
    h, w = pair(size)
    height, width = x.shape[-2:]
    if not x.is_floating_point():
        raise TypeError(f"resize needs floating-point images, not {x.dtype}: normalise them first")
    if h > height or w > width:
        raise ValueError(f"cannot shrink images of {height}x{width} to {h}x{w}: the size must not be larger")
    if (h, w) == (height, width):
        return x
    if op == "lanczos":
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows, columns = (lanczos_matrix(*axis).to(x.device, dtype) for axis in ((h, height), (w, width)))
        return like(sandwich(rows, x, columns), x)
    with torch.autocast(x.device.type, enabled=False):
        full = x.to(torch.promote_types(x.dtype, torch.float32))
        return like(F.interpolate(full, (h, w), mode=op, align_corners=False, antialias=True), x)


def lanczos_matrix(size: int, full: int, lobes: int = 3) -> Tensor:
    """The matrix (size, full), float64, that shrinks one axis with the Lanczos kernel, widened against aliasing.

    Rows sum to one. Source: Duchon, Lanczos filtering in one and two dimensions (1979); as Pillow does it.
    """
    scale = full / size
    centers = (torch.arange(size, dtype=torch.float64).unsqueeze(1) + 0.5) * scale
    t = (torch.arange(full, dtype=torch.float64) + 0.5 - centers) / scale
    weights = torch.where(t.abs() < lobes, torch.sinc(t) * torch.sinc(t / lobes), 0.0)
    return weights / weights.sum(1, keepdim=True)


def rescale_boxes(boxes: Tensor, old: Size, new: Size, align: Align = "center") -> Tensor:
    """Boxes (..., 4) as x1, y1, x2, y2 in pixels of an image that was shrunk from `old` to `new` (H, W).

    Pixel i covers the interval from i to i + 1. With ``align="corner"`` (see `fourier_crop`) content moves by part of
    a pixel, and the boxes with it.

    Raises:
        ValueError: no four numbers for a box.
    """
    if boxes.shape[-1:] != (4,):
        raise ValueError(f"boxes are (..., 4) as x1, y1, x2, y2, not {tuple(boxes.shape)}")
    y, x = new[0] / old[0], new[1] / old[1]
    scale = boxes.new_tensor([x, y, x, y], dtype=torch.promote_types(boxes.dtype, torch.float32))
    return boxes * scale if align == "center" else (boxes - 0.5) * scale + 0.5


def rescale_masks(masks: Tensor, new: Size) -> Tensor:
    """Masks or label maps (..., H, W) of any type as (..., h, w): each takes the value nearest to its centre."""
    rows, columns = (
        ((torch.arange(n, device=masks.device) + 0.5) * full / n).long()
        for n, full in zip(new, masks.shape[-2:], strict=True)
    )
    return masks[..., rows, :][..., columns]
