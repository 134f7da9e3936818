"""Where images come from. A source is map-style: a length, images and labels by index.

Unreadable images are replaced, not dropped: image i and label i of a source are those of the first
readable image from i on. That is a function of the files alone, so it is the same in every worker, on
every rank and after a resume, and nothing has to be scanned before training starts. The price: that
neighbour is seen twice per epoch. In a `Subset` it is the next one of the subset: what is held out of
training must not come back into it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leaven.recipes.common.decode import BadImage, Reduction, read_image
from leaven.recipes.common.flags import UserError

NAMED = 5  # unreadable images that are named one by one


class BadImageWarning(UserWarning):
    """An image could not be read and its neighbour took its place."""


class TooManyBadImages(UserError):
    """More images are unreadable than `--max-bad-images` allows."""

    on_every_rank = False  # each rank meets its own


class LostData(UserError):
    """Part of the data cannot be read any more."""

    on_every_rank = False


class Source(Protocol):
    """Images by index.

    Where reading is cheap in runs of neighbours only, a source has `blocks`, the lengths of these runs in order.
    """

    def __len__(self) -> int: ...

    def image(self, index: int, reduction: Reduction | None = None) -> Tensor:
        """Image `index`, uint8 (C, H, W)."""
        ...

    def label(self, index: int) -> int | None:
        """Its class, None where there is none."""
        ...


class ArraySource:
    """Images that are in memory.

    Args:
        images: uint8 (N, C, H, W).
        labels: one class per image, or None.
    """

    def __init__(self, images: Tensor, labels: Sequence[int] | NDArray[Any] | None) -> None:
        self.images = images
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int, reduction: Reduction | None = None) -> Tensor:
        return self.images[index]

    def label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])


class TolerantSource:
    """Base of sources whose images may turn out unreadable; see the module's text.

    What was found is kept in memory that the loader's workers share: the training process counts and
    names it.

    Args:
        n: images.
        labels: one class per image, or None.
        max_bad_images: how many unreadable images to bear.
    """

    _GOOD, _BAD = 1, 2

    def __init__(self, n: int, labels: Sequence[int] | NDArray[Any] | None, max_bad_images: int) -> None:
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.max_bad_images = max_bad_images
        self._status = torch.zeros(n, dtype=torch.uint8).share_memory_()
        self._reported = 0
        self._named: set[int] = set()

    def __len__(self) -> int:
        return len(self._status)

    def read(self, index: int, reduction: Reduction | None = None) -> Tensor:
        """Image `index` itself, uint8 (C, H, W), or `BadImage`."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call image `index` in a message."""
        raise NotImplementedError

    def image(self, index: int, reduction: Reduction | None = None) -> Tensor:
        """The first readable image from `index` on, uint8 (C, H, W).

        Raises:
            TooManyBadImages: more than `max_bad_images` were found unreadable.
        """
        return first_readable(self, index, reduction)[1]

    def label(self, index: int) -> int | None:
        """The class of `image(index)`, None where there is none."""
        if self.labels is None:
            return None
        return int(self.labels[index if self.known_good(index) else first_readable(self, index)[0]])

    def known_good(self, index: int) -> bool:
        """Whether image `index` has been read already."""
        return bool(self._status[index] == self._GOOD)

    def attempt(self, index: int, reduction: Reduction | None = None) -> Tensor | None:
        """Image `index` itself, None if it is unreadable.

        Raises:
            TooManyBadImages: more than `max_bad_images` were found unreadable.
        """
        status = self._status.numpy()
        if status[index] == self._BAD:
            return None
        try:
            image = self.read(index, reduction)
        except BadImage:
            status[index] = self._BAD
            if self.bad_count > self.max_bad_images:
                raise self.too_many() from None
            return None
        status[index] = self._GOOD
        return image

    @property
    def bad_count(self) -> int:
        """Unreadable images found so far, by any worker of this process."""
        return int(np.count_nonzero(self._status.numpy() == self._BAD))

    def bad_images(self, n: int | None = None) -> list[str]:
        """Names of the first `n` unreadable images found so far."""
        return [self.name(int(i)) for i in np.flatnonzero(self._status.numpy() == self._BAD)[:n]]

    def report(self) -> None:
        """Warn about what was found since the last call; for the training process, not for its workers.

        The first few are named one by one, later ones counted each time that their number has doubled.
        """
        count = self.bad_count
        if count == self._reported:
            return
        so_far = f"{count} unreadable so far, at most {self.max_bad_images} allowed"
        bad = np.flatnonzero(self._status.numpy() == self._BAD).tolist()
        fresh = [index for index in bad if index not in self._named][: NAMED - len(self._named)]
        self._named.update(fresh)
        for index in fresh:
            message = f"replaced {self.name(index)} by the next image: {self._reason(index)} ({so_far})"
            warnings.warn(message, BadImageWarning, stacklevel=2)
        if not fresh and count >= 2 * self._reported:
            warnings.warn(f"replaced more images: {so_far}", BadImageWarning, stacklevel=2)
        if fresh or count >= 2 * self._reported:
            self._reported = count

    def _reason(self, index: int) -> str:
        # The worker that found it is another process; asking again is simpler than a channel, and as exact.
        try:
            self.read(index)
        except BadImage as error:
            return str(error)
        return "unreadable when it was first asked for"

    def too_many(self) -> TooManyBadImages:
        """The error, with the first few named."""
        first, *others = np.flatnonzero(self._status.numpy() == self._BAD)[:NAMED].tolist()
        why = f"{self.name(first)} ({self._reason(first)})"
        names = ", ".join([why, *map(self.name, others)])
        if self.bad_count == len(self):
            return TooManyBadImages(f"none of the {len(self)} images of this split can be read: {names}")
        if self.bad_count <= self.max_bad_images:
            return TooManyBadImages(f"no image that is left to take can be read: {names}")
        return TooManyBadImages(
            f"{self.bad_count} unreadable images, more than --max-bad-images {self.max_bad_images}: {names}"
            f"{', ...' if self.bad_count > NAMED else ''}; repair or remove them, or allow more"
        )


