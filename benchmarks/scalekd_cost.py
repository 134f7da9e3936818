"""What a step of ScaleKD costs beside the way it is usually run.

    python benchmarks/scalekd_cost.py                # results/scalekd_cost-<machine>.json

"usual" restates in our own words how the authors' code computes the same loss (deep-optimization/ScaleKD; Fan et al.
2024): the frequency view by cosine transforms whose matrices are made anew in every call, and a pass of the teacher's
last stage for each view. Networks, projectors and weights are the same; so is the loss, up to rounding.

"whole step" is forward and backward of the student, the teacher's pass and all losses. "losses" are the four
comparisons of the maps alone, "tail" both views' way through the teacher's last stage, there and back.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timing import interleaved, machine, result_file
from torch import Tensor, nn

from leaven.pretext import ScaleKD
from leaven.pretext.scalekd import Targets
from leaven.pretext.scalekd.views import frequency_view_loss, spatial_view_loss

PAIRS = (("resnet50", "swin_tiny_patch4_window7_224"), ("resnet18", "vit_small_patch16_224"))


def transform(x: Tensor, inverse: bool = False) -> Tensor:
    """The cosine transform of maps (B, C, H, W) over both dimensions, by layers that are made in every call."""
    for dim in (3, 2):
        n = x.shape[dim]
        k, i = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
        basis = torch.cos(math.pi * k * (2 * i + 1) / (2 * n)) * (2 / n) ** 0.5
        basis[0] *= 0.5**0.5
        layer = nn.Linear(n, n, bias=False)
        layer.weight.data = basis.T if inverse else basis
        layer = layer.to(x.device)
        layer.weight.requires_grad_(False)
        x = layer(x.transpose(dim, 3)).transpose(dim, 3)
    return x


def usual_frequency_loss(student: Tensor, teacher: Tensor) -> Tensor:
    views = []
    for x in (student, teacher):
        coefficients = transform(x)
        keep = torch.ones_like(coefficients)
        keep[:, :, 0, 0] = 0
        views.append(F.normalize(transform(coefficients * keep, inverse=True), dim=1))
    return (views[0] - views[1]).square().sum() / len(student)


def usual_spatial_loss(student: Tensor, teacher: Tensor) -> Tensor:
    return (F.normalize(student, dim=1) - F.normalize(teacher, dim=1)).square().sum() / len(student)


class Usual(ScaleKD):
    """The same networks, the losses computed the usual way."""

    def _of_features(self, third: Tensor, fourth: Tensor, teacher: Targets) -> dict[str, Tensor]:
        parts = {}
        losses = (usual_spatial_loss, usual_frequency_loss)
        for view, (name, loss) in enumerate(zip(("spatial", "frequency"), losses, strict=True)):
            seen = self.tail(getattr(self, f"{name}3")(third, grid=teacher.grid), teacher)
            last = getattr(self, f"{name}4")(fourth, seen)
            parts[f"{name}3"] = self.alphas[0][view] * loss(seen, teacher.map)
            parts[f"{name}4"] = self.alphas[1][view] * loss(last, teacher.map)
        return parts


def ways(student: str, teacher: str, args: argparse.Namespace) -> dict[str, dict[str, Callable[[], object]]]:
    """By part: our way and the usual one."""
    torch.manual_seed(0)
    taught = timm.create_model(teacher, num_classes=10)
    ours = ScaleKD(timm.create_model(student, num_classes=10), taught).to(args.device).train()
    usual = Usual(timm.create_model(student, num_classes=10), taught).to(args.device).train()
    usual.load_state_dict(ours.state_dict())
    images = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    labels = torch.arange(args.batch_size, device=args.device) % 10
    mine, theirs = (model(images, labels).loss for model in (ours, usual))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)

    def step(model: ScaleKD) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            model(images, labels).loss.backward()

        return run

    targets = ours.tail.targets(ours.for_teacher(images))
    made = torch.randn_like(targets.map, requires_grad=True)
    tokens = torch.randn_like(targets.as_map(ours.tail), requires_grad=True)

    def losses(spatial: Any, frequency: Any) -> Callable[[], None]:
        return lambda: (2 * spatial(made, targets.map) + 2 * frequency(made, targets.map)).backward()

    return {
        "whole step": {"leaven": step(ours), "usual": step(usual)},
        "losses": {
            "leaven": losses(spatial_view_loss, frequency_view_loss),
            "usual": losses(usual_spatial_loss, usual_frequency_loss),
        },
        "tail": {
            "leaven": lambda: ours.tail(torch.cat([tokens, tokens]), targets).sum().backward(),
            "usual": lambda: (ours.tail(tokens, targets).sum() + ours.tail(tokens, targets).sum()).backward(),
        },
    }


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
    found: dict[str, Any] = {}
    for student, teacher in PAIRS:
        found[f"{teacher} to {student}"] = {
            part: interleaved(both, base="usual", repeats=args.repeats, device=args.device)
            for part, both in ways(student, teacher, args).items()
        }
        print(student, teacher, json.dumps(found[f"{teacher} to {student}"], indent=1), flush=True)
    settings = {"batch_size": args.batch_size, "image_size": 224, "repeats": args.repeats}
    report = {"machine": machine(args.device), "settings": settings, "pairs": found}
    output = args.output or result_file(__file__, args.device)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
