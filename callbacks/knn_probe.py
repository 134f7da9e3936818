"""An online kNN probe: how good are the backbone's features by now?"""

import copy
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leaven.callbacks.core import Callback, Handle, NoEffectWarning, Progress


class KNNProbe(Callback):
    """Every so many updates, the kNN accuracy of the backbone's pooled features.

    The protocol is `leaven.pretext.evaluation.knn`'s. Images must already be normalised and are not
    augmented. Hooks are paused meanwhile, modules keep their modes and the random state is as before, so
    training goes on as it would have without the probe. Every process measures its own copy of the model: BatchNorm's
    running statistics, unless synchronised, make their numbers differ. A training with fewer updates than `every` is
    not measured, and a `NoEffectWarning` says so.

    Args:
        train: images (N, C, H, W) or a loader of batches, and labels (N,) in the same order; or a loader alone, of
            batches (images, labels): the bank to search.
        test: images and labels to classify, in the same ways.
        every: updates between two measurements.
        k: neighbours that vote.
        temperature: of the votes, in units of cosine similarity.
        recalibrate: measure a copy whose BatchNorm statistics are taken anew, since those of masked or turned training
            images are off on whole, upright ones. From images or a loader that is given, or, if True, from the bank,
            which then should not lie class by class: a batch of one class lacks the variance between classes.
        name: of the callback, and the first word of the logged value; for a second probe beside the first.

    Attributes:
        history: pairs (update, accuracy in [0, 1]), oldest first.

    Raises:
        TypeError: neither images and labels nor a loader.
        ValueError: no number of updates, images and labels that differ in number, or more neighbours than images.
    """

    order = 95
    binds = "backbone"
    supports = frozenset({"compiled"})

    def __init__(
        self,
        train: tuple[Tensor | Iterable[Any], Tensor] | Iterable[Any],
        test: tuple[Tensor | Iterable[Any], Tensor] | Iterable[Any],
        every: int,
        k: int = 20,
        temperature: float = 0.07,
        recalibrate: bool | Tensor | Iterable[Any] = False,
        name: str = "knn",
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be a number of updates, at least 1, not {every}")
        self.train, self.test = _pair(train, "train"), _pair(test, "test")
        for part, (images, labels) in (("train", self.train), ("test", self.test)):
            if isinstance(images, Tensor) and labels is not None and len(images) != len(labels):
                raise ValueError(f"{part}: {len(images)} images, but {len(labels)} labels")
        bank = self.train[1]
        if bank is not None and k > len(bank):
            raise ValueError(f"k={k} neighbours of {len(bank)} images: lower k")
        self.every, self.k, self.temperature = every, k, temperature
        self.recalibrate, self.name = recalibrate, name
        self.history: list[tuple[int, float]] = []

    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterable[Handle]:
        self._backbone, self._progress = model, progress
        if self.every > progress.total_steps:
            warnings.warn(
                f"{self!r} measures nothing: the training has {progress.total_steps} updates; lower every",
                NoEffectWarning,
                stacklevel=2,
            )
        return ()

    def update(self) -> None:
        if self._progress.step % self.every == 0:
            self.history.append((self._progress.step, self.measure()))

    def measure(self) -> float:
        """The accuracy now, in [0, 1]; not added to `history`."""
        from leaven.pretext.evaluation import knn
        from leaven.pretext.features import recalibrate_batchnorm

        backbone = self._backbone
        if self.recalibrate is not False:
            backbone = copy.deepcopy(backbone)
            recalibrate_batchnorm(backbone, self.train[0] if self.recalibrate is True else self.recalibrate)
        bank, queries = _features(backbone, *self.train), _features(backbone, *self.test)
        return knn(*bank, *queries, k=self.k, temperature=self.temperature)

    def logs(self) -> dict[str, float]:
        return {f"{self.name}_top1": self.history[-1][1]} if self.history else {}

    def state_dict(self) -> dict[str, Any]:
        return {"history": [list(pair) for pair in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = [(step, accuracy) for step, accuracy in state["history"]]

    def __repr__(self) -> str:
        return f"KNNProbe(every={self.every}, k={self.k}, temperature={self.temperature:g})"


def _pair(data: Any, part: str) -> tuple[Any, Tensor | None]:
    """Images and labels, or a loader and None."""
    # A list of two may be two batches.
    if (
        isinstance(data, tuple | list)
        and len(data) == 2
        and (isinstance(data, tuple) or isinstance(data[1], Tensor))
    ):
        return data[0], data[1]
    if isinstance(data, Tensor | tuple) or not isinstance(data, Iterable):
        raise TypeError(
            f"KNNProbe: {part} must be (images, labels), or a loader of batches (images, labels), not a "
            f"{type(data).__name__}"
        )
    return data, None


def _features(backbone: nn.Module, images: Any, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Features (N, D) and labels (N,), which a loader gives along with the images, so that it may shuffle."""
    from leaven.pretext.features import extract_features

    if labels is not None:
        return extract_features(backbone, images), labels
    read: list[Tensor] = []

    def batches() -> Iterator[Tensor]:
        for batch in images:
            if not isinstance(batch, tuple | list) or len(batch) < 2:
                raise TypeError("KNNProbe: a loader alone must give batches (images, labels)")
            read.append(batch[1])
            yield batch[0]

    return extract_features(backbone, batches()), torch.cat(read)
