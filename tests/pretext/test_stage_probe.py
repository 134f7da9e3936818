"""Probes of stages against maps pooled by hand, and few labels by counting."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from leaven.backbones import NoStages, stages
from leaven.pretext import kshot_indices, linear_probe, pooled_maps, probe_stages, stage_probe
from leaven.pretext.stage_probe import pooled_side


class TwoStages(nn.Module):
    """The first map holds the brightness, the second forgets it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.second = nn.Conv2d(4, 6, 3, 2, 1)
        with torch.no_grad():
            self.second.weight.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(images))


def bright_or_dark(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    return torch.randn(n, 3, 16, 16, generator=generator) + 2 * labels.view(-1, 1, 1, 1), labels


def test_each_stage_is_judged_by_its_own_map() -> None:
    torch.manual_seed(0)
    found = probe_stages(TwoStages(), bright_or_dark(60, 0), bright_or_dark(40, 1))
    assert list(found) == ["first", "second"]
    assert found["first"] > 0.95
    assert found["second"] == 0.5


def test_the_paper_s_sides_for_the_layers_of_alexnet() -> None:
    """12, 7, 5, 6, 6: section 3.2 of the paper; never more numbers than asked for, one more row would be too many."""
    layers = [(64, 55), (192, 27), (384, 13), (256, 13), (256, 13)]
    assert [pooled_side(*layer, 9600) for layer in layers] == [12, 7, 5, 6, 6]
    for channels in (1, 3, 64, 100, 2048):
        for most in (channels, 9000, 9600):
            s = pooled_side(channels, 1000, most)
            assert s * s * channels <= most < (s + 1) ** 2 * channels
    assert pooled_side(64, 7, 9600) == 7  # a map is never enlarged
    assert pooled_side(20000, 7, 9600) == 1


def by_hand(map_: Tensor, side: int) -> Tensor:
    """Adaptive max pooling of (N, C, h, w) by loops: window i reaches from floor(i h / s) to ceil((i + 1) h / s)."""
    n, channels, height, width = map_.shape
    out = torch.empty(n, channels, side, side)
    for i in range(side):
        for j in range(side):
            rows = slice(i * height // side, -(-(i + 1) * height // side))
            columns = slice(j * width // side, -(-(j + 1) * width // side))
            out[:, :, i, j] = map_[:, :, rows, columns].flatten(2).max(2).values
    return out.flatten(1)


def test_maps_are_pooled_and_probed_as_by_hand() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    (x, y), (queries, labels) = (bright_or_dark(24, seed) for seed in (0, 1))
    x, queries = (nn.functional.interpolate(images, 64) for images in (x, queries))
    chosen = stages(model)[1:3]
    with torch.no_grad():
        maps, asked = (
            model.forward_intermediates(images, indices=[1, 2], norm=False, intermediates_only=True)
            for images in (x, queries)
        )
    sides = [pooled_side(m.shape[1], m.shape[2], 1000) for m in maps]
    assert sides == [5, 4]
    expected = [by_hand(m, side) for m, side in zip(maps, sides, strict=True)]
    for found, wanted in zip(pooled_maps(model, x, chosen, 1000), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    for whole, map_ in zip(pooled_maps(model, x, chosen, 10**6), maps, strict=True):
        torch.testing.assert_close(whole, map_.flatten(1))  # never enlarged
    accuracies = probe_stages(model, (x, y), (queries, labels), chosen, pool_to=1000)
    assert accuracies == {
        stage.name: linear_probe(known, y, by_hand(query, side), labels)
        for stage, known, query, side in zip(chosen, expected, asked, sides, strict=True)
    }


def test_the_seed_is_the_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_probe, "linear_probe", lambda *data: data[-1])
    data = bright_or_dark(8, 0)
    assert probe_stages(TwoStages(), data, data, seed=5) == {"first": 5, "second": 5}


def test_the_extractor_is_frozen_and_left_as_it_was() -> None:
    model, (x, y) = TwoStages().train(), bright_or_dark(20, 0)
    model.second.eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    chosen = stages(model)
    state = torch.get_rng_state()
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    assert not any(m.requires_grad for m in pooled_maps(model, x, chosen))
    first = probe_stages(model, (loader, y), (x, y), chosen)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == probe_stages(model, (x, y), ([x[:9], x[9:]], y), batch_size=7)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes


def test_a_vision_transformer_has_one_stage() -> None:
    x, y = bright_or_dark(12, 0)
    model = timm.create_model("test_vit", dynamic_img_size=True)
    x = nn.functional.interpolate(x, 32)
    assert list(probe_stages(model, (x, y), (x, y))) == [stages(model)[0].name]


def test_nothing_to_probe_is_an_error() -> None:
    data = bright_or_dark(8, 0)
    flat = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    flat(data[0])
    with pytest.raises(NoStages):
        probe_stages(flat, data, data)
    with pytest.raises(ValueError, match="no stages"):
        probe_stages(TwoStages(), data, data, stages=[])
    with pytest.raises(ValueError, match="no images"):
        probe_stages(TwoStages(), (data[0][:0], data[1][:0]), data)


def test_the_first_of_each_class_in_file_order() -> None:
    targets = [2, 0, 0, 1, 2, 1, 0, 2, 1]
    assert kshot_indices(targets, 1).tolist() == [0, 1, 3]
    assert kshot_indices(torch.tensor(targets), 2).tolist() == [0, 1, 2, 3, 4, 5]


def test_seeded_subsets_are_balanced_nested_and_random() -> None:
    targets = torch.randint(5, (1000,), generator=torch.Generator().manual_seed(0))
    few, many = kshot_indices(targets, 20, seed=3), kshot_indices(targets, 100, seed=3)
    for chosen, k in ((few, 20), (many, 100)):
        assert targets[chosen].bincount().tolist() == [k] * 5
        assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert set(few.tolist()) < set(many.tolist())
    assert few.equal(kshot_indices(targets, 20, seed=3))
    assert not few.equal(kshot_indices(targets, 20, seed=4))
    assert not few.equal(kshot_indices(targets, 20))
    counts = sum(torch.zeros(1000).index_fill(0, kshot_indices(targets, 20, seed=s), 1.0) for s in range(200))
    assert (counts > 0).all()  # every image has its turn: never drawn in 200 seeds has probability 1e-9


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="class 1 has 1 images, fewer than the 2 asked for"):
        kshot_indices([0, 0, 1], 2)
    for targets, k in (([0, 1], 0), ([0, -1], 1), ([], 1)):
        with pytest.raises(ValueError, match="k must be at least 1"):
            kshot_indices(targets, k)
