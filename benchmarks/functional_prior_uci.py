"""GP-matched priors against N(0, 1) on the UCI splits, both with posteriors by SGHMC.

    python benchmarks/functional_prior_uci.py --data DATA/uci --work RUNS          # as many at a time as cores
    python benchmarks/functional_prior_uci.py --data DATA/uci --work RUNS --table  # results/functional_prior_uci.json

One hidden layer of 100 tanh units, the target process and the likelihood as in Tran et al. 2022: RBF with a log-normal
lengthscale per input and log-normal variance, noise 0.1. Four chains of 8,000 steps in place of the authors' 82,000;
the first third of the draws is left out. Single Gaussian predictive density, in the target's own unit. R-hat is of the
functions' values at 50 training rows. A finished trial is one line of RUNS/functional_prior_uci.jsonl.
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
from study import study
from torch import nn

from leaven.bayes.functional_prior import (
    SGHMC,
    FunctionalPrior,
    GPTarget,
    fit_prior,
    gaussian_loglik,
    table_measure,
)
from leaven.recipes.common.tables import Scale, open_table

SPLITS = {"boston": 10, "concrete": 10, "energy": 10, "yacht": 10, "wine-red": 10, "kin8nm": 3, "power": 3}
PRIORS = ("N(0, 1)", "energy", "w1")
NOISE, CHAINS, BURN_IN, THIN, DRAWS = 0.1, 4, 2000, 200, 30
# Updates and, for w1, steps of the critic before each: a tenth of the authors' 200 x 200.
FIT: dict[str, dict[str, Any]] = {"energy": {"steps": 150}, "w1": {"steps": 80, "critic_steps": 50}}


def target(width: int) -> GPTarget:
    prior = gpytorch.priors.LogNormalPrior
    kernel = gpytorch.kernels.ScaleKernel(
        gpytorch.kernels.RBFKernel(
            ard_num_dims=width, lengthscale_prior=prior(math.log(math.sqrt(2 * width)), 1.0)
        ),
        outputscale_prior=prior(0.1, 1.0),
    )
    return GPTarget(kernel)


def trial(folder: str, data: str, split: int, prior: str) -> dict[str, Any]:
    """RMSE and NLL on the test rows, R-hat, and what it cost."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = open_table(f"{folder}/{data}", None)
    train, test = table.split(split)
    inputs, targets = Scale(table.x[train]), Scale(table.y[train])
    x, y = inputs(table.x[train]), targets(table.y[train])
    torch.manual_seed(split)
    net = nn.Sequential(nn.Linear(x.shape[1], 100), nn.Tanh(), nn.Linear(100, 1))
    functional = FunctionalPrior(net)
    start = time.process_time()
    if prior == "N(0, 1)":
        functional.standardise()
    else:
        distance: Any = prior
        fit_prior(functional, target(x.shape[1]), table_measure(x), distance, seed=split, **FIT[prior])
    matched = time.process_time()
    how: dict[str, Any] = {"chains": CHAINS, "burn_in": BURN_IN, "thin": THIN, "seed": split}
    posterior = SGHMC(functional, gaussian_loglik(NOISE), x, y, **how).run(DRAWS).after(DRAWS // 3)
    with torch.no_grad():
        functions = posterior.predict(functional, inputs(table.x[test]), chunk_size=16)[..., 0].double()
    scale, truth = float(targets.std), targets(table.y[test])[:, 0].double()
    mean, variance = functions.mean(0), functions.var(0) + NOISE
    nll = 0.5 * ((truth - mean).square() / variance + (2 * math.pi * variance).log()).mean()
    stds = {group: round(float(functional.sample(500)[group].std()), 4) for group in functional.groups}
    return {
        "rmse": scale * float((truth - mean).square().mean().sqrt()),
        "nll": math.log(scale) + float(nll),
        "rhat": float(posterior.rhat().mean()),
        "clamped": posterior.clamped_fraction,
        "standard deviations": stds,
        "cpu seconds": {"matching": matched - start, "sampling": time.process_time() - matched},
    }


def trials() -> dict[str, dict[str, Any]]:
    return {
        f"{data}, split {split}, {prior}": {"data": data, "split": split, "prior": prior}
        for data, splits in SPLITS.items()
        for split in range(splits)
        for prior in PRIORS
    }


def summary(outcomes: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Means over splits, and on how many a matched prior is better; what is not complete is left out."""
    rows: dict[str, Any] = {}
    lines = ["| data | splits | prior | RMSE | NLL | better RMSE | better NLL | R-hat |", "|" + " --- |" * 8]
    for data, splits in SPLITS.items():
        found = {
            prior: [outcomes.get(f"{data}, split {k}, {prior}") for k in range(splits)] for prior in PRIORS
        }
        if any(each is None or each["failure"] for row in found.values() for each in row):
            continue
        results = {prior: [each["result"] for each in row if each] for prior, row in found.items()}
        for prior, each in results.items():
            row: dict[str, Any] = {
                what: statistics.mean(r[what] for r in each) for what in ("rmse", "nll", "rhat")
            }
            for what in ("rmse", "nll"):
                pairs = zip(each, results["N(0, 1)"], strict=True)
                row[f"better {what}"] = sum(ours[what] < base[what] for ours, base in pairs)
            rows.setdefault(data, {})[prior] = row
            wins = (
                ["", ""]
                if prior == "N(0, 1)"
                else [f"{row[f'better {w}']} of {splits}" for w in ("rmse", "nll")]
            )
            cells = [
                data,
                str(splits),
                prior,
                f"{row['rmse']:.3f}",
                f"{row['nll']:.3f}",
                *wins,
                f"{row['rhat']:.3f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return rows, "\n".join(lines)


def prepare(data: Path, work: Path, jobs: int) -> tuple[Any, dict[str, dict[str, Any]]]:
    return partial(trial, str(data)), trials()


def main() -> None:
    settings = {
        "noise": NOISE,
        "chains": CHAINS,
        "burn_in": BURN_IN,
        "thin": THIN,
        "draws": DRAWS,
        "fit": FIT,
    }
    study(__file__, __doc__, prepare, summary, settings)


if __name__ == "__main__":
    main()