def first_readable(source: Any, index: int, reduction: Reduction | None = None) -> tuple[int, Tensor]:
    """The first readable image of a tolerant source, or of a subset of one, from `index` on, and its place.

    Raises:
        TooManyBadImages: see `TolerantSource.attempt`; or there is none.
    """
    for place in chain(range(index, len(source)), range(index)):
        image = source.attempt(place, reduction)
        if image is not None:
            return place, image
    while not isinstance(source, TolerantSource):
        source = source.source
    raise source.too_many()


def show_path(path: str | bytes) -> str:
    """A path as text that any terminal and log can hold: undecodable bytes as backslash escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class FileSource(TolerantSource):
    """Image files.

    Args:
        root: folder that `paths` are relative to.
        paths: image files.
        labels: one class per file, or None.
        in_chans: 1 for grey, 3 for RGB.
        max_bad_images: how many unreadable files to bear.
    """

    def __init__(
        self,
        root: str,
        paths: Sequence[str],
        labels: Sequence[int] | None,
        in_chans: int = 3,
        max_bad_images: int = 10,
    ) -> None:
        super().__init__(len(paths), labels, max_bad_images)
        self.root, self.in_chans = os.fsencode(root), in_chans
        # One array of bytes: a list of a million str would be copied, page by page, into every forked worker.
        self.paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)

    def path(self, index: int) -> str:
        """Where image `index` lies."""
        return os.fsdecode(os.path.join(self.root, bytes(self.paths[index])))

    def read(self, index: int, reduction: Reduction | None = None) -> Tensor:
        return read_image(self.path(index), self.in_chans, reduction)

    def name(self, index: int) -> str:
        return show_path(self.path(index))


def labels_of(source: Source) -> NDArray[np.int64]:
    """All labels (N,) of a source, where it can without reading its images."""
    known: Any = getattr(source, "labels", None)
    if known is not None:
        return np.asarray(known, dtype=np.int64)
    labels = [source.label(index) for index in range(len(source))]
    if None in labels:
        raise UserError("these images have no labels; give data with one class per image")
    return np.asarray(labels, dtype=np.int64)


class Subset:
    """Some images of a source.

    Args:
        source: what they are from.
        indices: which, (n,).
    """

    def __init__(self, source: Source, indices: NDArray[np.int64]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> NDArray[np.int64]:
        return labels_of(self.source)[self.indices]

    @property
    def blocks(self) -> NDArray[np.int64] | None:
        """How many of these images lie in each block of the source, where it has blocks."""
        blocks: NDArray[np.int64] | None = getattr(self.source, "blocks", None)
        if blocks is None:
            return None
        counts = np.diff(np.searchsorted(self.indices, np.cumsum(blocks)), prepend=0)
        return counts[counts > 0]

    def image(self, index: int, reduction: Reduction | None = None) -> Tensor:
        if not self._tolerant:
            return self.source.image(int(self.indices[index]), reduction)
        return first_readable(self, index, reduction)[1]

    def label(self, index: int) -> int | None:
        if self._tolerant and not self.known_good(index):
            index = first_readable(self, index)[0]
        return self.source.label(int(self.indices[index]))

    @property
    def _tolerant(self) -> bool:
        return getattr(self.source, "_tolerant", isinstance(self.source, TolerantSource))

    def known_good(self, index: int) -> bool:
        """As in `TolerantSource`."""
        source: Any = self.source
        return bool(source.known_good(int(self.indices[index])))

    def attempt(self, index: int, reduction: Reduction | None = None) -> Tensor | None:
        """As in `TolerantSource`."""
        source: Any = self.source
        image: Tensor | None = source.attempt(int(self.indices[index]), reduction)
        return image


def digits(seed: int, in_chans: int) -> tuple[ArraySource, ArraySource]:
    """scikit-learn's 1,797 handwritten digits, 8x8 in 17 grey levels, split 80 / 20 by class and seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(np.round(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    images = images.expand(-1, in_chans, -1, -1).contiguous()
    train, val = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=seed, stratify=labels)
    train, val = np.sort(train), np.sort(val)
    return ArraySource(images[train], labels[train]), ArraySource(images[val], labels[val])
