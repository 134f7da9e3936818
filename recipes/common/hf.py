"""`hf:NAME[:SPLIT]`: image sets of the Hugging Face hub, or local Parquet files.

Hugging Face datasets finds the files, their splits and the types of their columns; `ParquetSource` reads them.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leaven.recipes.common.flags import UserError
from leaven.recipes.common.parquet import Columns, ParquetSource, open_parquet, parquet_file, patiently
from leaven.recipes.common.sampler import permutation
from leaven.recipes.common.sources import Source, Subset

VAL_NAMES = ("validation", "val", "valid", "dev", "test")
HELD_OUT = 0.1


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
    schema = patiently(lambda: parquet_file(first, builder.storage_options).schema_arrow, first)
    features = builder.info.features or datasets.Features.from_arrow_schema(schema)
    columns = choose_columns(spec, features, image, label)
    make = partial(open_parquet, spec, builder.storage_options, in_chans, max_bad_images, buffer)
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
        rest, held = held_out(train, seed)
        parts: tuple[Source, Source] = Subset(train, rest), Subset(train, held)
        how = f"{len(held)} of them held out (seed {seed}), as no other split is there to judge on"
    else:
        parts = train, judged
        how = f"{len(judged)} held out ({val})"
    kept = min(1.0, train.kept() / len(train.blocks)) * train.stored_bytes / 2**20
    classes = f"{len(columns.classes)} classes in {columns.label}" if columns.classes else "no labels"
    return (
        *parts,
        columns.classes,
        [
            f"{name}, {split}: {stored}, {how}; images in {columns.image}, {classes}",
            f"read row group by row group, these in random order, rows within about {buffer} (--shuffle-buffer), "
            f"of which the workers of a process keep up to {kept:,.0f} MiB in memory",
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


def held_out(source: ParquetSource, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to train on and a tenth to hold out: whole row groups where there are enough of them, else single rows."""
    n, blocks = len(source), len(source.blocks)
    if blocks >= 20:
        chosen = permutation(seed, 0, blocks, "held out")[: round(HELD_OUT * blocks)]
        held = np.flatnonzero(np.isin(np.repeat(np.arange(blocks), source.blocks), chosen))
    else:
        held = np.sort(permutation(seed, 0, n, "held out")[: max(1, round(HELD_OUT * n))])
    return np.setdiff1d(np.arange(n), held), held
