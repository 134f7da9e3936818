"""Averages and kNN in the recipes that train without labels."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipe_programs import ROTNET, SPARK, rows, same_tensors
from safetensors.torch import load_file

from leaven.recipes.common.flags import UserError

FLAGS = [
    "--workers", "0", "--epochs", "2", "--limit-batches", "3", "--batch-size", "8", "--image-size", "32",
    "--backbone", "test_resnet", "--probe-images", "60", "--callbacks", "efficienttrain,ema,knn",
    "--model-ema-decay", "0.5", "--curriculum", "0.5:16,1:32",
]  # fmt: skip
OWN = {SPARK: ["--decoder-width", "16", "--stages", "4,8"], ROTNET: ["--hflip", "0"]}


@pytest.fixture
def pretrain(run: Callable[..., Path]) -> Callable[..., Path]:
    """Runs a recipe in this process for a few updates: its file, run folder, flags -> folder."""
    return lambda program, name, *flags: run(program, name, *FLAGS, *OWN[program], *flags)


@pytest.mark.parametrize(
    "program", [pytest.param(SPARK, id="spark"), pytest.param(ROTNET, id="rotnet", marks=pytest.mark.slow)]
)
def test_resume_is_the_uninterrupted_run(
    program: Path,
    pretrain: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import leaven.recipes.common.loop as loop

    whole = pretrain(program, "whole")
    said = capsys.readouterr().out
    assert "averaged backbone: statistics of" in said
    scores = [row.get("knn_top1") for row in rows(whole)]
    assert [score is None for score in scores] == [True, True, False, False, False, False]
    assert len(set(scores[2:5])) == 1
    plain = loop._gradients

    def gradients(*args: Any) -> Any:
        if args[4] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_gradients", gradients)
        with pytest.raises(SystemExit):
            pretrain(program, "broken")
    broken = pretrain(program, "broken", "--resume", "auto")
    assert rows(whole) == rows(broken)
    for name in ("backbone.safetensors", "backbone-ema.safetensors"):
        assert same_tensors(load_file(whole / name), load_file(broken / name))
    own, averaged = (load_file(whole / name) for name in ("backbone.safetensors", "backbone-ema.safetensors"))
    assert own.keys() == averaged.keys()
    assert not same_tensors(own, averaged)


def test_an_average_without_memory_is_the_network(
    pretrain: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pretrain(SPARK, "out", "--model-ema-decay", "0", "--callbacks", "ema", "--curriculum", "et")
    assert "hardly moves" not in capsys.readouterr().out
    both = [load_file(folder / name) for name in ("backbone.safetensors", "backbone-ema.safetensors")]
    assert same_tensors(*both)


@pytest.mark.slow
def test_a_dry_run_has_them_all(pretrain: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(SPARK, "out", "--dry-run", "--image-size", "64")
    assert "weights differ by at most 0 from those without the break" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--callbacks", "ema", "--curriculum", "et", "--eval-every", "2"], "add --callbacks knn"),
        (["--eval-every", "0"], "--eval-every must be at least 1, got 0"),
        (["--model-ema-decay", "1.5"], "--model-ema-decay must be between 0 and 1"),
        (["--probe-images", "1"], "--callbacks knn: 1 labelled training images"),
        (["--callbacks", "tract", "--curriculum", "et"], "this recipe knows efficienttrain, ema, knn"),
    ],
)
def test_wrong_flags(pretrain: Callable[..., Path], flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(SPARK, "out", *flags)


@pytest.mark.parametrize("program", [SPARK, ROTNET])
def test_knn_without_labels_is_refused_before_anything_is_made(
    program: Path, run: Callable[..., Path], tmp_path: Path
) -> None:
    from PIL import Image

    for n in range(4):
        Image.new("RGB", (40, 40), (n, 0, 0)).save(tmp_path / f"{n}.png")
    flags = ["--backbone", "test_resnet", "--data", str(tmp_path), "--callbacks", "knn"]
    with pytest.raises(UserError, match="--callbacks knn: no labels; give labelled images"):
        run(program, "out", *flags)
    assert not Path("out").exists()


def test_a_run_that_is_too_short_for_its_average_says_so() -> None:
    from leaven.recipes.common.average import AverageSettings

    assert AverageSettings(model_ema_decay=0.99).about_average(100) == []
    assert AverageSettings(model_ema_decay=0.9999, model_ema_warmup=True).about_average(6) == []
    (line,) = AverageSettings(model_ema_decay=0.9999).about_average(6)
    assert line.startswith("an average with decay 0.9999 hardly moves in 6 updates: add --model-ema-warmup")
