"""recipes/rotnet.py: what it says and leaves behind, exact resume, its measurements, and its errors."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from recipe_programs import ROTNET, rows, same_tensors
from torch import Tensor, nn

from leaven.pretext import Output, RotNet
from leaven.recipes.common.checkpoint import listing, load
from leaven.recipes.common.flags import run_main

Recipe = Callable[[Path], ModuleType]
Main = Callable[..., Path]
SMALL = ["--backbone", "test_resnet", "--image-size", "32", "--batch-size", "8", "--workers", "0"]
SHORT = ["--epochs", "2", "--limit-batches", "3", "--probe-images", "60", "--probe-width", "64"]


@pytest.fixture
def rotnet(run: Main, recipe: Recipe) -> Main:
    """Runs the recipe in this process on a small net for a few updates: run folder, flags -> folder."""
    recipe(ROTNET)
    return lambda name, *flags: run(ROTNET, name, *SMALL, *SHORT, *flags)


def test_a_run_says_in_order_what_it_should_and_leaves_a_whole_folder(
    rotnet: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm
    from safetensors.torch import load_file

    folder = rotnet("out")
    said = capsys.readouterr().out
    expected = [
        "cue audit: rotation told by trivial statistics of the images: texture ",
        "cue audit: by traces of the pipeline alone: texture 25.0%, border 25.0%",
        "held-out rotation accuracy: ",
        "\nkNN: k=20",
        "\nraw pixels 8x8 ",
        "\ntrained backbone ",
        "\nuntrained backbone, stage by stage: ",
        "smoke test of the recipe and no evidence",
        "run folder: out (",
    ]
    places = [said.find(part) for part in expected]
    assert min(places) >= 0, dict(zip(expected, places, strict=True))
    assert places == sorted(places)
    assert {path.name for path in (folder / "plots").iterdir()} == {"loss.png", "stages.png"}
    card = (folder / "README.md").read_text()
    assert "# test_resnet, RotNet" in card
    assert "held-out rotation accuracy" in card
    exported = load_file(folder / "backbone.safetensors")
    timm.create_model("test_resnet", num_classes=0).load_state_dict(exported)
    trained = load(listing(folder / "checkpoints")[0])["model"]
    assert torch.equal(
        exported["stem.0.weight"] if "stem.0.weight" in exported else exported["conv1.0.weight"],
        trained["backbone.conv1.0.weight"],
    )
    assert all(0 <= row["rotation_accuracy"] <= 1 for row in rows(folder))


def test_it_learns_and_the_held_out_accuracy_is_counted_over_all_turns(
    rotnet: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    rotnet(
        "out",
        "--epochs",
        "1",
        "--limit-batches",
        "60",
        "--batch-size",
        "16",
        "--lr",
        "3e-3",
        "--warmup-epochs",
        "0.1",
    )
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("held-out rotation accuracy"))
    accuracy = float(line.split()[3].rstrip("%"))
    assert accuracy > 45
    assert round(accuracy / 100 * 240, 2) == pytest.approx(round(accuracy / 100 * 240), abs=0.02)  # of 4 x 60


def test_the_accuracy_of_a_network_that_knows(rotnet: Main, recipe: Recipe) -> None:
    """A stand-in that reads the turn off a mark that the images carry is right always, another one by chance."""
    module = sys.modules["recipe_under_test_rotnet"]

    class Marks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            corners = torch.stack([x[:, 0, 0, 0], x[:, 0, -1, 0], x[:, 0, -1, -1], x[:, 0, 0, -1]], 1)
            return corners  # bright top-left corner: where counter-clockwise turns take it

    class Loader:
        data = type("Data", (), {"train": None, "val": None})

        def whole(self, part: Any, most: int) -> list[tuple[Tensor, Tensor]]:
            images = torch.zeros(6, 3, 8, 8)
            images[:, 0, 0, 0] = 1
            return [(images, torch.zeros(6))]

        def calibration(self) -> list[tuple[Tensor, Tensor]]:
            return self.whole(None, 6)

    class Knows(RotNet):
        def __init__(self, order: list[int]) -> None:
            nn.Module.__init__(self)
            self.backbone, self.order = Marks(), order
            self.anchor = nn.Parameter(torch.zeros(1))

        def logits(self, images: Tensor) -> Tensor:
            return self.backbone(images)[:, self.order]

    assert module.held_out_accuracy(Knows([0, 1, 2, 3]), Loader(), 6) == 1.0
    assert module.held_out_accuracy(Knows([0, 3, 2, 1]), Loader(), 6) == 0.5  # clockwise


@pytest.mark.parametrize("mode", [pytest.param("all", marks=pytest.mark.slow), "random"])
def test_sigterm_and_resume_are_the_uninterrupted_run(
    rotnet: Main, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--mode", mode, "--drop-path", "0.3"]
    whole = rotnet("whole", *flags)
    calls, plain = [0], RotNet.forward

    def forward(self: RotNet, images: Tensor, generator: torch.Generator | None = None) -> Output:
        calls[0] += 1
        if calls[0] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, images, generator)

    with monkeypatch.context() as patch:
        patch.setattr(RotNet, "forward", forward)
        with pytest.raises(SystemExit) as stopped:
            rotnet("broken", *flags)
    assert stopped.value.code == 143
    broken = rotnet("broken", *flags, "--resume", "auto")
    assert rows(whole) == rows(broken)
    ends = [load(listing(folder / "checkpoints")[0])["model"] for folder in (whole, broken)]
    assert same_tensors(*ends)


def test_unlabelled_images_and_the_curriculum(
    rotnet: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np
    from PIL import Image

    (tmp_path / "flat").mkdir()
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "flat" / f"{i}.jpg")
    folder = rotnet(
        "out", "--data", str(tmp_path / "flat"), "--image-size", "64", "--callbacks", "efficienttrain"
    )
    said = capsys.readouterr().out
    assert "no labels: kNN and linear probe are skipped" in said
    assert "run folder: out (weights, model card, log, plots/loss.png)" in said
    assert [path.name for path in (folder / "plots").iterdir()] == ["loss.png"]
    assert "near chance: do these images have a right way up?" in said  # noise has none
    assert {row["size"] for row in rows(folder)} == {48.0, 64.0}


def test_a_dry_run_needs_no_data(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(ROTNET).main([*SMALL, "--dry-run", "--data", "nowhere"])
    assert "weights differ by at most 0 " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--image-size", "32x64"], ["--image-size 32x64", "square"]),
        (["--mode", "both"], ["--mode", "all", "random"]),
        (["--hflip", "2"], ["--hflip must be between 0 and 1"]),
        (["--backbone", "resnet5"], ["resnet5"]),
        (["--callbacks", "tract"], ["--callbacks tract", "efficienttrain"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_wrong_flags(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], flags: list[str], parts: list[str]
) -> None:
    module = recipe(ROTNET)
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: module.main([*SMALL, *SHORT, *flags]))
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]
