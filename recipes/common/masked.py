"""Judging SparK: its loss on held-out images under fixed masks, and its reconstructions."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from leaven.pretext import recalibrate_batchnorm
from leaven.pretext.spark import SparK, sample_mask
from leaven.pretext.spark.loss import reconstruction
from leaven.recipes.common.data import KeyedLoader
from leaven.recipes.common.loop import keyed_generator
from leaven.recipes.common.plots import image_table


def judge(spark: SparK, calibration: KeyedLoader, seed: int) -> SparK:
    """A copy in eval mode whose BatchNorm statistics are taken anew, from masked training images.

    Those of an untrained network mean nothing, and after a short training they lag behind the weights.
    """
    model = copy.deepcopy(spark).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the masks that the calibration draws
        recalibrate_batchnorm(model, calibration)
    return model


def held_out_loss(model: SparK, held_out: KeyedLoader, seed: int) -> float:
    """Mean masked loss over the images, each under the same mask whenever and on whatever this is called."""
    device = next(model.parameters()).device
    total, images = 0.0, 0
    with torch.no_grad():
        for number, (batch, _) in enumerate(held_out):
            loss = model(batch.to(device), mask=fixed_mask(model, batch, seed, number).to(device)).loss
            total, images = total + float(loss) * len(batch), images + len(batch)
    return total / images


def fixed_mask(model: SparK, images: Tensor, seed: int, number: int) -> Tensor:
    """The mask of held-out batch `number`, (B, fh, fw)."""
    height, width = images.shape[-2:]
    generator = keyed_generator(seed, 0, number, "held out")
    return sample_mask(len(images), model.mask_grid(height, width), model.mask_ratio, generator)


def draw_reconstructions(
    model: SparK, images: Tensor, seed: int, path: Path, *, mean: Sequence[float], std: Sequence[float]
) -> None:
    """A picture: original, what the encoder sees, the prediction everywhere, and pasted where pixels were hidden."""
    device = next(model.parameters()).device
    images, mask = images.to(device), fixed_mask(model, images, seed, 0).to(device)
    predictions: list[Tensor] = []
    hook = model.decoder.register_forward_hook(lambda module, args, output: predictions.append(output))
    try:
        pasted = model.reconstruct(images, mask)
    finally:
        hook.remove()
    nothing = torch.zeros_like(mask)
    seen = mask.repeat_interleave(model.mask_cell, 1).repeat_interleave(model.mask_cell, 2).unsqueeze(1)
    columns = {
        "original": images,
        "seen": torch.where(seen, images, torch.zeros_like(images)),
        "predicted": reconstruction(predictions[0], images, nothing),
        "predicted where hidden": pasted,
    }
    caption = (
        "Each predicted patch has the mean and contrast of the true one, as in the paper's figures: "
        "the loss does not ask for them.\nVisible patches carry no loss; what is predicted there means nothing."
    )
    image_table(columns, path, mean=mean, std=std, caption=caption)
