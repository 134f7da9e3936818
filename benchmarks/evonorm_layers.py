"""EvoNorm beside BatchNorm and ReLU: time and memory of the layers, accuracy of networks at small and usual batches.

    python benchmarks/evonorm_layers.py cost                             # results/evonorm_cost-<machine>.json
    python benchmarks/evonorm_layers.py --data DATA --work RUNS run      # as many at a time as there are cores
    python benchmarks/evonorm_layers.py --data DATA --work RUNS table    # results/evonorm.json, and in words

Cost: forward and backward of one layer, one thread, eager and compiled, interleaved; memory is what autograd keeps for
the backward pass. Accuracy: recipes/train.py on photos, batches of 4 and of 32 images, the learning rate scaled with
the batch. A finished run is one line of results/evonorm_runs.jsonl and is not done again.
"""

import argparse
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ledger import RESULTS, Ledger, Run, data_sets, execute, interval95, summary
from timing import interleaved, machine, result_file
from torch import Tensor, nn

from leaven.callbacks import evo_norm

SHAPES = ((8, 64, 56, 56), (8, 256, 14, 14))

LEDGER = RESULTS / "evonorm_runs.jsonl"
SEEDS = (0, 1, 2)
BATCHES = {4: "4e-4", 32: "1.5e-3"}  # learning rates, about as the root of the batch
EPOCHS = 15
ARMS = {
    "BN, ReLU": ("--backbone", "resnet10t"),
    "GN, ReLU": ("--backbone", "benchmarks.group_norm_nets:resnet10t"),
    "S0": ("--backbone", "resnet10t", "--callbacks", "evonorm_s0"),
}
COMMON = shlex.split(
    f"--data photos --image-size 64 --epochs {EPOCHS} --eval-every {EPOCHS} --workers 0 "
    "--channels-last --weight-decay 0.05 --warmup-epochs 1 --crop-scale 0.35,1 --crop-pct 1.0 --save-every 100"
)


def layers(channels: int) -> dict[str, nn.Module]:
    return {
        "BN, ReLU": nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)),
        "GN, ReLU": nn.Sequential(nn.GroupNorm(32, channels), nn.ReLU(inplace=True)),
        "S0": evo_norm("s0", channels),
        "B0": evo_norm("b0", channels),
    }


def kept(layer: nn.Module, x: Tensor) -> float:
    """MiB that autograd holds for the backward pass, each tensor once, beside the input."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    seen.pop(x.untyped_storage().data_ptr(), None)
    return round(sum(seen.values()) / 2**20, 3)


def cost() -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for shape in SHAPES:
        x = torch.randn(shape, requires_grad=True)

        def step(layer: Any, x: Tensor = x) -> Callable[[], None]:
            return lambda: layer(x * 1.0).square().mean().backward()

        for how in ("eager", "compiled"):
            torch.compiler.reset()
            ways = {
                name: step(torch.compile(each) if how == "compiled" else each)
                for name, each in layers(shape[1]).items()
            }
            rows = interleaved(ways, base="BN, ReLU", repeats=15, device="cpu")
            if how == "eager":
                for name, layer in layers(shape[1]).items():
                    rows[name]["kept_mib"] = kept(layer, x * 1.0)
            found[f"{'x'.join(map(str, shape))}, {how}"] = rows
            print(shape, how, {name: row["ratio_to_BN, ReLU"] for name, row in rows.items()}, flush=True)
    return found


def training(arm: str, batch: int, seed: int) -> Run:
    words = ["recipes/train.py", *ARMS[arm], *COMMON, "--batch-size", str(batch), "--lr", BATCHES[batch]]
    return Run(f"{arm.replace(', ', '-')}-{batch}-{seed}", (*words, "--seed", str(seed)))


def table(ledger: Ledger) -> list[dict[str, Any]]:
    rows = []
    for batch in BATCHES:
        base = [ledger.top1(training("BN, ReLU", batch, seed)) for seed in SEEDS]
        for arm in ARMS:
            scores = [ledger.top1(training(arm, batch, seed)) for seed in SEEDS]
            gains = [a - b for a, b in zip(scores, base, strict=True)]
            rows.append(
                {"batch": batch, "arm": arm, "top1": summary(scores)}
                | {"minus BN": summary(gains), "interval95": interval95(gains)}
            )
    return rows


def words(rows: list[dict[str, Any]]) -> str:
    lines = ["| batch | layers | top-1 | minus BN, ReLU (95 %) |", "|" + " --- |" * 4]
    for row in rows:
        low, high = (100 * each for each in row["interval95"])
        gain = f"{100 * row['minus BN']['mean']:+.1f} ({low:+.1f} to {high:+.1f})"
        cells = [str(row["batch"]), row["arm"], f"{100 * row['top1']['mean']:.1f}"]
        lines.append("| " + " | ".join([*cells, "" if row["arm"] == "BN, ReLU" else gain]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("cost", "run", "table"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.step == "cost":
        report: dict[str, Any] = {"machine": machine("cpu"), "layers": cost()}
        path = result_file(__file__, "cpu").with_stem(f"evonorm_cost-{os.cpu_count()}core")
        path.write_text(json.dumps(report, indent=1) + "\n")
        return
    ledger = Ledger(LEDGER)
    if args.step == "table":
        rows = table(ledger)
        report = {"machine": machine("cpu"), "results": rows}
        (RESULTS / "evonorm.json").write_text(json.dumps(report, indent=1) + "\n")
        print(words(rows))
        return
    work = args.work.resolve()
    chains = [[training(arm, batch, seed) for arm in ARMS] for batch in BATCHES for seed in SEEDS]
    execute(chains, data_sets(args.data, work), work, args.jobs, ledger)


if __name__ == "__main__":
    main()
