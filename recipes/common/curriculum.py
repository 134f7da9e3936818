"""The recipes' side of EfficientTrain: batches, accumulation and learning rate follow the schedule."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch

from leaven.curricula import ET, ET_PP, ET_PP_DEIT, EfficientTrain, Schedule, Stage
from leaven.curricula.replay import ReplayBuffer
from leaven.recipes.common.average import AverageSettings
from leaven.recipes.common.data import KeyedLoader
from leaven.recipes.common.flags import UserError, flag
from leaven.recipes.common.sampler import BatchSpec
from leaven.recipes.common.schedule import Plan

SCHEDULES = {"et": ET, "et_pp": ET_PP, "et_pp_deit": ET_PP_DEIT}
# What the loader can shrink by itself, on the way from the file to the crop.
BY_LOADER = ("bicubic", "bilinear")


@dataclass
class CurriculumSettings(AverageSettings):
    """The flags of recipes that train under callbacks."""

    callbacks: tuple[str, ...] = flag(
        (),
        "callbacks by name, comma-separated: efficienttrain, ema; before any labels also knn; in recipes/train.py "
        "also tract and evonorm_s0 (or b0, b1, b2, s1, s2)",
    )
    curriculum: str = flag(
        "et",
        "schedule of sizes: et, et_pp, et_pp_deit, or your own as 0.6:160,0.8:192,1:224, shares of the updates and "
        "sides, which are scaled if the last is not --image-size. --epochs stays as it is: the run gets shorter",
    )
    curriculum_op: Literal["fourier", "lanczos", "bicubic", "bilinear"] = flag(
        "fourier",
        "how images shrink: the first two on the device, the others in the loader, which saves it work",
    )
    replay_buffer: int = flag(0, "images to keep and train on again while they are small (et_pp); 0: none")

    CALLBACKS: ClassVar[tuple[str, ...]] = ("efficienttrain", "ema")

    def __post_init__(self) -> None:
        if "ema" in self.callbacks and self.model_ema_decay is None:
            self.model_ema_decay = 0.9999
        super().__post_init__()
        for name in self.callbacks:
            if name not in self.CALLBACKS:
                raise UserError(f"--callbacks {name}: this recipe knows {', '.join(self.CALLBACKS)}")
        if len(set(self.callbacks)) < len(self.callbacks):
            raise UserError(f"--callbacks {','.join(self.callbacks)}: name each of them once")
        if self.replay_buffer < 0:
            raise UserError(f"--replay-buffer must be at least 0, got {self.replay_buffer}")
        if "efficienttrain" not in self.callbacks:
            for field in fields(CurriculumSettings):
                name = field.name
                if name.startswith(("curriculum", "replay")) and getattr(self, name) != field.default:
                    raise UserError(
                        f"--{name.replace('_', '-')} is of a curriculum: add --callbacks efficienttrain"
                    )
        read_schedule(self.curriculum)
        if self.loader_op is not None and self.augment_on == "device":
            raise UserError(
                f"--curriculum-op {self.curriculum_op} works in the loader: with --augment-on device take fourier"
            )

        if self.replay_buffer and self.augment_on == "device":
            raise UserError(
                "--replay-buffer keeps images as they leave the loader, ready: leave --augment-on device out"
            )

    @property
    def loader_op(self) -> str | None:
        """The interpolation by which the loader makes images smaller under the curriculum, if it does."""
        under = "efficienttrain" in self.callbacks and self.curriculum_op in BY_LOADER
        return self.curriculum_op if under else None


def read_schedule(text: str) -> Schedule:
    """A schedule by its name, or spelt out as shares of the updates and sizes: 0.6:160,0.8:192,1:224."""
    if text in SCHEDULES:
        return SCHEDULES[text]
    parts = [part.split(":") for part in text.split(",")]
    try:
        return Schedule(tuple(Stage(float(until), int(size)) for until, size in parts))
    except ValueError as error:
        reason = str(error) if all(len(part) == 2 for part in parts) else "expected SHARE:SIZE,..."
        raise UserError(f"--curriculum {text}: {reason}; or one of {', '.join(SCHEDULES)}") from None


@dataclass(frozen=True, kw_only=True)
class CurriculumPlan(Plan):
    """A run under a curriculum: every update has as many images as without it.

    While images are small, more of them make a batch, and fewer batches an update, as far as ``--grad-accum-steps``
    allows. With a replay buffer an epoch reads fewer images: a random part of them, another one each time.

    Attributes:
        curriculum: the callback.
        batch_size: images of a batch at full size, on each process.
        by_loader: the loader makes images smaller.
        buffer: for images to train on again, or None.
    """

    curriculum: EfficientTrain
    batch_size: int
    by_loader: bool
    buffer: ReplayBuffer | None

    def stage(self, update: int) -> Stage:
        """The schedule's stage; without a buffer nothing is replayed."""
        stage = self.curriculum.schedule.at(update / self.total)
        fits = self.accumulation % stage.batches == 0
        return stage._replace(
            batches=stage.batches if fits else 1, replay=1 if self.buffer is None else stage.replay
        )

    def micro_steps(self, update: int) -> int:
        return self.accumulation // self.stage(update).batches

    def position(self, update: int) -> float:
        return self.curriculum.schedule.clock(update / self.total) * self.total

    def extend(self, batch: Any, update: int, generator: Callable[[], torch.Generator]) -> Any:
        if self.buffer is None:
            return batch
        return self.buffer.extend(batch, self.stage(update).replay, generator())

    def spec(self, epoch: int, taken: int) -> BatchSpec:
        """What the batch looks like that begins after so many samples of an epoch, for `KeyedBatchSampler`."""
        within = min(bisect_right(_ends(self, epoch), taken), self.updates_per_epoch - 1)
        update = epoch * self.updates_per_epoch + within
        stage, t = self.stage(update), update / self.total
        size = self.curriculum.size_at(t) if self.by_loader else None
        new = self.batch_size * stage.batches // stage.replay
        return BatchSpec(new, size, self.curriculum.schedule.strength(t))


