"""Normalisation by the moments of visible positions, on dense maps: static shapes, no index."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def masked_batch_norm(norm: Any, x: Tensor, visible: Tensor) -> Tensor:
    """`norm` (BatchNorm2d or SyncBatchNorm) by batch moments of visible positions; updates its running buffers.

    With SyncBatchNorm in several processes, sum and count of all of them; processes may differ in their count.

    Args:
        norm: the module; its activation, if it has one, is not applied.
        x: (B, C, h, w).
        visible: bool (B, 1, h, w).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    zeroed = torch.where(visible, x, 0.0).to(wide)
    count = visible.sum(dtype=wide)
    total, count = _over_processes(norm, zeroed.sum((0, 2, 3)), count)
    mean = total / count
    centred = torch.where(visible, zeroed - mean.view(1, -1, 1, 1), 0.0)
    square, _ = _over_processes(norm, centred.square().sum((0, 2, 3)), count)
    variance = square / count
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            momentum = norm.momentum
            if momentum is None:  # cumulative average
                momentum = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
            unbiased = square / (count - 1).clamp(min=1)
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
    y = centred * (variance + norm.eps).rsqrt().view(1, -1, 1, 1)
    return _affine(norm, y).to(x.dtype)


def masked_group_norm(norm: nn.GroupNorm, x: Tensor, visible: Tensor) -> Tensor:
    """Group normalisation of (B, C, h, w) by moments over visible positions (B, 1, h, w) of each image and group."""
    grouped = _grouped(x, norm.num_groups)
    mean = _masked_mean(grouped, visible)
    variance = _masked_mean((grouped - mean).square(), visible)
    y = ((grouped - mean) * (variance + norm.eps).rsqrt()).view_as(x)
    return _affine(norm, y).to(x.dtype)


def masked_group_variance(x: Tensor, visible: Tensor, groups: int) -> Tensor:
    """Biased variance over the visible positions of each image and group, as a map (B, C, 1, 1)."""
    grouped = _grouped(x, groups)
    variance = _masked_mean((grouped - _masked_mean(grouped, visible)).square(), visible)
    return variance.flatten(1).repeat_interleave(x.shape[1] // groups, 1)[:, :, None, None]


def _grouped(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.reshape(batch, groups, channels // groups, height, width).to(wide)


def _masked_mean(grouped: Tensor, visible: Tensor) -> Tensor:
    """Mean of (B, G, C/G, h, w) over channels and visible positions: (B, G, 1, 1, 1)."""
    keep = visible.unsqueeze(1)
    count = keep.sum((2, 3, 4), keepdim=True).clamp(min=1) * grouped.shape[2]
    return torch.where(keep, grouped, 0.0).sum((2, 3, 4), keepdim=True) / count


def _affine(norm: Any, y: Tensor) -> Tensor:
    y = y if norm.weight is None else y * norm.weight.view(1, -1, 1, 1)
    return y if norm.bias is None else y + norm.bias.view(1, -1, 1, 1)


def _over_processes(norm: Any, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Both summed over the processes of a SyncBatchNorm; as they are for any other norm."""
    sync = (
        isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available() and dist.is_initialized()
    )
    if not sync or dist.get_world_size(norm.process_group) == 1:
        return total, count
    from torch.distributed.nn.functional import all_reduce

    both = all_reduce(torch.cat([total, count.view(1)]), group=norm.process_group or dist.group.WORLD)
    return both[:-1], both[-1]
