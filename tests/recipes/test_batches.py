"""What the recipes make of their images: normalisation travels with the weights."""

from pathlib import Path

import pytest

from leaven.backbones import create, save
from leaven.recipes.common.batches import Images, find_data
from leaven.recipes.common.flags import ImageSettings, UserError


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
