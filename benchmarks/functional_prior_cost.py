"""What a split of boston costs from prior to test score, beside the way of the authors' code.

    python benchmarks/functional_prior_cost.py --data DATA/uci

"usual" restates in our own words what that code does for its boston experiment (tranbahien/you-need-a-good-prior): 200
updates of the prior with up to 200 of a critic before each, hyper-parameters of the process drawn in a loop with one
Cholesky factor each, then four chains one after another of 82,000 steps, each step one forward and backward of one
network with an optimizer's loop over its parameters. That takes long: as many steps and updates are timed as the flags
say, and the rest is scaled up, for the loops do the same each time. "leaven": the energy distance or W1 with the steps
of functional_prior_uci.py, and its chains at once. The same data, one thread; functional_prior_uci.py has the RMSEs.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from functional_prior_uci import BURN_IN, CHAINS, DRAWS, FIT, NOISE, THIN, target
from timing import machine, result_file
from torch import Tensor, nn

from leaven.bayes.functional_prior import SGHMC, FunctionalPrior, fit_prior, gaussian_loglik, table_measure
from leaven.recipes.common.tables import Scale, open_table

USUAL_STEPS = 2000 + 40 * 2000  # of each of the four chains


def network(inputs: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 100), nn.Tanh(), nn.Linear(100, 1))


def usual_chain(x: Tensor, y: Tensor, std: list[float], steps: int) -> None:
    """One chain, parameter by parameter, with the state of each in a dictionary as optimizers have it."""
    net = network(x.shape[1])
    h = a = 0.01
    state: dict[Tensor, dict[str, Tensor]] = {
        p: {
            "tau": torch.ones_like(p),
            "g": torch.ones_like(p),
            "v": torch.ones_like(p),
            "m": torch.zeros_like(p),
        }
        for p in net.parameters()
    }
    for step in range(steps):
        rows = torch.randint(len(x), (32,))
        loss = 0.5 * (net(x[rows]) - y[rows]).square().mean() / NOISE
        prior = sum(
            0.5 * (p.square().sum() * (p.shape[1] if p.ndim > 1 else 1) / s**2)
            for p, s in zip(net.parameters(), std, strict=True)
        )
        net.zero_grad()
        (loss + prior / len(x)).backward()
        with torch.no_grad():
            for p, s in state.items():
                assert p.grad is not None
                gradient = p.grad * len(x)
                if step < 2000:
                    inverse = 1 / (s["tau"] + 1)
                    s["tau"].add_(1 - s["tau"] * s["g"] ** 2 / (s["v"] + 1e-16))
                    s["g"].add_(inverse * (gradient - s["g"]))
                    s["v"].add_(inverse * (gradient**2 - s["v"]))
                scaled = 1 / (s["v"].sqrt() + 1e-16)
                spread = (2 * h**2 * a * scaled - h**4).clamp_min(1e-16)
                s["m"].add_(-(h**2) * scaled * gradient - a * s["m"] + spread.sqrt() * torch.randn_like(p))
                p.add_(s["m"])


def usual_fit(x: Tensor, updates: int) -> None:
    """Our own W1 with the authors' numbers; the process is drawn in a loop there as here."""
    how: dict[str, Any] = {"critic_steps": 200, "functions": 128, "threshold": 0.1}
    fit_prior(
        FunctionalPrior(network(x.shape[1])), target(x.shape[1]), table_measure(x), steps=updates, **how
    )


def ours(x: Tensor, y: Tensor, distance: Any) -> dict[str, float]:
    start = time.perf_counter()
    prior = FunctionalPrior(network(x.shape[1]))
    fit_prior(prior, target(x.shape[1]), table_measure(x), distance, **FIT[distance])
    matched = time.perf_counter()
    SGHMC(prior, gaussian_loglik(NOISE), x, y, chains=CHAINS, burn_in=BURN_IN, thin=THIN).run(DRAWS)
    done = time.perf_counter()
    return {"matching": matched - start, "sampling": done - matched, "all": done - start}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000, help="of the usual chain that are timed")
    parser.add_argument("--updates", type=int, default=40, help="of the usual matching that are timed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = open_table(str(args.data / "boston"), None)
    train, _ = table.split(0)
    x, y = Scale(table.x[train])(table.x[train]), Scale(table.y[train])(table.y[train])
    std = [2.9, 2.0, 1.2, 0.3]  # a matched prior's
    found: dict[str, Any] = {f"leaven, {distance}": ours(x, y, distance) for distance in ("energy", "w1")}
    start = time.perf_counter()
    usual_fit(x, args.updates)
    matching = (time.perf_counter() - start) * 200 / args.updates
    start = time.perf_counter()
    usual_chain(x, y, std, args.steps)
    sampling = (time.perf_counter() - start) * USUAL_STEPS / args.steps * 4
    found["usual"] = {"matching": matching, "sampling": sampling, "all": matching + sampling}
    for who, row in found.items():
        row |= {
            f"{part} over usual": row[part] / found["usual"][part] for part in ("matching", "sampling", "all")
        }
        print(who, {what: round(value, 4 if "over" in what else 1) for what, value in row.items()})
    again = ours(x, y, "energy")  # interleaved: before and after the usual way
    drift = again["all"] / found["leaven, energy"]["all"]
    print(f"leaven, energy, once more: {drift:.2f} of the first time")
    settings = {"timed steps": args.steps, "timed updates": args.updates, "once more": round(drift, 3)}
    settings |= {"steps": BURN_IN + THIN * DRAWS, "usual steps": USUAL_STEPS}
    report = {"machine": machine("cpu"), "settings": settings, "seconds": found}
    result_file(__file__, "cpu").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
