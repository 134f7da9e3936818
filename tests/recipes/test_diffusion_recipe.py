"""recipes/diffusion_features.py: trains, resumes, reads models that there are, says what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from recipe_programs import DIFFUSION, refusal
from torch.utils.data import TensorDataset

from leaven.backbones import load
from leaven.pretext.diffusion import Cell, Schedule, UNet, make_head
from leaven.pretext.diffusion.opening import Opened
from leaven.recipes.common.dry_run import noise

Recipe = Callable[[Path], ModuleType]
TINY = """
from leaven.pretext.diffusion import UNet


def tiny(in_chans=3):
    return UNet(in_chans, width=16, multipliers=(1, 2), attention=(), head_width=16)
"""
NET = ["--backbone", "tiny_net:tiny"]
FLAGS = ["--image-size", "8", "--workers", "0", "--in-chans", "1"]
QUICK = [*FLAGS, "--timesteps", "20", "--pool", "1,2", "--probe-images", "300"]


@pytest.fixture(autouse=True)
def tiny_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny_net.py").write_text(TINY)
    monkeypatch.syspath_prepend(str(tmp_path))


def results(folder: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Path(folder, "results.json").read_text())["results"]
    return found


@pytest.mark.slow
def test_it_trains_and_its_weights_are_read_again(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    module = recipe(DIFFUSION)
    module.main(
        [*NET, *QUICK, "--epochs", "4", "--output-dir", "out", "--head", "linear", "--head-steps", "300"]
    )
    said = capsys.readouterr().out
    assert "digits are a smoke test" in said
    assert "the cell chosen on 60 more" in said
    who = [each["who"] for each in results("out")]
    assert who == ["pixels", "trained network", "trained network", "untrained network"]
    assert all(each["top1"] > 0.5 for each in results("out"))
    assert len(results("out")[1]["grid"]) == 2 * 9 * 2  # clean and t = 20, nine blocks, two pools
    for name in ("loss", "samples", "grid"):
        assert Path(f"out/plots/{name}.png").stat().st_size > 5000
    kept = torch.load("out/head.pt", weights_only=True)
    head = make_head(**kept["arguments"])
    head.load_state_dict(kept["state_dict"])
    assert kept["cell"] == results("out")[2]["cell"]
    assert kept["mean"].shape == (kept["arguments"]["channels"], *[kept["arguments"]["side"]] * 2)
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    load("tiny_net:tiny", "out/backbone.safetensors")
    module.main([*QUICK, "--model", "out", "--output-dir", "again"])
    assert results("again")[1]["top1"] == results("out")[1]["top1"]
    assert results("again")[1]["grid"] == results("out")[1]["grid"]


def test_held_out_images_have_noise_of_their_own(recipe: Recipe, tmp_path: Path) -> None:
    images = TensorDataset(torch.rand(6, 1, 8, 8), torch.arange(6) % 2)
    both = SimpleNamespace(
        data=SimpleNamespace(train=images, val=images), whole=lambda part, most: [part.tensors]
    )
    settings = SimpleNamespace(
        blocks=("1",), timesteps=(300,), pool=(1,), draws=1, include_clean=True, seed=0, probe_images=9
    )
    net = UNet(1, width=16, multipliers=(1, 2), attention=(), head_width=16)
    rivals = {"trained network": Opened(net, Schedule.linear())}
    found = recipe(DIFFUSION).cached(rivals, both, settings, SimpleNamespace(path=tmp_path))
    (train, _), (val, _) = found["trained network"]["train"], found["trained network"]["val"]
    for cell in train:
        assert torch.equal(train[cell], val[cell]) == (cell.t == "clean")


def test_a_head_bears_a_number_that_is_constant_in_training_alone(recipe: Recipe, tmp_path: Path) -> None:
    cell, y = Cell(20, "block", 1), torch.arange(200) % 2
    maps = (2.0 * y - 1).view(-1, 1, 1, 1) + torch.zeros(200, 2, 1, 1)
    maps[:, 1] = 0  # a dead unit, which a few held-out images wake
    waking = maps.clone()
    waking[:100, 1] = 0.01
    settings = SimpleNamespace(head="linear", head_steps=1500, seed=0)
    parts = {"train": ({cell: maps}, y), "val": ({cell: waking}, y)}
    top1 = recipe(DIFFUSION).head(settings, parts, cell, torch.arange(200), 2, tmp_path / "head.pt")
    assert top1 == 1


@pytest.mark.slow
def test_resume_is_exact(recipe: Recipe) -> None:
    module, flags = recipe(DIFFUSION), [*NET, *FLAGS, "--no-grid", "--epochs", "2", "--limit-batches", "3"]
    module.main([*flags, "--output-dir", "whole", "--save-every", "1"])
    module.main([*flags, "--output-dir", "cut", "--save-every", "1"])
    (last,) = Path("cut/checkpoints").glob("update-*6.pt")
    last.unlink()
    Path("cut/backbone.safetensors").unlink()
    module.main([*flags, "--output-dir", "cut", "--save-every", "1", "--resume", "auto"])
    a, b = (load("tiny_net:tiny", f"{name}/backbone.safetensors").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_few_labels_and_no_labels(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    module = recipe(DIFFUSION)
    quick = [*NET, *QUICK, "--epochs", "1", "--limit-batches", "2"]
    module.main([*quick, "--labels", "5", "--output-dir", "few"])
    assert "probes: 40 labels, the cell chosen on 10 more" in capsys.readouterr().out
    Path("images").mkdir()
    for i in range(70):
        Image.new("RGB", (8, 8), (3 * i, 0, 0)).save(f"images/{i}.png")
    module.main([*quick, "--data", "images", "--batch-size", "16", "--output-dir", "none"])
    assert "no labels: features are not probed" in capsys.readouterr().out


def test_no_cell_is_chosen_on_no_images(recipe: Recipe) -> None:
    """Of four labels a fifth is none."""
    module = recipe(DIFFUSION)
    settings = module.DiffusionSettings(in_chans=1, labels="1")
    images = module.scaled(noise(8, (8, 8), 1, classes=4), settings)
    assert module.judge(None, images, settings, None) == ([], ["4 labels are too few to learn from"], [])


def test_the_dry_run(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(DIFFUSION).main([*NET, *QUICK, "--dry-run"])
    assert "all works here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--timesteps", "1000"], "timestep 1000 is out of range"),
        (["--blocks", "mid"], "no block 'mid' in UNet; there are: input_blocks.0"),
        pytest.param(*(["--blocks", "99"], "block 99: UNet has 1 to 9"), marks=pytest.mark.slow),
        pytest.param(*(["--pool", "0"], "draws and pool must be at least 1"), marks=pytest.mark.slow),
        (["--model", "nowhere"], "no diffusion model at nowhere"),
        (["--model", "other.pt"], "time_embed.0.weight is (128, 32), and (1024, 256) is needed"),
        (["--ema-decay", "1"], "--ema-decay must be at least 0 and below 1"),
        (["--draws", "0"], "--draws must be at least 1"),
        (["--model", "out", "--no-grid"], "leave --no-grid and --dry-run out"),
        (["--model", "out", "--lr", "3"], "--lr is of training: leave it out with --model"),
        (["--image-size", "9"], "images of 9x9 pixels: both sides must be multiples of 2"),
        pytest.param(*(["--labels", "5000"], "training images only"), marks=pytest.mark.slow),
    ],
)
def test_wrong_flags(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    torch.save(UNet(1, width=32, multipliers=(1,)).state_dict(), "other.pt")
    module = recipe(DIFFUSION)
    training = [] if "--model" in flags else [*NET, "--epochs", "1", "--limit-batches", "1"]
    assert message in refusal(lambda: module.main([*QUICK, *training, *flags]), capsys)
    assert not list(Path().glob("runs/*/metrics.jsonl"))  # nothing was trained first


def test_a_backbone_that_is_no_denoiser(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*QUICK, "--backbone", "test_resnet", "--epochs", "1"]
    said = refusal(lambda: recipe(DIFFUSION).main(flags), capsys)
    assert "--backbone test_resnet is no denoiser: it must be a network called as net(x_t, t)" in said


def test_a_model_is_read_by_one_process(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = recipe(DIFFUSION)
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refusal(lambda: module.main(["--model", "out", "--output-dir", "read"]), capsys)
    assert said == "error: --model trains nothing and is for one process: leave the launcher out"
    assert not Path("read").exists()
