"""Few labels: as many as asked for of every class, nested, seeded, or one line that says why not."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest

from leaven.recipes.common.data import open_data
from leaven.recipes.common.few_labels import Subset, few_labels, hold_out, keep_few, labels_of
from leaven.recipes.common.flags import UserError

NAMES = ("ant", "bee", "cow")
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [200, 100, 60]))


def counts(indices: np.ndarray) -> list[int]:
    return np.bincount(LABELS[indices], minlength=3).tolist()


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        ("1", [1, 1, 1]),
        ("60", [60, 60, 60]),
        ("10%", [20, 10, 6]),
        ("1%", [2, 1, 1]),
        ("100%", [200, 100, 60]),
    ],
)
def test_every_class_gets_its_share(amount: str, expected: list[int]) -> None:
    chosen = few_labels(LABELS, amount, 0, NAMES)
    assert counts(chosen) == expected
    assert (np.diff(chosen) > 0).all()  # in order, none twice


def test_subsets_of_a_seed_are_nested_and_those_of_others_differ() -> None:
    sets = [
        set(few_labels(LABELS, amount, 3, NAMES).tolist()) for amount in ("1%", "5%", "20", "25%", "100%")
    ]
    assert all(small < large for small, large in pairwise(sets) if len(small) < 60)
    other = set(few_labels(LABELS, "5%", 4, NAMES).tolist())
    assert other != sets[1]
    assert set(few_labels(LABELS, "5%", 3, NAMES).tolist()) == sets[1]


def test_every_image_is_as_likely() -> None:
    hits = np.zeros(len(LABELS))
    for seed in range(300):
        hits[few_labels(LABELS, "10%", seed, NAMES)] += 1
    assert abs(hits.mean() - 30) < 1e-9
    assert hits.std() < 1.3 * np.sqrt(300 * 0.1 * 0.9)


@pytest.mark.parametrize(
    ("amount", "part"),
    [
        ("61", "class cow has 60 training images only"),
        ("0.5%", "class cow with its 60 training images would get none"),
        ("0", "at least one image"),
        ("0%", "more than 0%"),
        ("101%", "100%"),
        ("some", "expected N images of each class, or P%"),
        ("nan%", "more than 0%"),
    ],
)
def test_what_cannot_be_is_one_line(amount: str, part: str) -> None:
    with pytest.raises(UserError, match=part) as error:
        few_labels(LABELS, amount, 0, NAMES)
    assert str(error.value).startswith(f"--labels {amount}: ")


def test_kept_data_say_so_and_hold_the_right_pairs() -> None:
    data = open_data("digits")
    few = keep_few(data, "3", 1)
    assert len(few.train) == 30
    assert few.val is data.val
    assert few.notes[-1] == "--labels 3: 30 of 1437 training images, 3 of each class, seed 1"
    assert isinstance(few.train, Subset)
    for i, index in enumerate(few.train.indices.tolist()):
        assert few.train.label(i) == data.train.label(index)
        assert (few.train.image(i) == data.train.image(index)).all()
    assert (labels_of(few.train) == [few.train.label(i) for i in range(30)]).all()
    assert keep_few(data, None, 1) is data


def test_held_out_of_training_are_other_images_always_the_same() -> None:
    data = open_data("digits")
    split = hold_out(data, "20%")
    train, val = split.train, split.val
    assert isinstance(train, Subset)
    assert isinstance(val, Subset)
    assert sorted([*train.indices, *val.indices]) == list(range(1437))
    shares = np.bincount(labels_of(val)) / np.bincount(labels_of(data.train))
    assert (abs(shares - 0.2) < 0.01).all()
    assert split.notes[-1].startswith("--val-from-train 20%: judged on 28")
    assert (hold_out(data, "20%").val.indices == val.indices).all()  # type: ignore[attr-defined]
    few = keep_few(split, "10%", 0)
    assert not {train.indices[i] for i in few.train.indices} & set(val.indices.tolist())  # type: ignore[attr-defined]


def test_images_without_labels_are_held_out_too() -> None:
    data = dataclasses.replace(open_data("digits"), classes=())
    assert (len(hold_out(data, "20%").train), len(hold_out(data, "20%").val)) == (1150, 287)
    with pytest.raises(UserError, match=r"^--val-from-train 100%: no image is left"):
        hold_out(data, "100%")
