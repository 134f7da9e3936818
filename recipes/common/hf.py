"""`hf:NAME[:SPLIT]`: image sets of the Hugging Face hub, or local Parquet files, read row group by row group.

Hugging Face datasets finds the files, their splits and the types of their columns. The rows are then read here: from
Parquet a row group can be had by itself, wherever the file lies, so that nothing is copied to the disk, and nothing in
front of a position has to be read again to come back to it. An image is known by its row, counted through all files in
order; that keys its augmentation, whoever reads it.
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
from leaven.recipes.common.sampler import LANES, permutation
from leaven.recipes.common.sources import LostData, Source, Subset, TolerantSource

T = TypeVar("T")

VAL_NAMES = ("validation", "val", "valid", "dev", "test")
HELD_OUT = 0.1
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
        return index - int(self._starts[block]), _remember(self._read, block, self._table, self._kept())

    def _kept(self) -> int:
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
                self._open, file, lambda n: _parquet(self.files[n], self.storage), _OPEN_FILES
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


def _parquet(file: str, storage: dict[str, Any]) -> Any:
    """An open Parquet file."""
    import pyarrow.parquet as pq
    from fsspec.core import url_to_fs

    protocol = file.partition("://")[0] if "://" in file else "file"
    system, path = url_to_fs(file, **storage.get(protocol, {}))
    return pq.ParquetFile(system.open(path, "rb"))


def _column(file: str, storage: dict[str, Any], column: str) -> NDArray[np.int64]:
    """All classes of a file, without its images."""

    def read() -> NDArray[np.int64]:
        values = _parquet(file, storage).read(columns=[column], use_threads=False)[column]
        return np.array([_class(value) for value in values.to_pylist()], dtype=np.int64)

    return patiently(read, file)


def _class(value: int | None) -> int:
    return -1 if value is None else value


def open_hf(
    spec: str,
    in_chans: int = 3,
    max_bad_images: int = 10,
    seed: int = 0,
    image: str | None = None,
    label: str | None = None,
    buffer: int = 1000,
) -> tuple[Source, Source, tuple[str, ...], list[str]]:
    """Open ``hf:NAME[:SPLIT][?config=CONFIG]``; NAME is of the hub, a folder, or a pattern of Parquet files.

    SPLIT is trained on, `train` if it is not named. The held-out part is the first other split of `VAL_NAMES`, or a
    tenth of the training part.

    Args:
        spec: as above.
        in_chans: 1 for grey, 3 for RGB.
        max_bad_images: unreadable images to bear in each of the two parts.
        seed: of the held-out choice where there is one split.
        image, label: names of columns, None to find them by type.
        buffer: rows that are shuffled together.

    Returns:
        Training and held-out source, class names, and lines to print.

    Raises:
        UserError: a missing extra, no such data, no Parquet, or columns that cannot be told.
    """
    try:
        import datasets
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError(f'--data {spec} needs Hugging Face datasets: pip install "leaven[hf]"') from error
    name, split, config = parse(spec)
    files = any(character in name for character in "*?[") or name.endswith(".parquet")
    where: dict[str, Any] = (
        {"path": "parquet", "data_files": name} if files else {"path": name, "name": config}
    )
    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(**where)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(
            f"--data {spec}: {line}; NAME is of the Hugging Face hub, a folder, or a pattern of Parquet files, "
            "CONFIG goes behind it as ?config=CONFIG"
        ) from None
    found = {str(key): list(of) for key, of in (builder.config.data_files or {}).items()}
    other = next((f for of in found.values() for f in of if not f.endswith(".parquet")), None)
    if not any(found.values()):
        raise UserError(f"--data {spec}: there are no files")
    if other is not None:
        raise UserError(
            f"--data {spec} is stored as {other}, and only Parquet can be read from any row; "
            "load it with datasets, write it with to_parquet, and give the folder"
        )
    if split not in found:
        raise UserError(f"--data {spec}: there is no split {split}; there are {', '.join(found)}")
    first = found[split][0]
    schema = patiently(lambda: _parquet(first, builder.storage_options).schema_arrow, first)
    features = builder.info.features or datasets.Features.from_arrow_schema(schema)
    columns = choose_columns(spec, features, image, label)
    make = partial(_source, spec, builder.storage_options, in_chans, max_bad_images, buffer)
    train: ParquetSource = make(found[split], columns)
    notes = []
    if not train.labelled():
        notes.append(f"{columns.label} is empty in {split}: taken as unlabelled")
        train.columns = columns = Columns(columns.image, None, ())
    if columns.label is not None and not columns.classes:
        assert train.labels is not None
        names = tuple(map(str, range(int(train.labels.max()) + 1)))
        train.columns = columns = Columns(columns.image, columns.label, names)
    stored = f"{len(train)} images in {len(train.blocks)} row groups of {len(train.files)} Parquet files"
    val, judged = None, None
    for val in (each for each in VAL_NAMES if each in found and each != split):
        judged = make(found[val], columns)
        if judged.labelled():
            break
        notes.append(f"{val} is not used: its {columns.label} is empty")
        judged = None
    if judged is None:
        kept, held = held_out(train, seed)
        parts: tuple[Source, Source] = Subset(train, kept), Subset(train, held)
        how = f"{len(held)} of them held out (seed {seed}), as there is one split"
    else:
        parts = train, judged
        how = f"{len(judged)} held out ({val})"
    classes = f"{len(columns.classes)} classes in {columns.label}" if columns.classes else "no labels"
    return (
        *parts,
        columns.classes,
        [
            f"{name}, {split}: {stored}, {how}; images in {columns.image}, {classes}",
            f"read row group by row group, these in random order, rows within about {buffer} (--shuffle-buffer)",
            *notes,
        ],
    )


def parse(spec: str) -> tuple[str, str, str | None]:
    """``hf:NAME[:SPLIT][?config=CONFIG]`` -> NAME, SPLIT, CONFIG."""
    text, _, config = spec.removeprefix("hf:").partition("?config=")
    name, colon, split = text.rpartition(":")
    if not colon or not split.replace("_", "").replace("-", "").isalnum():
        name, split = text, "train"
    if not name:
        raise UserError(f"--data {spec}: expected hf:NAME or hf:NAME:SPLIT")
    return os.path.expanduser(name), split, config or None


def choose_columns(spec: str, features: Any, image: str | None, label: str | None) -> Columns:
    """The columns that were named, or the only ones of their type.

    Raises:
        UserError: none or several, or one of another type.
    """
    import datasets

    for flag, name in (("--image-column", image), ("--label-column", label)):
        if name is not None and name not in features:
            raise UserError(f"{flag} {name}: {spec} has {', '.join(features)}")
    images = [image] if image else [k for k, v in features.items() if isinstance(v, datasets.Image)]
    labels = [label] if label else [k for k, v in features.items() if isinstance(v, datasets.ClassLabel)]
    if len(images) != 1:
        what = (
            f"has the images {', '.join(images)}" if images else f"has no images, but {', '.join(features)}"
        )
        raise UserError(f"--data {spec} {what}: name one with --image-column")
    if len(labels) > 1:
        raise UserError(f"--data {spec} has the labels {', '.join(labels)}: name one with --label-column")
    if image and not (isinstance(features[image], datasets.Image) or _holds_bytes(features[image])):
        raise UserError(f"--image-column {image} holds {features[image]}, and no images")
    if not labels:
        return Columns(images[0], None, ())
    kind = features[labels[0]]
    if not isinstance(kind, datasets.ClassLabel) and not str(getattr(kind, "dtype", "")).startswith(
        ("int", "uint")
    ):
        raise UserError(f"--label-column {labels[0]} holds {kind}, and no numbers of classes")
    return Columns(images[0], labels[0], tuple(getattr(kind, "names", None) or ()))


def _holds_bytes(feature: Any) -> bool:
    inner = feature["bytes"] if isinstance(feature, dict) and "bytes" in feature else feature
    return str(getattr(inner, "dtype", "")).endswith("binary")


def _source(
    spec: str,
    storage: dict[str, Any],
    in_chans: int,
    max_bad_images: int,
    buffer: int,
    files: Sequence[str],
    columns: Columns,
) -> ParquetSource:
    """The files' footers tell their row groups."""

    def groups(file: str) -> list[int]:
        def read() -> list[int]:
            about = _parquet(file, storage).metadata
            return [about.row_group(i).num_rows for i in range(about.num_row_groups)]

        return patiently(read, file)

    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(groups, files))
    if sum(map(sum, rows)) < 2:
        raise UserError(f"--data {spec}: fewer than two rows in {files[0]}")
    return ParquetSource(files, rows, columns, storage, in_chans, max_bad_images, buffer)


def held_out(source: ParquetSource, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to train on and a tenth to hold out: whole row groups where there are enough of them, else single rows."""
    n, blocks = len(source), len(source.blocks)
    if blocks >= 20:
        chosen = permutation(seed, 0, blocks, "held out")[: round(HELD_OUT * blocks)]
        held = np.flatnonzero(np.isin(np.repeat(np.arange(blocks), source.blocks), chosen))
    else:
        held = np.sort(permutation(seed, 0, n, "held out")[: max(1, round(HELD_OUT * n))])
    return np.setdiff1d(np.arange(n), held), held
