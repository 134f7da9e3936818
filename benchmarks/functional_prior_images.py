"""GP-matched priors on images with few labels, beside N(0, 1), MAP and a deep ensemble.

    python benchmarks/functional_prior_images.py --data DATA --work RUNS            # as many at a time as cores
    python benchmarks/functional_prior_images.py --data DATA --work RUNS --table    # in words, and as JSON in results/

DATA holds cifar10-jpeg/, fashion-mnist/ and imagenette224-mini/. "LeNet": all parameters of LeNet-5 with tanh, on
pixels (32 x 32). "head": a linear layer on the features of a frozen resnet10t that was trained on another data set (as
in dkm_head.py). 200 or 1,000 labels; everybody is judged on 2,000 held-out images; what tells images of the other data
set is the entropy. "matched" is fitted by the energy distance to an RBF process of variance 8 on what the network sees.
MAP and the ensemble (five members) have the N(0, 1) prior and as many updates as the sampler has steps. Temperature 1:
nothing is tempered. A finished trial is one line of RUNS/functional_prior_images.jsonl.
"""

import math
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import gpytorch
import torch
from dkm_head import LEDGER, NET, SIDE, backbone, features, unpack_fashion
from ledger import Ledger, data_sets, execute
from study import study
from torch import Tensor, nn

from leaven.bayes import auroc, calibration
from leaven.bayes.functional_prior import (
    SGHMC,
    FunctionalPrior,
    GPTarget,
    fit_prior,
    image_measure,
    map_estimate,
    softmax_loglik,
)
from leaven.pretext import kshot_indices
from leaven.recipes.common.batches import Images, find_data
from leaven.recipes.common.flags import ImageSettings

NETS, ARMS, SEEDS = ("LeNet", "head"), ("N(0, 1)", "matched", "MAP", "ensemble"), (0, 1, 2)
LABELS = {"200": 20, "1,000": 100}  # images of each class
CHAINS, BURN_IN, THIN, DRAWS, VARIANCE = 4, 1000, 100, 30, 8.0
FIT: dict[str, Any] = {"steps": 150, "functions": 64, "chunk_size": 16}


