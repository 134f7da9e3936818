"""Deep kernel machines as heads on frozen backbones, beside linear, Gaussian process and ensemble heads.

    python benchmarks/dkm_head.py --data DATA --work RUNS            # as many at a time as there are cores
    python benchmarks/dkm_head.py --data DATA --work RUNS --table    # results/dkm_head.json, and in words

DATA holds cifar10-jpeg/, fashion-mnist/ and imagenette224-mini/. A backbone is trained with labels of another data set
("supervised": of photos for CIFAR, of CIFAR for Fashion-MNIST) or by SparK on the training images themselves, without
labels. Its features are taken once; heads learn from 200, 1,000 or all labels of them. What tells other images from
known ones is the entropy of the class probabilities; the other images are the held-out ones of the other set.

"linear": logistic regression on standardised features. "SVGP": a deep kernel machine of one layer. "DKM": of three;
"NNGP": the same with nu = infinity. "ensemble": five networks of one hidden layer of 256, their probabilities averaged.
The linear head's penalty, the DKM's nu and the ensemble's weight decay are chosen alike: the likeliest on a fifth of
the labels, then all of them. A finished trial is one line of RUNS/dkm_head.jsonl, a backbone one of
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
from leaven.pretext import kshot_indices
from leaven.recipes.common.batches import Images, build_backbone, find_data
from leaven.recipes.common.flags import ImageSettings
from leaven.recipes.common.probes import labelled_features, recalibrate

LEDGER = RESULTS / "dkm_head_runs.jsonl"
NET, SIDE = "resnet10t", {"cifar": 64, "fashion": 32}
HEADS = ("linear", "SVGP", "NNGP", "DKM", "ensemble")
BACKBONES = ("supervised", "SparK")
LABELS = {"200": 20, "1,000": 100, "all": None}  # images of each class
SEEDS = (0, 1, 2)
NU = (1.0, 100.0, math.inf)
# What a head may choose from; None: nothing.
CHOICES: dict[str, tuple[float | None, ...]] = {
    "linear": (1e-1, 1e-2, 1e-3),
    "SVGP": (None,),
    "NNGP": (None,),
    "DKM": NU,
    "ensemble": (0.05, 0.5, 5.0),
}
INDUCING, STEPS, LR = 100, 1000, 0.02
COMMON = shlex.split("--seed 0 --workers 0 --batch-size 64 --channels-last --weight-decay 0.05")


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


def linear(x: Tensor, y: Tensor, tests: list[Tensor], classes: int, l2: float) -> list[Tensor]:
    from sklearn.linear_model import LogisticRegression

    mean, std = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
    made = LogisticRegression(C=1 / (l2 * len(x)), max_iter=2000).fit(((x - mean) / std).numpy(), y.numpy())
    probs = [torch.zeros(len(test), classes, dtype=torch.float64) for test in tests]
    for found, test in zip(probs, tests, strict=True):
        said = made.predict_proba(((test - mean) / std).numpy())
        found[:, torch.from_numpy(made.classes_)] = torch.from_numpy(said).double()
    return probs


def ensemble(
    x: Tensor, y: Tensor, tests: list[Tensor], classes: int, seed: int, weight_decay: float
) -> list[Tensor]:
    probs = [torch.zeros(len(test), classes) for test in tests]
    for member in range(5):
        torch.manual_seed(1000 * seed + member)
        net = nn.Sequential(nn.Linear(x.shape[1], 256), nn.ReLU(), nn.Linear(256, classes))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=weight_decay)
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


def predicted(
    head: str, value: float | None, x: Tensor, y: Tensor, tests: list[Tensor], classes: int, seed: int
) -> list[Tensor]:
    """Class probabilities of a head that learns from x and y."""
    if head == "linear":
        assert value is not None
        return linear(x, y, tests, classes, value)
    if head == "ensemble":
        assert value is not None
        return ensemble(x, y, tests, classes, seed, value)
    depth, nu = {"SVGP": (1, 1.0), "NNGP": (3, math.inf)}.get(head, (3, value))
    assert nu is not None
    return kernel_machine(x, y, tests, classes, seed, depth, nu)


def chosen(head: str, x: Tensor, y: Tensor, classes: int, seed: int) -> float | None:
    """The value of `CHOICES` that is likeliest on a fifth of the labels."""
    values = CHOICES[head]
    if len(values) == 1:
        return values[0]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    judged, kept = order[: len(x) // 5], order[len(x) // 5 :]

    def score(value: float | None) -> float:
        (tried,) = predicted(head, value, x[kept], y[kept], [x[judged]], classes, seed)
        return calibration(tried, y[judged]).nll

    return min(values, key=score)


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
    value = chosen(head, x, y, classes, seed)
    result = {"chosen": str(value)}
    probs = predicted(head, value, x, y, [x_val, x_ood], classes, seed)
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
    choices = {head: [str(value) for value in values] for head, values in CHOICES.items()}
    settings = {"inducing": INDUCING, "steps": STEPS, "lr": LR, "choices": choices}
    study(__file__, __doc__, prepare, summary, settings)


if __name__ == "__main__":
    main()
