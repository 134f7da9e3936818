"""recipes/spark.py: what it prints and leaves behind, its presets, its errors, and that it resumes to the bit."""

import errno
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recipe_programs import (
    SPARK,
    TWO,
    kill_all,
    log_of,
    run,
    same_tensors,
    start,
    wait_for_line,
    wait_until_gone,
)

from leaven.pretext.spark import sample_mask
from leaven.recipes.common.checkpoint import listing, load
from leaven.recipes.common.flags import UserError, run_main

Recipe = Callable[[Path], ModuleType]
Main = Callable[..., Path]
SMALL = ["--backbone", "test_convnext", "--decoder-width", "32", "--batch-size", "8", "--workers", "0"]
SHORT = ["--epochs", "2", "--limit-batches", "3", "--probe-images", "60"]


@pytest.fixture
def spark(run: Main, recipe: Recipe) -> Main:
    """Runs the recipe in this process on a small net for a few updates: run folder, flags -> folder."""
    recipe(SPARK)
    return lambda name, *flags: run(SPARK, name, *SMALL, *SHORT, *flags)


def photos(folder: Path, n: int, size: tuple[int, int] = (40, 60)) -> Path:
    """JPEGs of coloured noise in a flat folder."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.jpg")
    return folder


# --- what comes out ----------------------------------------------------------------------------------------------


def test_a_run_says_in_order_what_it_should_and_leaves_a_whole_folder(
    spark: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = spark("out")
    said = capsys.readouterr().out
    expected = [
        "SparK backend: packed (",
        "mask: 2x2 cells of 32 px, 0.500 hidden (0.6 asked)",
        "held-out masked loss before training: ",
        "held-out masked loss: ",
        "\nkNN: k=20",
        "\nlinear probe: ",
        "\nraw pixels 8x8 ",
        "\nuntrained backbone ",
        "\ntrained backbone ",
        "smoke test of the recipe and no evidence",
        "run folder: out (",
    ]
    places = [said.find(part) for part in expected]
    assert min(places) >= 0, dict(zip(expected, places, strict=True))
    assert places == sorted(places)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "backbone.safetensors",
        "README.md",
        "plots",
    }
    assert {path.name for path in (folder / "plots").iterdir()} == {"loss.png", "reconstructions.png"}
    card = (folder / "README.md").read_text()
    for part in (
        "# test_convnext, SparK",
        "ICLR 2023",
        "timm.create_model('test_convnext'",
        "digits",
        "0.500 hidden",
    ):
        assert part in card
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["mask_ratio"] for row in rows] == [0.5] * 6


def test_the_weights_load_strictly_into_plain_timm_and_are_those_of_the_run(spark: Main) -> None:
    import timm
    from safetensors.torch import load_file

    folder = spark("out")
    exported = load_file(folder / "backbone.safetensors")
    plain = timm.create_model("test_convnext", num_classes=0)
    plain.load_state_dict(exported)
    trained = load(listing(folder / "checkpoints")[0])["model"]
    assert all(torch.equal(value, trained[f"backbone.{name}"]) for name, value in exported.items())
    fresh = timm.create_model("test_convnext", num_classes=0)
    assert not torch.equal(exported["stem.0.weight"], fresh.state_dict()["stem.0.weight"])


def test_training_lowers_the_held_out_loss(spark: Main, capsys: pytest.CaptureFixture[str]) -> None:
    spark("out", "--epochs", "1", "--limit-batches", "30", "--warmup-epochs", "0.1", "--lr", "3e-3")
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("held-out masked loss: ")
    )
    before, after = (float(word) for word in line.split() if word[0].isdigit())
    assert 0.9 < before < 1.1  # standardised patches, predicted by almost nothing
    assert after < before - 0.02


def test_batchnorm_is_taken_anew_from_whole_images_before_probing(
    spark: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    folder = spark("out", "--backbone", "test_resnet")
    said = capsys.readouterr().out
    for who in ("untrained", "trained"):
        assert re.search(rf"\n{who} backbone: statistics of \d+ BatchNorm layers taken anew from whole", said)
    exported = load_file(folder / "backbone.safetensors")
    trained = load(listing(folder / "checkpoints")[0])["model"]
    for name, value in exported.items():
        same = torch.equal(value, trained[f"backbone.{name}"])
        assert same == (not name.endswith(("running_mean", "running_var", "num_batches_tracked"))), name


def test_a_flat_folder_without_labels_and_images_that_are_not_square(
    spark: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "photos", 40)
    folder = spark("out", "--data", str(tmp_path / "photos"), "--image-size", "32x96", "--workers", "1")
    said = capsys.readouterr().out
    assert "mask: 1x3 cells" in said
    assert "no labels: kNN and linear probe are skipped" in said
    assert "smoke test" not in said
    assert (folder / "backbone.safetensors").exists()


def test_too_few_labels_to_learn_from_are_said(spark: Main, capsys: pytest.CaptureFixture[str]) -> None:
    folder = spark("out", "--probe-images", "1")
    said = capsys.readouterr().out
    assert (
        "1 labelled training images of 1 classes are too few to learn from: kNN and linear probe are skipped"
        in said
    )
    assert {"backbone.safetensors", "README.md"} <= {path.name for path in folder.iterdir()}


def test_weights_are_saved_before_anything_judges_them(
    recipe: Recipe, spark: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recipe(SPARK)

    def fails(*_: object) -> None:
        raise UserError("features contain NaN")

    monkeypatch.setattr(module, "probe", fails)
    with pytest.raises(UserError, match="NaN"):
        module.main([*SMALL, *SHORT, "--output-dir", "out"])
    assert Path("out/backbone.safetensors").exists()


def test_a_few_broken_images_are_named_and_skipped(spark: Main, tmp_path: Path) -> None:
    data = photos(tmp_path / "photos", 40)
    (data / "007.jpg").write_bytes(b"not a picture")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spark("out", "--data", str(data), "--image-size", "64", "--limit-batches", "5")
    assert any("007.jpg" in str(warning.message) for warning in caught)


def test_augmenting_on_the_device_trains(spark: Main) -> None:
    rows = log_of(spark("out", "--augment-on", "device", "--epochs", "1"))
    assert len(rows) == 3


@pytest.mark.parametrize("backend", ["packed", pytest.param("dense", marks=pytest.mark.slow)])
def test_backends_agree_on_the_first_update(spark: Main, backend: str) -> None:
    first = log_of(spark(backend, "--backend", backend, "--epochs", "1", "--limit-batches", "1"))[0]
    auto = log_of(spark("auto", "--epochs", "1", "--limit-batches", "1"))[0]
    assert first["loss"] == pytest.approx(auto["loss"], rel=1e-5)


def test_masks_come_from_the_loop_s_keyed_generators(spark: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    from leaven.recipes.common.loop import keyed_generator

    seeds: list[int] = []

    def draw(batch: int, grid: tuple[int, int], ratio: float, generator: torch.Generator) -> torch.Tensor:
        seeds.append(generator.initial_seed())
        return sample_mask(batch, grid, ratio, generator)

    monkeypatch.setattr(sys.modules["recipe_under_test_spark"], "sample_mask", draw)
    spark("out", "--epochs", "1", "--limit-batches", "2", "--seed", "5")
    assert seeds == [keyed_generator(5, update, 0, "process 0").initial_seed() for update in (0, 1)]


def test_a_dry_run_needs_no_data_and_checks_resume_and_export(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe(SPARK).main(["--backbone", "test_convnext", "--dry-run", "--data", "nowhere", "--epochs", "300"])
    said = capsys.readouterr().out
    assert "epochs: 300" in said
    assert "parameters: backbone 0.21 M" in said
    assert "resumed from update-000000001.pt; weights differ by at most 0 " in said
    assert "all works here (on noise" in said
    assert list(tmp_path.iterdir()) == []


def test_the_card_s_code_loads_a_grey_backbone(spark: Main) -> None:
    folder = spark(
        "out", "--in-chans", "1", "--epochs", "1", "--limit-batches", "1", "--backbone", "test_resnet"
    )
    code = (folder / "README.md").read_text().split("```")[1].removeprefix("python\n")
    assert "in_chans=1" in code
    names: dict[str, Any] = {}
    exec(code.replace('"backbone.safetensors"', repr(str(folder / "backbone.safetensors"))), names)
    names["backbone"].eval()
    assert names["backbone"](torch.zeros(1, 1, 64, 64)).isfinite().all()


def test_a_dry_run_by_two_processes_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--dry-run is for one process"):
        recipe(SPARK).main(["--backbone", "test_convnext", "--dry-run"])


# --- presets -----------------------------------------------------------------------------------------------------

PAPER = {
    "resnet50-paper": ("resnet50", 0.05, (0.9, 0.95), 224, 4096, 2e-4, 0.6),
    "resnet101-paper": ("resnet101", 0.08, (0.9, 0.95), 224, 4096, 2e-4, 0.6),
    "resnet152-paper": ("resnet152", 0.10, (0.9, 0.95), 224, 4096, 2e-4, 0.6),
    "resnet200-paper": ("resnet200", 0.15, (0.9, 0.95), 224, 4096, 2e-4, 0.6),
    "convnext_s-paper": ("convnext_s", 0.2, (0.9, 0.999), 224, 4096, 2e-4, 0.6),
    "convnext_b-paper": ("convnext_b", 0.3, (0.9, 0.999), 224, 4096, 2e-4, 0.6),
    "convnext_l-paper": ("convnext_l", 0.4, (0.9, 0.999), 224, 4096, 2e-4, 0.6),
    "convnext_l-384-paper": ("convnext_l", 0.4, (0.9, 0.999), 384, 2048, 4e-4, 0.75),
}


def test_presets_hold_the_papers_numbers(recipe: Recipe) -> None:
    from leaven.recipes.common.start import read_settings, resolve

    module = recipe(SPARK)
    assert module.PRESETS.keys() == PAPER.keys()
    for name, (backbone, drop, betas, side, batch, base, ratio) in PAPER.items():
        s = read_settings(module.SparkSettings, ["--preset", name], module.PRESETS)
        assert (s.backbone, s.drop_path, s.betas, s.image_size) == (backbone, drop, betas, (side, side))
        assert (s.global_batch_size, s.lr_base, s.mask_ratio) == (batch, base, ratio)
        assert (s.opt, s.clip_grad, s.weight_decay, s.weight_decay_end) == ("lamb", 5.0, 0.04, 0.2)
        assert (s.epochs, s.warmup_epochs, s.decoder_width) == (1600, 40, 768)
        assert (s.crop_scale, s.mixed_precision, s.sched) == ((0.67, 1.0), "no", "cosine")
        assert resolve(s, 32, {}).lr == pytest.approx(3.2e-3)
    for flags, value in ((["--epochs", "800"], 800), ([], 1600)):  # flags win over a preset
        s = read_settings(module.SparkSettings, ["--preset", "resnet50-paper", *flags], module.PRESETS)
        assert s.epochs == value


def test_a_preset_trains(spark: Main) -> None:
    flags = ["--preset", "convnext_s-paper", "--image-size", "64", "--epochs", "1"]
    # SMALL sets --batch-size, which a preset's global batch excludes.
    rows = log_of(spark("out", *flags, "--global-batch-size", "none"))
    assert [row["lr"] > 0 for row in rows] == [True] * 3


# --- exact resume ------------------------------------------------------------------------------------------------


def signal_in_update(module: ModuleType, monkeypatch: pytest.MonkeyPatch, update: int) -> None:
    """SIGTERM while the given update is drawing its mask."""
    drawn = [0]

    def draw(*args: Any) -> torch.Tensor:
        drawn[0] += 1
        if drawn[0] == update:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample_mask(*args)

    monkeypatch.setattr(module, "sample_mask", draw)


@pytest.mark.parametrize(
    ("backbone", "update"),
    [("test_convnext", 2), ("test_resnet", 4), pytest.param("convnext_atto", 5, marks=pytest.mark.slow)],
)
def test_sigterm_and_resume_are_the_uninterrupted_run(
    spark: Main, monkeypatch: pytest.MonkeyPatch, backbone: str, update: int
) -> None:
    from safetensors.torch import load_file

    flags = ["--backbone", backbone, "--drop-path", "0.3"]
    whole = spark("whole", *flags)
    with monkeypatch.context() as patch:
        signal_in_update(sys.modules["recipe_under_test_spark"], patch, update)
        with pytest.raises(SystemExit) as stopped:
            spark("broken", *flags)
    assert stopped.value.code == 143
    assert listing(Path("broken/checkpoints"))[0].name == f"update-{update:09d}.pt"
    assert not Path("broken/backbone.safetensors").exists()
    broken = spark("broken", *flags, "--resume", "auto")
    assert log_of(whole) == log_of(broken)
    ends = [load(listing(folder / "checkpoints")[0]) for folder in (whole, broken)]
    assert same_tensors(ends[0]["model"], ends[1]["model"])
    assert same_tensors(*({"x": end["optimizer"]["state"]} for end in ends))
    assert same_tensors(*(load_file(folder / "backbone.safetensors") for folder in (whole, broken)))


@pytest.mark.slow
def test_two_processes_with_accumulation_and_workers_resume_exactly(tmp_path: Path) -> None:
    """SIGTERM to the launcher, which hands it to both."""
    flags = [*SMALL, *SHORT, "--backbone", "test_resnet", "--limit-batches", "6", "--grad-accum-steps", "2"]
    flags += ["--drop-path", "0.3", "--workers", "1", "--epochs", "6"]
    done = run([*TWO, SPARK, *flags, "--output-dir", "whole"], tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    process = start([*TWO, SPARK, *flags, "--output-dir", "broken"], tmp_path)
    try:
        wait_for_line(process, "update 2/18")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    finally:
        kill_all(process)
    wait_until_gone(tmp_path)
    assert 2 <= len(log_of(tmp_path / "broken")) < 18
    done = run([*TWO, SPARK, *flags, "--output-dir", "broken", "--resume", "auto"], tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert log_of(whole) == log_of(broken)
    ends = [load(listing(folder / "checkpoints")[0])["model"] for folder in (whole, broken)]
    assert same_tensors(*ends)


# --- bad input: one line and exit code 2 -------------------------------------------------------------------------


@pytest.fixture
def complaint(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the recipe writes to stderr for these flags, as `python recipes/spark.py` would; it must exit with 2."""
    from accelerate.state import AcceleratorState, GradientState

    module = recipe(SPARK)

    def main(*flags: str) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda: module.main([*SMALL, *SHORT, *flags]))
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return main


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--backbone", "convnet_t"], ["convnet_t", "convnext_t"]),
        (["--mask-ration", "0.5"], ["--mask-ration", "--mask-ratio"]),
        (["--backbone", "swin_t"], ["SwinTransformerBlock", "choose a backbone without it"]),
        (["--image-size", "100"], ["100x100", "32", "96x96"]),
        (["--image-size", "32"], ["mask ratio", "1"]),
        (["--mask-ratio", "0"], ["mask ratio"]),
        (["--decoder-width", "100"], ["100", "32"]),
        (["--stages", "4,7"], ["7"]),
        (["--mask-cell", "48"], ["48", "32"]),
        (["--opt", "lambs"], ["lambs", "lamb"]),
        (["--preset", "resnet50"], ["resnet50", "resnet50-paper"]),
        (["--preset", "resnet50-paper"], ["--global-batch-size", "--batch-size"]),
        (["--data", "nowhere"], ["nowhere"]),
        (["--data", "tv:CIFAR10@nowhere"], ["nowhere"]),
        (["--init", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["--grad-accum-steps", "9"], ["--grad-accum-steps 9"]),
        (["--mixed-precision", "fp16"], ["--mixed-precision fp16", "GPU"]),
        (["--log-with", "paper"], ["--log-with paper"]),
        (["--resume", "nowhere"], ["--resume nowhere"]),
        (["--batch-size", "5000"], ["5000", "--global-batch-size"]),
        (["--lr", "inf"], ["--lr", "finite"]),
        (["--weight-decay-end", "nan"], ["--weight-decay-end", "finite"]),
        (["--warmup-epochs", "nan"], ["--warmup-epochs", "finite"]),
        (["--clip-grad", "0"], ["--clip-grad 0", "none"]),
        (["--clip-grad", "nan"], ["--clip-grad", "finite"]),
        (["--seed", "4294967296"], ["--seed must be below 4294967296"]),
        (["--image-size", "1"], ["--image-size", "8"]),
        (["--image-size", "100000"], ["--image-size", "8192"]),
        (["--probe-images", "0"], ["--probe-images must be at least 1"]),
        (["--opt", "sgd"], ["--opt sgd", "--betas none"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_wrong_flags(complaint: Callable[..., str], flags: list[str], parts: list[str]) -> None:
    error = complaint(*flags)
    for part in parts:
        assert part in error


def test_folders_without_images(complaint: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in complaint("--data", str(tmp_path / "empty"))
    (tmp_path / "file").touch()
    assert "file" in complaint("--data", str(tmp_path / "file"))


def test_too_many_broken_images(complaint: Callable[..., str], tmp_path: Path) -> None:
    data = photos(tmp_path / "photos", 30)
    for i in range(0, 30, 2):
        (data / f"{i:03d}.jpg").write_bytes(b"not a picture")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error = complaint(
            "--data", str(data), "--max-bad-images", "2", "--image-size", "64", "--workers", "1"
        )
    assert "--max-bad-images 2" in error


def test_output_folders_that_will_not_do(complaint: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    assert "not empty" in complaint("--output-dir", "used")
    assert "not a folder" in complaint("--output-dir", "file")
    assert "cannot write to the run folder" in complaint("--output-dir", "file/inner")
    assert "cannot write to the run folder" in complaint("--output-dir", "/proc/leaven")


def test_a_corrupt_checkpoint(complaint: Callable[..., str], spark: Main) -> None:
    spark("out", "--epochs", "1")
    path = listing(Path("out/checkpoints"))[0]
    path.write_bytes(path.read_bytes()[:5000])
    assert "truncated or not a checkpoint" in complaint("--epochs", "1", "--resume", "out")


@pytest.mark.parametrize("what", ["checkpoint", "log", "weights", "picture"])
def test_a_disk_that_fills_up(
    complaint: Callable[..., str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if what == "checkpoint":
        monkeypatch.setattr("leaven.recipes.common.checkpoint.torch.save", full)
    elif what == "log":
        monkeypatch.setattr("leaven.recipes.common.run_folder.json", SimpleNamespace(dumps=full))
    elif what == "weights":
        monkeypatch.setattr("safetensors.torch.save_file", full)
    else:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert "No space left on device" in complaint(
        "--epochs", "1", "--limit-batches", "1", "--output-dir", "out"
    )


def test_as_a_program(tmp_path: Path) -> None:
    """The same through a real process: nothing but the one line, whatever libraries have to say."""
    wrong = run([sys.executable, SPARK, "--backbone", "convnet_t", "--output-dir", "out"], tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1
    refused = run([sys.executable, SPARK, "--backbone", "swin_t", "--output-dir", "out"], tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
