"""Ridge grids against scikit-learn, heads trained together against heads alone, caches against what they hold."""

import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from leaven.pretext.diffusion import (
    AttentionHead,
    Cell,
    Denoiser,
    DiffusionFeatures,
    FeatureCache,
    Schedule,
    UNet,
    fit_heads,
    fresh_like,
    linear_cka,
    load_adm,
    make_head,
    ridge,
    ridge_grid,
    write_features,
)

CELLS = [Cell(20, "a", 2), Cell(20, "b", 2), Cell("clean", "a", None)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def toy(n: int = 60) -> tuple[dict[Cell, Tensor], Tensor]:
    """The second cell tells the class, the others do not."""
    labels = torch.arange(n) % 3
    maps = {cell: randn(n, 4, 2, 2, seed=i) for i, cell in enumerate(CELLS)}
    maps[CELLS[1]][:, 0, 0, 0] += 3.0 * labels
    maps[CELLS[1]][:, 1, 0, 0] += 3.0 * (labels == 1)
    return maps, labels


# ridge and the grid


@pytest.mark.parametrize("shape", [(40, 7), (12, 30)])
def test_ridge_is_that_of_scikit_learn_in_both_forms(shape: tuple[int, int]) -> None:
    x, y = randn(*shape).double() * 3 + 1, randn(shape[0], 4, seed=1).double()
    for l2, (w, b) in zip((1e-3, 0.5, 20.0), ridge(x, y, (1e-3, 0.5, 20.0)), strict=True):
        reference = Ridge(alpha=l2 * shape[0]).fit(x.numpy(), y.numpy())
        torch.testing.assert_close(w.T, torch.from_numpy(reference.coef_), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(b, torch.from_numpy(reference.intercept_), rtol=1e-7, atol=1e-9)
    with pytest.raises(ValueError, match="penalties must be greater than 0"):
        ridge(x, y, (0.0,))


def test_the_grid_finds_the_cell_that_tells() -> None:
    train, labels = toy()
    val, more = {cell: value[::2] for cell, value in toy(90)[0].items()}, (torch.arange(90) % 3)[::2]
    found = ridge_grid(train, labels, (val, more), (train, labels), l2=(0.01, 1.0))
    assert len(found) == 6
    assert found[0].cell == CELLS[1]
    assert found[0].accuracy[0] > 0.9
    assert [each.accuracy[0] for each in found] == sorted((each.accuracy[0] for each in found), reverse=True)
    x = train[CELLS[0]].flatten(1).double()
    z = (x - x.mean(0)) / x.std(0, correction=0)
    alone = Ridge(alpha=60.0).fit(z.numpy(), nn.functional.one_hot(labels).numpy())
    right = (torch.from_numpy(alone.predict(z.numpy())).argmax(1) == labels).double().mean()
    (same,) = [each for each in found if each.cell == CELLS[0] and each.l2 == 1.0]
    assert same.accuracy[1] == float(right)
    with pytest.raises(ValueError, match="validation images"):
        ridge_grid(train, labels)
    for maps, y, other, said in (
        (train, labels[:9], (val, more), "60 maps for 9 labels"),
        (train, labels, ({}, more), "is not among the other images' cells"),
        (train, labels, (val, more + 5), "class 5 is judged and not learnt"),
        ({cell: maps * torch.nan for cell, maps in train.items()}, labels, (val, more), "not finite"),
    ):
        with pytest.raises(ValueError, match=said):
            ridge_grid(maps, y, other)


def test_a_constant_feature_is_no_trouble() -> None:
    train, labels = toy()
    train[CELLS[1]][:, 3] = 7.0
    assert ridge_grid(train, labels, (train, labels))[0].accuracy[0] > 0.9


# heads


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_heads_together_are_heads_alone(optimizer: Any) -> None:
    train, labels = toy()
    kinds: list[Any] = ["linear", "mlp", "attention"]

    def heads() -> dict[Cell, nn.Module]:
        torch.manual_seed(0)
        side = {cell: 2 for cell in CELLS}
        return {cell: make_head(kind, 4, side[cell], 3, 16) for cell, kind in zip(CELLS, kinds, strict=True)}

    how: dict[str, Any] = {"steps": 20, "batch_size": 16, "lr": 1e-2, "optimizer": optimizer}
    together, alone = heads(), heads()
    fit_heads(together, train, labels, **how)
    for cell, head in alone.items():
        fit_heads({cell: head}, train, labels, **how)
        for a, b in zip(together[cell].parameters(), head.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert not head.training


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv", "attention"])
def test_every_head_learns(kind: Any) -> None:
    train, labels = toy()
    torch.manual_seed(0)
    head = make_head(kind, 4, 2, 3, 32)
    fit_heads({CELLS[1]: head}, train, labels, steps=300, lr=3e-3)
    with torch.no_grad():
        assert float((head(train[CELLS[1]]).argmax(1) == labels).float().mean()) > 0.85


def test_attention_does_not_see_places_and_trains_its_token() -> None:
    head = AttentionHead(4, 3, 5, width=16, heads=2)
    head.norm = nn.Identity()  # which has a weight for every place
    maps = randn(2, 4, 3, 3)
    mixed = maps.flatten(2)[..., torch.randperm(9)].view_as(maps)
    torch.testing.assert_close(head(maps), head(mixed))
    head(maps).sum().backward()
    assert head.cls.grad is not None
    assert float(head.cls.grad.abs().sum()) > 0


def test_wrong_heads() -> None:
    train, labels = toy()
    with pytest.raises(ValueError, match="unknown head 'svm'"):
        make_head("svm", 4, 2, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no heads"):
        fit_heads({}, train, labels)
    with pytest.raises(ValueError, match="60 maps and 5 labels"):
        fit_heads({CELLS[0]: make_head("linear", 4, 2, 3)}, train, labels[:5])
    with pytest.raises(ValueError, match=r"no features for the heads D: give each head's under its own name"):
        fit_heads({"D": make_head("linear", 4, 2, 3)}, train, labels)  # type: ignore[misc]
    head = {CELLS[0]: make_head("linear", 4, 2, 3)}
    for wrong in (labels + 1, labels - 1):
        with pytest.raises(
            ValueError, match=r"t=20, a, pool 2: labels from -?\d to \d, but it has classes 0 to 2"
        ):
            fit_heads(head, train, wrong)
    with pytest.raises(
        ValueError, match=r"labels must be class indices \(N,\), got \(60,\) of torch.float32"
    ):
        fit_heads(head, train, labels.float())
    with pytest.raises(ValueError, match="steps and batch_size must be at least 1"):
        fit_heads({CELLS[0]: make_head("linear", 4, 2, 3)}, train, labels, steps=0)
    with pytest.raises(FloatingPointError, match="t=20, a, pool 2: the loss is"):
        fit_heads({CELLS[0]: make_head("linear", 4, 2, 3)}, train, labels, lr=1e30, optimizer="sgd")
    with pytest.raises(ValueError, match="t=20, a, pool 2: there is a NaN"):
        fit_heads({CELLS[0]: make_head("linear", 4, 2, 3)}, {CELLS[0]: train[CELLS[0]] * torch.nan}, labels)


# CKA


def test_cka() -> None:
    x = randn(50, 8)
    rotation = torch.linalg.qr(randn(8, 8, seed=1))[0]
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, randn(50, 8, seed=2)) < 0.3
    wide = randn(20, 300)  # over images in place of numbers
    a, b = (each.double() - each.double().mean(0) for each in (wide, wide[:, :150] ** 2))
    by_hand = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert linear_cka(wide, wide[:, :150] ** 2) == pytest.approx(float(by_hand))
    with pytest.raises(ValueError, match="the same for all images"):
        linear_cka(x, torch.ones(50, 3))
    with pytest.raises(ValueError, match="50 and 20 images"):
        linear_cka(x, wide)


# caches


def extractor(seed: int = 0, **how: Any) -> DiffusionFeatures:
    torch.manual_seed(seed)
    model = UNet(1, width=32, multipliers=(1, 2))
    settings: dict[str, Any] = {"blocks": ["middle_block", "input_blocks.1"], "timesteps": (10, 90)} | how
    return DiffusionFeatures(model, Schedule.linear(), **settings)


def batches(x: Tensor, size: int = 3) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.split(size), (torch.arange(len(x)) % 4).split(size), strict=True)


def test_what_is_cached_is_what_was_computed(tmp_path: Path) -> None:
    x, features = randn(7, 1, 8, 8), extractor(pool=(1, None))
    written = write_features(tmp_path, features, batches(x), 7, dtype=torch.float32)
    assert written == sum(path.stat().st_size for path in tmp_path.iterdir())
    cache = FeatureCache(tmp_path, features)
    assert list(cache) == features.cells
    assert len(cache) == 8
    for cell, value in features(x).items():
        torch.testing.assert_close(cache[cell], value, rtol=1e-5, atol=1e-6)
    assert cache.labels.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert write_features(tmp_path / "half", features, batches(x), 7) < 0.7 * written


def test_writing_goes_on_where_it_was(tmp_path: Path) -> None:
    x, features = randn(7, 1, 8, 8), extractor()

    def cut() -> Iterator[tuple[Tensor, Tensor]]:
        yield from list(batches(x))[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_features(tmp_path / "cut", features, cut(), 7)
    with pytest.raises(ValueError, match="has 6 of 7 images: write_features goes on"):
        FeatureCache(tmp_path / "cut", features)
    first = tmp_path / "cut" / "00000.safetensors"
    before = first.stat().st_mtime_ns
    write_features(tmp_path / "cut", features, batches(x), 7)
    assert first.stat().st_mtime_ns == before
    write_features(tmp_path / "whole", features, batches(x), 7)
    cut_one, whole = FeatureCache(tmp_path / "cut"), FeatureCache(tmp_path / "whole")
    assert all(torch.equal(cut_one[cell], whole[cell]) for cell in whole)


def test_more_files_than_five_digits_count_stay_in_order(tmp_path: Path) -> None:
    x, features = randn(7, 1, 8, 8), extractor()
    write_features(tmp_path, features, batches(x), 7)
    for number in (2, 1, 0):
        (tmp_path / f"{number:05}.safetensors").rename(tmp_path / f"{number + 99_998:05}.safetensors")
    assert FeatureCache(tmp_path).labels.tolist() == [0, 1, 2, 3, 0, 1, 2]


def test_another_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, features = randn(7, 1, 8, 8), extractor()
    write_features(tmp_path, features, batches(x), 7)
    for other, key in (
        (extractor(1), "model"), (extractor(timesteps=(10, 91)), "cells"), (extractor(draws=2), "draws"),
        (extractor(encode=lambda x: 2 * x), "encoder"), (extractor(call=lambda net, x, t: net(x, 0 * t)), "call"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"made with another {key}: write them again"):
            FeatureCache(tmp_path, other)
        with pytest.raises(FileExistsError, match=f"made with another {key}: take an empty folder"):
            write_features(tmp_path, other, batches(x), 7)
    with pytest.raises(FileExistsError, match="another images"):
        write_features(tmp_path, features, batches(x + 1), 7)
    with pytest.raises(FileExistsError, match="another dtype"):
        write_features(tmp_path, features, batches(x), 7, dtype=torch.float32)
    with pytest.raises(ValueError, match="9 images were announced and 7 came"):
        write_features(tmp_path / "nine", features, batches(x), 9)
    with pytest.raises(FileNotFoundError, match="no cached features in"):
        FeatureCache(tmp_path / "nowhere")
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is damaged"):
        FeatureCache(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**10))
    with pytest.raises(OSError, match="7000000 images need"):
        write_features(tmp_path / "large", features, batches(x), 7_000_000)
    assert not list((tmp_path / "large").iterdir())


# the U-Net and its training


def test_the_denoiser_learns() -> None:
    """Images that are all of one grey: the noise can be told exactly."""
    torch.manual_seed(0)
    schedule = Schedule.linear(100, 1e-3, 0.2)
    denoiser = Denoiser(UNet(1, width=16, multipliers=(1, 2), attention=(), head_width=16), schedule)
    x = torch.full((32, 1, 8, 8), 0.5)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(150):
        loss = denoiser(x, generator).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.9  # a fresh network predicts no noise at all
    assert sum(losses[-10:]) / 10 < 0.1


class Gaussian(nn.Module):
    """The exact denoiser of pixels that are normal around 0.2 with a standard deviation of 0.15."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule, self.unused = schedule, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        abar = self.schedule.alphas_cumprod[t].view(-1, 1, 1, 1).float()
        return (1 - abar).sqrt() * (x - 0.2 * abar.sqrt()) / (abar * 0.15**2 + 1 - abar)


def test_samples_have_the_distribution_of_the_data() -> None:
    schedule = Schedule.linear()
    denoiser = Denoiser(Gaussian(schedule), schedule)
    drawn = denoiser.sample((8, 1, 32, 32), steps=200, generator=torch.Generator().manual_seed(1))
    assert float(drawn.mean()) == pytest.approx(0.2, abs=0.01)
    assert float(drawn.std()) == pytest.approx(0.15, rel=0.05)


def test_a_schedule_may_leave_the_image_whole_at_the_first_time() -> None:
    schedule = Schedule(torch.linspace(1, 1e-3, 100, dtype=torch.float64))
    drawn = Denoiser(Gaussian(schedule), schedule).sample(
        (2, 1, 16, 16), 50, torch.Generator().manual_seed(1)
    )
    assert float(drawn.mean()) == pytest.approx(0.2, abs=0.03)


def test_a_draw_depends_on_its_generator_alone(tmp_path: Path) -> None:
    denoiser = Denoiser(UNet(1, width=32, multipliers=(1, 2)))
    x = randn(4, 1, 8, 8)
    a, b = (denoiser(x, torch.Generator().manual_seed(5)).loss for _ in range(2))
    assert torch.equal(a, b)
    denoiser.export(tmp_path / "net.safetensors")
    again = load_adm(tmp_path / "net.safetensors", UNet(1, width=32, multipliers=(1, 2)))
    assert not again.training
    t = torch.tensor([1, 2, 3, 4])
    assert torch.equal(again(x, t), denoiser.backbone(x, t))


def test_fresh_weights_are_no_zeros_and_nothing_of_the_old_ones() -> None:
    model = nn.Sequential(UNet(1, width=32, multipliers=(1, 2)), AttentionHead(4, 2, 3, width=16, heads=2))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    before = torch.get_rng_state()
    fresh = fresh_like(model)
    assert torch.equal(torch.get_rng_state(), before)
    for name, p in fresh.named_parameters():
        assert not (p == 7.0).any(), name
        assert name.endswith("bias") or p.abs().sum() > 0, name
    assert all((p == 7.0).all() for p in model.parameters())
    again, other = fresh_like(model), fresh_like(model, seed=1)
    weights = [dict(each.named_parameters())["0.out.2.weight"] for each in (fresh, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    model = UNet(1, width=32, multipliers=(1, 2))
    torch.save(model.state_dict(), tmp_path / "net.pt")
    load_adm(tmp_path / "net.pt", UNet(1, width=32, multipliers=(1, 2)))
    for other, said in (
        (UNet(1, width=32, multipliers=(1, 1)), r"input_blocks\.3\.0\..* is "),
        (UNet(1, width=32, multipliers=(1, 2, 2)), "has no input_blocks"),
        (UNet(1, width=32, multipliers=(1,)), "which the network has not|is of another network| is "),
    ):
        with pytest.raises(ValueError, match=said) as error:
            load_adm(tmp_path / "net.pt", other)
        assert "\n" not in str(error.value)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, said in (
        ("junk", "is no checkpoint of weights alone"),
        ("list", "holds list, no weights by name"),
    ):
        with pytest.raises(ValueError, match=said):
            load_adm(tmp_path / f"{name}.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_adm(tmp_path / "nothing.pt")


def test_keys_are_those_of_guided_diffusion() -> None:
    """A few that tell each part of the naming."""
    with torch.device("meta"):
        from leaven.pretext.diffusion import adm

        keys = set(adm().state_dict())
    for key in (
        "time_embed.0.weight", "time_embed.2.bias", "input_blocks.0.0.weight", "input_blocks.1.0.in_layers.0.weight",
        "input_blocks.1.0.in_layers.2.weight", "input_blocks.1.0.emb_layers.1.weight",
        "input_blocks.1.0.out_layers.0.bias", "input_blocks.1.0.out_layers.3.weight", "input_blocks.10.1.qkv.weight",
        "input_blocks.10.1.norm.weight", "input_blocks.10.1.proj_out.bias", "middle_block.1.qkv.bias",
        "output_blocks.2.2.in_layers.2.weight", "output_blocks.0.0.skip_connection.weight", "out.0.weight",
        "out.2.weight",
    ):  # fmt: skip
        assert key in keys, key
    assert json.dumps(sorted(keys)).count("input_blocks.10.1.") == 6
