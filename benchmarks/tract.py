"""What TrAct costs, and how many updates it saves.

    python benchmarks/tract.py cost                                   # results/tract_cost-<machine>.json
    python benchmarks/tract.py --data DATA --work RUNS tune           # learning rates, on a fifth of the images
    python benchmarks/tract.py --data DATA --work RUNS run            # as many at a time as there are cores
    python benchmarks/tract.py --data DATA --work RUNS table          # results/tract.json, and in words

Cost: processor time of one thread on what a step adds, beside that of the step itself. "unfold" restates the plain form
of the method (Petersen et al. 2024): all patches of the batch in one matrix, its second moment, the inverse.

Updates: recipes/train.py on photos, with and without, the learning rate tuned for both. A finished run is one line of
results/tract_runs.jsonl and is not done again. The arms of a seed share weights, order and augmentation.
"""

import argparse
import json
import os
import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from ledger import RESULTS, Ledger, Run, data_sets, execute, interval95, summary
from timing import machine, result_file
from torch import Tensor, nn

from leaven.callbacks import patch_second_moment, tract_gradient

LAM = 0.1
COSTED = {"resnet50": "conv1", "convnext_tiny": "stem.0", "vit_small_patch16_224": "patch_embed.proj"}
BATCH, REPEATS = 8, 7

LEDGER = RESULTS / "tract_runs.jsonl"
NETS = ("test_resnet", "test_vit3")  # timm's, of 0.4 and 0.8 million parameters
SEEDS = (0, 1, 2, 3, 4)
RATES = ("5e-4", "1.5e-3", "4e-3")
TUNE = 100
SIDE, EPOCHS = 64, 24
COMMON = shlex.split(
    f"--data photos --image-size {SIDE} --epochs {EPOCHS} --batch-size 50 --workers 0 "
    "--channels-last --weight-decay 0.05 --warmup-epochs 2 --crop-scale 0.35,1 --crop-pct 1.0 --save-every 100"
)
ARMS = {"without": (), "TrAct": ("--callbacks", "tract")}
SHARES = (0.5, 0.75, 0.9, 1.0)  # of the final accuracy without TrAct, to be reached


def unfolded(x: Tensor, conv: nn.Conv2d, gradient: Tensor) -> Tensor:
    patches = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    columns = patches.transpose(0, 1).flatten(1)
    moment = columns @ columns.T / columns.shape[1]
    inverse = torch.linalg.inv(moment + LAM * torch.eye(len(moment)))
    return (gradient.flatten(1) @ inverse).view_as(gradient)


def ours(x: Tensor, conv: nn.Conv2d, gradient: Tensor) -> Tensor:
    total, count = patch_second_moment(x, conv)
    return tract_gradient(gradient, total / count, LAM)


def cost() -> dict[str, Any]:
    """Per network: processor seconds of the step and of either form, medians and their ratios."""
    torch.set_num_threads(1)
    found = {}
    for net, name in COSTED.items():
        torch.manual_seed(0)
        model, x = timm.create_model(net), torch.randn(BATCH, 3, 224, 224)
        conv = model.get_submodule(name)
        gradient = torch.randn_like(conv.weight)

        def step(model: nn.Module = model, x: Tensor = x) -> None:
            model.zero_grad()
            model(x).square().mean().backward()

        def form(way: Any, x: Tensor = x, conv: Any = conv, g: Tensor = gradient) -> Callable[[], Tensor]:
            return lambda: way(x, conv, g)

        ways = {"step": step, "unfold": form(unfolded), "leaven": form(ours)}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(REPEATS + 2):
            for way, call in ways.items():
                start = time.process_time()
                call()
                times[way].append(time.process_time() - start)
        median = {way: statistics.median(t[2:]) for way, t in times.items()}
        ratios = sorted(a / b for a, b in zip(times["leaven"][2:], times["unfold"][2:], strict=True))
        found[net] = {
            "layer": str(conv),
            "cpu_seconds": {way: round(value, 5) for way, value in median.items()},
            "share_of_step": {way: round(median[way] / median["step"], 5) for way in ("unfold", "leaven")},
            "leaven_to_unfold": round(statistics.median(ratios), 3),
            "range": [round(ratios[0], 3), round(ratios[-1], 3)],
        }
        print(net, found[net], flush=True)
    return found


