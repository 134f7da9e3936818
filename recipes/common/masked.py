"""Saying what SparK does and judging it: its loss on held-out images under fixed masks, and its reconstructions."""

import copy
from pathlib import Path

import torch
from torch import Tensor

from leaven.backbones.probe import seeded
from leaven.pretext import recalibrate_batchnorm
from leaven.pretext.features import device_of
from leaven.pretext.spark import SparK, sample_mask
from leaven.pretext.spark.loss import reconstruction
from leaven.recipes.common.batches import Images
from leaven.recipes.common.loop import keyed_generator
from leaven.recipes.common.plots import image_table


def describe(spark: SparK, size: tuple[int, int]) -> list[str]:
    """What runs, in words: backend and why, grid and realised mask ratio, parameters."""
    fh, fw = spark.mask_grid(*size)
    hidden = 1 - sample_mask(1, (fh, fw), spark.mask_ratio).float().mean().item()
    millions = [sum(p.numel() for p in module.parameters()) / 1e6 for module in (spark.backbone, spark)]
    left_out = [f"not trained, since no map used depends on it: {', '.join(spark.untrained)}"]
    return [
        f"SparK backend: {spark.backend} ({spark.backend_reason})",
        f"mask: {fh}x{fw} cells of {spark.mask_cell} px, {hidden:.3f} hidden ({spark.mask_ratio} asked)",
        f"parameters: backbone {millions[0]:.2f} M, with decoder {millions[1]:.2f} M",
        *(left_out if spark.untrained else []),
    ]


def judge(spark: SparK, images: Images) -> SparK:
    """A copy in eval mode whose BatchNorm statistics are taken anew, from masked training images.

    Those of an untrained network mean nothing, and after a short training they lag behind the weights.
    """
    model, settings = copy.deepcopy(spark).eval(), images.settings
    with seeded(settings.seed, device_of(model)):  # of the masks that the calibration draws
        recalibrate_batchnorm(model, images.calibration())
    return model


def held_out_loss(model: SparK, images: Images, most: int) -> float:
    """Mean masked loss over held-out images, at most ``most``, each under the same mask in every call."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with torch.no_grad():
        for number, (batch, _) in enumerate(images.whole(images.data.val, most)):
            mask = fixed_mask(model, batch, images.settings.seed, number)
            total += float(model(batch.to(device), mask=mask.to(device)).loss) * len(batch)
            count += len(batch)
    return total / count


def fixed_mask(model: SparK, images: Tensor, seed: int, number: int) -> Tensor:
    """The mask of held-out batch `number`, (B, fh, fw)."""
    height, width = images.shape[-2:]
    generator = keyed_generator(seed, 0, number, "held out")
    return sample_mask(len(images), model.mask_grid(height, width), model.mask_ratio, generator)


def draw_reconstructions(model: SparK, images: Images, path: Path) -> None:
    """Eight held-out images, see `reconstruction_columns`, as a picture."""
    pixels = torch.cat([batch for batch, _ in images.whole(images.data.val, 8)])
    columns = reconstruction_columns(model, pixels, fixed_mask(model, pixels, images.settings.seed, 0))
    image_table(columns, path, mean=images.mean, std=images.std, caption=CAPTION)


CAPTION = (
    "Each predicted patch is given the brightness and contrast of the true one, as in the paper's figures: "
    "only its pattern is predicted.\nVisible patches carry no loss; what is predicted there means nothing."
)


def reconstruction_columns(model: SparK, pixels: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Images (B, C, H, W) under `mask`: original, what the encoder sees, the prediction, and both pasted together."""
    device = next(model.parameters()).device
    pixels, mask = pixels.to(device), mask.to(device)
    predictions: list[Tensor] = []
    hook = model.decoder.register_forward_hook(lambda module, args, output: predictions.append(output))
    try:
        pasted = model.reconstruct(pixels, mask)
    finally:
        hook.remove()
    seen = mask.repeat_interleave(model.mask_cell, 1).repeat_interleave(model.mask_cell, 2).unsqueeze(1)
    return {
        "original": pixels,
        "seen": torch.where(seen, pixels, torch.zeros_like(pixels)),
        "predicted": reconstruction(predictions[0], pixels, torch.zeros_like(mask)),
        "predicted where hidden": pasted,
    }
