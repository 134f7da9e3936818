"""Images in Parquet files, wherever they lie, read row group by row group.

A row group can be had by itself: nothing is copied to the disk, and nothing in front of a position has to be read
again to come back to it. An image is known by its row, counted through all files in order; that keys its augmentation,
whoever reads it.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from leaven.recipes.common.decode import BadImage, Reduction, decode
from leaven.recipes.common.flags import UserError
from leaven.recipes.common.sampler import LANES
from leaven.recipes.common.sources import LostData, TolerantSource

T = TypeVar("T")

_OPEN_FILES = 32
_WAITS = (1, 5, 25)  # seconds before a file that does not answer is asked again


@dataclass(frozen=True)
class Columns:
    """Which columns to read: the images, and the classes if there are any."""

    image: str
    label: str | None
    classes: tuple[str, ...]


class ParquetSource(TolerantSource):
    """Images in Parquet files, local or remote.

    Args:
        files: paths or URLs, in order.
        rows: row groups of each file, in rows.
        columns: which to read.
        storage: options of remote file systems, by protocol.
        in_chans: 1 for grey, 3 for RGB.
        max_bad_images: how many unreadable images to bear.
        buffer: rows that are shuffled together; about as many, `LANES` times over, are kept in memory by the workers.
    """

    stored_bytes = 0
    _labels: NDArray[np.int64] | None = None

    def __init__(
        self,
        files: Sequence[str],
        rows: Sequence[Sequence[int]],
        columns: Columns,
        storage: dict[str, Any],
        in_chans: int = 3,
        max_bad_images: int = 10,
        buffer: int = 1000,
    ) -> None:
        self.blocks = np.array([n for groups in rows for n in groups], dtype=np.int64)
        super().__init__(int(self.blocks.sum()), None, max_bad_images)
        self.files, self.columns, self.storage, self.in_chans = tuple(files), columns, storage, in_chans
        self.buffer = buffer
        self._places = [(file, group) for file, groups in enumerate(rows) for group in range(len(groups))]
        self._starts = np.concatenate([[0], np.cumsum(self.blocks)])
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._open: OrderedDict[Hashable, Any] = OrderedDict()
        self._read: OrderedDict[Hashable, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": -1, "_open": OrderedDict(), "_read": OrderedDict()}

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """All classes (N,), of rows as they are stored; the column is read when it is first asked for."""
        if self._labels is None and self.columns.label is not None:
            read = partial(_column, storage=self.storage, column=self.columns.label)
            with ThreadPoolExecutor(8) as pool:
                self._labels = np.concatenate(list(pool.map(read, self.files)))
        return self._labels

    @labels.setter
    def labels(self, labels: NDArray[np.int64] | None) -> None:
        self._labels = labels

    def label(self, index: int) -> int | None:
        """The class of `image(index)`, None where there is none."""
        if self.columns.label is None:
            return None
        if self._status[index] != self._GOOD:
            index = self._first_readable(index)[0]
        row, table = self._row(index)
        return _class(table[self.columns.label][row].as_py())

    def labelled(self) -> bool:
        """Whether no row of the first row group lacks its class; hidden ones are often stored as -1."""
        if self.columns.label is None:
            return True
        values = self._table(0)[self.columns.label].to_pylist()
        return all(_class(value) >= 0 for value in values)

    def read(self, index: int, reduction: Reduction | None = None) -> Tensor:
        row, table = self._row(index)
        value = table[self.columns.image][row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise BadImage("there is no image in this row")
        return decode(data, self.in_chans, reduction)

    def name(self, index: int) -> str:
        block = int(np.searchsorted(self._starts, index, "right")) - 1
        file = self._places[block][0]
        first = self._starts[next(b for b, place in enumerate(self._places) if place[0] == file)]
        return f"row {index - first} of {self.files[file]}"

    def _row(self, index: int) -> tuple[int, Any]:
        """The place of a row in its row group, and the row group."""
        block = int(np.searchsorted(self._starts, index, "right")) - 1
        if self._process != os.getpid():  # a worker must not share its parent's position in a file
            self._forget()
        return index - int(self._starts[block]), _remember(self._read, block, self._table, self.kept())

    def kept(self) -> int:
        """Row groups that this process needs at once: a buffer for each of its lanes."""
        from torch.utils.data import get_worker_info

        info = get_worker_info()
        lanes = -(-LANES // max(1, info.num_workers)) if info else LANES
        return lanes * (-(-self.buffer // max(1, int(self.blocks.mean()))) + 2)

    def _table(self, block: int) -> Any:
        file, group = self._places[block]
        names = [name for name in (self.columns.image, self.columns.label) if name is not None]

        def read() -> Any:
            parquet = _remember(
                self._open, file, lambda n: parquet_file(self.files[n], self.storage), _OPEN_FILES
            )
            return parquet.read_row_group(group, columns=names, use_threads=False)

        return patiently(read, self.files[file])


def _remember(cache: OrderedDict[Hashable, Any], key: T, make: Callable[[T], Any], most: int) -> Any:
    """`make(key)`, or what it gave when it was last asked; the `most` last used are kept."""
    if key not in cache:
        cache[key] = make(key)
        while len(cache) > most:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


def patiently(read: Callable[[], T], file: str, waits: Sequence[float] = _WAITS) -> T:
    """`read()`, asked again where a network may be to blame.

    Raises:
        LostData: it failed each time.
    """
    for wait in (*(waits if "://" in file else ()), None):
        try:
            return read()
        except (OSError, ValueError) as error:  # pyarrow's errors are of both kinds
            if wait is None:
                line = " ".join(str(error).split())[:200]
                raise LostData(
                    f"cannot read {file} ({line}); what was saved is kept: --resume auto"
                ) from error
            time.sleep(wait)
    raise AssertionError


def parquet_file(file: str, storage: dict[str, Any]) -> Any:
    """An open Parquet file."""
    import pyarrow.parquet as pq
    from fsspec.core import url_to_fs

    protocol = file.partition("://")[0] if "://" in file else "file"
    system, path = url_to_fs(file, **storage.get(protocol, {}))
    return pq.ParquetFile(system.open(path, "rb"))


def _column(file: str, storage: dict[str, Any], column: str) -> NDArray[np.int64]:
    """All classes of a file, without its images."""

    def read() -> NDArray[np.int64]:
        values = parquet_file(file, storage).read(columns=[column], use_threads=False)[column]
        return np.array([_class(value) for value in values.to_pylist()], dtype=np.int64)

    return patiently(read, file)


def _class(value: int | None) -> int:
    return -1 if value is None else value


def open_parquet(
    spec: str,
    storage: dict[str, Any],
    in_chans: int,
    max_bad_images: int,
    buffer: int,
    files: Sequence[str],
    columns: Columns,
) -> ParquetSource:
    """The files' footers tell their row groups."""

    def groups(file: str) -> list[tuple[int, int]]:
        def read() -> list[tuple[int, int]]:
            about = parquet_file(file, storage).metadata
            found = (about.row_group(i) for i in range(about.num_row_groups))
            return [(group.num_rows, group.total_byte_size) for group in found]

        return patiently(read, file)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(groups, files))
    rows = [[n for n, _ in each] for each in found]
    if sum(map(sum, rows)) < 2:
        raise UserError(f"--data {spec}: fewer than two rows in {files[0]}")
    source = ParquetSource(files, rows, columns, storage, in_chans, max_bad_images, buffer)
    source.stored_bytes = sum(size for each in found for _, size in each)
    return source
