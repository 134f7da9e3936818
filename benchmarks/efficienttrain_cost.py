"""What EfficientTrain's schedules save at their own size of 224 px, by measured steps.

    python benchmarks/efficienttrain_cost.py --data DATA --work RUNS    # results/efficienttrain_cost-<machine>.json

Processor time of one thread, medians of interleaved repeats: loading an image of DATA/imagenette224-mini as
recipes/train.py does, with RandAugment, and a step of AdamW with 8 of them at every size of the schedules, the Fourier
crop included. A schedule's gain is that of a run whose updates take these times, loading included, on the same core.
"fourier": the loader gives whole images. "bilinear": it decodes and resizes to the size that is due.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from ledger import data_sets
from timing import machine, result_file

from leaven.curricula import ET, ET_PP, fourier_crop
from leaven.recipes.common.augment import TrainTransform
from leaven.recipes.common.batches import find_data
from leaven.recipes.common.data import KeyedDataset
from leaven.recipes.common.flags import ImageSettings
from leaven.recipes.common.sampler import Key

NETS = ("resnet50", "convnext_tiny", "deit_small_patch16_224")
SIZES, FULL = (96, 160, 192, 224), 224
BATCH, REPEATS, LOADED = 8, 5, 64


def medians(ways: dict[int, Callable[[], Any]], repeats: int) -> dict[int, float]:
    """Processor seconds by size; the first of the interleaved repeats is warm-up."""
    times: dict[int, list[float]] = {size: [] for size in ways}
    for _ in range(repeats + 1):
        for size, call in ways.items():
            start = time.process_time()
            call()
            times[size].append(time.process_time() - start)
    return {size: statistics.median(each[1:]) for size, each in times.items()}


def loading(photos: str) -> dict[int, float]:
    """Seconds per image that the loader makes at a size; images have been read once, so that none waits for a disk."""
    found = find_data(ImageSettings(data=photos, image_size=(FULL, FULL), workers=0))
    transform = TrainTransform((FULL, FULL), (0.35, 1), 0.5, found.mean, found.std, aa="randaugment")
    dataset = KeyedDataset(found.train, transform)

    def load(size: int) -> Callable[[], Any]:
        keys = [Key(0, 0, i, None if size == FULL else (size, size)) for i in range(LOADED)]
        return lambda: [dataset[key] for key in keys]

    return {size: spent / LOADED for size, spent in medians({s: load(s) for s in SIZES}, REPEATS).items()}


def training(net: str) -> dict[int, float]:
    """Seconds per image of a step, from whole images on."""
    torch.manual_seed(0)
    flexible = {"dynamic_img_size": True} if net.startswith("deit") else {}
    model = timm.create_model(net, num_classes=10, **flexible).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = (
        torch.randn(BATCH, 3, FULL, FULL).contiguous(memory_format=torch.channels_last),
        torch.arange(BATCH),
    )

    def step(size: int) -> Callable[[], None]:
        def update() -> None:
            images = x if size == FULL else fourier_crop(x, size)
            torch.nn.functional.cross_entropy(model(images), y).backward()
            optimizer.step()
            optimizer.zero_grad()

        return update

    return {size: spent / BATCH for size, spent in medians({s: step(s) for s in SIZES}, REPEATS).items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = loading(data_sets(args.data, args.work.resolve())["photos"])
    rows: dict[str, Any] = {}
    for net in NETS:
        step = training(net)
        whole = load[FULL]
        ways = {
            "network alone": step,
            "fourier": {size: spent + whole for size, spent in step.items()},
            "bilinear": {size: spent + load[size] for size, spent in step.items()},
        }
        rows[net] = {"ms per image": {size: round(1000 * spent, 2) for size, spent in step.items()}}
        for name, schedule in (("ET", ET), ("ET++", ET_PP)):
            gains = {way: round(schedule.speedup(cost.__getitem__), 3) for way, cost in ways.items()}
            rows[net][name] = {"by area": round(schedule.speedup(), 3)} | gains
        print(net, rows[net], flush=True)
    loader = {size: round(1000 * spent, 2) for size, spent in load.items()}
    report = {"machine": machine("cpu"), "batch": BATCH, "loader, ms per image": loader, "networks": rows}
    result_file(__file__, "cpu").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
