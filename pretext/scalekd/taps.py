"""A student's last two maps and its logits, from one ordinary call of the unmodified network."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leaven.backbones import NoStages, Stage, features
from leaven.backbones import stages as all_stages
from leaven.backbones.probe import (
    UNSUITABLE,
    ImageSize,
    candidate_images,
    first_that_runs,
    reason_of,
    untouched,
)


@dataclass(frozen=True)
class Tap:
    """A module whose output is a feature map.

    Attributes:
        name: path of the module.
        layout: how it gives the map: "nchw", "nhwc", or "tokens" (B, prefix + h w, C).
        channels: C.
        grid: (h, w) on the image that was tried.
        prefix: tokens before those of the map.
        call: which of the module's calls in one pass.
        overwritten: the network later changes the map in place, so that it must be copied.
    """

    name: str
    layout: Literal["nchw", "nhwc", "tokens"]
    channels: int
    grid: tuple[int, int]
    prefix: int = 0
    call: int = 0
    overwritten: bool = False


Seen = tuple[str, int, Tensor, Tensor]
"""Of one call of a module: its path, the call's number, what it returned, and that tensor as it was left."""


def two_stages(student: nn.Module, image_size: ImageSize = None) -> tuple[Stage, Stage]:
    """The maps that ScaleKD takes: of the last two reductions; of a vision transformer, after three quarters and all.

    Args:
        student: any network with feature maps.
        image_size: of the images, where it insists on one.

    Raises:
        NoStages: the network gives fewer than two.
    """
    found = all_stages(student, image_size)
    if len(found) >= 2:
        return found[-2], found[-1]
    info: Any = getattr(student, "feature_info", None)
    depth = 0 if info is None else len(info)
    if depth < 2 or found[-1].index is None:
        raise NoStages(f"{type(student).__name__} gives one feature map only; ScaleKD needs two")
    third, fourth = (replace(found[-1], index=index) for index in (max(depth * 3 // 4 - 1, 0), depth - 1))
    return third, fourth


def find_taps(
    student: nn.Module, stages: tuple[Stage, Stage], image_size: ImageSize = None
) -> tuple[Tap, Tap]:
    """Which modules give the maps of `stages` when the student is called: those whose outputs are equal to them.

    Args:
        student: run once on an image.
        stages: the two maps.
        image_size: of the images, where it insists on one.

    Raises:
        NoStages: the student does not run, or no module's output is such a map.
    """

    def run(image: Tensor) -> tuple[list[Tensor], list[Seen]]:
        wanted = features(student, image, stages)
        seen: list[Seen] = []
        counts: dict[str, int] = {}
        handles = []

        def record(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                call = counts[name] = counts.get(name, -1) + 1
                if isinstance(output, Tensor) and output.ndim in (3, 4):
                    seen.append((name, call, output.clone(), output))

            return hook

        try:
            for name, module in student.named_modules():
                if name:
                    handles.append(module.register_forward_hook(record(name)))
            student(image)
        finally:
            for handle in handles:
                handle.remove()
        return wanted, seen

    with untouched(student), torch.no_grad():
        try:
            _, (wanted, seen) = first_that_runs(run, candidate_images(student, image_size))
        except UNSUITABLE as error:
            raise NoStages(
                f"{type(student).__name__} did not run on a test image: {reason_of(error)}"
            ) from error
    third, fourth = (_match(student, stage, map_, seen) for stage, map_ in zip(stages, wanted, strict=True))
    return third, fourth


def _match(student: nn.Module, stage: Stage, map_: Tensor, seen: list[Seen]) -> Tap:
    grid = (int(map_.shape[2]), int(map_.shape[3]))
    # The last: fresh residual blocks are often the identity, and the map of the one before is the same.
    for name, call, output, later in reversed(seen):
        for tap in _readings(name, call, output, map_.shape[1], grid):
            if torch.equal(read(tap, output, grid), map_):
                return replace(tap, overwritten=not torch.equal(output, later))
    raise NoStages(
        f"no module of {type(student).__name__} gives its map {stage.name} when it is called; give others as stages="
    )


def _readings(name: str, call: int, output: Tensor, channels: int, grid: tuple[int, int]) -> list[Tap]:
    h, w = grid
    found = []
    if output.ndim == 4 and tuple(output.shape[1:]) == (channels, h, w):
        found.append(Tap(name, "nchw", channels, grid, 0, call))
    if output.ndim == 4 and tuple(output.shape[1:]) == (h, w, channels):
        found.append(Tap(name, "nhwc", channels, grid, 0, call))
    if output.ndim == 3 and output.shape[2] == channels and output.shape[1] >= h * w:
        found.append(Tap(name, "tokens", channels, grid, output.shape[1] - h * w, call))
    return found


def read(tap: Tap, output: Tensor, grid: tuple[int, int]) -> Tensor:
    """The map (B, C, h, w) in what the tapped module gave."""
    if tap.layout == "tokens":
        map_: Tensor = output[:, tap.prefix :].mT.unflatten(2, grid)
        return map_
    return output.movedim(3, 1) if tap.layout == "nhwc" else output


def tapped(student: nn.Module, taps: tuple[Tap, ...], images: Tensor) -> tuple[Any, list[Tensor]]:
    """What the student returns, and its maps (B, C, h, w) at the taps, in one pass.

    Args:
        student: called on the images.
        taps: of `find_taps`.
        images: (B, C, H, W), normalised.

    Raises:
        RuntimeError: a tapped module did not run.
    """
    out: list[Tensor | None] = [None] * len(taps)
    handles = []

    def record(i: int, tap: Tap) -> Any:
        calls = [0]

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if calls[0] == tap.call:
                output = output.clone() if tap.overwritten else output
                out[i] = read(tap, output, _token_grid(output, tap, images))
            calls[0] += 1

        return hook

    try:
        for i, tap in enumerate(taps):
            handles.append(student.get_submodule(tap.name).register_forward_hook(record(i, tap)))
        result = student(images)
    finally:
        for handle in handles:
            handle.remove()
    maps = [each for each in out if each is not None]
    if len(maps) < len(taps):
        raise RuntimeError(
            f"a tapped module of {type(student).__name__} did not run: {[tap.name for tap in taps]}"
        )
    return result, maps


def _token_grid(output: Tensor, tap: Tap, images: Tensor) -> tuple[int, int]:
    """Rows and columns of the tokens, which have the shape of the image."""
    if tap.layout != "tokens":
        return tap.grid
    n = output.shape[1] - tap.prefix
    rows = round((n * images.shape[2] / images.shape[3]) ** 0.5)
    return rows, n // rows
