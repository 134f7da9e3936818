"""SparK's target and loss: each patch standardised by its own moments, squared error on hidden patches alone."""

import torch
from torch import Tensor


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) to (B, fh, fw, p*p*C), the channel innermost (upstream's order)."""
    blocks: Tensor = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B C fh p fw p
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """The inverse of ``patchify``: (B, fh, fw, p*p*C) to (B, C, H, W)."""
    blocks: Tensor = patches.unflatten(3, (patch, patch, -1))  # B fh fw p p C
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, sqrt(unbiased variance + 1e-6), over all p*p*C values of a patch jointly."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision widened, float64 left alone."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def masked_loss(prediction: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error to standardised patches, averaged over the hidden patches of the batch (SparK eq. 3).

    Args:
        prediction: (B, C, H, W), in standardised units.
        images: (B, C, H, W).
        mask: bool (B, fh, fw), True = visible.
    """
    patch = images.shape[-1] // mask.shape[-1]
    target = patchify(at_least_float32(images), patch)
    mean, std = moments(target)
    error = (patchify(at_least_float32(prediction), patch) - (target - mean) / std).square().mean(-1)
    hidden = (~mask).to(error.dtype)
    return (error * hidden).sum() / (hidden.sum() + 1e-8)


def reconstruction(prediction: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Predicted patches in the images' units where hidden, the images' own pixels where visible: (B, C, H, W)."""
    patch = images.shape[-1] // mask.shape[-1]
    own = patchify(at_least_float32(images), patch)
    mean, std = moments(own)
    predicted = patchify(at_least_float32(prediction), patch) * std + mean
    return unpatchify(torch.where(mask.unsqueeze(-1), own, predicted), patch)
