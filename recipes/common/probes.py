"""What the features are worth: kNN and linear probe of raw pixels, the untrained and the trained backbone."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from leaven.pretext import (
    extract_features,
    knn,
    knn_protocol,
    linear_probe,
    linear_protocol,
    recalibrate_batchnorm,
)
from leaven.recipes.common.batches import Images, Part, user_errors
from leaven.recipes.common.data import Data, KeyedLoader

Labelled = tuple[KeyedLoader, Tensor]

# Raw pixels are compared at the stored size, up to this side: a linear probe on 150,528 numbers tells no more.
_PIXELS = 32


def probe(
    backbones: Mapping[str, nn.Module], images: Images, most: int
) -> tuple[list[tuple[str, str]], list[str]]:
    """Top-1 of kNN and linear probe on raw pixels, then on each backbone in turn; see `recalibrate` first.

    Args:
        backbones: what to probe, by the name to print.
        images: with labels, or without: then nothing is probed.
        most: images at most of each of the two parts.

    Returns:
        Results as (what, percent), and lines to print: protocol, then a table.
    """
    data, settings = images.data, images.settings
    if why := unfit(data, most):
        return [], [f"{why}: kNN and linear probe are skipped"]
    raw = pixel_size(data)
    loaders = [images.whole(part, most) for part in (data.train, data.val)]
    pairs = [
        labelled_features(nn.Flatten(), images.whole(part, most, raw)) for part in (data.train, data.val)
    ]
    scores = {f"raw pixels {raw[0]}x{raw[1]}": _scores(pairs, settings.seed)}
    for name, backbone in backbones.items():
        scores[name] = _scores([labelled_features(backbone, loader) for loader in loaders], settings.seed)
    crop = f"whole image resized to cover {images.size[0]}x{images.size[1]}, centre crop"
    split = f"{len(pairs[0][0])} training to {len(pairs[1][0])} held-out images"
    k = min(20, len(pairs[0][0]))
    lines = [
        knn_protocol(k, split=split, crop=crop),
        linear_protocol(split=split, crop=crop),
        *_table(scores),
    ]
    return [
        (f"{who}, {what} top-1", f"{v:.2%}") for who, row in scores.items() for what, v in row.items()
    ], lines


def unfit(data: Data, most: int) -> str:
    """Why nothing can be learnt from the labels of at most so many training images; empty if it can."""
    if not data.classes:
        return f"no labels ({data.unlabelled})" if data.unlabelled else "no labels"
    counts = np.bincount(Part(data.train, most).labels)
    if (counts > 0).sum() < 2 or counts.max() < 2:
        return f"{counts.sum()} labelled training images of {(counts > 0).sum()} classes are too few to learn from"
    return ""


def labelled(images: Images, most: int) -> tuple[Labelled, Labelled]:
    """Loaders of whole training and held-out images, at most so many of each, and the labels of what they give."""
    parts = Part(images.data.train, most), Part(images.data.val, most)
    # One by one, and not `Part.labels`: an unreadable image is replaced together with its label.
    labels = [torch.tensor([part.label(index) for index in range(len(part))]) for part in parts]
    loaders = [images.whole(part, most) for part in (images.data.train, images.data.val)]
    return (loaders[0], labels[0]), (loaders[1], labels[1])


def recalibrate(backbones: Mapping[str, nn.Module], images: Images) -> list[str]:
    """Take the BatchNorm statistics of every backbone anew, from whole training images; lines that say so.

    After masked training they describe visible patches, before any training nothing at all.
    """
    lines = []
    for name, backbone in backbones.items():
        if layers := recalibrate_batchnorm(backbone, images.calibration()):
            lines.append(
                f"{name}: statistics of {layers} BatchNorm layers taken anew from whole training images"
            )
    return lines


def pixel_size(data: Data) -> tuple[int, int]:
    """(H, W) at which raw pixels are compared."""
    height, width = data.train.image(0).shape[-2:]
    return min(int(height), _PIXELS), min(int(width), _PIXELS)


def _table(results: dict[str, dict[str, float]]) -> list[str]:
    """The results as lines, one per row, in percent."""
    width = max(len(name) for name in results)
    rows = [
        f"{name:<{width}}  {100 * row['kNN']:6.2f}  {100 * row['linear probe']:12.2f}"
        for name, row in results.items()
    ]
    return [f"{'top-1 %':<{width}}  {'kNN':>6}  {'linear probe':>12}", *rows]


def labelled_features(backbone: nn.Module, loader: KeyedLoader) -> tuple[Tensor, Tensor]:
    """Features (N, D) of the loader's images, and their labels (N,)."""
    labels: list[Tensor] = []

    def images() -> Iterator[Any]:
        for batch, label in loader:
            labels.append(label)
            yield batch

    features = extract_features(backbone, images())
    return features, torch.cat(labels)


def _scores(pairs: list[tuple[Tensor, Tensor]], seed: int) -> dict[str, float]:
    (train_x, train_y), (val_x, val_y) = pairs
    with user_errors(ValueError):  # features that are not finite
        return {
            "kNN": knn(train_x, train_y, val_x, val_y, k=min(20, len(train_x))),
            "linear probe": linear_probe(train_x, train_y, val_x, val_y, seed=seed),
        }