def training(net: str, arm: str, seed: int, lr: str, split: tuple[str, ...] = ()) -> Run:
    words = [
        "recipes/train.py",
        "--backbone",
        net,
        *COMMON,
        "--seed",
        str(seed),
        "--lr",
        lr,
        *ARMS[arm],
        *split,
    ]
    return Run(f"{net}-{seed}-{lr}-{arm}", tuple(words))


def rated(net: str, arm: str) -> dict[str, Run]:
    return {lr: training(net, arm, TUNE, lr, ("--val-from-train", "20%")) for lr in RATES}


def chosen(ledger: Ledger, net: str, arm: str) -> str:
    scores = {lr: ledger.top1(run) for lr, run in rated(net, arm).items()}
    return max(scores, key=lambda lr: scores[lr])


def final(ledger: Ledger) -> list[list[Run]]:
    """A chain per seed and network."""
    return [
        [training(net, arm, seed, chosen(ledger, net, arm)) for arm in ARMS] for seed in SEEDS for net in NETS
    ]


def reached(ledger: Ledger, run: Run, accuracy: float) -> int | None:
    """Updates until the held-out accuracy is first at least so high."""
    return next((step for step, top1 in ledger.rows[run.name]["curve"] if top1 >= accuracy), None)


def table(ledger: Ledger) -> list[dict[str, Any]]:
    """Accuracy at the end, and updates to fixed accuracies, paired by seed."""
    rows = []
    for net in NETS:
        runs = {arm: [training(net, arm, seed, chosen(ledger, net, arm)) for seed in SEEDS] for arm in ARMS}
        scores = {arm: [ledger.top1(run) for run in each] for arm, each in runs.items()}
        gains = [a - b for a, b in zip(scores["TrAct"], scores["without"], strict=True)]
        goals = [share * statistics.mean(scores["without"]) for share in SHARES]
        updates = {
            f"{goal:.3f}": {arm: [reached(ledger, run, goal) for run in each] for arm, each in runs.items()}
            for goal in goals
        }
        rows.append(
            {"backbone": net, "lr": {arm: chosen(ledger, net, arm) for arm in ARMS}, "updates to": updates}
            | {"top1": {arm: summary(values) for arm, values in scores.items()}}
            | {"difference": summary(gains), "interval95": interval95(gains)}
        )
    return rows


def words(rows: list[dict[str, Any]]) -> str:
    """Markdown: final accuracies; medians of updates, "-" where fewer than half of the seeds got there."""
    lines = ["| backbone | | without | TrAct |", "|" + " --- |" * 4]
    for row in rows:
        low, high = (100 * each for each in row["interval95"])
        means = [f"{100 * row['top1'][arm]['mean']:.1f}" for arm in ARMS]
        means[1] += f" ({100 * row['difference']['mean']:+.1f}, {low:+.1f} to {high:+.1f})"
        lines.append(f"| {row['backbone']} | top-1 at the end | " + " | ".join(means) + " |")
        for goal, by_arm in row["updates to"].items():
            medians = [
                statistics.median(sorted(float("inf") if s is None else s for s in by_arm[arm]))
                for arm in ARMS
            ]
            cells = ["-" if m == float("inf") else f"{m:.0f}" for m in medians]
            lines.append(f"| | updates to {100 * float(goal):.1f} % | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("cost", "tune", "run", "table"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.step == "cost":
        report = {"machine": machine("cpu"), "batch": BATCH, "image_size": 224, "networks": cost()}
        result_file(__file__, "cpu").with_stem(f"tract_cost-{os.cpu_count()}core").write_text(
            json.dumps(report, indent=1) + "\n"
        )
        return
    ledger = Ledger(LEDGER)
    if args.step == "table":
        rows = table(ledger)
        tried = [ledger.rows[run.name] for net in NETS for arm in ARMS for run in rated(net, arm).values()]
        report = {"machine": machine("cpu"), "results": rows, "tried on the tuning split": tried}
        (RESULTS / "tract.json").write_text(json.dumps(report, indent=1) + "\n")
        print(words(rows))
        return
    data, work = data_sets(args.data, args.work.resolve()), args.work.resolve()
    chains = [list(rated(net, arm).values()) for net in NETS for arm in ARMS]
    execute(chains if args.step == "tune" else final(ledger), data, work, args.jobs, ledger)


if __name__ == "__main__":
    main()
