"""Every recipe in two processes on CPUs: as one process with twice the batch, or refused with one line."""

import math
import sys
from pathlib import Path

import pytest
from recipe_programs import (
    DIFFUSION,
    DKM,
    EVALUATE,
    LAYERS,
    PRIOR,
    ROTNET,
    SCALEKD,
    SEARCH,
    SPARK,
    TRAIN,
    TWO,
    rows,
    run,
)

FSDP = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--use_fsdp", "--num_processes", "2"]
FSDP += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
COMMON = ["--image-size", "32", "--workers", "0", "--epochs", "2", "--limit-batches", "2"]
# Without BatchNorm, whose statistics are each process's own on CPUs.
NET = ["--backbone", "test_convnext"]
TINY = "from leaven.pretext.diffusion import UNet\n\n\ndef tiny(in_chans=3):\n"
TINY += "    return UNet(in_chans, width=16, multipliers=(1, 2), attention=(), head_width=16)\n"

TRAINING = {
    "train": [TRAIN, *NET, "--hflip", "0", "--model-ema-decay", "0.9"],
    "spark": [SPARK, *NET, "--stages", "4,8", "--decoder-width", "16", "--probe-images", "60"],
    "rotnet": [ROTNET, *NET, "--probe-images", "60"],
    "scalekd": [SCALEKD, *NET, "--teacher", "test_vit", "--teacher-weights", "teacher/backbone.safetensors"],
    "diffusion_features": [DIFFUSION, "--backbone", "tiny_net:tiny", "--in-chans", "1", "--no-grid"],
}
# What both processes draw for themselves differs from what one process draws: masks, and noise.
DRAWS = {"spark", "diffusion_features"}
ALONE = {
    "evaluate": [EVALUATE, "--backbone", "test_resnet"],
    "dkm": [DKM],
    "functional_prior": [PRIOR],
    "schedule_search": [SEARCH, "--backbone", "test_resnet"],
    "evonorm_search": [LAYERS],
    "diffusion_features of a model": [DIFFUSION, "--model", "whole"],
    "spark's dry run": [SPARK, *NET, "--dry-run"],
}


def prepare(folder: Path, recipe: str) -> None:
    """What the commands need to find."""
    (folder / "tiny_net.py").write_text(TINY)
    if recipe == "scalekd":
        teacher = [sys.executable, TRAIN, "--backbone", "test_vit", *COMMON, "--output-dir", "teacher"]
        assert run(teacher, folder, timeout=300).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TRAINING)
def test_two_processes_learn_what_one_with_twice_the_batch_does(tmp_path: Path, recipe: str) -> None:
    prepare(tmp_path, recipe)
    command = [*TRAINING[recipe], *COMMON]
    two = run([*TWO, *command, "--batch-size", "8", "--output-dir", "two"], tmp_path, timeout=300)
    assert two.returncode == 0, two.stderr
    one = [sys.executable, *command, "--batch-size", "16", "--output-dir", "one"]
    assert run(one, tmp_path, timeout=300).returncode == 0
    found, expected = (rows(tmp_path / name) for name in ("two", "one"))
    assert [row["step"] for row in found] == [row["step"] for row in expected] == [1, 2, 3, 4]
    assert two.stdout.count("run folder: ") == 1
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )
    for row, other in zip(found, expected, strict=True):
        assert math.isfinite(row["loss"])
        if recipe not in DRAWS:
            # The first update sees the same weights. Adam then divides small gradients by their own size, which
            # makes more of how floats were summed.
            close = 1e-5 if row["step"] == 1 else 1e-2
            assert row["loss"] == pytest.approx(other["loss"], rel=close)
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=close)
            assert row.get("val_top1") == pytest.approx(other.get("val_top1"), abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ALONE)
def test_what_is_for_one_process_refuses_two(tmp_path: Path, recipe: str) -> None:
    done = run([*TWO, *ALONE[recipe], "--output-dir", "out"], tmp_path)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "one process" in said[0] or "starts its own processes" in said[0]
    assert "launcher" in said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TRAINING)
def test_fsdp_is_refused_before_anything_is_written(tmp_path: Path, recipe: str) -> None:
    done = run([*FSDP, *TRAINING[recipe], *COMMON, "--output-dir", "out"], tmp_path)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert said[0].startswith("error: this loop trains with DDP, not FSDP")
    assert not (tmp_path / "out").exists()