def lenet(classes: int = 10) -> nn.Sequential:
    """LeCun et al. 1998 for 32 x 32 RGB, as it is usually written today."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, classes),
    )  # fmt: skip


def pixels(data: str, places: dict[str, str], work: Path) -> Path:
    """Training, held-out and other images at 32 x 32, normalised by the data's own statistics; taken once."""
    cache = work / f"pixels-{data}.pt"
    if not cache.is_file():
        settings = ImageSettings(backbone=NET, data=places[data], image_size=(32, 32), workers=0)
        found, other = (find_data(ImageSettings(data=places[name])) for name in (data, *set(SIDE) - {data}))
        images = Images(found, settings, (32, 32), found.mean, found.std)
        parts = {"train": found.train, "val": found.val, "ood": other.val}
        tensors = {}
        for name, part in parts.items():
            batches = list(images.whole(part, 10_000))
            tensors[name] = (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
        torch.save(tensors, cache)
    return cache


def target(inputs: int, classes: int) -> GPTarget:
    prior = gpytorch.priors.LogNormalPrior
    rbf = gpytorch.kernels.RBFKernel(lengthscale_prior=prior(math.log(math.sqrt(2 * inputs)), 1.0))
    variance = prior(math.log(VARIANCE), math.sqrt(0.3))
    return GPTarget(gpytorch.kernels.ScaleKernel(rbf, outputscale_prior=variance), outputs=classes)


@torch.no_grad()
def probabilities(prior: FunctionalPrior, params: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.cat(
        [prior.evaluate(params, part, chunk_size=16).double().softmax(2).mean(0) for part in x.split(250)]
    )


def trial(caches: dict[str, str], data: str, net: str, labels: str, seed: int, arm: str) -> dict[str, Any]:
    """Scores of one arm."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = torch.load(caches[f"{data} {net}"])
    (x, y), (x_val, y_val), (x_ood, _) = found["train"], found["val"], found["ood"]
    classes = int(y.max()) + 1
    rows = kshot_indices(y, LABELS[labels], seed)
    x, y = x[rows], y[rows]
    torch.manual_seed(seed)
    prior = FunctionalPrior(lenet(classes) if net == "LeNet" else nn.Linear(x.shape[1], classes))
    start, result = time.process_time(), dict[str, Any]()
    if arm == "matched":
        process = target(x[0].numel(), classes)
        fit_prior(prior, process, image_measure(x, 64), "energy", seed=seed, **FIT)
        result["standard deviations"] = {
            group: round(float(prior.sample(200)[group].detach().std()), 4) for group in prior.groups
        }
    else:
        prior.standardise()
    if arm in ("MAP", "ensemble"):
        steps, members = BURN_IN + THIN * DRAWS, 5 if arm == "ensemble" else 1
        params = map_estimate(prior, softmax_loglik, x, y, members=members, steps=steps, seed=seed)
    else:
        how: dict[str, Any] = {"chains": CHAINS, "burn_in": BURN_IN, "thin": THIN, "seed": seed}
        posterior = SGHMC(prior, softmax_loglik, x, y, **how).run(DRAWS).after(DRAWS // 3)
        params = posterior.flat()
        result |= {"rhat": float(posterior.rhat().mean()), "clamped": posterior.clamped_fraction}
    probs, strange = (probabilities(prior, params, each) for each in (x_val[:2000], x_ood[:2000]))
    known = calibration(probs, y_val[:2000])
    scores = {"accuracy": known.accuracy, "nll": known.nll, "ece": known.ece}
    entropies = [torch.special.entr(each).sum(1) for each in (probs, strange)]
    return result | scores | {"ood auroc": auroc(*entropies), "cpu seconds": time.process_time() - start}


def trials() -> dict[str, dict[str, Any]]:
    return {
        f"{data}, {net}, {labels}, seed {seed}, {arm}": {
            "data": data, "net": net, "labels": labels, "seed": seed, "arm": arm,
        }
        for net in NETS[::-1] for data in SIDE for labels in LABELS for seed in SEEDS for arm in ARMS
    }  # fmt: skip


def summary(outcomes: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Means over seeds; what is not complete is left out."""
    rows = []
    what = ("accuracy", "nll", "ece", "ood auroc")
    lines = ["| data | net | labels | arm | accuracy | NLL | ECE | OOD AUROC |", "|" + " --- |" * 8]
    for data in SIDE:
        for net in NETS:
            for labels in LABELS:
                for arm in ARMS:
                    names = [f"{data}, {net}, {labels}, seed {seed}, {arm}" for seed in SEEDS]
                    found = [outcomes.get(name) for name in names]
                    if any(each is None or each["failure"] for each in found):
                        continue
                    row: dict[str, Any] = {"data": data, "net": net, "labels": labels, "arm": arm}
                    for score in what:
                        values = [each["result"][score] for each in found if each]
                        row[score] = {"mean": statistics.mean(values), "sd": statistics.stdev(values)}
                    rows.append(row)
                    cells = [data, net, labels, arm, f"{100 * row['accuracy']['mean']:.1f} %"]
                    cells += [f"{row[score]['mean']:.3f}" for score in what[1:]]
                    lines.append("| " + " | ".join(cells) + " |")
    return rows, "\n".join(lines)


def prepare(data: Path, work: Path, jobs: int) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Backbones, their features, and images, and what is to be done with them."""
    places = data_sets(data, work) | {"fashion": unpack_fashion(data, work)}
    execute([[backbone(name, "supervised")] for name in SIDE], places, work, jobs, Ledger(LEDGER))
    caches = {f"{name} head": str(features(name, "supervised", places, work)) for name in SIDE}
    caches |= {f"{name} LeNet": str(pixels(name, places, work)) for name in SIDE}
    return partial(trial, caches), trials()


def main() -> None:
    settings = {
        "chains": CHAINS, "burn_in": BURN_IN, "thin": THIN, "draws": DRAWS, "fit": FIT, "variance": VARIANCE,
        "temperature": 1.0,
    }  # fmt: skip
    study(__file__, __doc__, prepare, summary, settings)


if __name__ == "__main__":
    main()
