"""benchmarks/diffusion_features.py in small: what each kind of features may choose from."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import diffusion_features as benchmark

from leaven.backbones import create, save
from leaven.pretext import extract_features


def test_other_networks_choose_among_their_stages_and_poolings_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = create("resnet10t").eval(), torch.rand(4, 3, 32, 32)
    save(net, tmp_path / "backbone.safetensors", name="resnet10t")
    moments = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.3, 0.2]])
    found = benchmark.features("SparK", str(tmp_path / "backbone.safetensors"), x, moments, 0)
    blocks = list(dict.fromkeys(cell.block for cell in found))
    assert len(blocks) > 3
    assert [(cell.block, cell.pool) for cell in found] == [(b, p) for b in blocks for p in benchmark.POOLS]
    assert all(len(maps) == 4 for maps in found.values())
    images = torch.nn.functional.interpolate(
        (x - moments[0].view(3, 1, 1)) / moments[1].view(3, 1, 1), (64, 64), mode="bicubic"
    )
    last = next(maps for cell, maps in found.items() if cell.block == blocks[-1] and cell.pool == 1)
    torch.testing.assert_close(last.flatten(1), extract_features(net, images), rtol=1e-4, atol=1e-5)
