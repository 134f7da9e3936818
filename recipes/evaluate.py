"""What a backbone's features are worth: kNN, linear probe and few labels, under protocols that have a name.

    python recipes/evaluate.py --backbone resnet50 --init runs/spark/backbone.safetensors --data PATH/OF/IMAGES
    python recipes/evaluate.py --backbone resnet50 --init pretrained --data tv:CIFAR10@./data --few 1%,10%,5

Nothing is trained but the classifiers on frozen features. Raw pixels and the untrained backbone are measured too.
"""

import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from leaven.backbones import resolve
from leaven.bayes import calibration
from leaven.pretext import few_label_probe, few_protocol, knn, knn_protocol, linear_probs, linear_protocol
from leaven.pretext.evaluation import FEW, KNN, LINEAR
from leaven.recipes.common.batches import Images, Part, build_backbone, find_data, user_errors
from leaven.recipes.common.card import command
from leaven.recipes.common.data import Data
from leaven.recipes.common.few_labels import few_labels, keep_few
from leaven.recipes.common.flags import ImageSettings, UserError, flag, parse, run_main, to_yaml
from leaven.recipes.common.launcher import set_threads
from leaven.recipes.common.probes import labelled_features, pixel_size, recalibrate
from leaven.recipes.common.run_folder import open_run

FEW_LABELS = ("1%", "10%")


@dataclass
class EvaluateSettings(ImageSettings):
    """kNN, linear probe and few labels on frozen features."""

    init: str | None = flag(None, "weights to judge: a .safetensors file, `pretrained`, or none: untrained")
    few: tuple[str, ...] | None = flag(
        FEW_LABELS, "few labels: N images of each class or P%, comma-separated; none"
    )
    few_seeds: int = flag(5, "random choices of the few labelled images, for mean and spread")
    probe_images: int = flag(20000, "images at most, of each part")
    recalibrate: bool = flag(True, "take BatchNorm's statistics anew from whole training images first")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.few_seeds < 1:
            raise UserError("--few-seeds must be at least 1")


def main(argv: list[str] | None = None) -> None:
    """Read the flags and judge."""
    settings = parse(EvaluateSettings, argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("recipes/evaluate.py is for one process: leave the launcher out")
    resolve(settings.backbone)  # before a run folder is made for a typo
    data = keep_few(find_data(settings), None, 0)
    run = open_run("evaluate", settings.backbone, output_dir=settings.output_dir, resume=None)
    print(set_threads(1))
    results = evaluate(settings, data)
    run.write(run.config, to_yaml(settings))
    about = {"backbone": resolve(settings.backbone), "init": settings.init, "data": data.name}
    report = about | {"command": command(), "notes": data.notes, "results": results}
    run.write(run.path / "results.json", json.dumps(report, indent=1))
    print(f"run folder: {run.path} (results.json)")


def evaluate(settings: EvaluateSettings, data: Data) -> list[dict[str, Any]]:
    """All results, printed as they come: who, protocol and its definition, top-1 in [0, 1], spread over seeds."""
    size = settings.image_size or data.image_size
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    inits = {"untrained backbone": None} | ({settings.init: settings.init} if settings.init else {})
    backbones = {}
    for who, init in inits.items():
        torch.manual_seed(settings.seed)
        backbone = build_backbone(replace(settings, init=init), size, classes=0)
        backbones[who] = backbone.to(device or "cpu")
    images = Images.of(data, settings, size, backbone)
    lines = [*data.notes, str(images)]
    lines += (
        recalibrate(backbones, images) if settings.recalibrate else ["BatchNorm's statistics as they are"]
    )
    raw, most = pixel_size(data), settings.probe_images
    split = f"{min(most, len(data.train))} training to {min(most, len(data.val))} held-out images"
    words: dict[str, Any] = {"split": split, "crop": "whole image resized to cover the size, centre crop"}
    print("\n".join(lines))
    labels, seeds = Part(data.train, most).labels, range(settings.few_seeds)
    few: dict[str, list[NDArray[np.int64]]] = {}
    for amount in settings.few or ():
        try:
            few[amount] = [few_labels(labels, amount, seed, data.classes, "--few") for seed in seeds]
        except UserError as error:
            if settings.few != FEW_LABELS:
                raise
            print(f"few labels, {amount}: left out ({error})")

    results: list[dict[str, Any]] = []
    judged: dict[str, tuple[nn.Module, tuple[int, int]]] = {"raw pixels": (nn.Flatten(), raw)}
    judged |= {who: (backbone, size) for who, backbone in backbones.items()}
    for who, (backbone, side) in judged.items():
        pair = [
            labelled_features(backbone, images.whole(part, most, side)) for part in (data.train, data.val)
        ]
        with user_errors(ValueError):
            for result in judge(pair, few, settings.seed, words):
                results.append({"who": who, "size": list(side), **result})
                print(line(results[-1]))
    print("protocols:", *dict.fromkeys(f"{r['protocol']} = {r['definition']}" for r in results), sep="\n")
    return results


def judge(
    pair: list[tuple[Tensor, Tensor]],
    few: dict[str, list[NDArray[np.int64]]],
    seed: int,
    words: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """The results on the features and labels of training and held-out images, protocol by protocol."""
    (train_x, train_y), (val_x, val_y) = pair
    four = train_x, train_y, val_x, val_y
    k = min(20, len(train_x))
    yield {"protocol": KNN, "definition": knn_protocol(k, **words), "top1": knn(*four, k=k)}
    probe = calibration(linear_probs(*four, seed=seed), val_y.cpu())
    sure = {"nll": probe.nll, "brier": probe.brier, "ece": probe.ece}
    yield {"protocol": LINEAR, "definition": linear_protocol(**words), "top1": probe.accuracy, **sure}
    for amount, choices in few.items():
        scores = [few_label_probe(*four, chosen.tolist()) for chosen in choices]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        numbers = {"top1": statistics.mean(scores), "sd": spread, "seeds": scores}
        about = {"protocol": FEW, "definition": few_protocol(**words), "labels": amount}
        yield {**about, "images": len(choices[0]), **numbers}


def line(result: dict[str, Any]) -> str:
    """One result in words, its protocol first."""
    size = "x".join(map(str, result["size"]))
    words = f"{result['protocol']:<9}  {result['who']}, {size}: top-1 {result['top1']:.2%}"
    if result["protocol"] == LINEAR:
        words += f" (NLL {result['nll']:.3f}, ECE {result['ece']:.3f})"
    if result["protocol"] == FEW:
        choices = (
            f"{len(result['seeds'])} choices of {result['images']} images, {result['labels']} of each class"
        )
        words += f" (SD {result['sd']:.2%} over {choices})"
    return words


if __name__ == "__main__":
    run_main(main)
