"""Class by class, a few of the labelled images."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from leaven.recipes.common.data import Data
from leaven.recipes.common.flags import UserError
from leaven.recipes.common.sampler import permutation
from leaven.recipes.common.sources import Subset, labels_of


def few_labels(
    labels: NDArray[np.int64], amount: str, seed: int, names: Sequence[str], flag: str = "--labels"
) -> NDArray[np.int64]:
    """Indices of a random subset, in order: so many images of each class, or the same share of each.

    Subsets of one seed are nested: what is among few is among more.

    Args:
        labels: (N,) class of each image.
        amount: "N" for N images of every class, "P%" for P per cent of each, rounded to the nearest number.
        seed: decides which.
        names: of the classes.
        flag: what to call `amount` in an error.

    Raises:
        UserError: not such an amount, a class would get no image, or has fewer than are asked for.
    """
    try:
        share = float(amount.removesuffix("%")) / 100 if amount.endswith("%") else None
        number = 0 if share is not None else int(amount)
    except ValueError:
        raise UserError(f"{flag} {amount}: expected N images of each class, or P%") from None
    if (share is not None and not 0 < share <= 1) or (share is None and number < 1):
        raise UserError(
            f"{flag} {amount}: expected at least one image of each class, or more than 0% to 100%"
        )
    chosen = []
    for label, name in enumerate(names):
        members = np.flatnonzero(labels == label)
        take = number if share is None else int(share * len(members) + 0.5)
        if not take <= len(members):
            raise UserError(f"{flag} {amount}: class {name} has {len(members)} training images only")
        if not take:
            raise UserError(
                f"{flag} {amount}: class {name} with its {len(members)} training images would get none; "
                "ask for more"
            )
        # Keyed by the class in place of an epoch.
        chosen.append(members[permutation(seed, label, len(members), "few labels")[:take]])
    return np.sort(np.concatenate(chosen))


def keep_few(data: Data, amount: str | None, seed: int) -> Data:
    """The data with the labels of ``--labels`` alone to train on, and a note that says so.

    Raises:
        UserError: the data is not labelled, or see `few_labels`.
    """
    if data.unlabelled:
        raise UserError(
            f"--data {data.name} is taken as unlabelled: {data.unlabelled}; leave out what has no class, or train on "
            "it with a recipe that needs none, such as recipes/spark.py"
        )
    if not data.classes:
        raise UserError(
            f"--data {data.name} has no labels; give a folder with one sub-folder per class (of hf: data the "
            "--label-column), or train on it with a recipe that needs none, such as recipes/spark.py"
        )
    if amount is None:
        return data
    labels = labels_of(data.train)
    kept = few_labels(labels, amount, seed, data.classes)
    counts = np.bincount(labels[kept], minlength=len(data.classes))
    each = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    note = (
        f"--labels {amount}: {len(kept)} of {len(labels)} training images, {each} of each class, seed {seed}"
    )
    return replace(data, train=Subset(data.train, kept), notes=[*data.notes, note])


def hold_out(data: Data, amount: str) -> Data:
    """Another split of the training images, always the same: for choosing settings without a look at the held-out part.

    Args:
        data: its held-out part is put away.
        amount: "P%" of the training images to judge on, of each class where there are classes; or "N" of each.

    Raises:
        UserError: see `few_labels`.
    """
    n, names = len(data.train), data.classes or ("all images",)
    labels = labels_of(data.train) if data.classes else np.zeros(n, dtype=np.int64)
    kept_out = few_labels(labels, amount, 0, names, "--val-from-train")
    rest = np.setdiff1d(np.arange(n), kept_out)
    if not len(rest):
        raise UserError(f"--val-from-train {amount}: no image is left to train on")
    note = f"--val-from-train {amount}: judged on {len(kept_out)} of {n} training images, the held-out part is closed"
    parts = {"train": Subset(data.train, rest), "val": Subset(data.train, kept_out)}
    return replace(data, **parts, notes=[*data.notes, note])  # type: ignore[arg-type]
