"""`hf:NAME[:SPLIT]`: image sets of the Hugging Face hub, or local Parquet files.

Hugging Face datasets finds the files, their splits and the types of their columns; `ParquetSource` reads them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leaven.recipes.common.flags import SHUFFLE_BUFFER, UserError
from leaven.recipes.common.parquet import Columns, ParquetSource, open_parquet, parquet_file, patiently
from leaven.recipes.common.sampler import permutation
from leaven.recipes.common.sources import Source, Subset

VAL_NAMES = ("validation", "val", "valid", "dev", "test")
HELD_OUT = 0.1


@dataclass(frozen=True)
class Opened:
    """What `open_hf` found.

    Attributes:
        train, val: the two parts.
        classes: names; empty without labels.
        notes: lines to print.
        unlabelled: why there are no classes although there is a column for them; empty otherwise.
    """

    train: Source
    val: Source
    classes: tuple[str, ...]
    notes: list[str]
    unlabelled: str = ""


def open_hf(
    spec: str,
    in_chans: int = 3,
    max_bad_images: int = 10,
    seed: int = 0,
    image: str | None = None,
    label: str | None = None,
    buffer: int = SHUFFLE_BUFFER,
) -> Opened:
    """Open ``hf:NAME[:SPLIT][?config=CONFIG]``; NAME is of the hub, a folder, or a pattern of Parquet files.

    SPLIT is trained on, `train` if it is not named. The held-out part is the first other split of `VAL_NAMES` whose
    rows have classes, or a tenth of the training part.

    Args:
        spec: as above.
        in_chans: 1 for grey, 3 for RGB.
        max_bad_images: unreadable images to bear in each of the two parts.
        seed: of the held-out choice where there is one split.
        image, label: names of columns, None to find them by type.
        buffer: rows that are shuffled together.

    Raises:
        UserError: a missing extra, no such data, no Parquet, or columns that cannot be told.
    """
    name, split, config = parse(spec)
    builder, files = _find(spec, name, split, config)
    features = _features(builder, files[split][0])
    columns = choose_columns(spec, features, image, label)
    make = partial(open_parquet, spec, builder.storage_options, in_chans, max_bad_images, buffer)
    train: ParquetSource = make(files[split], columns)
    why = _label(spec, train)
    notes = [f"{why}: taken as unlabelled"] if why else []
    val = _judged(spec, split, files, partial(make, columns=train.columns), notes)
    stored = f"{len(train)} images in {len(train.blocks)} row groups of {len(train.files)} Parquet files"
    if val is None:
        rest, held = held_out(train, seed)
        parts: tuple[Source, Source] = Subset(train, rest), Subset(train, held)
        how = f"{len(held)} of them held out (seed {seed}), as no other split is there to judge on"
    else:
        parts = train, val[1]
        how = f"{len(val[1])} held out ({val[0]})"
    kept = min(1.0, train.kept() / len(train.blocks)) * train.stored_bytes / 2**20
    columns = train.columns
    classes = f"{len(columns.classes)} classes in {columns.label}" if columns.classes else "no labels"
    if columns.label is None and not why and (others := [each for each in features if each != columns.image]):
        notes.append(f"no column is of classes: name one of {', '.join(others)} with --label-column if it is")
    splits = sorted({s for s in VAL_NAMES for file in files[split] if os.path.basename(file).startswith(s)})
    if splits and split == "train" and any(character in name for character in "*?["):
        folder = os.path.dirname(name)
        notes.append(
            f"files named {', '.join(splits)} are trained on too: give the folder, hf:{folder}, for splits"
        )
    found = f"{name}, {split}: {stored}, {how}; images in {columns.image}, {classes}"
    order = (
        f"read row group by row group, these in random order, rows within about {buffer} (--shuffle-buffer), "
        f"of which the workers of a process keep up to {kept:,.0f} MiB in memory"
    )
    return Opened(*parts, columns.classes, [found, order, *notes], why)


def _find(spec: str, name: str, split: str, config: str | None) -> tuple[Any, dict[str, list[str]]]:
    """Hugging Face's builder of a data set, and its Parquet files by split.

    Raises:
        UserError: a missing extra, no such data or split, other files than Parquet.
    """
    try:
        import datasets
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError(f'--data {spec} needs Hugging Face datasets: pip install "leaven[hf]"') from error
    pattern = any(character in name for character in "*?[") or name.endswith(".parquet")
    where: dict[str, Any] = (
        {"path": "parquet", "data_files": name} if pattern else {"path": name, "name": config}
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
    files = {str(key): list(of) for key, of in (builder.config.data_files or {}).items()}
    other = next((f for of in files.values() for f in of if not f.endswith(".parquet")), None)
    if not any(files.values()):
        raise UserError(f"--data {spec}: there are no files")
    if other is not None:
        raise UserError(
            f"--data {spec} is stored as {other}, and only Parquet can be read from any row; "
            "load it with datasets, write it with to_parquet, and give the folder"
        )
    if split not in files:
        raise UserError(f"--data {spec}: there is no split {split}; there are {', '.join(files)}")
    return builder, files


def _features(builder: Any, first: str) -> Any:
    """The columns and their types, as Hugging Face has them."""
    import datasets

    schema = patiently(lambda: parquet_file(first, builder.storage_options).schema_arrow, first)
    return builder.info.features or datasets.Features.from_arrow_schema(schema)


def _label(spec: str, train: ParquetSource) -> str:
    """Find the classes where their column does not name them; why there are none, although there is a column.

    Without them the column is forgotten: partly labelled images are good enough for training without labels.
    """
    columns = train.columns
    if columns.label is None:
        return ""
    if columns.text:
        names = {value for values in train.stored_labels() for value in values if value is not None}
        train.columns = columns = replace(columns, classes=tuple(sorted(names)))
    if why := lacking(spec, train):
        train.columns, train.labels = Columns(columns.image, None, ()), None
    elif not columns.classes:
        assert train.labels is not None
        names_of_numbers = tuple(map(str, range(int(train.labels.max()) + 1)))
        train.columns = replace(columns, classes=names_of_numbers)
    return why


def _judged(
    spec: str,
    split: str,
    files: dict[str, list[str]],
    make: Callable[[list[str]], ParquetSource],
    notes: list[str],
) -> tuple[str, ParquetSource] | None:
    """The first other split whose rows have classes, if it needs them; those passed over are added to the notes."""
    for name in (each for each in VAL_NAMES if each in files and each != split):
        source = make(files[name])
        why = lacking(spec, source)
        if not why:
            return name, source
        notes.append(f"{name} is not used: {why}")
    return None


def lacking(spec: str, source: ParquetSource) -> str:
    """What is missing in the column of the classes, in words; empty if every row has one.

    Hidden classes are often stored as -1.

    Raises:
        UserError: a class that is none of the known ones.
    """
    columns = source.columns
    if columns.label is None or source.labels_known_good:
        return ""
    labels = source.labels
    assert labels is not None
    strange = np.flatnonzero(labels >= (len(columns.classes) or math.inf))
    if len(strange):
        kind = "text that is no class of the training part" if columns.text else f"class {labels[strange[0]]}"
        raise UserError(
            f"--data {spec}: {columns.label} has {kind} in {source.name(int(strange[0]))}, and there are "
            f"{len(columns.classes)} classes"
        )
    missing = np.flatnonzero(labels < 0)
    if len(missing) == len(labels):
        return f"its {columns.label} is empty"
    if not len(missing):
        return ""
    return (
        f"{columns.label} is null or negative in {len(missing)} of {len(labels)} rows, first in "
        f"{source.name(int(missing[0]))}"
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
    images = images or [k for k, v in features.items() if isinstance(v, dict) and _holds_bytes(v)]
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
    dtype = str(getattr(kind, "dtype", ""))
    if isinstance(kind, datasets.ClassLabel) or dtype.startswith(("int", "uint")):
        return Columns(images[0], labels[0], tuple(getattr(kind, "names", None) or ()))
    if dtype in ("string", "large_string"):
        return Columns(images[0], labels[0], (), text=True)
    raise UserError(
        f"--label-column {labels[0]} holds {kind}, and no classes: cast it to datasets.ClassLabel, to integers or to "
        "text"
    )


def _holds_bytes(feature: Any) -> bool:
    inner = feature["bytes"] if isinstance(feature, dict) and "bytes" in feature else feature
    return str(getattr(inner, "dtype", "")).endswith("binary")


def held_out(source: ParquetSource, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to train on and a tenth to hold out: whole row groups where there are enough of them, else single rows."""
    n, blocks = len(source), len(source.blocks)
    if blocks >= 20:
        chosen = permutation(seed, 0, blocks, "held out")[: round(HELD_OUT * blocks)]
        held = np.flatnonzero(np.isin(np.repeat(np.arange(blocks), source.blocks), chosen))
    else:
        held = np.sort(permutation(seed, 0, n, "held out")[: max(1, round(HELD_OUT * n))])
    return np.setdiff1d(np.arange(n), held), held