@lru_cache(maxsize=2)
def _ends(plan: CurriculumPlan, epoch: int) -> list[int]:
    """Samples of an epoch that each process has taken after each of its updates."""
    first, images = epoch * plan.updates_per_epoch, plan.accumulation * plan.batch_size
    return list(accumulate(images // plan.stage(first + i).replay for i in range(plan.updates_per_epoch)))


def follow(
    settings: CurriculumSettings, plan: Plan, loader: KeyedLoader, size: tuple[int, int], multiple: int
) -> tuple[Plan, EfficientTrain | None, list[str]]:
    """Put a run under the curriculum that the flags ask for, if any.

    Args:
        settings: the flags, in final numbers.
        plan: of the run without a curriculum.
        loader: its sampler is given the schedule.
        size: (H, W) of the whole images.
        multiple: of what a scaled schedule's sizes must be.

    Returns:
        The plan to train by, the callback to attach, and lines to print.

    Raises:
        UserError: a batch that the replay buffer cannot share.
    """
    if "efficienttrain" not in settings.callbacks:
        return plan, None, []
    schedule = read_schedule(settings.curriculum)
    curriculum = EfficientTrain(
        schedule, settings.curriculum_op, image_size=size, multiple=multiple, batch_size=settings.batch_size
    )
    buffer = ReplayBuffer(settings.replay_buffer) if settings.replay_buffer else None
    by_loader = settings.loader_op is not None
    known = {field.name: getattr(plan, field.name) for field in fields(plan)}
    if buffer is not None and all(stage.replay == 1 for stage in schedule.stages):
        raise UserError(f"--replay-buffer: --curriculum {settings.curriculum} replays nothing; et_pp does")
    if buffer is not None and buffer.capacity > len(loader.dataset):
        raise UserError(
            f"--replay-buffer {buffer.capacity} is more than the {len(loader.dataset)} images that there are"
        )
    under = CurriculumPlan(
        **known, curriculum=curriculum, batch_size=settings.batch_size, by_loader=by_loader, buffer=buffer
    )
    for update in range(under.total):
        stage = under.stage(update)
        if settings.batch_size * stage.batches % stage.replay:
            raise UserError(
                f"--replay-buffer: --batch-size {settings.batch_size} must divide by {stage.replay} "
                f"({settings.curriculum} takes one new image in {stage.replay})"
            )
    loader.batch_sampler.schedule = under.spec
    where = "in the loader" if by_loader else "on the device"
    lines = [
        f"EfficientTrain ({settings.curriculum}): {curriculum.shapes()} by {settings.curriculum_op} {where}, "
        f"{curriculum.speedup():.2f} times less computation by area"
    ]
    if buffer is not None:
        lines.append(
            f"replay buffer of {settings.replay_buffer} images: refilled on resume, which is then not bit-equal"
        )
    return under, curriculum, lines
