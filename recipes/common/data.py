"""From a `--data` text to a loader: `open_data`, `KeyedDataset`, `make_loader`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from leaven.recipes.common.augment import Transform
from leaven.recipes.common.flags import SHUFFLE_BUFFER, UserError
from leaven.recipes.common.folders import split_folder
from leaven.recipes.common.hf import open_hf, parse
from leaven.recipes.common.sampler import Key, KeyedBatchSampler
from leaven.recipes.common.sources import (
    FileSource,
    LostData,
    Source,
    TolerantSource,
    TooManyBadImages,
    digits,
    show_path,
)
from leaven.recipes.common.torchvision_sets import open_torchvision

IMAGENET_MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)
IMAGENET_STD: tuple[float, ...] = (0.229, 0.224, 0.225)


@dataclass
class Data:
    """What `open_data` found.

    Attributes:
        name: for titles and folder names.
        kind: "digits", "torchvision", "hf" or "folder".
        train, val: the two parts.
        classes: class names by label; empty without labels.
        mean, std: per channel, of images in [0, 1].
        image_size: (H, W) to train at, a suggestion.
        notes: lines to print: what was found and decided.
        unlabelled: why there are no classes, where the data has a column for them.
    """

    name: str
    kind: str
    train: Source
    val: Source
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    notes: list[str] = field(default_factory=list)
    unlabelled: str = ""


def open_data(
    spec: str,
    *,
    max_bad_images: int = 10,
    seed: int = 0,
    in_chans: int = 3,
    image_column: str | None = None,
    label_column: str | None = None,
    shuffle_buffer: int = SHUFFLE_BUFFER,
) -> Data:
    """Open the data that a `--data` text names.

    Args:
        spec: `digits`, `tv:NAME@ROOT` (add `?download` to let torchvision fetch it), `hf:NAME[:SPLIT]` as `open_hf`
            understands it, or a folder as `split_folder` does.
        max_bad_images: unreadable images to bear in each of the two parts.
        seed: key of the split where the data has none.
        in_chans: 1 to read grey, 3 to read RGB.
        image_column, label_column, shuffle_buffer: of `hf:`, see `open_hf`.

    Raises:
        UserError: the data is not there, or is not what its place says.
    """
    if in_chans not in (1, 3):
        raise UserError(f"--in-chans {in_chans}: images are read as 1 (grey) or 3 (RGB) channels")
    for flag, column in (("--image-column", image_column), ("--label-column", label_column)):
        if column is not None and not spec.startswith("hf:"):
            raise UserError(f"{flag} is of --data hf:NAME, and --data is {spec}")
    if shuffle_buffer != SHUFFLE_BUFFER and not spec.startswith("hf:"):
        raise UserError(f"--shuffle-buffer is of --data hf:NAME: all rows of {spec} are shuffled together")
    if spec == "digits":
        return _open_digits(seed, in_chans)
    if spec.startswith("tv:"):
        return _open_torchvision(spec, in_chans, max_bad_images)
    if spec.startswith("hf:"):
        columns = image_column, label_column
        found = open_hf(spec, in_chans, max_bad_images, seed, *columns, shuffle_buffer)
        mean, std = channel_statistics(found.train)
        name, size = os.path.basename(parse(spec)[0].rstrip("/")), suggested_size(found.train)
        return Data(
            name, "hf", found.train, found.val, found.classes, mean, std, size, found.notes, found.unlabelled
        )
    return _open_folder(os.path.expanduser(spec), seed, in_chans, max_bad_images)


def _open_digits(seed: int, in_chans: int) -> Data:
    train, val = digits(seed, in_chans)
    mean, std = channel_statistics(train)
    notes = [f"digits: {len(train)} training and {len(val)} held-out 8x8 images; a smoke test, no evidence"]
    return Data("digits", "digits", train, val, tuple("0123456789"), mean, std, (64, 64), notes)


def _open_torchvision(spec: str, in_chans: int, max_bad_images: int) -> Data:
    train, val, classes, val_name = open_torchvision(spec, in_chans, max_bad_images)
    mean, std = channel_statistics(train)
    name = spec.removeprefix("tv:").split("@")[0]
    notes = [
        f"{name}: {len(train)} training images, {len(val)} held out ({val_name}), {len(classes)} classes"
    ]
    return Data(name, "torchvision", train, val, classes, mean, std, suggested_size(train), notes)


def _open_folder(root: str, seed: int, in_chans: int, max_bad_images: int) -> Data:
    found = split_folder(root, seed)
    train, val = (
        FileSource(root, part.paths, part.labels, in_chans, max_bad_images)
        for part in (found.train, found.val)
    )
    mean, std = (values if in_chans == 3 else (sum(values) / 3,) for values in (IMAGENET_MEAN, IMAGENET_STD))
    name = show_path(os.path.basename(os.path.abspath(root)))
    return Data(name, "folder", train, val, found.classes, mean, std, suggested_size(train), found.notes)


def spread(source: Source, n: int) -> NDArray[np.int64]:
    """Indices of `n` images, or of all if there are fewer, evenly spread over the source.

    Where the source is read in blocks: of neighbours, 32 at a time.
    """
    length, run = len(source), 1 if getattr(source, "blocks", None) is None else 32
    runs = -(-n // run)
    if n >= length or runs * run > length:
        return np.arange(min(n, length)) * length // min(n, length)
    return (np.arange(runs)[:, None] * length // runs + np.arange(run)).ravel()[:n]


def _some(source: Source, n: int) -> Iterator[Tensor]:
    """About `n` images, evenly spread over the source."""
    if getattr(source, "blocks", None) is not None:
        return (source.image(i) for i in spread(source, n).tolist())
    return (source.image(i) for i in range(0, len(source), max(1, len(source) // n)))


def channel_statistics(source: Source, n: int = 1000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of images in [0, 1], over all pixels of about `n` images.

    A channel that is the same everywhere has a deviation of one grey level, for it is divided by.
    """
    # Sums of 1, x and x^2, image by image: sizes may differ, and all at once may not fit.
    sums = torch.zeros(3, 1, dtype=torch.float64)
    for image in _some(source, n):
        x = image.flatten(1).double() / 255
        sums = sums + torch.stack([torch.ones_like(x), x, x.square()]).sum(2)
    mean, square = sums[1] / sums[0], sums[2] / sums[0]
    return tuple(mean.tolist()), tuple((square - mean.square()).clamp_min(1 / 255**2).sqrt().tolist())


