"""Curricula as pure functions of progress: what size, how strong an augmentation, how large a batch, when.

Sources: Wang et al., EfficientTrain, ICCV 2023 (arXiv 2211.09703); EfficientTrain++, TPAMI 2024 (arXiv 2405.08768).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

# Progress comes from counted updates: a border that falls on an update belongs to the stage that begins there.
_ROUNDING = 1e-9


class Stage(NamedTuple):
    """Part of a schedule.

    Attributes:
        until: where it ends on the schedule's axis, in (0, 1].
        size: side of the images in pixels.
        batches: how many times more images than at full size fit a micro-batch.
        replay: of so many images, one is new and the others come out of a buffer, where there is one.
    """

    until: float
    size: int
    batches: int = 1
    replay: int = 1


@dataclass(frozen=True)
class Schedule:
    """Sizes that grow to the full one, and augmentation that grows to full strength.

    Source: Wang et al., EfficientTrain, ICCV 2023 (arXiv 2211.09703); EfficientTrain++, TPAMI 2024 (arXiv 2405.08768).

    Args:
        stages: in order; the last one ends at 1 and has the full size.
        axis: what `Stage.until` and the strengths divide: "steps", the optimizer's updates (each of the same number
            of images), or "compute", which an image takes in proportion to its area.
        strengths: of the augmentation, relative to its full magnitude, in stages of equal length on the axis.

    Raises:
        ValueError: stages that do not grow, or do not end at 1.
    """

    stages: tuple[Stage, ...]
    axis: Literal["steps", "compute"] = "steps"
    strengths: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        stages = tuple(Stage(*stage) for stage in self.stages)
        object.__setattr__(self, "stages", stages)
        if any(not isinstance(n, int) for stage in stages for n in stage[1:]):
            raise ValueError("a stage's size, batches and replay are whole numbers")
        if not stages or stages[-1].until != 1:
            raise ValueError("the last stage of a schedule must end at 1")
        if not stages[0].until > 0 or not all(b.until > a.until for a, b in pairwise(stages)):
            raise ValueError(f"stages must end one after another, not at {[s.until for s in stages]}")
        if stages[0].size < 1 or any(b.size < a.size for a, b in pairwise(stages)):
            raise ValueError(f"sizes must not shrink: {[s.size for s in stages]}")
        if any(min(stage.batches, stage.replay) < 1 for stage in stages):
            raise ValueError("a stage's batches and replay must be at least 1")
        if self.axis not in ("steps", "compute"):
            raise ValueError(f'axis must be "steps" or "compute", not {self.axis!r}')
        if (
            not isinstance(self.strengths, tuple)
            or not self.strengths
            or not all(s >= 0 for s in self.strengths)
        ):
            raise ValueError(
                f"strengths must be a tuple of one or more numbers from 0, not {self.strengths!r}"
            )

    @property
    def full(self) -> int:
        """The full size in pixels."""
        return self.stages[-1].size

    @property
    def _shares(self) -> list[float]:
        """Share of the updates that each stage has."""
        ends = [0.0, *(stage.until for stage in self.stages)]
        shares = [b - a for a, b in pairwise(ends)]
        if self.axis == "compute":
            shares = [share / self._area(stage) for share, stage in zip(shares, self.stages, strict=True)]
        return [share / sum(shares) for share in shares]

    def _area(self, stage: Stage) -> float:
        return (stage.size / self.full) ** 2

    def at(self, t: float) -> Stage:
        """The stage that the update at share `t` of all updates belongs to; the first before 0, the last after 1."""
        end = 0.0
        for stage, share in zip(self.stages, self._shares, strict=True):
            end += share
            if t < end - _ROUNDING:
                return stage
        return self.stages[-1]

    def clock(self, t: float) -> float:
        """Where share `t` of the updates stands on the schedule's own axis: what learning rates follow.

        On the axis "steps" that is `t` itself; on "compute" the share of the computation done, so that a cosine
        learning rate falls with computation, as in EfficientTrain++.
        """
        if self.axis == "steps":
            return t
        return _interpolate(
            t, self._shares, [b - a for a, b in pairwise([0.0, *(s.until for s in self.stages)])]
        )

    def compute(self, t: float) -> float:
        """Share of the run's computation that share `t` of its updates takes, an image costing its area."""
        costs = [share * self._area(stage) for share, stage in zip(self._shares, self.stages, strict=True)]
        return _interpolate(t, self._shares, [cost / sum(costs) for cost in costs])

    def strength(self, t: float) -> float:
        """Of the augmentation at share `t` of the updates."""
        index = int(self.clock(t) * len(self.strengths) + _ROUNDING)
        return self.strengths[min(index, len(self.strengths) - 1)]

    def shapes(self) -> tuple[int, ...]:
        """The sizes that occur, smallest first."""
        return tuple(dict.fromkeys(stage.size for stage in self.stages))

    def speedup(self, cost: Callable[[int], float] | None = None) -> float:
        """How many times less the run costs than as many updates at full size.

        Args:
            cost: of an image of this size, in any unit, such as measured seconds; None: its area. Small images cost
                more than their area says, so measure before you promise.
        """
        cost = cost or (lambda size: float(size * size))
        mean = sum(share * cost(stage.size) for share, stage in zip(self._shares, self.stages, strict=True))
        return cost(self.full) / mean

    def epochs(self, equivalent: float) -> float:
        """Passes over the data that cost as much, by area, as `equivalent` passes at full size."""
        return equivalent * self.speedup()

    def scaled(self, full: int, multiple: int = 16) -> "Schedule":
        """The schedule for another full size: sizes in proportion, rounded to multiples, `multiple` at least.

        Args:
            full: new full size, kept as it is.
            multiple: what the backbone can divide: its reduction, patch side or mask cell.

        Raises:
            ValueError: a size or a multiple below 1.
        """
        if min(full, multiple) < 1:
            raise ValueError(f"the full size and the multiple must be at least 1, not {full} and {multiple}")

        def size(stage: Stage) -> int:
            near = round(stage.size * full / self.full / multiple) * multiple
            return min(full, max(multiple, near))

        stages = [
            stage._replace(size=full if stage.size == self.full else size(stage)) for stage in self.stages
        ]
        return replace(self, stages=tuple(stages))


