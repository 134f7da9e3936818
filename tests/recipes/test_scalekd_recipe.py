"""recipes/scalekd.py: a teacher of recipes/train.py teaches; what is left behind, exact resume, errors."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from recipe_programs import SCALEKD, TRAIN, rows, same_tensors

from leaven.backbones import create, save
from leaven.recipes.common.checkpoint import listing, load
from leaven.recipes.common.flags import run_main

Recipe = Callable[[Path], ModuleType]
FLAGS = ["--image-size", "32", "--batch-size", "8", "--workers", "0", "--hflip", "0", "--epochs", "2"]
FLAGS += ["--limit-batches", "3"]
STUDENT = ["--backbone", "test_resnet", "--teacher", "test_vit", "--teacher-weights"]


@pytest.fixture
def weights(recipe: Recipe) -> str:
    """Of a teacher that recipes/train.py has trained a little."""
    recipe(TRAIN).main(["--backbone", "test_vit", *FLAGS, "--output-dir", "teacher"])
    forget()
    return "teacher/backbone.safetensors"


def forget() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_teacher_of_the_train_recipe_teaches(
    recipe: Recipe, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm
    from safetensors.torch import load_file

    module = recipe(SCALEKD)
    own = rows(Path("teacher"))[-1]["val_top1"]
    module.main([*STUDENT, weights, *FLAGS, "--callbacks", "tract,ema", "--output-dir", "out"])
    said = capsys.readouterr().out
    assert f"teacher: test_vit, {weights}, frozen" in said
    assert f"the teacher's own accuracy on 360 held-out images: {own:.2%}" in said
    found = rows(Path("out"))
    assert {"ce", "kd", "spatial3", "frequency4", "top1", "val_top1"} <= found[-1].keys()
    plain = timm.create_model("test_resnet", num_classes=10)
    plain.load_state_dict(load_file("out/backbone.safetensors"), strict=True)
    assert "# test_resnet, ScaleKD" in Path("out/README.md").read_text()
    saved = load(listing(Path("out/checkpoints"))[0])["model"]
    teachers = sum(value.numel() for value in load_file(weights).values())
    assert teachers > 300_000
    assert not any("teacher" in key or "tail" in key for key in saved)


def test_grey_images_reach_a_grey_teacher(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(SCALEKD).main([*STUDENT[:-1], "--image-size", "32", "--in-chans", "1", "--dry-run"])
    assert "exported weights load into the plain backbone" in capsys.readouterr().out


def test_resume_is_the_uninterrupted_run(recipe: Recipe, weights: str) -> None:
    module = recipe(SCALEKD)
    flags = [*STUDENT, weights, *FLAGS, "--save-every", "1"]
    module.main([*flags, "--output-dir", "whole"])
    forget()
    module.main([*flags, "--output-dir", "part"])
    forget()
    newest = listing(Path("part/checkpoints"))[0]
    newest.unlink()
    module.main([*flags, "--output-dir", "part", "--resume", "auto"])
    same_tensors(*(load(listing(Path(name) / "checkpoints")[0])["model"] for name in ("whole", "part")))


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([], ["--teacher-weights: give FILE or pretrained"]),
        (["--teacher-weights", "nowhere.safetensors"], ["no weights file nowhere.safetensors"]),
        (["--teacher", "resnet18", "--teacher-weights", "x"], ["no weights file x"]),
        (["--teacher", "vit_tinny"], ["vit_tinny"]),
        (["--kd-weight", "2"], ["--kd-weight must be between 0 and 1"]),
        (["--bce-loss"], ["--bce-loss is not of ScaleKD"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_wrong_flags(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], flags: list[str], parts: list[str]
) -> None:
    module = recipe(SCALEKD)
    if "vit_tinny" in flags:
        flags = [*flags, "--teacher-weights", "x"]
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: module.main(["--backbone", "test_resnet", *FLAGS, *flags]))
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]


def test_images_that_do_not_suit_the_teacher_are_refused_before_training(
    recipe: Recipe, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = recipe(SCALEKD)
    flags = [*STUDENT, weights, *FLAGS, "--image-size", "40", "--output-dir", "out"]
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: module.main(flags))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "--image-size 40x40 does not suit --teacher test_vit: " in said
    assert "should be divisible by patch size (16)" in said
    assert not Path("out/config.yaml").exists()


def test_a_dry_run_labels_its_noise(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(SCALEKD).main([*STUDENT[:-1], "--image-size", "32", "--labels", "10%", "--dry-run"])
    assert "exported weights load into the plain backbone" in capsys.readouterr().out


def test_a_dry_run_has_the_classes_of_the_teachers_file(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = create("test_vit", num_classes=7, image_size=32)
    save(teacher, "teacher.safetensors", name="test_vit", metadata={"num_classes": 7})
    recipe(SCALEKD).main([*STUDENT, "teacher.safetensors", "--image-size", "32", "--dry-run"])
    assert "all works here (on noise" in capsys.readouterr().out


def test_a_teacher_of_no_family_is_refused(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    recipe(TRAIN).main(["--backbone", "test_resnet", *FLAGS, "--output-dir", "teacher"])
    forget()
    capsys.readouterr()
    module = recipe(SCALEKD)
    flags = ["--backbone", "test_resnet", "--teacher", "test_resnet"]
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: module.main([*flags, "--teacher-weights", "teacher/backbone.safetensors", *FLAGS]))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "--teacher test_resnet: no tail is known of a ResNet" in said
    assert "TeacherTail" not in said  # which no flag takes
