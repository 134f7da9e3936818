"""recipes/train.py: what it learns and leaves behind, its presets, exact resume, fine-tuning, and its errors."""

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from recipe_programs import EVALUATE, SPARK, TRAIN, TWO, rows, run, same_tensors
from torch import Tensor, nn

from leaven.backbones import create, metadata, save
from leaven.recipes.common.augment import eval_transform
from leaven.recipes.common.batches import Part
from leaven.recipes.common.checkpoint import listing, load
from leaven.recipes.common.data import open_data
from leaven.recipes.common.flags import run_main
from leaven.recipes.common.sampler import Key

Recipe = Callable[[Path], ModuleType]
Main = Callable[..., Path]
SMALL = [
    "--backbone",
    "test_resnet",
    "--image-size",
    "32",
    "--batch-size",
    "8",
    "--workers",
    "0",
    "--hflip",
    "0",
]
SHORT = ["--epochs", "2", "--limit-batches", "3"]
ALL = ["--aa", "trivial", "--reprob", "0.5", "--mixup", "0.4", "--cutmix", "1", "--drop-path", "0.3"]
ALL += ["--layer-decay", "0.7", "--model-ema-decay", "0.8", "--aug-repeats", "2", "--opt", "lamb"]


@pytest.fixture
def train(run: Main, recipe: Recipe) -> Main:
    """Runs the recipe in this process on a small net for a few updates: run folder, flags -> folder."""
    recipe(TRAIN)
    return lambda name, *flags: run(TRAIN, name, *SMALL, *SHORT, *flags)


def digits_by_hand(size: int, crop_pct: float) -> tuple[Tensor, Tensor]:
    """The held-out digits as the recipe shows them to the network."""
    data = open_data("digits")
    transform = eval_transform((size, size), crop_pct, data.mean, data.std)
    images = torch.stack([transform(data.val.image(i), Key(0, 0, i)) for i in range(len(data.val))])
    return images, torch.tensor([data.val.label(i) for i in range(len(data.val))])


# --- callbacks ---------------------------------------------------------------------------------------------------


def test_methods_by_name(train: Main, capsys: pytest.CaptureFixture[str]) -> None:
    """TrAct and EvoNorm act; what is exported is the changed network, and the card says how to build it."""
    import timm
    from safetensors.torch import load_file

    plain = train("plain", "--crop-scale", "1,1")
    capsys.readouterr()
    folder = train("out", "--crop-scale", "1,1", "--callbacks", "tract,evonorm_s0", "--tract-lam", "0.2")
    said = capsys.readouterr().out
    norms = sum("running_var" in key for key in timm.create_model("test_resnet").state_dict())
    assert f"EvoNorm-s0: {norms} of {norms} BatchNorm layers replaced" in said
    assert "TrAct(lam=0.2, layers=" in said
    assert rows(folder)[0]["loss"] != rows(plain)[0]["loss"]
    code = (folder / "README.md").read_text().split("```python")[1].split("```")[0]
    assert 'replace_norm_act(backbone, partial(evo_norm, "s0"))' in code
    found: dict[str, Any] = {}
    code = code.replace('"backbone.safetensors"', repr(str(folder / "backbone.safetensors")))
    exec(code, found)
    weights = load_file(folder / "backbone.safetensors")
    assert all(torch.equal(found["backbone"].state_dict()[key], value) for key, value in weights.items())
    assert any(key.endswith(".v") for key in weights)


