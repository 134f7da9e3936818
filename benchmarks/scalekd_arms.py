"""One run of what benchmarks/scalekd.py compares, in the loop of recipes/train.py.

    python benchmarks/scalekd_arms.py ARM --backbone test_resnet --teacher test_convnext2 --teacher-weights FILE ...

All flags are those of recipes/scalekd.py.

Arms: "plain"; "logits" and "features" of timm.task; "scalekd", and it without one of its parts: "no-projector" (1x1
convolutions in place of cross attention), "no-frequency" (one view of the features), "no-tail" (the first map is left
out, the second has learned queries).
"""

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.task import FeatureDistillationTask, LogitDistillationTask
from torch import Tensor, nn

from leaven.backbones import save
from leaven.pretext import Output, ScaleKD
from leaven.pretext.scalekd import CrossAttentionProjector, Targets
from leaven.pretext.scalekd.views import frequency_view_loss, spatial_view_loss
from leaven.recipes.common.batches import Images, find_data
from leaven.recipes.common.flags import run_main
from leaven.recipes.common.start import read_settings
from leaven.recipes.scalekd import PRESETS, ScaleKDSettings, distilled, load_teacher
from leaven.recipes.train import SUPERVISED, Method, train


class OfTimm(nn.Module):
    """A task of timm's as an objective."""

    def __init__(self, task: Any, student: nn.Module) -> None:
        super().__init__()
        task.teacher.requires_grad_(False)
        self.task, self.backbone = task, student

    def forward(self, images: Tensor, targets: Tensor) -> Output:
        found = self.task(images, targets)
        right = found["output"].detach().argmax(1) == targets
        return Output(found["loss"], {"top1": right.float().mean()})

    def export(self, path: Any, *, name: str | None = None, **metadata: Any) -> None:
        save(self.backbone, path, name=name, metadata=metadata)


class Convolution(nn.Module):
    """The plainest projector: a 1x1 convolution to the teacher's width, resized to its grid."""

    def __init__(self, projector: CrossAttentionProjector) -> None:
        super().__init__()
        channels, width = projector.k.in_features, projector.k.out_features
        self.project = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, features: Tensor, queries: Tensor | None = None, grid: Any = None) -> Tensor:
        out: Tensor = self.project(features)
        size = grid if queries is None else queries.shape[2:]
        return out if out.shape[2:] == size else nn.functional.interpolate(out, size, mode="bilinear")


class WithoutTail(ScaleKD):
    """The last map alone, with learned queries of its own."""

    def own_queries(self) -> "WithoutTail":
        spare = [self.spatial3, self.frequency3]
        for projector, unused in zip((self.spatial4, self.frequency4), spare, strict=True):
            width = projector.q.in_features
            assert unused.queries is not None
            shape = self._probe(self.teacher_size).map.shape[2:]
            projector.queries = nn.Parameter(torch.randn(1, width, *shape))
            unused.requires_grad_(False)
        return self

    def _of_features(self, third: Tensor, fourth: Tensor, teacher: Targets) -> dict[str, Tensor]:
        grid = (int(teacher.map.shape[2]), int(teacher.map.shape[3]))
        pairs = (("spatial4", spatial_view_loss), ("frequency4", frequency_view_loss))
        return {
            name: alpha * loss(getattr(self, name)(fourth, grid=grid), teacher.map, self.reduction)
            for (name, loss), alpha in zip(pairs, self.alphas[1], strict=True)
        }


def of_timm(
    kind: Any, settings: ScaleKDSettings, student: nn.Module, images: Images, device: torch.device, **how: Any
) -> tuple[OfTimm, list[str]]:
    teacher, (mean, std) = load_teacher(settings, images)
    if (tuple(mean), tuple(std)) != (tuple(images.mean), tuple(images.std)):
        raise ValueError(
            "timm's tasks read the statistics of the networks' own settings: they must be those of the data"
        )
    labels = nn.CrossEntropyLoss(label_smoothing=settings.smoothing)
    task = kind(student, teacher, criterion=labels, device=device, verbose=False, **how)
    return OfTimm(task, student).to(device), [f"timm.task.{kind.__name__}, {how}"]


def without(
    part: str, settings: Any, student: nn.Module, images: Images, device: Any
) -> tuple[ScaleKD, list[str]]:
    if part == "frequency":
        settings = replace(settings, alpha_freq=0.0)  # those of the run are compared when it goes on
    objective, lines = distilled(settings, student, images, device)
    if part == "projector":
        for name in ("spatial3", "frequency3", "spatial4", "frequency4"):
            setattr(objective, name, Convolution(getattr(objective, name)).to(device))
    if part == "tail":
        objective.__class__ = WithoutTail
        objective.own_queries().to(device)  # type: ignore[operator]
    return objective, [*lines, f"ScaleKD without its {part}"]


METHODS: dict[str, Any] = {
    "plain": SUPERVISED.objective,
    "logits": partial(of_timm, LogitDistillationTask, task_loss_weight=0.5, temperature=1.0),
    "features": partial(of_timm, FeatureDistillationTask, task_loss_weight=1.0, distill_loss_weight=5.0),
    "scalekd": distilled,
    "no-projector": partial(without, "projector"),
    "no-frequency": partial(without, "frequency"),
    "no-tail": partial(without, "tail"),
}


def main() -> None:
    arm, argv = sys.argv[1], sys.argv[2:]
    settings = read_settings(ScaleKDSettings, argv, PRESETS)
    train(settings, find_data(settings), Method(f"scalekd-{arm}", arm, "benchmarks/scalekd.py", METHODS[arm]))


if __name__ == "__main__":
    run_main(main)
