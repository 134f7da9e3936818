"""Held-out accuracy during training, of the weights and of their average."""

from collections.abc import Iterable, Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.optim import Optimizer

from leaven.callbacks import EMA, Callback, Progress
from leaven.callbacks.callback import Handle
from leaven.pretext import count_correct
from leaven.recipes.common.data import KeyedLoader


class Validation(Callback):
    """Top-1 and top-5 accuracy on held-out images every so many updates and after the last one.

    Each process counts its share of the images; the counts are summed. Training goes on as it would have without:
    modes and random states come back, and nothing is drawn from the training loader.

    Args:
        loader: this process's share of the held-out images.
        every: updates between two measurements.
        accelerator: sums over processes.
        ema: an average to measure too; it must be attached before.

    Attributes:
        scores: the newest measurement, shares in [0, 1] by name: top1, top5, and with an average ema_top1, ema_top5.
    """

    order = 95
    binds = "backbone"
    supports = frozenset({"compiled"})

    def __init__(
        self, loader: KeyedLoader, every: int, accelerator: Accelerator, ema: EMA | None = None
    ) -> None:
        self.loader, self.every, self.accelerator, self.ema = loader, every, accelerator, ema
        self.scores: dict[str, float] = {}
        self._measured = 0

    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterable[Handle]:
        self._model, self._progress = model, progress
        return ()

    def update(self) -> None:
        step = self._progress.step
        if step % self.every == 0 or step == self._progress.total_steps:
            self.scores, self._measured = self.measure(), step

    def finish(self) -> None:
        """Measure the end of the training, where `update` has not; to be called by all processes.

        Steps that GradScaler skipped are not counted, and with them the count ends before the last update.
        """
        if self._measured != self._progress.step:
            self.scores, self._measured = self.measure(), self._progress.step

    def measure(self) -> dict[str, float]:
        """The accuracies now; to be called by all processes."""
        models: dict[str, Any] = {"": self._model}
        if self.ema is not None:
            models["ema_"] = self.ema.module.backbone
        scores: dict[str, float] = {}
        for prefix, model in models.items():
            for (
                buffer
            ) in model.buffers():  # BatchNorm's differ where it is not synchronised: judge what is saved
                broadcast(buffer)
            top1, top5, images = self.accelerator.reduce(count_correct(model, self.loader)).tolist()
            scores |= {f"{prefix}top1": top1 / images, f"{prefix}top5": top5 / images}
        return scores

    def logs(self) -> dict[str, float]:
        if self._measured != self._progress.step:
            return {}  # in the log only where it was measured
        return {f"val_{name}": score for name, score in self.scores.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self.scores), "measured": self._measured}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scores, self._measured = dict(state["scores"]), state["measured"]

    def __repr__(self) -> str:
        return f"Validation(every={self.every})"
