"""recipes/evaluate.py: its numbers are those of the protocols, for the weights of every recipe; and its errors."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from recipe_programs import EVALUATE
from torch import Tensor, nn

from leaven.backbones import create, save
from leaven.pretext import extract_features, few_label_probe, knn, linear_probe, recalibrate_batchnorm
from leaven.recipes.common.augment import eval_transform
from leaven.recipes.common.data import open_data
from leaven.recipes.common.few_labels import few_labels
from leaven.recipes.common.flags import run_main
from leaven.recipes.common.sampler import Key, permutation

Evaluate = Callable[..., dict[tuple[str, str], dict[str, Any]]]
SMALL = ["--image-size", "32", "--workers", "0", "--few", "2,1%", "--few-seeds", "2"]


@pytest.fixture
def evaluate(recipe: Callable[[Path], ModuleType]) -> Evaluate:
    """Runs the recipe in this process: run folder, flags -> results by (who, protocol, labels)."""
    module = recipe(EVALUATE)

    def main(name: str, *flags: str) -> dict[tuple[str, str], dict[str, Any]]:
        module.main([*SMALL, "--output-dir", name, *flags])
        found = json.loads((Path(name) / "results.json").read_text())["results"]
        return {(r["who"], r["protocol"] + (" " + r["labels"] if "labels" in r else "")): r for r in found}

    return main


def digits(part: str, size: int) -> tuple[Tensor, Tensor]:
    data = open_data("digits")
    source = getattr(data, part)
    transform = eval_transform((size, size), 1.0, data.mean, data.std)
    images = torch.stack([transform(source.image(i), Key(0, 0, i)) for i in range(len(source))])
    return images, torch.tensor([source.label(i) for i in range(len(source))])


def by_hand(backbone: nn.Module, size: int) -> dict[str, float]:
    """Every protocol on features taken here."""
    (images, y), (val_images, val_y) = digits("train", size), digits("val", size)
    x, val_x = extract_features(backbone, images), extract_features(backbone, val_images)
    scores = {"knn-v1": knn(x, y, val_x, val_y), "linear-v1": linear_probe(x, y, val_x, val_y)}
    names = tuple("0123456789")
    for amount in ("2", "1%"):
        few = [
            few_label_probe(x, y, val_x, val_y, list(few_labels(y.numpy(), amount, seed, names)))
            for seed in (0, 1)
        ]
        scores[f"few-v1 {amount}"] = statistics.mean(few)
    return scores


@pytest.mark.parametrize("classes", [0, pytest.param(10, marks=pytest.mark.slow)])
def test_results_are_those_of_the_protocols(
    evaluate: Evaluate, capsys: pytest.CaptureFixture[str], classes: int
) -> None:
    """For weights with a classifier, as recipes/train.py leaves them, and without one, as recipes/spark.py does."""
    model = create("test_resnet", num_classes=classes)
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(-1)  # no fresh network, and other statistics than the file has
    save(model, "w.safetensors", name="test_resnet", metadata={"num_classes": classes})
    found = evaluate("out", "--backbone", "test_resnet", "--init", "w.safetensors")
    said = capsys.readouterr().out
    assert {who for who, _ in found} == {"raw pixels", "untrained backbone", "w.safetensors"}
    images, _ = digits("train", 32)
    recalibrate_batchnorm(model, images[permutation(0, 0, 512, "calibration") * len(images) // 512])
    for who, backbone, size in (("w.safetensors", model, 32), ("raw pixels", nn.Flatten(), 8)):
        for protocol, score in by_hand(backbone, size).items():
            result = found[who, protocol]
            assert result["top1"] == pytest.approx(score, abs=0.006), (who, protocol)
            assert f"{result['protocol']:<9}  {who}, {size}x{size}: top-1 {result['top1']:.2%}" in said
            assert result["definition"] in said
    assert "w.safetensors: statistics of" in said
    few = found["w.safetensors", "few-v1 2"]
    assert few["images"] == 20
    assert few["sd"] == pytest.approx(statistics.stdev(few["seeds"]))
    assert "1437 training to 360 held-out images" in few["definition"]


def test_statistics_as_they_are_and_fewer_images(
    evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--backbone", "test_resnet", "--probe-images", "300", "--few", "1"]
    found = evaluate("out", *flags, "--no-recalibrate")
    assert "BatchNorm's statistics as they are" in capsys.readouterr().out
    assert {who for who, _ in found} == {"raw pixels", "untrained backbone"}
    assert "300 training to 300 held-out images" in found["raw pixels", "knn-v1"]["definition"]
    again = evaluate("again", *flags)
    assert again["untrained backbone", "knn-v1"]["top1"] != found["untrained backbone", "knn-v1"]["top1"]
    assert again["raw pixels", "knn-v1"]["top1"] == found["raw pixels", "knn-v1"]["top1"]


def test_the_same_flags_give_the_same_numbers(evaluate: Evaluate) -> None:
    flags = ["--backbone", "test_convnext", "--probe-images", "200", "--few", "2"]
    one, two = (evaluate(name, *flags) for name in ("one", "two"))
    assert one == two
    assert all(math.isfinite(result["top1"]) for result in one.values())


def test_torchvision_weights_of_any_classifier(evaluate: Evaluate) -> None:
    save(create("tv:mobilenet_v3_small", num_classes=10), "w.safetensors", name="tv:mobilenet_v3_small")
    flags = [
        "--backbone",
        "tv:mobilenet_v3_small",
        "--init",
        "w.safetensors",
        "--probe-images",
        "100",
        "--few",
        "2",
    ]
    found = evaluate("out", *flags)
    assert ("w.safetensors", "linear-v1") in found


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--backbone", "test_resnt"], ["test_resnt", "test_resnet"]),
        (["--backbone", "test_resnet", "--init", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["--backbone", "test_resnet", "--few", "5000"], ["--few 5000", "training images only"]),
        (["--backbone", "test_resnet", "--few", "1%"], ["--few 1%", "would get none"]),
        (["--backbone", "test_resnet", "--init", "."], [". is a folder", "no .safetensors file"]),
        (["--backbone", "test_resnet", "--lr", "1"], ["--lr"]),
        (["--backbone", "test_resnet", "--few-seeds", "0"], ["--few-seeds"]),
        (["--backbone", "test_resnet", "--data", "flat"], ["flat"]),
    ],
)
def test_errors_are_one_line(
    recipe: Callable[[Path], ModuleType],
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    parts: list[str],
) -> None:
    module = recipe(EVALUATE)
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: module.main([*SMALL, "--probe-images", "100", "--output-dir", "out", *flags]))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


def test_few_labels_that_cannot_be_had_are_left_out_unless_asked_for(
    recipe: Callable[[Path], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    """143 digits of each class give 1 % of 100 images no image of a class; nobody asked for that."""
    module = recipe(EVALUATE)
    flags = ["--backbone", "test_resnet", "--image-size", "32", "--workers", "0", "--probe-images", "100"]
    module.main([*flags, "--output-dir", "out"])
    said = capsys.readouterr().out
    assert "few labels, 1%: left out (--few 1%: class " in said
    assert "few-v1" in said  # 10 % can be had
    module.main([*flags, "--few", "none", "--output-dir", "none"])
    said = capsys.readouterr().out
    assert "few-v1" not in said
    assert "linear-v1" in said


def test_several_processes_are_refused(
    recipe: Callable[[Path], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = recipe(EVALUATE)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        run_main(lambda: module.main([*SMALL, "--backbone", "test_resnet"]))
    assert "one process" in capsys.readouterr().err