def _interpolate(t: float, widths: Sequence[float], heights: Sequence[float]) -> float:
    """Piecewise linear from (0, 0), by these steps to the right and up."""
    done = 0.0
    for width, height in zip(widths, heights, strict=True):
        if t < width:
            return done + height * t / width
        t, done = t - width, done + height
    return 1.0


ET = Schedule(
    (Stage(0.6, 160, 2), Stage(0.8, 192, 2), Stage(1.0, 224)), "steps", tuple(m / 9 for m in (1, 3, 5, 7, 9))
)
"""EfficientTrain: 160 px for three fifths of the updates, 192 px for one, 224 px for the last.

RandAugment of magnitude 1, 3, 5, 7, 9 in stages of equal length, by the published code; twice the images per batch
while they are small.
"""
ET_PP = Schedule(
    (Stage(0.2, 96, 2, 4), Stage(0.6, 160, 2, 2), Stage(1.0, 224)), "compute", tuple(m / 9 for m in range(10))
)
"""EfficientTrain++: 96, 160 and 224 px for 20, 40 and 40 % of the computation.

RandAugment of magnitude 0 to 9 in stages of equal computation.
"""
ET_PP_DEIT = Schedule(
    (Stage(0.2, 96, 2, 4), Stage(0.6, 160, 2, 2), Stage(0.8, 192, 2), Stage(1.0, 224)),
    "compute",
    ET_PP.strengths,
)
"""EfficientTrain++ for DeiT: a stage at 192 px before the last."""
