"""What diffusion features cost: early exit beside the whole pass, the grid in one go beside one pass for each cell.

    python benchmarks/diffusion_features_cost.py --threads 1

"usual": what the authors' code does (soumik-kanad/diffssl): a hook on one block, and the whole network run for one
timestep. A U-Net laid out as ADM (37 blocks) in small, 64 px, block 24 of 37; and the grid of 6 timesteps by 3 blocks.
Values are checked to agree before anything is timed. Interleaved repeats, medians, ratios.
"""

import argparse
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from timing import interleaved, machine, result_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from leaven.pretext.diffusion import Cell, DiffusionFeatures, Schedule, UNet, adm, block_names
from leaven.pretext.diffusion.blocks import pooled
from leaven.pretext.diffusion.features import keyed_noise

BLOCKS, TIMES = (19, 24, 30), (10, 30, 60, 90, 150, 300)


def network() -> UNet:
    torch.manual_seed(0)
    made = UNet(3, 6, width=32, multipliers=(1, 1, 2, 2, 4, 4), depth=2, attention=(8, 16, 32))
    return made.eval()


@torch.no_grad()
def usual(net: UNet, schedule: Schedule, x: Tensor, block: int, t: int) -> Tensor:
    """One cell: noise, the whole network, one hook."""
    kept: list[Tensor] = []
    name = block_names(net)[block - 1]
    hook = net.get_submodule(name).register_forward_hook(lambda module, args, output: kept.append(output))
    noise = torch.stack([keyed_noise(0, i, t, 0, x.shape[1:]) for i in range(len(x))]).to(x)
    times = torch.full((len(x),), t, device=x.device)
    net(schedule.add_noise(x, noise, times), times)
    hook.remove()
    return pooled(kept[0], 2)


def ways(x: Tensor) -> dict[str, dict[str, Callable[[], object]]]:
    net, schedule = network().to(x.device), Schedule.linear()
    one = DiffusionFeatures(net, schedule, [24], timesteps=(90,))
    full = DiffusionFeatures(net, schedule, [24], timesteps=(90,), early_exit=False)
    grid = DiffusionFeatures(net, schedule, list(BLOCKS), timesteps=TIMES)
    found, names = grid(x), block_names(net)
    for block in BLOCKS:
        for t in TIMES:
            mine = found[Cell(t, names[block - 1], 2)]
            torch.testing.assert_close(mine, usual(net, schedule, x, block, t), rtol=1e-4, atol=1e-4)
    return {
        "block 24, t = 90": {
            "early exit": lambda: one(x),
            "whole pass": lambda: full(x),
            "usual": lambda: usual(net, schedule, x, 24, 90),
        },
        "grid of 18 cells": {
            "in one go": lambda: grid(x),
            "usual": lambda: [usual(net, schedule, x, block, t) for block in BLOCKS for t in TIMES],
        },
    }


class _Stop(Exception):
    pass


def shares() -> dict[str, float]:
    """Of a pass of the paper's network, by counting operations."""

    def stop(*_: Any) -> None:
        raise _Stop

    found = {}
    with torch.device("meta"):
        for block in (0, *BLOCKS):
            net = adm()
            if block:
                net.get_submodule(block_names(net)[block - 1]).register_forward_hook(stop)
            with FlopCounterMode(display=False) as counted, suppress(_Stop):
                net(torch.zeros(1, 3, 256, 256), torch.zeros(1))
            found[f"b = {block}"] = float(counted.get_total_flops())
    whole = found.pop("b = 0")
    return {block: round(work / whole, 4) for block, work in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x = torch.randn(args.batch_size, 3, 64, 64, device=args.device)
    found: dict[str, Any] = {"share of ADM's operations": shares()}
    for what, each in ways(x).items():
        found[what] = interleaved(each, base="usual", repeats=args.repeats, device=args.device)
        for row in found[what].values():
            cells = 18 if "grid" in what else 1
            row["images_times_cells_per_s"] = round(args.batch_size * cells / row["median_s"], 1)
    print(json.dumps(found, indent=1))
    settings = {"batch_size": args.batch_size, "image_size": 64, "repeats": args.repeats}
    report = {"machine": machine(args.device), "settings": settings, **found}
    output = args.output or result_file(__file__, args.device)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
