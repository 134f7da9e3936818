"""How well class probabilities say what will happen: likelihood, Brier score, calibration error, outliers."""

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from leaven.pretext.evaluation import Values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Bin",
    "Calibration",
    "auroc",
    "brier",
    "calibration",
    "expected_calibration_error",
    "nll",
    "reliability_plot",
]


class Bin(NamedTuple):
    """Predictions whose confidence lies between two bounds.

    Attributes:
        low, high: bounds; the confidence is above the first and at most the second.
        images: how many.
        confidence, accuracy: means; nan where there are none.
    """

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Scores of class probabilities on labelled images. None of them alone says that a network is calibrated.

    Attributes:
        accuracy: share of images whose likeliest class is right.
        nll: mean negative log likelihood, nats.
        brier: mean squared distance to the one-hot label, in [0, 2].
        ece: expected calibration error over `bins`.
        bins: of equal width over confidence.
        images: how many.
    """

    accuracy: float
    nll: float
    brier: float
    ece: float
    bins: tuple[Bin, ...]
    images: int

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.2%}, NLL {self.nll:.3f}, Brier {self.brier:.3f}, ECE {self.ece:.3f} "
            f"({len(self.bins)} bins of equal width), {self.images} images"
        )


def calibration(probs: Values, labels: Values, bins: int = 15) -> Calibration:
    """All scores.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, and what each score names.

    Args:
        probs: (N, C), rows that sum to 1; a tensor, an array or lists, as are all arguments here.
        labels: class indices (N,).
        bins: of the calibration error.

    Raises:
        ValueError: shapes that do not fit, or rows that are no probabilities.
    """
    ece, found = expected_calibration_error(probs, labels, bins)
    checked, classes = _checked(probs, labels)
    right = (checked.argmax(1) == classes).double().mean()
    return Calibration(float(right), nll(probs, labels), brier(probs, labels), ece, found, len(classes))


def nll(probs: Values, labels: Values) -> float:
    """Mean negative log likelihood, nats; infinite where a true class has probability 0.

    Arguments and errors: see `calibration`.
    """
    probs, labels = _checked(probs, labels)
    return float(-probs.gather(1, labels.unsqueeze(1)).log().mean())


def brier(probs: Values, labels: Values) -> float:
    """Mean squared distance to the one-hot label, summed over classes, in [0, 2]. Source: Brier 1950.

    Arguments and errors: see `calibration`.
    """
    probs, labels = _checked(probs, labels)
    return float((probs - torch.nn.functional.one_hot(labels, probs.shape[1])).square().sum(1).mean())


def expected_calibration_error(
    probs: Values, labels: Values, bins: int = 15
) -> tuple[float, tuple[Bin, ...]]:
    """Mean distance of confidence and accuracy over bins of equal width, weighted by their counts; and the bins.

    Arguments and errors: see `calibration`. Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017,
    equation 3.
    """
    probs, labels = _checked(probs, labels)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    confidence, guess = probs.max(1)
    right = (guess == labels).double()
    # By the bounds that are told, and not by confidence * bins, which rounding may lift over a whole number.
    bounds = torch.tensor([i / bins for i in range(1, bins)], dtype=torch.float64, device=confidence.device)
    which = torch.bucketize(confidence, bounds)
    found = []
    for i in range(bins):
        inside = which == i
        count = int(inside.sum())
        means = (
            (float(confidence[inside].mean()), float(right[inside].mean())) if count else (math.nan, math.nan)
        )
        found.append(Bin(i / bins, (i + 1) / bins, count, *means))
    total = sum(each.images * abs(each.accuracy - each.confidence) for each in found if each.images)
    return total / len(labels), tuple(found)


def auroc(inside: Values, outside: Values) -> float:
    """How surely a score tells images of other data from known ones: the probability that theirs is higher.

    Args:
        inside: scores (N,) of data as in training; the higher, the stranger, such as `Prediction.entropy`.
        outside: scores (M,) of other data.

    Raises:
        ValueError: scores that are not (N,) and (M,), none, or not finite.
    """
    from sklearn.metrics import roc_auc_score

    known, other = (_tensor(each).detach().double().cpu() for each in (inside, outside))
    if known.ndim != 1 or other.ndim != 1 or not len(known) or not len(other):
        raise ValueError(
            f"scores (N,) and (M,) are needed, not {tuple(known.shape)} and {tuple(other.shape)}"
        )
    scores, strange = torch.cat([known, other]), torch.cat([torch.zeros(len(known)), torch.ones(len(other))])
    if not torch.isfinite(scores).all():
        raise ValueError("scores contain NaN or infinity")
    return float(roc_auc_score(strange.numpy(), scores.numpy()))


def reliability_plot(
    scores: Calibration, path: str | os.PathLike[str] | None = None, title: str = ""
) -> "Figure":
    """Draw accuracy over confidence, and below it how many predictions there are.

    Args:
        scores: of `calibration`.
        path: of a PNG to write, if any.
        title: above the picture, before ECE and NLL.

    Returns:
        A figure of matplotlib, which notebooks show.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    middles = [(each.low + each.high) / 2 for each in scores.bins]
    width = 1 / len(scores.bins)
    upper.bar(middles, [each.accuracy for each in scores.bins], width, edgecolor="white", label="accuracy")
    upper.plot([0, 1], [0, 1], color="black", linestyle="dashed", label="confidence")
    upper.set_ylabel("accuracy")
    upper.set_ylim(0, 1)
    upper.legend(loc="upper left")
    upper.set_title(f"{title}\nECE {scores.ece:.3f}, NLL {scores.nll:.3f}".strip(), fontsize=10)
    lower.bar(middles, [each.images for each in scores.bins], width, edgecolor="white", color="grey")
    lower.set_xlabel("confidence")
    lower.set_ylabel("images")
    lower.set_xlim(0, 1)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _tensor(values: Values) -> Tensor:
    """As they are; of lists in float64, as Python's numbers are, where torch would round to float32."""
    kept = isinstance(values, Tensor | np.ndarray)
    return torch.as_tensor(values) if kept else torch.as_tensor(values, dtype=torch.float64)


def _checked(probs: Values, labels: Values) -> tuple[Tensor, Tensor]:
    """Probabilities in float64 and labels beside them, as tensors."""
    probs = _tensor(probs)
    labels = torch.as_tensor(labels).to(probs.device)
    if probs.ndim != 2 or labels.shape != probs.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"probabilities (N, C) and labels (N,) are needed, not {tuple(probs.shape)} and {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < probs.shape[1]:
        raise ValueError(f"labels must be class indices from 0 to {probs.shape[1] - 1}")
    tolerance = max(1e-3, torch.finfo(probs.dtype).eps) if probs.is_floating_point() else 1e-3
    probs = probs.detach().double()
    one = torch.ones(len(probs), dtype=probs.dtype, device=probs.device)
    if (probs < 0).any() or not torch.allclose(probs.sum(1), one, atol=tolerance):
        raise ValueError("rows must be probabilities that sum to 1; take softmax of logits")
    return probs, labels.long()