def suggested_size(source: Source) -> tuple[int, int]:
    """A square to train at: 224 for photos, else the images' shorter side rounded up to 32, at least 64.

    64 because networks that divide the side by 32 need more than one cell.
    """
    shorter = float(np.median([min(image.shape[-2:]) for image in _some(source, 8)]))
    side = 224 if shorter >= 200 else max(64, 32 * -(-int(shorter) // 32))
    return side, side


class KeyedDataset(Dataset[tuple[Any, int]]):
    """A source and a transform, asked by `Key`: (what the transform makes, label or -1)."""

    def __init__(self, source: Source, transform: Transform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Any, int]:
        # Under a curriculum, by transforms that know how much of an image they need.
        smaller = None if key.size is None else getattr(self.transform, "reduction", None)
        if smaller is None:
            image = self.source.image(key.index)
        else:
            image = self.source.image(key.index, partial(smaller, key=key))
        label = self.source.label(key.index)
        return self.transform(image, key), -1 if label is None else label


class KeyedLoader(DataLoader[tuple[Any, int]]):
    """A DataLoader that moves its sampler's position as it hands batches out, and names unreadable images."""

    dataset: KeyedDataset
    batch_sampler: KeyedBatchSampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        source = _tolerant(self.dataset.source)
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except TooManyBadImages:
                # A worker's error has its traceback for a message: say it again, in one line.
                if source is None:
                    raise
                raise source.too_many() from None
            except LostData as error:
                line = str(error).strip().splitlines()[-1].rpartition("LostData: ")[2]
                raise LostData(f"{line}; what was saved is kept: --resume auto") from None
            if source is not None:
                source.report()
            self.batch_sampler.advance()
            yield batch
        self.batch_sampler.next_epoch()


def make_loader(
    dataset: KeyedDataset, sampler: KeyedBatchSampler, workers: int = 0, *, pin_memory: bool = False
) -> KeyedLoader:
    """A loader of the sampler's batches.

    `for batch in loader` goes from the sampler's position to the end of its epoch, and leaves the sampler
    at the start of the next. Nothing is drawn from the global generator. Do not give it to
    `accelerator.prepare`: the sampler knows its rank already.

    Args:
        dataset: what to load.
        sampler: which keys, in which batches.
        workers: processes; they are kept between epochs. 0: load in this process.
        pin_memory: page-locked batches, for faster copies to a GPU.
    """
    return KeyedLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_process_group if workers else None,
        pin_memory=pin_memory,
        # An iterator draws a base seed for its workers: from here, not from the global generator.
        generator=torch.Generator(),
    )


def _tolerant(source: Any) -> TolerantSource | None:
    """The source that counts unreadable images, if need be below wrappers that hold theirs as `.source`."""
    while source is not None and not isinstance(source, TolerantSource):
        source = getattr(source, "source", None)
    return source


def _leave_process_group(worker: int) -> None:
    """Let Ctrl-C and signals to the whole group reach the training process alone.

    It still needs its workers to reach a step where it can save. They end when it tells them to, or within
    seconds after it is gone.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
