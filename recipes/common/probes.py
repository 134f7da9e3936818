"""What the features are worth: kNN and linear probe of raw pixels, the untrained and the trained backbone."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leaven.pretext import extract_features, knn, knn_protocol, linear_probe, linear_protocol
from leaven.recipes.common.batches import Size, eval_batches
from leaven.recipes.common.data import Data, KeyedLoader
from leaven.recipes.common.flags import CommonSettings

# Raw pixels are compared at the stored size, up to this side: a linear probe on 150,528 numbers tells no more.
_PIXELS = 32


def probe(
    backbones: dict[str, nn.Module],
    data: Data,
    size: Size,
    mean: Sequence[float],
    std: Sequence[float],
    settings: CommonSettings,
    *,
    most: int,
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Top-1 of kNN and linear probe for raw pixels, then each backbone in turn.

    Args:
        backbones: what to probe, by the name to print.
        data: with labels.
        size: of the images.
        mean, std: to normalise with.
        settings: batch size, workers and seed.
        most: images at most of each of the two parts.

    Returns:
        ``{"raw pixels": {"knn": .., "linear": ..}, ...}`` in that order, and lines to print: the protocols.
    """
    loaders = [eval_batches(part, size, mean, std, settings, most) for part in (data.train, data.val)]
    stored = data.train.image(0).shape[-2:]
    raw = (min(int(stored[0]), _PIXELS), min(int(stored[1]), _PIXELS))
    small = [eval_batches(part, raw, mean, std, settings, most) for part in (data.train, data.val)]
    pairs = [_features(nn.Flatten(), loader) for loader in small]
    results = {"raw pixels": _scores(pairs, settings.seed)}
    k = min(20, len(pairs[0][0]))
    crop = f"whole image resized to cover {size[0]}x{size[1]}, centre crop"
    split = f"{len(pairs[0][0])} training to {len(pairs[1][0])} held-out images"
    lines = [
        knn_protocol(k, split=split, crop=crop),
        linear_protocol(split=split, crop=crop),
        f"raw pixels: {raw[0]}x{raw[1]}",
    ]
    for name, backbone in backbones.items():
        results[name] = _scores([_features(backbone, loader) for loader in loaders], settings.seed)
    return results, lines


def table(results: dict[str, dict[str, float]]) -> list[str]:
    """The results as lines, one per row, in percent."""
    width = max(len(name) for name in results)
    rows = [
        f"{name:<{width}}  {100 * row['knn']:6.2f}  {100 * row['linear']:6.2f}"
        for name, row in results.items()
    ]
    return [f"{'top-1 %':<{width}}  {'kNN':>6}  {'linear':>6}", *rows]


def _features(backbone: nn.Module, loader: KeyedLoader) -> tuple[Tensor, Tensor]:
    labels: list[Tensor] = []

    def images() -> Iterator[Any]:
        for batch, label in loader:
            labels.append(label)
            yield batch

    features = extract_features(backbone, images())
    return features, torch.cat(labels)


def _scores(pairs: list[tuple[Tensor, Tensor]], seed: int) -> dict[str, float]:
    (train_x, train_y), (val_x, val_y) = pairs
    return {
        "knn": knn(train_x, train_y, val_x, val_y, k=min(20, len(train_x))),
        "linear": linear_probe(train_x, train_y, val_x, val_y, seed=seed),
    }
