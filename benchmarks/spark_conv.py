"""One convolution of SparK's packed encoder, forward and backward: on the dense map, by halo, on spconv's pairs.

    python benchmarks/spark_conv.py     # results/spark_conv-<machine>.json

Layers of ResNet-50, RegNetY-008, EfficientNet-B0 and ConvNeXt-T as they meet 160 px images under a mask of 0.6 (10 of
25 cells of 32 px), and of ResNet-50 on 224 px (20 of 49 cells). "chosen" is what the packed encoder takes by itself.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import interleaved, machine, result_file
from torch import Tensor

from leaven.pretext.spark.geometry import Geometry
from leaven.pretext.spark.halo import halo_conv2d, halo_pays
from leaven.pretext.spark.masking import sample_mask, visible_ids
from leaven.pretext.spark.spconv_rule import spconv_conv2d

# name, channels, groups, kernel, cell side, grid
LAYERS = [
    *(("3x3", c, 1, 3, r, 5) for c, r in ((64, 8), (128, 4), (256, 2), (512, 1))),
    *(("3x3, 224 px", c, 1, 3, r, 7) for c, r in ((64, 8), (128, 4), (256, 2), (512, 1))),
    *(("3x3, groups of 16", c, c // 16, 3, r, 5) for c, r in ((64, 8), (128, 4), (320, 2))),
    *(("depthwise 3x3", c, c, 3, r, 5) for c, r in ((32, 16), (144, 8), (480, 2))),
    *(("depthwise 5x5", c, c, 5, r, 5) for c, r in ((240, 4), (672, 2))),
    *(("depthwise 7x7", c, c, 7, r, 5) for c, r in ((96, 8), (192, 4), (384, 2))),
]


def steps(channels: int, groups: int, kernel: int, r: int, geo: Geometry) -> dict[str, Callable[[], None]]:
    """Forward and backward of the layer in every way that serves it."""
    torch.manual_seed(0)
    values = torch.randn(geo.batch, geo.keep * r * r, channels, device=geo.ids.device, requires_grad=True)
    weight = torch.randn(
        channels, channels // groups, kernel, kernel, device=geo.ids.device, requires_grad=True
    )

    def dense() -> Tensor:
        return geo.gather(F.conv2d(geo.scatter(values, r), weight, None, 1, kernel // 2, 1, groups), r)

    def halo() -> Tensor:
        return halo_conv2d(values, geo, r, weight, None, (1, 1), groups)

    def spconv() -> Tensor:
        return spconv_conv2d(values, geo, r, weight, None, (1, 1))

    def step(way: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: way().square().sum().backward()

    ways = {"dense": dense, "halo": halo} | ({"spconv": spconv} if groups == 1 else {})
    return {name: step(way) for name, way in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for name, channels, groups, kernel, r, grid in LAYERS:
        mask = sample_mask(args.batch_size, (grid, grid), 0.6, torch.Generator().manual_seed(0))
        geo = Geometry(visible_ids(mask).to(args.device), (grid, grid))
        ways = steps(channels, groups, kernel, r, geo)
        chosen = (
            "halo"
            if args.device == "cpu" and halo_pays(geo, r, (kernel // 2,) * 2, groups == channels)
            else "dense"
        )
        row = {
            "layer": name,
            "channels": channels,
            "cell side": r,
            "visible": geo.keep / grid**2,
            "chosen": chosen,
        }
        times = interleaved(ways, base="dense", repeats=args.repeats, device=args.device)
        rows.append(row | {"times": times})
        ratios = ", ".join(f"{way} {times[way]['ratio_to_dense']}" for way in times if way != "dense")
        print(f"{name:18} {channels:4} channels, cell {r:2}: {ratios} of dense; chosen: {chosen}", flush=True)
    output = args.output or result_file(__file__, args.device)
    settings = {"batch_size": args.batch_size, "repeats": args.repeats}
    output.write_text(
        json.dumps({"machine": machine(args.device), "settings": settings, "layers": rows}, indent=1) + "\n"
    )
    print(f"written: {output}")


if __name__ == "__main__":
    main()
