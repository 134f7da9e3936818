"""Deep kernel machines on the UCI splits, beside Gaussian processes of gpytorch.

    python benchmarks/dkm_uci.py --data DATA/uci --work RUNS             # as many trials at a time as there are cores
    python benchmarks/dkm_uci.py --data DATA/uci --work RUNS --table     # results/dkm_uci.json, and in words

Ten splits of the small sets, three of the large ones. "DKM" takes the nu of a fixed grid that is likeliest on a fifth
of the training rows, then trains on all of them; "NNGP" is the same machine at nu = infinity. "SVGP" and "DSPP" are
gpytorch's, with as many inducing points and updates; DSPP's beta is chosen as nu is, of two values.
"exact GP" is gpytorch's, where there are at most 2,000 rows. All kernels have a learnt scale per input; all compute in
float64, and noise may fall as low as it likes. A finished trial is one line of RUNS/dkm_uci.jsonl and is not done
again.
"""

import math
import statistics
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import gpytorch
import torch
from study import study
from torch import Tensor

from leaven.bayes import DeepKernelMachine
from leaven.bayes.deep_kernel_machine import fit
from leaven.recipes.common.tables import Scale, open_table

SPLITS = {
    "boston": 10,
    "concrete": 10,
    "energy": 10,
    "yacht": 10,
    "wine-red": 10,
    "kin8nm": 3,
    "naval": 3,
    "power": 3,
}
MODELS = ("DKM", "NNGP", "exact GP", "SVGP", "DSPP")
NU = (0.01, 1.0, 100.0, math.inf)
INDUCING, STEPS, BATCH, LR = 100, 1000, 256, 0.02
BETA = (0.05, 1.0)
EXACT_ROWS = 2000

# Means and variances of the observations, standardised, and log weights: (sites, rows), (sites, rows), (sites, 1).
Mixture = tuple[Tensor, Tensor, Tensor]
ONE = torch.zeros(1, 1)


def dkm(x: Tensor, y: Tensor, test: Tensor, nu: float, seed: int) -> Mixture:
    torch.manual_seed(seed)
    made = DeepKernelMachine(x.shape[1], 1, 3, min(INDUCING, len(x)), nu, ard=True)
    fit(made, x, y, steps=STEPS, batch_size=BATCH, lr=LR, seed=seed)
    with torch.no_grad():
        found = made(test)
    assert found.noise is not None
    return found.mean.T, found.variance.T + found.noise, ONE


def chosen(
    way: Any, values: tuple[float, ...], x: Tensor, y: Tensor, test: Tensor, seed: int
) -> tuple[Mixture, float]:
    """The value that is likeliest on a fifth of the rows, then all of them."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    judged, kept = order[: len(x) // 5], order[len(x) // 5 :]
    scores = {}
    for value in values:
        scores[value] = float(density(way(x[kept], y[kept], x[judged], value, seed), y[judged, 0]).mean())
    best = max(values, key=lambda value: scores[value])
    return way(x, y, test, best, seed), best


def density(found: Mixture, truth: Tensor) -> Tensor:
    mean, variance, weights = (each.double() for each in found)
    each = -0.5 * ((truth - mean).square() / variance + (2 * math.pi * variance).log())
    return (each + weights).logsumexp(0)


def kernel(width: int, batch: tuple[int, ...] = ()) -> Any:
    batch = torch.Size(batch)
    rbf = gpytorch.kernels.RBFKernel(ard_num_dims=width, batch_shape=batch)
    return gpytorch.kernels.ScaleKernel(rbf, batch_shape=batch)


def gaussian() -> Any:
    """gpytorch's likelihood without its floor of 1e-4 under the noise, which a deep kernel machine has not."""
    return gpytorch.likelihoods.GaussianLikelihood(noise_constraint=gpytorch.constraints.GreaterThan(1e-8))


class Exact(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, likelihood: Any) -> None:
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = gpytorch.means.ConstantMean(), kernel(x.shape[1])

    def forward(self, x: Tensor) -> Any:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def exact(x: Tensor, y: Tensor, test: Tensor, seed: int) -> Mixture:
    likelihood = gaussian()
    model = Exact(x.double(), y[:, 0].double(), likelihood).double().train()
    marginal = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (-marginal(model(x.double()), y[:, 0].double())).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        found = likelihood(model(test.double()))
    return found.mean[None], found.variance[None], ONE


class Sparse(gpytorch.models.ApproximateGP):
    def __init__(self, inducing: Tensor) -> None:
        variational = gpytorch.variational.CholeskyVariationalDistribution(len(inducing))
        super().__init__(gpytorch.variational.VariationalStrategy(self, inducing, variational))
        self.mean_module, self.covar_module = gpytorch.means.ConstantMean(), kernel(inducing.shape[1])

    forward = Exact.forward


