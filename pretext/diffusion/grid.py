"""Which timestep, block and pooling? Linear classifiers of all of them, in closed form."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from leaven.pretext.diffusion.features import Cell

L2 = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


class Scored(NamedTuple):
    """A classifier of the grid.

    Attributes:
        cell: what it reads.
        l2: its penalty.
        accuracy: on each of the other parts, in their order.
    """

    cell: Cell
    l2: float
    accuracy: tuple[float, ...]


def ridge(x: Tensor, y: Tensor, l2: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """Least squares with a penalty: weights (D, C) and intercepts (C,) for each, float64, by one decomposition.

    Minimises ``|x w + b - y|^2 / N + l2 |w|^2``; scikit-learn's alpha is ``N l2``. The smaller of the two problems is
    solved, over D numbers or over N images.

    Args:
        x: (N, D).
        y: (N, C).
        l2: greater than 0.

    Raises:
        ValueError: a penalty that is not.
    """
    if not l2 or min(l2) <= 0:
        raise ValueError(f"penalties must be greater than 0, got {tuple(l2)}")
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    primal = x.shape[1] <= len(x)
    values, vectors = torch.linalg.eigh(x.T @ x if primal else x @ x.T)
    right = vectors.T @ (x.T @ y if primal else y)
    found = []
    for penalty in l2:
        w = vectors @ (right / (values.clamp_min(0) + penalty * len(x)).unsqueeze(1))
        w = w if primal else x.T @ w
        found.append((w, mean_y - mean_x @ w))
    return found


def ridge_grid(
    train: Mapping[Cell, Tensor],
    labels: Tensor,
    *others: tuple[Mapping[Cell, Tensor], Tensor],
    l2: Sequence[float] = L2,
) -> list[Scored]:
    """A linear classifier for every cell and penalty, on features standardised by the training images, best first.

    Least squares to +1 for the class and 0 for the others. The first of the others decides the order, so give
    validation images there, and what is reported last; of equals the first cell and the strongest penalty lead.

    Args:
        train: maps (N, C, k, k) of training images by cell, such as a `FeatureCache`.
        labels: (N,) class indices.
        others: maps and labels of other images; their accuracies are taken.
        l2: penalties, see `ridge`.

    Raises:
        ValueError: numbers that do not fit, or a class that is judged and not learnt.
    """
    if not others:
        raise ValueError("give the maps and labels of validation images, and of what else is to be judged")
    found = []
    for cell in train:
        if not all(cell in maps for maps, _ in others):
            raise ValueError(f"{cell} is not among the other images' cells")
    new = sorted(
        {int(each) for _, y in others for each in y.unique()} - {int(each) for each in labels.unique()}
    )
    if new:
        raise ValueError(f"class {new[0]} is judged and not learnt: it has no training image")
    targets = F.one_hot(labels)
    for cell in train:
        x = train[cell].flatten(1).double()
        if len(x) != len(labels) or not torch.isfinite(x).all():
            raise ValueError(
                f"{cell}: {len(x)} maps for {len(labels)} labels, or numbers that are not finite"
            )
        mean, std = x.mean(0), x.std(0, correction=0)
        std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)
        parts = [((maps[cell].flatten(1).double() - mean) / std, y) for maps, y in others]
        for penalty, (w, b) in zip(l2, ridge((x - mean) / std, targets, l2), strict=True):
            right = tuple(float(((z @ w + b).argmax(1) == y).double().mean()) for z, y in parts)
            found.append(Scored(cell, penalty, right))
    return sorted(found, key=lambda each: (-each.accuracy[0], -each.l2))


def linear_cka(x: Tensor, y: Tensor) -> float:
    """How alike two networks see the same images: 1 for features that differ by a rotation and a scale, 0 for none.

    Source: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, section 3.

    Args:
        x: (N, D), of one network.
        y: (N, E), of the other.

    Raises:
        ValueError: other numbers of images, or features that are the same for all.
    """
    if len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} images: features of the same images are compared")
    x, y = (each.flatten(1).double() for each in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    if not (x.any() and y.any()):
        raise ValueError("features that are the same for all images are like none")
    if len(x) < min(x.shape[1], y.shape[1]):
        a, b = x @ x.T, y @ y.T
        return float((a * b).sum() / (a.norm() * b.norm()))
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))
