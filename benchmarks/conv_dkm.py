"""Convolutional deep kernel machines on the pixels of Fashion-MNIST, beside a small CNN and the machine for vectors.

    python benchmarks/conv_dkm.py --data DATA --work RUNS            # as many at a time as there are cores
    python benchmarks/conv_dkm.py --data DATA --work RUNS --table    # results/conv_dkm.json, and in words

DATA holds fashion-mnist/ and cifar10-jpeg/. Everybody learns from the same 200 or 1,000 labelled images, standardised
by their own mean and deviation, without augmentation, in as many updates of as many images, and is judged on the
10,000 test images. What tells other images from known ones is the entropy of the class probabilities; the other images
are 2,000 held-out ones of CIFAR-10, in grey, at 28 px.

"conv DKM": three layers of inducing points, which nu holds to the infinitely wide convolutional network; at nu =
infinity that is what it is, and its inducing points and outputs alone are learnt. "CNN, mean": three convolutions as
wide as these layers, with the same strides, BatchNorm, the mean over positions, as there, and a linear layer.
"CNN, flat": the same without the mean. "DKM": three kernels on pixels as one vector. "seconds" are those of training,
on one thread. Nothing is chosen on held-out images. A finished trial is one line of RUNS/conv_dkm.jsonl.
"""

import gzip
import statistics
import time
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ledger import data_sets
from study import study
from torch import Tensor, nn

from leaven.bayes import ConvolutionalDKM, DeepKernelMachine, auroc, calibration
from leaven.bayes.deep_kernel_machine import fit, normalised
from leaven.pretext import kshot_indices

KINDS = ("conv DKM, nu 1", "conv DKM, nu inf", "CNN, mean", "CNN, flat", "DKM, nu 1", "DKM, nu inf")
LABELS = {"200": 20, "1,000": 100}  # images of each class
SEEDS = (0, 1, 2)
WIDTHS, STRIDES = (32, 64, 128), (2, 2)
INDUCING = 200  # of the machine for vectors
STEPS, BATCH, LR, CNN_LR = 1000, 64, 0.02, 3e-3
SCORES = ("accuracy", "nll", "ece", "ood auroc", "seconds")


def fashion(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) in [0, 1] and labels (N,)."""
    images, labels = (
        np.frombuffer(gzip.decompress((folder / f"{part}-{what}-ubyte.gz").read_bytes()), np.uint8)
        for what in ("images-idx3", "labels-idx1")
    )
    return torch.tensor(images[16:]).view(-1, 1, 28, 28) / 255, torch.tensor(labels[8:]).long()


def prepare(data: Path, work: Path, jobs: int) -> tuple[Any, dict[str, dict[str, Any]]]:
    """All images in one file, and what is to be done with them."""
    cache = work / "conv_dkm.pt"
    if not cache.is_file():
        from torchvision.datasets import ImageFolder

        other = ImageFolder(data_sets(data, work)["cifar"] + "/test")
        grey = [np.array(image.convert("L").resize((28, 28))) for image, _ in other]
        parts = {part: fashion(data / "fashion-mnist", part) for part in ("train", "t10k")}
        torch.save((*parts["train"], *parts["t10k"], torch.tensor(np.stack(grey)).unsqueeze(1) / 255), cache)
    return partial(trial, str(cache)), trials()


def machine(x: Tensor, y: Tensor, tests: list[Tensor], kind: str, seed: int) -> tuple[list[Tensor], float]:
    """Class probabilities of other images, and how long training took."""
    torch.manual_seed(seed)
    nu, start = float(kind.rpartition(" ")[2]), time.perf_counter()
    made: DeepKernelMachine
    if kind.startswith("conv"):
        made = ConvolutionalDKM(1, 10, WIDTHS, STRIDES, likelihood="categorical", nu=nu)
    else:
        x, *tests = (normalised(images.flatten(1)) for images in (x, *tests))
        made = DeepKernelMachine(x.shape[1], 10, 3, min(INDUCING, len(x)), nu, likelihood="categorical")
    fit(made, x, y, steps=STEPS, batch_size=BATCH, lr=LR, seed=seed)
    spent = time.perf_counter() - start
    with torch.no_grad():
        return [torch.cat([made(part).probs() for part in test.split(100)]) for test in tests], spent


def network(x: Tensor, y: Tensor, tests: list[Tensor], kind: str, seed: int) -> tuple[list[Tensor], float]:
    """The same of a small convolutional network."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    layers: list[nn.Module] = []
    for (ins, outs), stride in zip(pairwise((1, *WIDTHS)), (1, *STRIDES), strict=True):
        layers += [nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1)] if kind == "CNN, mean" else []
    net = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))
    net.eval()(x[:1])  # the last layer takes what comes
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=CNN_LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    order: list[int] = []
    for _ in range(STEPS):
        if len(order) < min(BATCH, len(x)):
            order += torch.randperm(len(x)).tolist()
        rows, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    spent = time.perf_counter() - start
    net.eval()
    with torch.no_grad():
        return [torch.cat([net(part).softmax(1) for part in test.split(500)]) for test in tests], spent


def trial(cache: str, labels: str, seed: int, kind: str) -> dict[str, Any]:
    """Scores of one classifier."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    x, y, x_test, y_test, x_other = torch.load(cache)
    rows = kshot_indices(y, LABELS[labels], seed)
    mean, std = x[rows].mean(), x[rows].std()
    x, *tests = ((images - mean) / std for images in (x[rows], x_test, x_other))
    train = network if kind.startswith("CNN") else machine
    probs, spent = train(x, y[rows], tests, kind, seed)
    known = calibration(probs[0], y_test)
    entropies = [torch.special.entr(each.double()).sum(1) for each in probs]
    scores = (known.accuracy, known.nll, known.ece, auroc(*entropies), round(spent, 1))
    return dict(zip(SCORES, scores, strict=True))


def trials() -> dict[str, dict[str, Any]]:
    """Seed by seed, so that a table can be made before all are done."""
    return {
        f"{labels}, seed {seed}, {kind}": {"labels": labels, "seed": seed, "kind": kind}
        for labels in LABELS
        for seed in SEEDS
        for kind in KINDS
    }


def summary(outcomes: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Means and standard deviations over the seeds, of what has all of them."""
    rows = []
    lines = ["| labels | classifier | accuracy | NLL | ECE | OOD AUROC | seconds |", "|" + " --- |" * 7]
    for labels in LABELS:
        for kind in KINDS:
            found = [outcomes.get(f"{labels}, seed {seed}, {kind}") for seed in SEEDS]
            results = [each["result"] for each in found if each and not each["failure"]]
            if len(results) < len(SEEDS):
                continue
            row: dict[str, Any] = {"labels": labels, "classifier": kind}
            for what in SCORES:
                values = [each[what] for each in results]
                row[what] = {"mean": statistics.mean(values), "sd": statistics.stdev(values)}
            rows.append(row)
            mean, sd = (100 * row["accuracy"][of] for of in ("mean", "sd"))
            cells = [labels, kind, f"{mean:.1f} % ({sd:.1f})"]
            cells += [f"{row[what]['mean']:.3f} ({row[what]['sd']:.3f})" for what in SCORES[1:4]]
            lines.append("| " + " | ".join([*cells, f"{row['seconds']['mean']:.0f}"]) + " |")
    return rows, "\n".join(lines)


def main() -> None:
    settings = {"widths": WIDTHS, "strides": STRIDES, "inducing": INDUCING, "steps": STEPS, "batch": BATCH}
    study(__file__, __doc__, prepare, summary, settings | {"lr": LR, "cnn lr": CNN_LR})


if __name__ == "__main__":
    main()
