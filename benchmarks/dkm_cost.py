"""What an update of a deep kernel machine costs, by rows, batch, inducing points and depth; beside gpytorch's SVGP.

    python benchmarks/dkm_cost.py            # results/dkm_cost-<machine>.json

Processor time of one thread per update of `fit`, the median of 30 after 5 of warm-up, on 8 columns of noise. One number
is varied at a time; the others are 10,000 rows, 256 of them in a batch, 100 inducing points, three layers. The SVGP is
that of dkm_uci.py: as many inducing points, a learnt scale per input, float64 as in the machine. It and a machine of
one layer take turns, three times.
"""

import json
import statistics
import time
from typing import Any

import gpytorch
import torch
from dkm_uci import Sparse, gaussian
from timing import machine, result_file
from torch import Tensor

from leaven.bayes import DeepKernelMachine
from leaven.bayes.deep_kernel_machine import fit

BASE = {"rows": 10_000, "batch": 256, "inducing": 100, "depth": 3}
VARIED = {
    "rows": (1000, 10_000, 100_000, 1_000_000),
    "batch": (64, 256, 1024, 4096),
    "inducing": (50, 100, 200, 400, 800),
    "depth": (1, 3, 6),
}
COLUMNS, WARM, STEPS = 8, 5, 30


def table(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, COLUMNS, generator=generator)
    return x, x.sin().sum(1, keepdim=True)


def ours(rows: int, batch: int, inducing: int, depth: int) -> float:
    """Median seconds of an update."""
    (x, y), marks = table(rows), list[float]()
    torch.manual_seed(0)
    made = DeepKernelMachine(COLUMNS, 1, depth, inducing, 1.0, ard=True)
    fit(made, x, y, steps=WARM + STEPS, batch_size=batch, report=lambda *_: marks.append(time.process_time()))
    return statistics.median(b - a for a, b in zip(marks[WARM - 1 :], marks[WARM:], strict=False))


def svgp(rows: int, batch: int, inducing: int) -> float:
    """The same of gpytorch's."""
    x, y = (each.double() for each in table(rows))
    model, likelihood = Sparse(x[:inducing].clone()).double().train(), gaussian().double()
    bound = gpytorch.mlls.VariationalELBO(likelihood, model, rows)
    optimizer = torch.optim.Adam({id(p): p for p in [*model.parameters(), *likelihood.parameters()]}.values())
    times = []
    for _ in range(WARM + STEPS):
        start = time.process_time()
        chosen = torch.randint(rows, (batch,))
        optimizer.zero_grad()
        (-bound(model(x[chosen]), y[chosen, 0])).backward()
        optimizer.step()
        times.append(time.process_time() - start)
    return statistics.median(times[WARM:])


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, values in VARIED.items():
        found[name] = {value: round(1000 * ours(**(BASE | {name: value})), 3) for value in values}
        print(name, found[name], flush=True)
    beside = {}
    for inducing in (50, 100, 200):
        pairs = [
            (ours(**(BASE | {"inducing": inducing, "depth": 1})), svgp(BASE["rows"], BASE["batch"], inducing))
            for _ in range(3)
        ]
        ratios = sorted(a / b for a, b in pairs)
        beside[inducing] = {
            "machine, ms": round(1000 * statistics.median(a for a, _ in pairs), 3),
            "SVGP, ms": round(1000 * statistics.median(b for _, b in pairs), 3),
            "ratio": round(ratios[1], 3), "range": [round(ratios[0], 3), round(ratios[2], 3)],
        }  # fmt: skip
        print(inducing, beside[inducing], flush=True)
    report = {"machine": machine("cpu"), "base": BASE, "ms per update": found, "beside SVGP": beside}
    result_file(__file__, "cpu").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
