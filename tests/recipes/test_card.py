"""The lines of a model card that build the network again: run as a reader would paste them."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from leaven.backbones import create, load, resolve, save
from leaven.recipes.common.card import lines_of_use

MINE = """
from torch import nn


def of_one_size(num_classes=0, image_size=(8, 8)):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size[0] * image_size[1], num_classes or 4))


network = of_one_size(image_size=(16, 16))
"""


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("vit_tiny_patch16_224", "img_size=(16, 32)"),
        ("mixer_s32_224", "img_size=(64, 64)"),
        ("tv:vit_b_32", "image_size=64"),
        ("test_resnet", ""),
        ("my_networks:of_one_size", "image_size=(16, 16)"),
        ("my_networks:network", ""),
    ],
)
def test_a_network_of_one_size_is_built_for_its_size(
    name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_networks.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    size = {"img_size=(16, 32)": (16, 32), "img_size=(64, 64)": (64, 64), "image_size=64": (64, 64)}.get(
        told, (16, 16)
    )
    network = create(name, image_size=size)
    weights = tmp_path / "backbone.safetensors"
    save(network, weights, name=name, metadata={"image_size": size})
    lines = lines_of_use(weights, resolve(name))
    assert ("size=" in lines[-2]) == bool(told)
    assert told in lines[-2]
    found: dict[str, Any] = {}
    exec("\n".join(lines), found)
    assert all(torch.equal(found["backbone"].state_dict()[k], v) for k, v in network.state_dict().items())
    assert type(load(name, weights)) is type(network)
    sys.modules.pop("my_networks", None)


def test_a_network_of_a_hub_is_timm_s(tmp_path: Path) -> None:
    lines = lines_of_use(tmp_path / "none.safetensors", "hf-hub:timm/resnet10t.c3_in1k")
    assert lines[3] == "backbone = timm.create_model('hf-hub:timm/resnet10t.c3_in1k', num_classes=0)"
