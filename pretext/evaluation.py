"""How good are the features? Weighted kNN and a linear probe under fixed, printed protocols.

Published kNN and linear-probe numbers drift with the temperature, the crop, the norm layers' mode and the
scaling of the features. Here each has a fixed default, and `knn_protocol`, `linear_protocol` and `few_protocol` put
it into words, to be printed with every result. What a name such as knn-v1 stands for never changes: another
default would be knn-v2.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from leaven.pretext.features import extract_features, recalibrate_batchnorm

__all__ = [
    "extract_features",
    "few_label_probe",
    "few_protocol",
    "knn",
    "knn_protocol",
    "linear_probe",
    "linear_probs",
    "linear_protocol",
    "recalibrate_batchnorm",
]

# Features and labels, in whatever they were kept.
Values = Tensor | np.ndarray | Sequence[Any]
# Rows of the similarity matrix are computed in chunks of about this many numbers (64 MB in fp32).
_CHUNK = 2**24
# L2 penalties that the linear probe tries, strongest first, for the mean loss: sklearn's C is 1 / (l2 * N).
_L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
# Of the probe with few labels, which has too few to choose one.
_L2_FEW = 1e-2

# Names of the protocols under their defaults.
KNN, LINEAR, FEW = "knn-v1", "linear-v1", "few-v1"


def knn_protocol(
    k: int = 20,
    temperature: float = 0.07,
    *,
    split: str = "train to held-out",
    crop: str = "whole image, resized",
) -> str:
    """One line that says how a kNN result was obtained.

    Args:
        k, temperature: as given to `knn`.
        split: which images were searched and which were judged, in words.
        crop: how images were cut, in words.
    """
    return (
        f"kNN: k={k}, votes weighted by exp(cosine / {temperature:g}), features L2-normalised, "
        f"norm layers in eval, split: {split}, crop: {crop}, no augmentation"
    )


def linear_protocol(*, split: str = "train to held-out", crop: str = "whole image, resized") -> str:
    """One line that says how a linear-probe result was obtained; arguments as in `knn_protocol`."""
    return (
        f"linear probe: logistic regression on frozen features standardised with train statistics, "
        f"L2 from {_L2_GRID[-1]:g} to {_L2_GRID[0]:g} chosen on a held-out fifth of train, refitted on all, "
        f"norm layers in eval, split: {split}, crop: {crop}, no augmentation"
    )


def few_protocol(*, split: str = "train to held-out", crop: str = "whole image, resized") -> str:
    """One line that says how a result with few labels was obtained; arguments as in `knn_protocol`."""
    return (
        f"few labels: logistic regression on frozen features of the chosen images, standardised with the statistics "
        f"of all training images, L2 {_L2_FEW:g} for the mean loss, norm layers in eval, split: {split}, "
        f"crop: {crop}, no augmentation"
    )


def knn(
    train_x: Values,
    train_y: Values,
    test_x: Values,
    test_y: Values,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Top-1 accuracy of the weighted k-nearest-neighbour classifier of Wu et al. (2018), as used by DINO.

    The ``k`` nearest training features under cosine similarity ``s`` vote, each with weight
    ``exp(s / temperature)``. The search is exact. ``temperature=math.inf`` gives the plain majority vote.

    Args:
        train_x: (N, D) features to search, on any device; the test features must be on the same one. Like the others
            a tensor, an array or lists.
        train_y: (N,) class indices from 0.
        test_x: (M, D) features to classify.
        test_y: (M,) class indices from 0.
        k: number of voters, at most N.
        temperature: in units of cosine similarity; smaller lets the nearest dominate.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: on shapes or labels that do not fit, non-finite features, or ``k`` outside 1..N.
    """
    train_x, train_y, test_x, test_y = _checked(train_x, train_y, test_x, test_y)
    if not 1 <= k <= len(train_x):
        raise ValueError(f"k must be between 1 and the {len(train_x)} training features, not {k}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    bank = F.normalize(train_x, dim=1).T
    classes = int(train_y.max()) + 1
    correct = 0
    rows = max(1, _CHUNK // len(train_x))
    for queries, labels in zip(torch.split(test_x, rows), torch.split(test_y, rows), strict=True):
        similarity, neighbours = (F.normalize(queries, dim=1) @ bank).topk(k, dim=1)
        # Relative to the nearest neighbour: the argmax is the same and exp cannot overflow.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(queries), classes).scatter_add_(1, train_y[neighbours], weights)
        correct += int((votes.argmax(1) == labels).sum())
    return correct / len(test_x)


def linear_probe(train_x: Values, train_y: Values, test_x: Values, test_y: Values, seed: int = 0) -> float:
    """Top-1 accuracy of multinomial logistic regression on standardised features.

    The L2 penalty is chosen on a fifth of the training features, held out class by class; the winner (the
    stronger of equals) is fitted again on all of them. Same inputs and seed, same result.

    Args:
        train_x: (N, D) features; like the others a tensor, an array or lists.
        train_y: (N,) class indices from 0.
        test_x: (M, D) features.
        test_y: (M,) class indices from 0.
        seed: decides which training features are held out.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: on shapes or labels that do not fit, non-finite features, fewer than two classes, or no
            class with two examples.
    """
    x, y, queries, labels = (t.cpu().numpy() for t in _checked(train_x, train_y, test_x, test_y))
    x, queries = _standardised(x, queries)
    return float(_chosen_regression(x, y, seed).score(queries, labels))


def linear_probs(train_x: Values, train_y: Values, test_x: Values, test_y: Values, seed: int = 0) -> Tensor:
    """Class probabilities (M, C) of the probe whose accuracy `linear_probe` gives, float64.

    Arguments and errors as there. C is one more than the largest label; a class that `train_y` lacks has probability 0.
    """
    x, y, queries, labels = (t.cpu().numpy() for t in _checked(train_x, train_y, test_x, test_y))
    x, queries = _standardised(x, queries)
    model = _chosen_regression(x, y, seed)
    probs = torch.zeros(len(queries), 1 + int(max(y.max(), labels.max())), dtype=torch.float64)
    probs[:, torch.from_numpy(model.classes_)] = torch.from_numpy(model.predict_proba(queries)).double()
    return probs


def few_label_probe(
    train_x: Values, train_y: Values, test_x: Values, test_y: Values, chosen: Sequence[int]
) -> float:
    """Top-1 accuracy of logistic regression that is told the labels of a few training images only.

    The features are standardised with the statistics of all training images: those need no labels. The L2 penalty
    is fixed, since one example of each class leaves nothing to choose it on.

    Args:
        train_x: (N, D) features; like the others a tensor, an array or lists.
        train_y: (N,) class indices from 0.
        test_x: (M, D) features.
        test_y: (M,) class indices from 0.
        chosen: which of the training images are labelled.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: on shapes or labels that do not fit, non-finite features, or fewer than two classes chosen.
    """
    x, y, queries, labels = (t.cpu().numpy() for t in _checked(train_x, train_y, test_x, test_y))
    x, queries = _standardised(x, queries)
    few = np.asarray(chosen)
    if len(np.unique(y[few])) < 2:
        raise ValueError("few_label_probe needs labelled images of at least two classes")
    return float(_regression(_L2_FEW, x[few], y[few]).score(queries, labels))


def _standardised(x: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both by the mean and standard deviation of the first, feature by feature."""
    # Sums in float64: numpy's along the first axis lose a digit in float32 for every ten times as many images.
    mean = x.mean(0, dtype=np.float64).astype(x.dtype)
    std = np.sqrt(np.square(x - mean).mean(0, dtype=np.float64)).astype(x.dtype)
    std[std <= 1e-6 * np.abs(mean)] = 1.0  # constant but for rounding, which would be blown up to noise
    return (x - mean) / std, (queries - mean) / std


def _regression(l2: float, x: np.ndarray, y: np.ndarray) -> Any:
    """Multinomial logistic regression: mean cross-entropy + l2 / 2 * |W|^2, the intercept without penalty."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1 / (l2 * len(x)), max_iter=2000).fit(x, y)


def _chosen_regression(x: np.ndarray, y: np.ndarray, seed: int) -> Any:
    """That of the L2 penalty which is best on a fifth of the features, fitted to all of them."""
    held_out = _held_out(y, seed)
    if len(np.unique(y)) < 2 or not held_out.any():
        raise ValueError(
            "linear_probe needs at least two classes, and at least one of them with two examples"
        )
    scores = [_regression(l2, x[~held_out], y[~held_out]).score(x[held_out], y[held_out]) for l2 in _L2_GRID]
    return _regression(_L2_GRID[int(np.argmax(scores))], x, y)


def _held_out(y: np.ndarray, seed: int) -> np.ndarray:
    """Boolean (N,): a fifth of each class, at least one of every class that has two."""
    order = np.random.default_rng(seed).permutation(len(y))
    held_out = np.zeros(len(y), dtype=bool)
    for label in np.unique(y):
        members = order[y[order] == label]
        held_out[members[: -(-len(members) // 5)]] = len(members) > 1
    return held_out


def _checked(*given: Values) -> tuple[Tensor, ...]:
    """The four tensors, features at least fp32 and labels int64 on the features' device, or a ValueError."""
    train_x, train_y, test_x, test_y = (torch.as_tensor(each) for each in given)
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim != 2 or len(x) == 0 or y.shape != (len(x),):
            shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(f"{name} features must be (N, D) and labels (N,) with N > 0, not {shapes}")
        if not torch.isfinite(x).all():
            raise ValueError(f"{name} features contain NaN or infinity: did the backbone diverge?")
        if y.is_floating_point():
            raise ValueError(f"{name} labels must be class indices of an integer type, not {y.dtype}")
        if int(y.min()) < 0:
            raise ValueError(
                f"{name} labels must be class indices from 0; unlabelled images cannot be evaluated"
            )
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(
            f"train features have {train_x.shape[1]} dimensions, test features {test_x.shape[1]}"
        )
    dtype = torch.promote_types(torch.promote_types(train_x.dtype, test_x.dtype), torch.float32)
    return (
        train_x.detach().to(dtype),
        train_y.to(train_x.device).long(),
        test_x.detach().to(dtype),
        test_y.to(test_x.device).long(),
    )