class Layer(gpytorch.models.deep_gps.dspp.DSPPLayer):
    """One layer of gpytorch's deep sigma point process."""

    def __init__(self, inducing: Tensor, outputs: int | None) -> None:
        batch = torch.Size([] if outputs is None else [outputs])
        inducing = inducing if outputs is None else inducing.expand(outputs, -1, -1).clone()
        variational = gpytorch.variational.MeanFieldVariationalDistribution(
            inducing.shape[-2], batch_shape=batch
        )
        strategy = gpytorch.variational.VariationalStrategy(self, inducing, variational)
        super().__init__(strategy, inducing.shape[-1], outputs, 8)
        linear = gpytorch.means.LinearMean(inducing.shape[-1])
        self.mean_module = gpytorch.means.ConstantMean() if outputs is None else linear
        self.covar_module = kernel(inducing.shape[-1], batch)

    forward = Exact.forward


class DSPP(gpytorch.models.deep_gps.dspp.DSPP):
    def __init__(self, inducing: Tensor, likelihood: Any) -> None:
        super().__init__(8)
        self.hidden, self.likelihood = Layer(inducing, 3), likelihood
        self.last = Layer(torch.randn(len(inducing), 3), None)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.hidden(x))


def variational(x: Tensor, y: Tensor, test: Tensor, beta: float | None, seed: int) -> Mixture:
    """SVGP; with beta, DSPP."""
    torch.manual_seed(seed)
    start = DeepKernelMachine(x.shape[1], 1, 1, min(INDUCING, len(x)))
    start.init_inducing(x, seed=seed)
    points = start.inducing.detach().clone()
    likelihood = gaussian()
    if beta is None:
        model: Any = Sparse(points)
        bound: Any = gpytorch.mlls.VariationalELBO(likelihood, model, len(x))
    else:
        model = DSPP(points, likelihood)
        bound = gpytorch.mlls.DeepPredictiveLogLikelihood(likelihood, model, len(x), beta=beta)
    model.double().train()
    likelihood.double()
    x, y, test = x.double(), y.double(), test.double()
    parameters = {id(p): p for p in [*model.parameters(), *likelihood.parameters()]}
    optimizer = torch.optim.Adam(parameters.values(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(STEPS):
        if len(order) < min(BATCH, len(x)):
            order = torch.cat([order, torch.randperm(len(x), generator=generator)])
        batch, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        (-bound(model(x[batch]), y[batch, 0])).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        found = likelihood(model(test))
        if beta is None:
            return found.mean[None], found.variance[None], ONE
        return found.mean, found.variance, model.quad_weights.view(-1, 1)


def trial(folder: str, data: str, split: int, model: str) -> dict[str, Any]:
    """RMSE and NLL on the test rows, in the target's own unit."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = open_table(f"{folder}/{data}", None)
    train, test = table.split(split)
    inputs, targets = Scale(table.x[train]), Scale(table.y[train])
    x, y, new = inputs(table.x[train]), targets(table.y[train]), inputs(table.x[test])
    truth = targets(table.y[test])[:, 0].double()
    result: dict[str, Any] = {}
    if model == "DKM":
        found, nu = chosen(dkm, NU, x, y, new, split)
        result["nu"] = str(nu)
    elif model == "DSPP":
        found, result["beta"] = chosen(variational, BETA, x, y, new, split)
    elif model == "NNGP":
        found = dkm(x, y, new, math.inf, split)
    else:
        found = exact(x, y, new, split) if model == "exact GP" else variational(x, y, new, None, split)
    mean = (found[2].double().exp() * found[0].double()).sum(0)
    rmse, scale = float((truth - mean).square().mean().sqrt()), float(targets.std)
    return result | {"rmse": scale * rmse, "nll": math.log(scale) - float(density(found, truth).mean())}


def trials(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        f"{data}, split {split}, {model}": {"data": data, "split": split, "model": model}
        for data, splits in SPLITS.items()
        for split in range(splits)
        for model in MODELS
        if model != "exact GP" or len(open_table(str(folder / data), None).x) <= EXACT_ROWS
    }


def summary(outcomes: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Means and standard errors over splits, and as a Markdown table; what is not complete is left out."""
    rows: dict[str, Any] = {}
    lines = ["| data | splits | " + " | ".join(MODELS) + " |", "|" + " --- |" * (2 + len(MODELS))]
    for data, splits in SPLITS.items():
        for what in ("rmse", "nll"):
            cells = [f"{data}, {what.upper()}", str(splits)]
            for model in MODELS:
                found = [outcomes.get(f"{data}, split {split}, {model}") for split in range(splits)]
                if any(each is None or each["failure"] for each in found):
                    cells.append("-")
                    continue
                values = [each["result"][what] for each in found]
                mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(splits)
                rows.setdefault(data, {}).setdefault(model, {})[what] = {
                    "mean": mean,
                    "standard error": error,
                }
                digits = 4 if abs(mean) < 0.1 else 3
                cells.append(f"{mean:.{digits}f} ± {error:.{digits}f}")
            lines.append("| " + " | ".join(cells) + " |")
    return rows, "\n".join(lines)


def prepare(data: Path, work: Path, jobs: int) -> tuple[Any, dict[str, dict[str, Any]]]:
    return partial(trial, str(data)), trials(data)


def main() -> None:
    settings: dict[str, Any] = {"inducing": INDUCING, "steps": STEPS, "batch": BATCH, "lr": LR}
    settings |= {"nu": [str(nu) for nu in NU], "beta": BETA}
    study(__file__, __doc__, prepare, summary, settings)


if __name__ == "__main__":
    main()
