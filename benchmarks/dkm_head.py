"""Deep kernel machines as heads on frozen backbones, beside linear, Gaussian process and ensemble heads.

    python benchmarks/dkm_head.py --data DATA --work RUNS            # as many at a time as there are cores
    python benchmarks/dkm_head.py --data DATA --work RUNS --table    # results/dkm_head.json, and in words

DATA holds cifar10-jpeg/, fashion-mnist/ and imagenette224-mini/. A backbone is trained with labels of another data set
("supervised": of photos for CIFAR, of CIFAR for Fashion-MNIST) or by SparK on the training images themselves, without
labels. Its features are taken once; heads learn from 200, 1,000 or all labels of them. What tells other images from
known ones is the entropy of the class probabilities; the other images are the held-out ones of the other set.

"linear": logistic regression, its penalty chosen on a fifth. "SVGP": a deep kernel machine of one layer. "DKM": of
three, nu chosen on a fifth; "NNGP": the same with nu = infinity. "ensemble": five networks of one hidden layer of 256,
their probabilities averaged. A finished trial is one line of RUNS/dkm_head.jsonl, a backbone one of
results/dkm_head_runs.jsonl.
"""

import gzip
import math
import shlex
import statistics
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ledger import RESULTS, Ledger, Run, data_sets, execute
from study import study
from torch import Tensor, nn

from leaven.bayes import DeepKernelMachine, auroc, calibration
from leaven.bayes.deep_kernel_machine import fit, normalised
from leaven.pretext import kshot_indices, linear_probs
from leaven.recipes.common.batches import Images, build_backbone, find_data
from leaven.recipes.common.flags import ImageSettings
from leaven.recipes.common.probes import labelled_features, recalibrate

LEDGER = RESULTS / "dkm_head_runs.jsonl"
NET, SIDE = "resnet10t", {"cifar": 64, "fashion": 32}
HEADS = ("linear", "SVGP", "NNGP", "DKM", "ensemble")
BACKBONES = ("supervised", "SparK")
LABELS = {"200": 20, "1,000": 100, "all": None}  # images of each class
SEEDS = (0, 1, 2)
NU = (1.0, 10.0, 100.0, math.inf)
INDUCING, STEPS, LR = 200, 1500, 0.02
COMMON = shlex.split(
    "--seed 0 --workers 0 --batch-size 64 --mixed-precision bf16 --channels-last --weight-decay 0.05"
)


def backbone(data: str, kind: str) -> Run:
    """How the backbone for a data set comes about."""
    side = ["--image-size", str(SIDE[data])]
    if kind == "supervised":
        other = {
            "cifar": ["--data", "photos", "--epochs", "30"],
            "fashion": ["--data", "cifar", "--epochs", "8"],
        }[data]
        words = ["recipes/train.py", *other, "--lr", "4e-3", "--crop-scale", "0.35,1", "--warmup-epochs", "1"]
    else:
        epochs, warmup = {"cifar": ("6", "1"), "fashion": ("1", "0.17")}[data]  # updates: 936, 156 of them
        words = [
            "recipes/spark.py",
            "--data",
            data,
            "--epochs",
            epochs,
            "--lr",
            "2e-3",
            "--weight-decay-end",
            "none",
            "--warmup-epochs",
            warmup,
        ]
        words += ["--stages", "4,8,16", "--decoder-width", "128", "--crop-scale", "0.67,1"]
    return Run(f"{kind}-for-{data}", (*words, "--backbone", NET, *side, *COMMON))


