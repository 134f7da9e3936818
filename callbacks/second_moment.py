"""The mathematics of TrAct: the second moment of a first layer's patches, and the gradient times its inverse."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Systems up to this size are solved in float64.
_SMALL = 256
# Patches are laid out in parts of so many numbers: on a CPU what its cache holds, elsewhere few parts.
_PART = {"cpu": 1 << 18}
_LARGE_PART = 1 << 26
# From this size on a product is made of blocks, those below the diagonal left out.
_BLOCKS_FROM = 96
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def reason_against(layer: nn.Module) -> str | None:
    """Why the rows of this layer's weight do not simply meet patches of its input, or None."""
    kind = type(layer).__name__
    plain = any(type(layer).forward is each.forward for each in (*_CONVOLUTIONS, nn.Linear))
    if not plain and not _pads_by_size(layer):
        return f"a {kind} is not a Linear or Conv1d to Conv3d as torch computes them"
    weight = layer._parameters.get("weight")
    if not isinstance(weight, nn.Parameter):
        return f"the weight of this {kind} is derived from other parameters"
    if nn.parameter.is_lazy(weight):
        return f"the weight of this {kind} is not there yet: call the model on a batch first"
    return None


@torch.no_grad()
def patch_second_moment(x: Tensor, layer: nn.Module) -> tuple[Tensor, int]:
    """The sum of u u^T over all inputs u that the weight of `layer` is multiplied with, and how many there are.

    For a convolution u is a patch, in the order of ``weight.flatten(1)``, under the layer's own stride, dilation,
    groups and padding; a patch at the border counts as one, with its padding. Not centred. Computed in float32, or in
    float64 where `x` is that, whatever autocast says. Source: see `tract_gradient`.

    Args:
        x: what the layer is called with, (B, C, ...) for a convolution, (..., C) for a Linear.
        layer: a Linear, Conv1d, Conv2d or Conv3d, timm's ``Conv2dSame`` too.

    Returns:
        (groups, n, n), n = C / groups * kernel positions, and the number of patches.

    Raises:
        TypeError: another kind of layer.
        ValueError: an input that the layer does not take.
    """
    if reason := reason_against(layer):
        raise TypeError(f"no second moment: {reason}")
    _check_input(x, layer)
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if isinstance(layer, nn.Linear):
            rows = x.reshape(-1, layer.in_features)
            return (rows.mT @ rows)[None], len(rows)
        return _of_convolution(x, layer)


def tract_gradient(gradient: Tensor, moment: Tensor, lam: float) -> Tensor:
    """The gradient of a first layer's weight times (C + lam I)^-1, C the second moment of its inputs.

    The step -eta times it solves the ridge regression ||dz - dW x||^2 + lam b ||dW||^2 for the change of weight that
    comes closest to a gradient step dz = -eta b dL/dz on the pre-activations, over a batch x of b inputs.

    Solved by Cholesky, in float64 up to n = 256 and in float32 beyond. A gradient that is not finite gives one that
    is not. Where the moment is not finite, or too large against lam to solve with, the gradient comes back as it is.

    Source: Petersen, Borgelt, Ermon 2024 (arXiv 2410.23970), section 3.

    Args:
        gradient: of the weight, (out, ...) with n numbers in each row.
        moment: mean of u u^T over patches u, (n, n), or (groups, n, n) with the rows of a group together.
        lam: greater than 0, in units of the inputs' variance.

    Raises:
        ValueError: lam is not greater than 0, or the moment is of other inputs.
    """
    if not lam > 0:
        raise ValueError(f"lam must be greater than 0, got {lam}")
    groups = len(moment) if moment.ndim == 3 else 1
    n = gradient[0].numel()
    if moment.shape[-2:] != (n, n) or moment.ndim not in (2, 3) or len(gradient) % groups:
        raise ValueError(
            f"the moment of a gradient {tuple(gradient.shape)} is ({n}, {n}), or that for each group of its rows, not "
            f"{tuple(moment.shape)}"
        )
    result, _ = solved(gradient, moment, lam)
    return result


