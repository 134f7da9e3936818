"""How many updates a run has, and the learning rate and weight decay of each, as pure functions."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from leaven.recipes.common.flags import CommonSettings, UserError
from leaven.recipes.common.sampler import KeyedBatchSampler


@dataclass(frozen=True)
class Plan:
    """The length of a run.

    Attributes:
        epochs: passes over the data.
        batches: batches per epoch on each process.
        accumulation: batches per optimizer update. Batches at the end of an epoch that do not fill an update
            are left out, so that every update has the same weight.
        warmup_epochs: epochs of linear warm-up, may be a fraction.
    """

    epochs: int
    batches: int
    accumulation: int = 1
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        if self.batches < self.accumulation:
            raise UserError(
                f"an epoch has {self.batches} batches, fewer than --grad-accum-steps {self.accumulation}: "
                "lower that, --batch-size, or raise --limit-batches"
            )

    @classmethod
    def of(cls, sampler: KeyedBatchSampler, settings: CommonSettings) -> "Plan":
        """The run that the flags describe, with the batches of this sampler."""
        batches = min(len(sampler), settings.limit_batches or len(sampler))
        return cls(settings.epochs, batches, settings.grad_accum_steps, settings.warmup_epochs)

    @property
    def updates_per_epoch(self) -> int:
        return self.batches // self.accumulation

    @property
    def total(self) -> int:
        """Updates in the whole run."""
        return self.epochs * self.updates_per_epoch

    @property
    def warmup(self) -> int:
        """Updates of warm-up, fewer than the whole run has."""
        return min(round(self.warmup_epochs * self.updates_per_epoch), self.total - 1)

    @property
    def about_warmup(self) -> list[str]:
        """A line where the warm-up is asked to last longer than the run."""
        if self.warmup_epochs <= self.epochs:
            return []
        return [
            f"--warmup-epochs {self.warmup_epochs:g} is longer than the run of {self.epochs} epochs: "
            f"{self.warmup} of its {self.total} updates are warm-up"
        ]

    # What a curriculum changes, see `leaven.recipes.common.curriculum`.

    def micro_steps(self, update: int) -> int:
        """Batches of this update."""
        return self.accumulation

    def position(self, update: int) -> float:
        """Where, in updates, the learning rate and the weight decay stand."""
        return update

    def extend(self, batch: Any, update: int, generator: Callable[[], torch.Generator]) -> Any:
        """What is trained on when this is what the loader gave; the generator is made if anything is drawn."""
        return batch


def cosine(start: float, end: float, fraction: float) -> float:
    """Half a cosine from ``start`` (at fraction 0) to ``end`` (at 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0))) / 2


def learning_rate(
    update: float, plan: Plan, peak: float, *, shape: str = "cosine", start: float = 0.005, end: float = 0.001
) -> float:
    """Linear warm-up from ``start * peak`` to ``peak``, then a cosine to ``end * peak`` at the last update.

    The defaults are SparK's (keyu-tian/SparK, which steps it per iteration as well).

    Args:
        update: 0 for the first; see `Plan.position`.
        plan: length of the run and its warm-up.
        peak: the highest learning rate.
        shape: "cosine", or "constant" to stay at the peak after the warm-up.
        start, end: shares of the peak.
    """
    if update < plan.warmup:
        return peak * (start + (1 - start) * update / plan.warmup)
    if shape == "constant":
        return peak
    return cosine(peak, end * peak, (update - plan.warmup) / max(1, plan.total - 1 - plan.warmup))


def weight_decay(update: float, plan: Plan, start: float, end: float) -> float:
    """A cosine from ``start`` to ``end`` over all updates, warm-up included."""
    return cosine(start, end, update / max(1, plan.total - 1))


def set_schedule(optimizer: Optimizer, lr: float, decay: float) -> None:
    """Set both for the coming update.

    A group keeps its own share of the learning rate (``lr_scale``, as timm's layer decay sets it). Groups
    without weight decay (biases, norms, tokens) keep none.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        # Told apart once, by the value that the optimizer was built with: a decay that is scheduled to pass
        # through zero must not be lost there. The mark is saved with the optimizer's state.
        if group.setdefault("decays", group["weight_decay"] != 0):
            group["weight_decay"] = decay
