"""The two views in which features are compared: as they are, and without each channel's mean over space."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["sum", "per_49"]


def remove_dc(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) without each channel's mean over positions.

    That is the discrete cosine transform with coefficient (0, 0) set to zero, transformed back, as the paper puts its
    frequency view; the mean is that coefficient. On a 1x1 map nothing is left. Source: see `spatial_view_loss`.
    """
    return x - x.mean((2, 3), keepdim=True)


def spatial_view_loss(student: Tensor, teacher: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Squared distance of two maps (B, C, H, W), each normalised along channels at every position: 2 - 2 cos.

    Source: Fan et al., ScaleKD, NeurIPS 2024 (arXiv 2411.06786), dual-view feature mimicking.

    Args:
        student, teacher: maps of one shape; computed in float32 at least.
        reduction: "sum" over positions, mean over images, as the authors' code has it, whose weights are for 7x7 maps.
            "per_49" takes the mean over positions times 49, which keeps those weights right on other grids.

    Raises:
        ValueError: other shapes, or another reduction.
    """
    if student.shape != teacher.shape or student.ndim != 4:
        raise ValueError(
            f"two maps (B, C, H, W) of one shape, not {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if reduction not in ("sum", "per_49"):
        raise ValueError(f'reduction must be "sum" or "per_49", not {reduction!r}')
    dtype = torch.promote_types(student.dtype, torch.float32)
    difference = F.normalize(student.to(dtype), dim=1) - F.normalize(teacher.to(dtype), dim=1)
    total = difference.square().sum() / len(student)
    return total if reduction == "sum" else total * 49 / student[0, 0].numel()


def frequency_view_loss(student: Tensor, teacher: Tensor, reduction: Reduction = "sum") -> Tensor:
    """`spatial_view_loss` of both maps after `remove_dc`: what varies over space, without the mean that dominates it.

    On a 1x1 grid the loss is 0, its gradients too. Source and errors: see `spatial_view_loss`.

    Args:
        student, teacher: maps (B, C, H, W) of one shape.
        reduction: see `spatial_view_loss`.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    return spatial_view_loss(remove_dc(student.to(dtype)), remove_dc(teacher.to(dtype)), reduction)