def unpack_fashion(folder: Path, work: Path) -> str:
    raw = work / "FashionMNIST" / "raw"
    if not raw.is_dir():
        raw.mkdir(parents=True)
        for file in (folder / "fashion-mnist").glob("*.gz"):
            (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    return f"tv:FashionMNIST@{work}"


def features(data: str, kind: str, places: dict[str, str], work: Path) -> Path:
    """Features of training, held-out and other images, with labels, taken once."""
    cache = work / f"features-{data}-{kind}.pt"
    if cache.is_file():
        return cache
    torch.set_num_threads(1)
    weights = str(work / backbone(data, kind).name / "backbone.safetensors")
    size = (SIDE[data], SIDE[data])
    settings = ImageSettings(backbone=NET, data=places[data], image_size=size, init=weights, workers=0)
    found = find_data(settings)
    net = build_backbone(settings, size, classes=0)
    images = Images.of(found, settings, size, net)
    recalibrate({NET: net}, images)  # SparK's statistics are those of masked images
    other = find_data(replace(settings, data=places["fashion" if data == "cifar" else "cifar"]))
    parts = {
        "train": (images, found.train),
        "val": (images, found.val),
        "ood": (replace(images, data=other), other.val),
    }
    tensors = {}
    for name, (source, part) in parts.items():
        x, y = labelled_features(net, source.whole(part, len(part)))
        tensors[name] = (normalised(x), y)
    torch.save(tensors, cache)
    return cache


def ensemble(x: Tensor, y: Tensor, tests: list[Tensor], classes: int, seed: int) -> list[Tensor]:
    probs = [torch.zeros(len(test), classes) for test in tests]
    for member in range(5):
        torch.manual_seed(1000 * seed + member)
        net = nn.Sequential(nn.Linear(x.shape[1], 256), nn.ReLU(), nn.Linear(256, classes))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
        for _ in range(STEPS):
            rows = torch.randint(len(x), (min(256, len(x)),))
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            for total, test in zip(probs, tests, strict=True):
                total += net(test).softmax(1) / 5
    return probs


def kernel_machine(
    x: Tensor, y: Tensor, tests: list[Tensor], classes: int, seed: int, depth: int, nu: float
) -> list[Tensor]:
    torch.manual_seed(seed)
    inducing = min(INDUCING, len(torch.unique(x, dim=0)))
    made = DeepKernelMachine(x.shape[1], classes, depth, inducing, nu, likelihood="categorical")
    fit(made, x, y, steps=STEPS, lr=LR, seed=seed)
    with torch.no_grad():
        return [torch.cat([made(part).probs() for part in test.split(2000)]) for test in tests]


def trial(caches: dict[str, str], data: str, kind: str, labels: str, seed: int, head: str) -> dict[str, Any]:
    """Scores of one head."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = torch.load(caches[f"{data} {kind}"])
    (x, y), (x_val, y_val), (x_ood, _) = found["train"], found["val"], found["ood"]
    classes, shots = int(y.max()) + 1, LABELS[labels]
    if shots is not None:
        rows = kshot_indices(y, shots, seed)
        x, y = x[rows], y[rows]
    tests = [x_val, x_ood]
    result: dict[str, Any] = {}
    if head == "linear":
        probs = [linear_probs(x, y, test, torch.full((len(test),), classes - 1), seed) for test in tests]
    elif head == "ensemble":
        probs = ensemble(x, y, tests, classes, seed)
    elif head == "SVGP":
        probs = kernel_machine(x, y, tests, classes, seed, 1, 1.0)
    elif head == "NNGP":
        probs = kernel_machine(x, y, tests, classes, seed, 3, math.inf)
    else:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        judged, kept = order[: len(x) // 5], order[len(x) // 5 :]
        scores = {}
        for nu in NU:
            (tried,) = kernel_machine(x[kept], y[kept], [x[judged]], classes, seed, 3, nu)
            scores[nu] = calibration(tried, y[judged]).nll
        result["nu"] = str(min(NU, key=lambda nu: scores[nu]))
        probs = kernel_machine(x, y, tests, classes, seed, 3, float(result["nu"]))
    known = calibration(probs[0], y_val)
    entropies = [torch.special.entr(each.double()).sum(1) for each in probs]
    scores_of = {
        "accuracy": known.accuracy,
        "nll": known.nll,
        "ece": known.ece,
        "ood auroc": auroc(*entropies),
    }
    return result | scores_of


def trials() -> dict[str, dict[str, Any]]:
    return {
        f"{data}, {kind}, {labels}, seed {seed}, {head}": {
            "data": data, "kind": kind, "labels": labels, "seed": seed, "head": head,
        }
        for data in SIDE for kind in BACKBONES for labels in LABELS for seed in SEEDS for head in HEADS
    }  # fmt: skip


def summary(outcomes: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    rows = []
    lines = ["| data | backbone | labels | head | accuracy | NLL | ECE | OOD AUROC |", "|" + " --- |" * 8]
    for data in SIDE:
        for kind in BACKBONES:
            for labels in LABELS:
                for head in HEADS:
                    names = [f"{data}, {kind}, {labels}, seed {seed}, {head}" for seed in SEEDS]
                    found = [outcomes.get(name) for name in names]
                    if any(each is None or each["failure"] for each in found):
                        continue
                    row: dict[str, Any] = {"data": data, "backbone": kind, "labels": labels, "head": head}
                    for what in ("accuracy", "nll", "ece", "ood auroc"):
                        values = [each["result"][what] for each in found if each]
                        row[what] = {"mean": statistics.mean(values), "sd": statistics.stdev(values)}
                    rows.append(row)
                    cells = [data, kind, labels, head, f"{100 * row['accuracy']['mean']:.1f} %"]
                    cells += [f"{row[what]['mean']:.3f}" for what in ("nll", "ece", "ood auroc")]
                    lines.append("| " + " | ".join(cells) + " |")
    return rows, "\n".join(lines)


def prepare(data: Path, work: Path, jobs: int) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Backbones and their features, and what is to be done with them."""
    pairs = [(name, kind) for name in SIDE for kind in BACKBONES]
    places = data_sets(data, work) | {"fashion": unpack_fashion(data, work)}
    execute([[backbone(*pair)] for pair in pairs], places, work, jobs, Ledger(LEDGER))
    caches = {f"{name} {kind}": str(features(name, kind, places, work)) for name, kind in pairs}
    return partial(trial, caches), trials()


def main() -> None:
    settings = {"inducing": INDUCING, "steps": STEPS, "lr": LR, "nu": [str(nu) for nu in NU]}
    study(__file__, __doc__, prepare, summary, settings)


if __name__ == "__main__":
    main()
