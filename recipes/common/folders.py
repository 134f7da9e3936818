"""A folder of images -> training and held-out files: a split, class sub-folders, or unlabelled images."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from leaven.recipes.common.decode import SUFFIXES
from leaven.recipes.common.flags import UserError
from leaven.recipes.common.sampler import permutation
from leaven.recipes.common.sources import show_path

VAL_NAMES = ("val", "valid", "validation", "test")
_JUNK = ("__MACOSX",)


@dataclass
class Files:
    """Paths relative to the opened folder; `labels` index `FolderSplit.classes`, None without classes."""

    paths: list[str]
    labels: list[int] | None


@dataclass
class FolderSplit:
    """What a folder holds."""

    train: Files
    val: Files
    classes: tuple[str, ...]
    notes: list[str] = field(default_factory=list)


@dataclass
class _Listing:
    loose: list[str]  # images directly in the folder
    below: dict[str, list[str]]  # sub-folder -> the images anywhere below it; only sub-folders with images
    empty: list[str]  # sub-folders without images
    others: list[str]  # files that are no images


def split_folder(root: str, seed: int = 0, held_out: float = 0.1) -> FolderSplit:
    """Decide what in `root` is for training and what is held out.

    `train/` beside `val/`, `valid/`, `validation/` or `test/` is a split. Otherwise two or more
    sub-folders with images are classes, as in torchvision's ImageFolder (images may lie deeper, loose
    ones are left out), and anything else is unlabelled; a share of these is held out, by class and seed.

    Args:
        root: the folder.
        seed: key of the held-out choice.
        held_out: share of the images to hold out where there is no split.

    Raises:
        UserError: missing, empty or unreadable folder, half a split, or a split whose classes do not agree.
    """
    if not os.path.isdir(root):
        what = "is a file, not a folder" if os.path.exists(root) else "is no such folder"
        raise UserError(
            f"--data {show_path(root)} {what}; give digits, tv:NAME@ROOT, hf:NAME, or a folder of images"
        )
    try:
        listing = _look(root)
    except OSError as error:
        raise UserError(f"--data: cannot read {show_path(error.filename)}: {error.strerror}") from None
    splits = {name.lower(): name for name in listing.below if name.lower() in ("train", *VAL_NAMES)}
    val = next((splits[name] for name in VAL_NAMES if name in splits), None)
    if "train" in splits and val is not None:
        return _given_split(root, listing, splits["train"], val)
    if splits and len(splits) == len(listing.below):
        _refuse_half_split(root, splits)
    return _hold_out(root, listing, seed, held_out)


def _look(folder: str) -> _Listing:
    listing = _Listing([], {}, [], [])
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.name.startswith(".") or entry.name in _JUNK:
            continue
        if entry.is_dir():
            images = [os.path.join(entry.name, path) for path in _images_below(entry.path)]
            if images:
                listing.below[entry.name] = images
            else:
                listing.empty.append(entry.name)
        elif entry.name.lower().endswith(SUFFIXES):
            listing.loose.append(entry.name)
        else:
            listing.others.append(entry.name)
    return listing


def _images_below(folder: str) -> list[str]:
    """All image files below `folder`, relative to it, sorted; links are followed, loops of links are not."""

    def stop(error: OSError) -> None:
        raise error

    found, visited = [], set()
    for at, folders, files in os.walk(folder, followlinks=True, onerror=stop):
        real = os.path.realpath(at)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _JUNK]
        prefix = "" if at == folder else os.path.relpath(at, folder)
        names = (name for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES))
        found += [os.path.join(prefix, name) for name in names]
    return sorted(found)


def _inside(listing: _Listing, name: str) -> _Listing:
    """The listing of a sub-folder, without reading the disk again."""
    inside = _Listing([], {}, [], [])
    for path in listing.below[name]:
        path = path[len(name) + 1 :]
        child, deeper, _ = path.partition(os.sep)
        if deeper:
            inside.below.setdefault(child, []).append(path)
        else:
            inside.loose.append(path)
    return inside


def _given_split(root: str, listing: _Listing, train_name: str, val_name: str) -> FolderSplit:
    train, val = _inside(listing, train_name), _inside(listing, val_name)
    notes = []
    unused = [f"{name}/" for name in listing.below if name not in (train_name, val_name)]
    if unused or listing.loose:
        loose = [f"{len(listing.loose)} loose images"] if listing.loose else []
        notes.append(f"not used, beside {train_name}/ and {val_name}/: {', '.join(unused + loose)}")
    classes: tuple[str, ...] = ()
    if len(train.below) > 1 and val.below:
        extra = sorted(set(val.below) - set(train.below))
        if extra:
            raise UserError(
                f"--data {show_path(root)}: {val_name}/ has classes that {train_name}/ lacks: "
                + ", ".join(map(show_path, extra[:5]))
            )
        classes = tuple(train.below)
        notes += _left_out(train_name, train) + _left_out(val_name, val)
    elif train.below or val.below:
        notes.append(f"{train_name}/ and {val_name}/ do not both hold class folders: taken as unlabelled")
    files = [_files(part, classes, prefix=name) for part, name in ((train, train_name), (val, val_name))]
    counts = f"{train_name}/ {len(files[0].paths)} images, {val_name}/ {len(files[1].paths)}"
    notes.insert(0, f"{show_path(root)}: {counts}, {_how_labelled(classes)}")
    return FolderSplit(files[0], files[1], classes, notes)


def _hold_out(root: str, listing: _Listing, seed: int, share: float) -> FolderSplit:
    classes = tuple(listing.below) if len(listing.below) > 1 else ()
    files = _files(listing, classes)
    n = len(files.paths)
    if n == 0:
        others = (
            f"only {len(listing.others)} other files, such as {show_path(listing.others[0])}"
            if listing.others
            else "nothing"
        )
        parquet = any(name.endswith(".parquet") for name in listing.others) or any(
            Path(root).glob("*/*.parquet")
        )
        hint = f"; for its Parquet files give --data hf:{show_path(root)}" if parquet else ""
        raise UserError(f"--data {show_path(root)} holds no images ({', '.join(SUFFIXES)}), {others}{hint}")
    if n == 1:
        raise UserError(
            f"--data {show_path(root)} holds one image; two are needed, one to train on and one held out"
        )
    labels = np.zeros(n, dtype=np.int64) if files.labels is None else np.array(files.labels)
    chosen = []
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        chosen += members[
            permutation(seed, label, len(members), "held out")[: round(share * len(members))]
        ].tolist()
    if not chosen:
        chosen = [int(permutation(seed, 0, n, "held out")[0])]
    held = set(chosen)
    train, val = (
        Files([files.paths[i] for i in rows], files.labels and [files.labels[i] for i in rows])
        for rows in ([i for i in range(n) if i not in held], sorted(held))
    )
    notes = [
        f"{show_path(root)}: {n} images, {_how_labelled(classes)}; {len(held)} of them held out (seed {seed})"
    ]
    if len(listing.below) == 1:
        notes.append(f"its one sub-folder, {show_path(next(iter(listing.below)))}/, is not taken for a class")
    return FolderSplit(train, val, classes, notes + (_left_out("", listing) if classes else []))


def _files(listing: _Listing, classes: tuple[str, ...], prefix: str = "") -> Files:
    if not classes:
        paths = sorted(listing.loose + [path for paths in listing.below.values() for path in paths])
        return Files([os.path.join(prefix, path) for path in paths], None)
    index = {name: i for i, name in enumerate(classes)}
    pairs = [
        (os.path.join(prefix, path), index[name]) for name, paths in listing.below.items() for path in paths
    ]
    return Files([path for path, _ in pairs], [label for _, label in pairs])


def _left_out(name: str, listing: _Listing) -> list[str]:
    where = f"{name}/: " if name else ""
    notes = []
    if listing.loose:
        notes.append(f"{where}{len(listing.loose)} loose images beside the class folders are not used")
    if listing.empty:
        empty = ", ".join(show_path(n) for n in listing.empty[:5])
        notes.append(f"{where}folders without images are no classes: {empty}")
    return notes


def _how_labelled(classes: tuple[str, ...]) -> str:
    return f"{len(classes)} classes" if classes else "unlabelled"


def _refuse_half_split(root: str, splits: dict[str, str]) -> None:
    names = " and ".join(f"{name}/" for name in splits.values())
    missing = "train/" if "train" not in splits else "val/, valid/ or test/"
    one = os.path.join(root, next(iter(splits.values())))
    raise UserError(
        f"--data {show_path(root)} holds {names} but no {missing} with images; "
        f"add it, or give --data {show_path(one)}"
    )