def solved(gradient: Tensor, moment: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """`tract_gradient`, and whether the system could be solved: a tensor, for reading it would wait for a GPU."""
    moment = moment if moment.ndim == 3 else moment[None]
    groups, n, _ = moment.shape
    double = n <= _SMALL and moment.device.type != "mps"
    precision = torch.float64 if double else torch.promote_types(moment.dtype, torch.float32)
    system = moment.to(precision) + lam * torch.eye(n, dtype=precision, device=moment.device)
    factor, failures = torch.linalg.cholesky_ex(system)
    good = (failures == 0).all() & torch.isfinite(system).all()
    right = gradient.reshape(groups, -1, n).to(precision).mT
    solved = torch.cholesky_solve(right, factor).mT.reshape(gradient.shape)
    return torch.empty_like(gradient).copy_(torch.where(good, solved, gradient.to(precision))), good


def _check_input(x: Tensor, layer: Any) -> None:
    kind, shape = type(layer).__name__, tuple(x.shape)
    if isinstance(layer, nn.Linear):
        if x.ndim < 1 or shape[-1] != layer.in_features:
            raise ValueError(f"this {kind} takes (..., {layer.in_features}), not {shape}")
        return
    ndim = layer.weight.ndim
    if x.ndim not in (ndim - 1, ndim) or shape[1 - ndim] != layer.in_channels:
        raise ValueError(
            f"this {kind} takes {layer.in_channels} channels and {ndim - 2} axes of space, not {shape}"
        )


def _of_convolution(x: Tensor, layer: Any) -> tuple[Tensor, int]:
    x = _padded(x if x.ndim == layer.weight.ndim else x[None], layer)
    # Weight, stride and padding may have been set after the layer was made; torch goes by what they are now.
    kernel, groups = tuple(layer.weight.shape[2:]), layer.groups
    stride, dilation = _per_axis(layer.stride, len(kernel)), _per_axis(layer.dilation, len(kernel))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    places = [(size - span) // s + 1 for size, span, s in zip(x.shape[2:], reach, stride, strict=True)]
    if min(places) < 1:
        raise ValueError(
            f"inputs of {tuple(x.shape[2:])}, with padding, are smaller than a patch of {tuple(reach)}"
        )
    batch, channels, *steps = x.stride()
    within = [d * step for d, step in zip(dilation, steps, strict=True)]
    between = [s * step for s, step in zip(stride, steps, strict=True)]
    n = x.shape[1] // groups * _product(kernel)
    total = x.new_zeros(groups, n, n)
    inner, inner_strides = (x.shape[1], *kernel), (channels, *within)
    outer, outer_strides = (len(x), *places), (batch, *between)
    # Patches that do not overlap are laid out as rows, so that what is read lies together; others as columns.
    rows = all(s >= span for s, span in zip(stride, reach, strict=True))
    if rows:
        patches, first = x.as_strided((*outer, *inner), (*outer_strides, *inner_strides)), 0
    else:
        patches, first = x.as_strided((*inner, *outer), (*inner_strides, *outer_strides)), len(inner)
    part = _PART.get(x.device.type, _LARGE_PART)
    line = x.shape[1] * _product(kernel) * _product(places[1:])  # of one image
    lines = max(1, min(places[0], part // line))
    for images in patches.split(max(1, part // (line * places[0])), first):
        for band in images.split(lines, first + 1):
            u = band.reshape(-1, groups, n).permute(1, 2, 0) if rows else band.reshape(groups, n, -1)
            _add_upper(total, u)
    upper = total.triu()
    return upper + total.triu(1).mT, len(x) * _product(places)


def _add_upper(total: Tensor, u: Tensor) -> None:
    """Add u u^T, of (groups, n, N), to the blocks of `total` on the diagonal and above it."""
    n = u.shape[1]
    step = -(-n // 3) if n >= _BLOCKS_FROM and u.device.type == "cpu" else n
    for start in range(0, n, step):
        rows = slice(start, start + step)
        total[:, rows, start:].baddbmm_(u[:, rows], u[:, start:].mT)


def _padded(x: Tensor, layer: Any) -> Tensor:
    if _pads_by_size(layer):
        from timm.layers.padding import pad_same

        padded: Tensor = pad_same(x, layer.kernel_size, layer.stride, layer.dilation)
        return padded
    mode = layer.padding_mode
    around = layer._reversed_padding_repeated_twice  # all that the other modes go by; "same" too
    if mode == "zeros" and not isinstance(layer.padding, str):
        around = [n for n in reversed(_per_axis(layer.padding, layer.weight.ndim - 2)) for _ in range(2)]
    if not any(around):
        return x
    return F.pad(x, around, "constant" if mode == "zeros" else mode)


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def _pads_by_size(layer: nn.Module) -> bool:
    """timm's ``Conv2dSame``, as in the networks that come from TensorFlow."""
    return type(layer).__name__ == "Conv2dSame" and isinstance(layer, nn.Conv2d)


def _product(sizes: Any) -> int:
    return int(torch.Size(sizes).numel())