def test_evonorm_weights_go_on_in_every_recipe(
    train: Main, recipe: Recipe, run: Main, complaint: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Their file notes the layers; who starts from it gets the same network, and what it writes notes them too."""
    folder = train("first", "--callbacks", "evonorm_s0")
    weights = str(folder / "backbone.safetensors")
    assert metadata(weights)["evonorm"] == "s0"
    capsys.readouterr()
    again = train("again", "--init", weights)
    said = capsys.readouterr().out
    assert f"{weights}: BatchNorm replaced by EvoNorm-s0" in said
    assert f"--init {weights}: all weights" in said
    assert metadata(again / "backbone.safetensors")["evonorm"] == "s0"
    assert "replace_norm_act(backbone" in (again / "README.md").read_text()
    train("same", "--init", weights, "--callbacks", "evonorm_s0")
    assert "leave --callbacks evonorm_b0 out" in complaint("--init", weights, "--callbacks", "evonorm_b0")
    flags = ["--backbone", "test_resnet", "--image-size", "32", "--workers", "0", "--few", "2"]
    recipe(EVALUATE).main([*flags, "--init", weights, "--output-dir", "judged"])
    assert Path("judged/results.json").is_file()


def test_an_evonorm_that_finds_nothing_to_replace_is_refused(complaint: Callable[..., str]) -> None:
    line = complaint("--backbone", "test_convnext", "--callbacks", "evonorm_s0")
    assert "--callbacks evonorm_s0: 0 of 0 BatchNorm layers replaced; leave it out" in line


def test_a_network_of_which_evonorm_normalises_little_can_be_rebuilt() -> None:
    """It was trained under the same warning. One of which nothing is normalised was not trained."""
    from leaven.callbacks import NoEffectWarning
    from leaven.recipes.common.batches import put_evonorm
    from leaven.recipes.common.flags import UserError

    norm, conv = (lambda: nn.BatchNorm2d(3)), (lambda: nn.Conv2d(3, 3, 1))
    network = nn.Sequential(norm(), nn.ReLU(), *(part() for _ in range(3) for part in (conv, norm)))
    with pytest.warns(NoEffectWarning, match="3 of the 4 BatchNorm layers"):
        put_evonorm(network, "s0")
    for plain, line in (
        (nn.Sequential(conv(), norm()), "none of the 1 BatchNorm layers"),
        (nn.Sequential(conv()), "no layer of Sequential was replaced"),
    ):
        with pytest.raises(UserError, match=line):
            put_evonorm(plain, "s0")


def test_which_class_has_which_number(train: Main) -> None:
    folder = train("out")
    assert json.loads(metadata(folder / "backbone.safetensors")["classes"]) == list("0123456789")
    assert "classes: 0 0, 1 1, 2 2," in (folder / "README.md").read_text()


# --- what comes out ----------------------------------------------------------------------------------------------


def test_a_small_network_learns_digits_far_beyond_chance(
    train: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--epochs",
        "6",
        "--batch-size",
        "32",
        "--limit-batches",
        "44",
        "--lr",
        "3e-3",
        "--crop-scale",
        "0.8,1",
    ]
    folder = train("out", *flags, "--eval-every", "6")
    found = rows(folder)
    assert [row["step"] for row in found if "val_top1" in row] == [264]
    assert found[-1]["val_top1"] > 0.7  # chance: .1
    assert found[-1]["val_top5"] > 0.95
    assert np.mean([row["top1"] for row in found[-20:]]) > np.mean([row["top1"] for row in found[:20]]) + 0.3
    said = capsys.readouterr().out
    assert f"held-out top1: {found[-1]['val_top1']:.2%}" in said
    assert "smoke test of the recipe and no evidence" in said


def test_the_folder_is_whole_and_both_files_give_the_numbers_that_were_reported(
    train: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm
    from safetensors.torch import load_file

    folder = train("out", "--model-ema-decay", "0.5", "--lr", "3e-3", "--crop-pct", "0.8")
    said = capsys.readouterr().out
    names = {path.name for path in folder.iterdir()}
    files = {"backbone.safetensors", "backbone-ema.safetensors", "README.md", "config.yaml", "metrics.jsonl"}
    assert names == files | {"checkpoints", "plots"}
    last = rows(folder)[-1]
    images, labels = digits_by_hand(32, 0.8)
    trained = load(listing(folder / "checkpoints")[0])["model"]
    for file, prefix in (("backbone.safetensors", ""), ("backbone-ema.safetensors", "ema_")):
        plain = timm.create_model("test_resnet", num_classes=10)
        plain.load_state_dict(load_file(folder / file))  # strictly
        with torch.no_grad():
            logits = plain.eval()(images)
        for k, name in ((1, "top1"), (5, "top5")):
            share = (logits.topk(k).indices == labels[:, None]).any(1).double().mean().item()
            assert last[f"val_{prefix}{name}"] == pytest.approx(share, abs=1e-9)
            assert f"held-out {prefix.replace('_', ' ')}{name}: {share:.2%}" in said
        same = [torch.equal(value, trained[f"backbone.{key}"]) for key, value in plain.state_dict().items()]
        assert all(same) == (prefix == "")
    card = (folder / "README.md").read_text()
    assert "timm.create_model('test_resnet', num_classes=10)" in card
    code = card.split("```")[1].removeprefix("python\n")
    scope: dict[str, Any] = {}
    exec(code.replace('"backbone.safetensors"', repr(str(folder / "backbone.safetensors"))), scope)
    assert scope["backbone"].fc.out_features == 10


def test_a_torchvision_network(train: Main) -> None:
    from safetensors.torch import load_file
    from torchvision.models import get_model

    folder = train("out", "--backbone", "tv:mobilenet_v3_small", "--epochs", "1", "--layer-decay", "0.9")
    plain = get_model("mobilenet_v3_small", num_classes=10)
    plain.load_state_dict(load_file(folder / "backbone.safetensors"))
    images, labels = digits_by_hand(32, 0.95)
    with torch.no_grad():
        share = (plain.eval()(images).argmax(1) == labels).double().mean().item()
    assert rows(folder)[-1]["val_top1"] == pytest.approx(share, abs=1e-9)


def test_few_labels(train: Main, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train("out", "--labels", "2", "--labels-seed", "3", "--limit-batches", "9", "--epochs", "1")
    assert "--labels 2: 20 of 1437 training images, 2 of each class, seed 3" in capsys.readouterr().out
    assert len(rows(folder)) == 2  # twenty images are two batches of eight


def test_a_dry_run_needs_no_data(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--backbone",
        "test_resnet",
        "--image-size",
        "32",
        "--dry-run",
        "--data",
        "nowhere",
        "--labels",
        "1%",
        *ALL,
    ]
    recipe(TRAIN).main(flags)
    said = capsys.readouterr().out
    assert "resumed from update-000000001.pt; weights differ by at most 0 " in said
    assert "all works here (on noise" in said
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_network_that_is_built_for_one_size(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """At another size than its own: a position embedding has as many tokens as there are patches."""
    recipe(TRAIN).main(["--backbone", "test_vit", "--dry-run", "--data", "nowhere"])
    assert "all works here (on noise" in capsys.readouterr().out


def test_a_dry_run_hears_what_the_launcher_was_told(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    recipe(TRAIN).main(["--backbone", "test_resnet", "--image-size", "32", "--dry-run"])
    assert "all works here (on noise" in capsys.readouterr().out


# --- nothing but training decides the weights ---------------------------------------------------------------------


def test_validation_does_not_change_training(train: Main) -> None:
    often, never = (train(n, *ALL[:8], "--eval-every", n) for n in ("1", "9"))
    assert sum("val_top1" in row for row in rows(often)) == 2
    assert sum("val_top1" in row for row in rows(never)) == 1  # the last update always
    ends = [load(listing(folder / "checkpoints")[0]) for folder in (often, never)]
    assert same_tensors(ends[0]["model"], ends[1]["model"])
    losses = [[row["loss"] for row in rows(folder)] for folder in (often, never)]
    assert losses[0] == losses[1]


def test_a_skipped_step_does_not_leave_out_the_last_measurement(
    train: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GradScaler skips the first steps under fp16: the last update is then never counted."""
    from accelerate.optimizer import AcceleratedOptimizer

    steps, plain = [], AcceleratedOptimizer.step

    def step(self: AcceleratedOptimizer) -> None:
        steps.append(self)
        if len(steps) > 1:
            plain(self)

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    folder = train("out", "--epochs", "1", "--model-ema-decay", "0.5")
    card = (folder / "README.md").read_text()
    assert "held-out top1" in card
    assert "held-out ema top1" in card


def test_sigterm_and_resume_are_the_uninterrupted_run(train: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything on that draws: augmentation, erasing, mixing, stochastic depth, repeats; in the second epoch."""
    from safetensors.torch import load_file

    module = sys.modules["recipe_under_test_train"]
    whole = train("whole", *ALL)
    with monkeypatch.context() as patch:
        calls, plain = [0], module.mixing

        def mixing(*args: Any) -> Any:
            mix = plain(*args)

            def counted(*batch: Any) -> Any:
                calls[0] += 1
                if calls[0] == 4:
                    os.kill(os.getpid(), signal.SIGTERM)
                return mix(*batch)

            return counted

        patch.setattr(module, "mixing", mixing)
        with pytest.raises(SystemExit) as stopped:
            train("broken", *ALL)
    assert stopped.value.code == 143
    assert listing(Path("broken/checkpoints"))[0].name == "update-000000004.pt"
    broken = train("broken", *ALL, "--resume", "auto")
    assert rows(whole) == rows(broken)
    ends = [load(listing(folder / "checkpoints")[0]) for folder in (whole, broken)]
    assert same_tensors(ends[0]["model"], ends[1]["model"])
    assert same_tensors(ends[0]["callbacks"], ends[1]["callbacks"])
    assert same_tensors(*({"x": end["optimizer"]["state"]} for end in ends))
    for file in ("backbone.safetensors", "backbone-ema.safetensors"):
        assert same_tensors(*(load_file(folder / file) for folder in (whole, broken)))
    # Once more, though it is finished: the numbers come from the checkpoint.
    assert rows(train("broken", *ALL, "--resume", "auto")) == rows(whole)


def test_layers_of_the_run_learn_at_their_share(train: Main) -> None:
    folder = train("out", "--epochs", "1", "--layer-decay", "0.5")
    groups = load(listing(folder / "checkpoints")[0])["optimizer"]["param_groups"]
    # test_resnet: stem, four stages of a block each, classifier.
    assert {group["lr_scale"] for group in groups} == {0.5**k for k in range(6)}
    assert all(group["lr"] == pytest.approx(groups[-1]["lr"] * group["lr_scale"]) for group in groups)


def test_resume_changed_takes_the_new_layer_decay(train: Main) -> None:
    folder = train("out", "--epochs", "1", "--layer-decay", "0.5")
    with pytest.warns(UserWarning, match="total_steps"):
        train("out", "--layer-decay", "0.8", "--resume", "auto", "--resume-changed")
    groups = load(listing(folder / "checkpoints")[0])["optimizer"]["param_groups"]
    assert {group["lr_scale"] for group in groups} == {0.8**k for k in range(6)}
    assert all(group["lr"] == pytest.approx(groups[-1]["lr"] * group["lr_scale"]) for group in groups)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_shares_of_the_held_out_images_are_all_of_them_once(n: int) -> None:
    class Numbers:
        def __len__(self) -> int:
            return 11

        def image(self, index: int) -> Tensor:
            return torch.tensor(index)

        def label(self, index: int) -> int:
            return index

    for most in (11, 7):
        parts = [Part(Numbers(), most, (i, n)) for i in range(n)]
        seen = [part.label(i) for part in parts for i in range(len(part))]
        whole = Part(Numbers(), most)
        assert sorted(map(int, seen)) == [whole.label(i) for i in range(most)]
        assert len(set(seen)) == most


def test_every_process_judges_the_statistics_of_the_first(
    train: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of BatchNorm differ between processes on CPUs, and only the first one's are saved."""
    sent: list[Tensor] = []
    monkeypatch.setattr("leaven.recipes.common.validation.broadcast", sent.append)
    train("out", "--epochs", "1", "--model-ema-decay", "0.5")
    assert len(sent) == 2 * len(list(create("test_resnet").buffers())) > 0


@pytest.mark.slow
def test_two_processes_report_the_accuracy_of_what_they_save(tmp_path: Path) -> None:
    """Each counts its share of the images."""
    from safetensors.torch import load_file

    flags = ["--output-dir", "out", "--limit-batches", "60", "--lr", "5e-3", "--model-ema-decay", "0.9"]
    done = run([*TWO, TRAIN, *SMALL, *SHORT, *flags], tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    images, labels = digits_by_hand(32, 0.95)
    for file, prefix in (("backbone.safetensors", ""), ("backbone-ema.safetensors", "ema_")):
        model = create("test_resnet", num_classes=10).eval()
        model.load_state_dict(load_file(tmp_path / "out" / file))
        with torch.no_grad():
            share = (model(images).argmax(1) == labels).double().mean().item()
        assert share > 0.3  # not a constant answer, on which the statistics would have no influence
        assert rows(tmp_path / "out")[-1][f"val_{prefix}top1"] == pytest.approx(share, abs=1e-9)


# --- fine-tuning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "head"), [("test_resnet", "fc"), ("tv:mobilenet_v3_small", "classifier.3")])
def test_a_headless_file_is_the_start_and_the_classifier_alone_is_fresh(
    train: Main, capsys: pytest.CaptureFixture[str], name: str, head: str
) -> None:
    """At a learning rate of zero the weights stay those of the file."""
    from safetensors.torch import load_file

    save(create(name), "start.safetensors", name=name)
    flags = ["--backbone", name, "--init", "start.safetensors", "--lr", "0", "--epochs", "1"]
    folder = train("out", *flags)
    assert f"--init start.safetensors: all but {head}.weight, {head}.bias" in capsys.readouterr().out
    start, end = load_file("start.safetensors"), load_file(folder / "backbone.safetensors")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for key, value in end.items():
        if not key.endswith(statistics) and not key.startswith(f"{head}."):
            assert torch.equal(value, start[key]), key
    assert end[f"{head}.weight"].shape[0] == 10


PAPER = {
    # lr per 256, layer decay, weight decay, mixup, repeats, drop path, EMA, batch, epochs, warm-up
    "convnext_s": (2e-4, 0.7, 0.01, 0.8, 3, 0.3, 0.9999, 4096, 400, 20),
    "convnext_b": (1e-4, 0.7, 0.01, 0.8, 3, 0.4, 0.9999, 4096, 400, 20),
    "convnext_l": (1e-4, 0.7, 0.02, 0.8, 3, 0.5, 0.9999, 4096, 200, 10),
    "convnext_l-384": (6e-5, 0.7, 0.01, 0.8, 3, 0.5, 0.99995, 1024, 200, 20),
    "resnet50": (2e-3, 0.7, 0.02, 0.1, 1, 0.05, 0.9999, 2048, 300, 5),
    "resnet101": (1e-3, 0.8, 0.02, 0.1, 1, 0.2, 0.9999, 2048, 300, 5),
    "resnet152": (1e-3, 0.8, 0.02, 0.1, 1, 0.2, 0.9999, 2048, 300, 5),
    "resnet200": (1e-3, 0.8, 0.02, 0.1, 1, 0.2, 0.9999, 2048, 300, 5),
}


def test_presets_hold_the_papers_numbers(recipe: Recipe) -> None:
    from leaven.recipes.common.start import read_settings, resolve

    module = recipe(TRAIN)
    assert module.PRESETS.keys() == {f"{name}-spark-finetune" for name in PAPER}
    for name, numbers in PAPER.items():
        s = read_settings(module.TrainSettings, ["--preset", f"{name}-spark-finetune"], module.PRESETS)
        found = (
            s.lr_base,
            s.layer_decay,
            s.weight_decay,
            s.mixup,
            s.aug_repeats,
            s.drop_path,
            s.model_ema_decay,
        )
        assert (*found, s.global_batch_size, s.epochs, s.warmup_epochs) == numbers
        assert s.backbone == name.removesuffix("-384")
        resnet = name.startswith("resnet")
        assert (s.opt, s.bce_loss) == (("lamb", True) if resnet else ("adamw", False))
        assert (s.cutmix, s.smoothing, s.aa, s.reprob) == (1.0, 0.1, "trivial", 0.25)
        assert resolve(s, 8, {}).lr == pytest.approx(s.lr_base * s.global_batch_size / 256)


@pytest.mark.slow
def test_resnet50_under_the_papers_preset_does_not_explode(train: Main) -> None:
    """Users of the official code report that it does. At the preset's own rate for this batch, without a warm-up."""
    flags = [
        "--preset",
        "resnet50-spark-finetune",
        "--image-size",
        "32",
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
    ]
    flags += [
        "--backbone",
        "resnet50",
        "--batch-size",
        "16",
        "--global-batch-size",
        "none",
        "--limit-batches",
        "6",
        "--labels",
        "10",
    ]
    folder = train("out", *flags)
    found = rows(folder)
    assert (
        load(listing(folder / "checkpoints")[0])["model"]["backbone.layer4.2.conv3.weight"].shape[0] == 2048
    )
    assert found[0]["lr"] == pytest.approx(2e-3 * 16 / 256)
    assert len(found) == 6
    for row in found:
        assert math.isfinite(row["loss"])
        assert 0 < row["grad_norm"] < 100
    assert found[-1]["loss"] < 1.2 * found[0]["loss"]
    assert math.isfinite(found[-1]["val_top1"])


# --- bad input: one line and exit code 2 ---------------------------------------------------------------------------


@pytest.fixture
def complaint(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the recipe writes to stderr for these flags, as `python recipes/train.py` would; it must exit with 2."""
    from accelerate.state import AcceleratorState, GradientState

    module = recipe(TRAIN)

    def main(*flags: str) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda: module.main([*SMALL, *SHORT, *flags]))
        assert stopped.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        return lines[0]

    return main


def test_a_rate_that_explodes_ends_in_one_line(complaint: Callable[..., str]) -> None:
    """With weight decay, 1e6 multiplies every weight by 5e4 per update."""
    error = complaint("--lr", "1e6", "--warmup-epochs", "0", "--limit-batches", "40", "--output-dir", "out")
    assert "stopped before the weights took it" in error
    assert "try a lower --lr" in error
    written = rows(Path("out"))
    assert 0 < len(written) < 40
    assert all(math.isfinite(row["loss"]) for row in written)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--aa", "trivia"], ["--aa", "trivial"]),
        (["--labels-seed", "3"], ["--labels-seed chooses among labelled images: add --labels"]),
        (["--shuffle-buffer", "5"], ["--shuffle-buffer is of --data hf:NAME: all rows of digits"]),
        (
            ["--backbone", "test_vit", "--image-size", "40"],
            ["--image-size 40x40 does not suit --backbone test_vit", "divisible by patch size"],
        ),
        (["--labels", "200"], ["--labels 200", "training images only"]),
        (["--labels", "0.1%"], ["would get none"]),
        (["--backbone", "tv:resnet18", "--drop-path", "0.1"], ["tv:resnet18", "drop_path_rate"]),
        (["--mixup", "0.2", "--batch-size", "9"], ["--mixup", "--batch-size 9 must be even"]),
        (["--smoothing", "1"], ["smoothing", "1.0"]),
        (["--hflip", "1.5"], ["--hflip must be between 0 and 1"]),
        (["--callbacks", "evonorm_s0,evonorm_b0"], ["one EvoNorm takes the place of all others"]),
        (["--tract-lam", "0.2"], ["--tract-lam is of a callback: add --callbacks tract"]),
        (["--callbacks", "tract", "--tract-lam", "0"], ["--tract-lam must be greater than 0"]),
        (["--layer-decay", "-1"], ["--layer-decay must be between 0 and 1"]),
        (["--crop-pct", "0"], ["--crop-pct"]),
        (["--eval-every", "0"], ["--eval-every"]),
        (["--model-ema-decay", "2"], ["--model-ema-decay"]),
        (["--augment-on", "device", "--aa", "trivial"], ["--augment-on device", "--aa"]),
        (["--preset", "resnet50-spark"], ["resnet50-spark", "resnet50-spark-finetune"]),
        (["--init", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (
            ["--backbone", "own_networks:headless"],
            ["own_networks:headless takes no num_classes", "def factory(num_classes=0)"],
        ),
        (["--backbone", "own_networks:network"], ["own_networks:network is a network that is built already"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_wrong_flags(
    complaint: Callable[..., str], monkeypatch: pytest.MonkeyPatch, flags: list[str], parts: list[str]
) -> None:
    module = ModuleType("own_networks")
    module.headless = lambda: nn.Conv2d(3, 4, 3)  # type: ignore[attr-defined]
    module.network = nn.Conv2d(3, 4, 3)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_networks", module)
    error = complaint(*flags)
    for part in parts:
        assert part in error


def test_unlabelled_images(complaint: Callable[..., str], tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "flat").mkdir()
    for i in range(20):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "flat" / f"{i}.png")
    error = complaint("--data", "flat")
    assert "--data flat has no labels" in error
    assert "recipes/spark.py" in error


def test_a_file_of_another_network(complaint: Callable[..., str]) -> None:
    save(create("resnet10t"), "other.safetensors", name="resnet10t")
    error = complaint("--init", "other.safetensors")
    assert "written from resnet10t" in error
    assert "does not fit" in error


def test_a_run_of_another_recipe_is_named(run: Main, complaint: Callable[..., str]) -> None:
    flags = ["--image-size", "64", "--epochs", "1", "--limit-batches", "1", "--decoder-width", "32"]
    run(SPARK, "masked", *SMALL[:2], *SMALL[4:8], *flags, "--probe-images", "64")
    assert "--resume masked is a run of recipes/spark.py, and this is train.py" in complaint(
        "--resume", "masked"
    )


def test_the_card_keeps_the_first_command(
    train: Main, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes/train.py", "--first", "command"])
    folder = train("out")
    monkeypatch.setattr(sys, "argv", ["recipes/train.py", "--resume", "out"])
    recipe(TRAIN).main(["--resume", "out"])
    card = (folder / "README.md").read_text()
    assert "    python recipes/train.py --first command\n" in card


def test_changed_settings_are_named_before_anything_else(train: Main, complaint: Callable[..., str]) -> None:
    """Else this would be about a batch of more images than there are."""
    train("out")
    line = complaint("--output-dir", "out", "--resume", "auto", *SHORT, "--batch-size", "4096")
    assert (
        "cannot resume out exactly: batch_size 8 -> 4096; go back to the old values (--resume out alone"
        in line
    )
