"""Tables for regression: CSV and Parquet files, and folders laid out like the UCI splits of the Bayesian literature."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leaven.recipes.common.convert import did_you_mean
from leaven.recipes.common.flags import UserError

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Table:
    """Numbers to learn from.

    Attributes:
        name: for the log.
        x: inputs (N, D), as they are in the file.
        y: targets (N, C).
        columns: names of the inputs.
        targets: names of the targets.
        split: (training rows, test rows) of split k.
        splits: how many are given; 0: as many as one likes are drawn.
    """

    name: str
    x: Numbers
    y: Numbers
    columns: tuple[str, ...]
    targets: tuple[str, ...]
    split: Callable[[int], tuple[Indices, Indices]]
    splits: int = 0

    @property
    def digest(self) -> str:
        """Of all numbers, by which a table is known again."""
        return blake2b(self.x.tobytes() + self.y.tobytes(), digest_size=8).hexdigest()

    def __str__(self) -> str:
        inputs = f"{len(self.x)} rows, {self.x.shape[1]} inputs, target {', '.join(self.targets)}"
        how = f"{self.splits} splits of the folder" if self.splits else "splits drawn, a tenth held out"
        return f"{self.name}: {inputs}, {how}"


def open_table(data: str, target: str | None, seed: int = 0) -> Table:
    """The table of ``--data``: "diabetes" (scikit-learn's, 442 patients), a .csv or .parquet file, or a folder.

    A folder has data.txt, index_features.txt, index_target.txt and index_train_K.txt, index_test_K.txt for each split,
    as in the experiments of Hernandez-Lobato & Adams (2015) and Gal & Ghahramani (2016).

    Args:
        data: what to read.
        target: the column to learn, or several, separated by commas; of files alone.
        seed: of splits that are drawn.

    Raises:
        UserError: it cannot be read, has text or gaps in it, or no such column.
    """
    path = Path(data)
    if target is not None and (data == "diabetes" or path.is_dir()):
        raise UserError(
            f"--target is of .csv and .parquet files: {data} says itself what is learnt, leave it out"
        )
    if data == "diabetes":
        from sklearn.datasets import load_diabetes

        bunch = load_diabetes()
        x, y, columns = bunch.data, bunch.target[:, None], tuple(bunch.feature_names)
        return Table(data, x, y, columns, ("progression",), _drawn(len(x), seed))
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise UserError(
            f"--data {data}: no such table; give diabetes, a .csv or .parquet file, or a folder of UCI splits"
        )
    reader = {".csv": _csv, ".parquet": _parquet}.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"--data {data}: a table is a .csv or .parquet file")
    names, values = reader(path)
    if target is None:
        raise UserError(f"--data {data}: add --target COLUMN; there are: {', '.join(names)}")
    wanted = [target] if target in names else [name.strip() for name in target.split(",")]
    for name in wanted:
        if name not in names:
            raise UserError(f"--target {name}: no such column in {data}{did_you_mean(name, names)}")
    inputs = [name for name in names if name not in wanted]
    if not inputs:
        raise UserError(f"--target {target}: nothing is left in {data} to learn it from")
    x, y = (np.stack([_numbers(name, values[name], data) for name in names], 1) for names in (inputs, wanted))
    if len(x) < 20:
        raise UserError(f"--data {data}: {len(x)} rows are too few to hold some out; 20 are the least")
    return Table(path.name, x, y, tuple(inputs), tuple(wanted), _drawn(len(x), seed))


def _drawn(n: int, seed: int) -> Callable[[int], tuple[Indices, Indices]]:
    def split(k: int) -> tuple[Indices, Indices]:
        order = np.random.default_rng([seed, k]).permutation(n)
        held_out = max(1, n // 10)
        return np.sort(order[held_out:]), np.sort(order[:held_out])

    return split


def _folder(path: Path) -> Table:
    def rows(name: str) -> Indices:
        return np.atleast_1d(_text(path / name)).astype(np.int64)

    if not (path / "data.txt").is_file():
        raise UserError(f"--data {path}: no data.txt in it, as folders of UCI splits have")
    values = np.atleast_2d(_text(path / "data.txt"))
    features, targets = rows("index_features.txt"), rows("index_target.txt")
    for name, which in (("index_features.txt", features), ("index_target.txt", targets)):
        if len(which) == 0 or which.min() < 0 or which.max() >= values.shape[1]:
            raise UserError(
                f"--data {path}: {name} must name columns from 0 to {values.shape[1] - 1} of data.txt"
            )
    if not np.isfinite(values).all():
        row = int((~np.isfinite(values)).any(1).argmax())
        raise UserError(f"--data {path}: row {row + 1} of data.txt has what is no number in it: fill gaps")
    splits = len(list(path.glob("index_train_*.txt")))
    if not splits:
        raise UserError(f"--data {path}: no index_train_0.txt in it, as folders of UCI splits have")
    names = tuple(f"column {i}" for i in range(values.shape[1]))

    def split(k: int) -> tuple[Indices, Indices]:
        return rows(f"index_train_{k}.txt"), rows(f"index_test_{k}.txt")

    inputs, outputs = (tuple(names[i] for i in which) for which in (features, targets))
    return Table(path.resolve().name, values[:, features], values[:, targets], inputs, outputs, split, splits)


def _text(path: Path) -> Numbers:
    try:
        return np.loadtxt(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())[:120]}") from error


def _csv(path: Path) -> tuple[list[str], dict[str, list[object]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    rows = [row for _, row in lines]
    if len(rows) < 2:
        raise UserError(f"--data {path}: a line with the columns' names and lines of numbers are needed")
    columns = [name.strip() for name in rows[0]]
    if len(columns) == 1 and ";" in columns[0]:
        raise UserError(f"--data {path}: its columns are separated by semicolons: save it with commas")
    if _is_data(columns):
        raise UserError(
            f"--data {path}: its first line is numbers ({', '.join(columns[:4])}, ...): write a line with the columns' "
            "names above it"
        )
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise UserError(f"--data {path}: column {twice[0]!r} is there twice")
    for number, row in lines[1:]:
        if len(row) != len(columns):
            raise UserError(f"--data {path}: line {number} has {len(row)} values for {len(columns)} columns")
    return columns, {name: [row[i] for row in rows[1:]] for i, name in enumerate(columns)}


def _is_data(columns: list[str]) -> bool:
    """Whether a first line is one of numbers, and no names; columns that are merely counted are names."""
    try:
        values = [float(name) for name in columns]
    except ValueError:
        return False
    return values not in ([*range(len(values))], [*range(1, len(values) + 1)])


def _parquet(path: Path) -> tuple[list[str], dict[str, list[object]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError('Parquet files need pyarrow: pip install "leaven[parquet]"') from error
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())[:120]}") from error
    return list(table.column_names), {name: table[name].to_pylist() for name in table.column_names}


def _numbers(name: str, values: list[object], data: str) -> Numbers:
    """A column as numbers; what is none is named, and its row."""
    found = np.empty(len(values))
    for row, value in enumerate(values):
        try:
            found[row] = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            found[row] = np.nan
        if (
            isinstance(value, str) and "_" in value
        ):  # Python's own way to write numbers, and nobody's in a table
            found[row] = np.nan
        if not np.isfinite(found[row]):
            raise UserError(
                f"--data {data}: column {name!r} has {value!r} in row {row + 1}, which is no number: fill gaps, "
                "write classes as numbers, or leave the column out"
            )
    return found


class Scale:
    """Columns to mean 0 and standard deviation 1, by those of some rows; a constant column stays at 0."""

    def __init__(self, rows: Numbers) -> None:
        values = torch.as_tensor(rows, dtype=torch.float64)
        self.mean, std = values.mean(0), values.std(0, correction=0)
        if not torch.isfinite(std).all():
            raise ValueError("a column's numbers are too large to be standardised: give it another unit")
        # Of equal numbers the deviation may come out as a rounding error, and not as 0.
        self.std = torch.where(values.amin(0) < values.amax(0), std, 1.0)

    def __call__(self, rows: Numbers) -> Tensor:
        return ((torch.as_tensor(rows, dtype=torch.float64) - self.mean) / self.std).float()
