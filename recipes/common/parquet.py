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
from functools import cached_property, partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from leaven.recipes.common.decode import BadImage, Reduction, decode
from leaven.recipes.common.flags import UserError
from leaven.recipes.common.sampler import LANES
from leaven.recipes.common.sources import LostData, TolerantSource, first_readable

T = TypeVar("T")

_OPEN_FILES = 32
_WAITS = (1, 5, 25)  # seconds before a file that does not answer is asked again


@dataclass(frozen=True)
class Columns:
    """Which columns to read: the images, and the classes if there are any.

    Attributes:
        image, label: their names.
        classes: names of the classes, in order.
        text: the label column holds these names, and no numbers.
    """

    image: str
    label: str | None
    classes: tuple[str, ...]
    text: bool = False

    def number(self, value: int | str | None) -> int:
        """The class of a stored value: -1 where there is none, beyond all others for an unknown name."""
        if value is None:
            return -1
        return self._numbers.get(str(value), len(self.classes)) if self.text else int(value)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}


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
    labels_known_good = False  # by the files' footers: no row lacks its class
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
            number = self.columns.number
            numbers = ([number(value) for value in values] for values in self.stored_labels())
            self._labels = np.fromiter(chain.from_iterable(numbers), dtype=np.int64)
        return self._labels

    @labels.setter
    def labels(self, labels: NDArray[np.int64] | None) -> None:
        self._labels = labels

    def stored_labels(self) -> list[list[Any]]:
        """The label column of each file, as it is stored."""
        assert self.columns.label is not None
        read = partial(_column, storage=self.storage, column=self.columns.label)
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(read, self.files))

    def label(self, index: int) -> int | None:
        """The class of `image(index)`, None where there is none."""
        if self.columns.label is None:
            return None
        if not self.known_good(index):
            index = first_readable(self, index)[0]
        row, table = self._row(index)
        return self.columns.number(table[self.columns.label][row].as_py())

    def read(self, index: int, reduction: Reduction | None = None) -> Tensor:
        row, table = self._row(index)
        value = table[self.columns.image][row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            path = value.get("path") if isinstance(value, dict) else None
            raise BadImage(
                f"the file holds no image here but the path {path}"
                if path
                else "there is no image in this row"
            )
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
                raise LostData(f"cannot read {file} ({line})") from error
            time.sleep(wait)
    raise AssertionError


def parquet_file(file: str, storage: dict[str, Any]) -> Any:
    """An open Parquet file."""
    import pyarrow.parquet as pq
    from fsspec.core import url_to_fs

    protocol = file.partition("://")[0] if "://" in file else "file"
    system, path = url_to_fs(file, **storage.get(protocol, {}))
    return pq.ParquetFile(system.open(path, "rb"))


def _column(file: str, storage: dict[str, Any], column: str) -> list[Any]:
    """A column of a file, without its images."""

    def read() -> list[Any]:
        values = parquet_file(file, storage).read(columns=[column], use_threads=False)[column]
        found: list[Any] = values.to_pylist()
        return found

    return patiently(read, file)


def open_parquet(
    spec: str,
    storage: dict[str, Any],
    in_chans: int,
    max_bad_images: int,
    buffer: int,
    files: Sequence[str],
    columns: Columns,
) -> ParquetSource:
    """The files' footers tell their row groups.

    Raises:
        UserError: columns that are not in all files, or not of one kind; fewer than two rows.
    """

    def groups(file: str) -> list[tuple[int, int, bool]]:
        def read() -> list[tuple[int, int, bool]]:
            parquet = parquet_file(file, storage)
            if wrong := _clash(columns, parquet.schema_arrow):
                raise UserError(f"--data {spec}: {file} {wrong}; all files of a set need the same columns")
            found = (parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups))
            return [(group.num_rows, group.total_byte_size, _all_labelled(columns, group)) for group in found]

        return patiently(read, file)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(groups, files))
    rows = [[n for n, _, _ in each] for each in found]
    if sum(map(sum, rows)) < 2:
        raise UserError(f"--data {spec}: fewer than two rows in {files[0]}")
    source = ParquetSource(files, rows, columns, storage, in_chans, max_bad_images, buffer)
    source.stored_bytes = sum(size for each in found for _, size, _ in each)
    source.labels_known_good = all(good for each in found for _, _, good in each)
    return source


def _clash(columns: Columns, schema: Any) -> str:
    """What is wrong with the columns of a file; empty if nothing is."""
    from pyarrow import types

    for name in (columns.image, columns.label):
        if name is not None and name not in schema.names:
            return f"has no column {name}, but {', '.join(schema.names)}"
    image = schema.field(columns.image).type
    if not (types.is_struct(image) or types.is_binary(image) or types.is_large_binary(image)):
        return f"has {image} in {columns.image}, and no images"
    if columns.label is None or types.is_null(label := schema.field(columns.label).type):
        return ""
    text = types.is_string(label) or types.is_large_string(label)
    fits = text if columns.text else types.is_integer(label)
    return (
        ""
        if fits
        else f"has {label} in {columns.label}, and other files {'text' if columns.text else 'numbers'}"
    )


def _all_labelled(columns: Columns, group: Any) -> bool:
    """Whether the statistics of a row group tell that each row has a class; if not, the column has to be read."""
    names = [group.column(i).path_in_schema for i in range(group.num_columns)]
    about = group.column(names.index(columns.label)).statistics if columns.label in names else None
    if columns.text or about is None or not about.has_min_max or not about.has_null_count or about.null_count:
        return False
    return bool(about.min >= 0 and (not columns.classes or about.max < len(columns.classes)))
