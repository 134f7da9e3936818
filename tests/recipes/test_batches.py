"""What the recipes make of their images: normalisation travels with the weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from leaven.backbones import create, save
from leaven.pretext import recalibrate_batchnorm
from leaven.recipes.common.batches import Images, find_data
from leaven.recipes.common.data import Data
from leaven.recipes.common.flags import ImageSettings, UserError
from leaven.recipes.common.sources import ArraySource


def test_weights_are_fed_as_they_were_trained(tmp_path: Path) -> None:
    settings = ImageSettings(backbone="resnet10t")
    data, backbone = find_data(settings), create("resnet10t")
    own = Images.of(data, settings, (32, 32), backbone)
    assert (tuple(own.mean), tuple(own.std)) == (data.mean, data.std)

    other = Images(data, settings, (32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    path = tmp_path / "backbone.safetensors"
    save(backbone, path, name="resnet10t", metadata=other.notes)
    tuned = Images.of(data, ImageSettings(backbone="resnet10t", init=str(path)), (32, 32), backbone)
    assert (tuned.mean, tuned.std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert tuned.notes == other.notes
    with pytest.raises(UserError, match="is for 3 channels: add --in-chans 3"):
        Images.of(data, ImageSettings(backbone="resnet10t", init=str(path), in_chans=1), (32, 32), backbone)

    save(backbone, path, name="resnet10t")  # weights from elsewhere: the data's own again
    plain = Images.of(data, ImageSettings(backbone="resnet10t", init=str(path)), (32, 32), backbone)
    assert (plain.mean, plain.std) == (data.mean, data.std)


def test_a_process_may_have_no_held_out_image() -> None:
    """As where there are fewer of them than processes."""
    source = ArraySource(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), [0, 1])
    data = Data("two", "folder", source, source, ("a", "b"), (0.5,) * 3, (0.5,) * 3, (8, 8))
    images = Images(data, ImageSettings(workers=0), (8, 8), data.mean, data.std)
    labels = [[int(y) for _, batch in images.whole(source, 2, share=(i, 3)) for y in batch] for i in range(3)]
    assert labels == [[0], [1], []]


@pytest.mark.parametrize("n", [20, 100, 1000])
def test_statistics_are_taken_from_batches_of_all_classes(n: int) -> None:
    """Images lie class by class, as in a folder: all of the variance is between the classes."""
    labels = np.arange(n) * 10 // n
    pixels = torch.from_numpy(25 * labels).to(torch.uint8).view(n, 1, 1, 1).expand(n, 1, 8, 8)
    source = ArraySource(pixels, labels)
    names = tuple(map(str, range(10)))
    data = Data("toy", "folder", source, source, names, (0.0,), (1.0,), (8, 8))
    images = Images(data, ImageSettings(in_chans=1, workers=0), (8, 8), (0.0,), (1.0,))
    norm = nn.Sequential(nn.BatchNorm2d(1))
    recalibrate_batchnorm(norm, images.calibration())
    whole = pixels.float() / 255
    assert norm[0].running_mean.item() == pytest.approx(whole.mean().item(), rel=0.02)
    assert norm[0].running_var.item() == pytest.approx(whole.var().item(), rel=0.05)
