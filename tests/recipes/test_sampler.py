"""Keyed randomness, and who sees which sample when."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from leaven.recipes.common.augment import TrainTransform
from leaven.recipes.common.data import KeyedDataset, make_loader
from leaven.recipes.common.flags import UserError
from leaven.recipes.common.sampler import (
    BatchSpec,
    Key,
    KeyedBatchSampler,
    permutation,
    random_bits,
    uniform,
)
from leaven.recipes.common.sources import ArraySource


def indices(sampler):
    return [[key.index for key in batch] for batch in sampler]


def a_source(n=40):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, 12, 10), dtype=np.uint8))
    return ArraySource(images, np.arange(n))


def a_dataset(n=40):
    return KeyedDataset(a_source(n), TrainTransform((8, 8), (0.3, 1.0), 0.5, (0.5,) * 3, (0.25,) * 3))


# Keyed random numbers

PINNED = [1949835790966617571, 11404570058163755863]


def test_draws_never_change():
    """Written down once: a resumed run must draw the same after any update of numpy or of this file."""
    assert random_bits(0, 0, 0, "crop", 2).tolist() == PINNED
    assert random_bits(5, 3, 9, "order", 2).tolist() == [9760331773805196629, 234757837641234190]
    assert permutation(5, 3, 8).tolist() == [4, 1, 2, 5, 0, 7, 6, 3]
    assert uniform(0, 0, 0, "crop", 1)[0] == (PINNED[0] >> 11) / 2**53


def test_draws_depend_on_each_part_of_the_key_and_on_nothing_else():
    base = uniform(1, 2, 3, "crop", 5)
    torch.manual_seed(0)
    assert (uniform(1, 2, 3, "crop", 5) == base).all()
    assert (uniform(1, 2, 3, "crop", 3) == base[:3]).all()
    for other in [
        (0, 2, 3, "crop"),
        (1, 0, 3, "crop"),
        (1, 2, 0, "crop"),
        (1, 2, 3, "flip"),
        (1, 3, 2, "crop"),
    ]:
        assert not np.isin(uniform(*other, 5), base).any()


def test_streams_of_neighbours_do_not_overlap():
    """As they would if index or epoch were added to what Philox counts up by itself."""
    words = [random_bits(1, epoch, index, "crop", 50) for epoch in range(6) for index in range(6)]
    assert len(np.unique(np.concatenate(words))) == 36 * 50


@pytest.mark.parametrize("vary", ["seed", "epoch", "index"])
def test_draws_are_uniform_and_uncorrelated_along_each_part_of_the_key(vary):
    n = 4000
    fixed = {"seed": 7, "epoch": 1, "index": 5}
    draws = np.stack([uniform(**(fixed | {vary: i}), purpose="crop", n=3) for i in range(n)])
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > 0.001
        assert abs(np.corrcoef(column[:-1], column[1:])[0, 1]) < 4 / np.sqrt(n)
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 4 / np.sqrt(n)
    flips = np.array([uniform(**(fixed | {vary: i}), purpose="flip")[0] for i in range(n)])
    assert abs(np.corrcoef(draws[:, 0], flips)[0, 1]) < 4 / np.sqrt(n)


def test_permutation_is_a_uniform_one():
    """All 24 orders of 4 items, equally often."""
    counts = Counter(tuple(permutation(3, epoch, 4).tolist()) for epoch in range(4800))
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 0.001


# The sampler


@given(
    n=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
    last=st.booleans(),
)
def test_ranks_share_an_epoch_without_overlap(n, batch_size, world, epoch, last):
    if not last and n // world < batch_size:
        with pytest.raises(UserError, match="lower --batch-size"):
            KeyedBatchSampler(n, batch_size, world_size=world)
        return
    samplers = [
        KeyedBatchSampler(n, batch_size, 5, rank, world, epoch, drop_last=not last) for rank in range(world)
    ]
    batches = [indices(s) for s in samplers]
    assert len({len(b) for b in batches}) == 1
    assert [len(s) for s in samplers] == [len(b) for b in batches]
    assert len({tuple(map(len, b)) for b in batches}) == 1
    seen = [i for rank in batches for batch in rank for i in batch]
    if last:
        assert set(seen) == set(range(n))
        assert len(seen) - n < world
    else:
        assert len(set(seen)) == len(seen)
        assert len(seen) > n - world * batch_size
        assert all(len(batch) == batch_size for rank in batches for batch in rank)


def test_epochs_differ_and_seeds_differ():
    orders = {
        str(indices(KeyedBatchSampler(30, 5, seed, epoch=epoch))) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4
    assert indices(KeyedBatchSampler(7, 3, shuffle=False, drop_last=False)) == [[0, 1, 2], [3, 4, 5], [6]]


@given(position=st.integers(0, 6), epoch=st.integers(0, 2), rank=st.integers(0, 1))
def test_starting_in_the_middle_gives_the_tail_of_a_full_pass(position, epoch, rank):
    whole = list(KeyedBatchSampler(50, 4, 9, rank, 2, epoch))
    assert list(KeyedBatchSampler(50, 4, 9, rank, 2, epoch, position)) == whole[position:]
    assert len(KeyedBatchSampler(50, 4, 9, rank, 2, epoch, position)) == len(whole) == 6


def test_keys_carry_seed_epoch_size_and_strength():
    (batch, *_) = KeyedBatchSampler(8, 8, 3, epoch=2, size=(6, 9), strength=0.5, shuffle=False)
    assert batch == [Key(3, 2, i, (6, 9), 0.5) for i in range(8)]
    assert pickle.loads(pickle.dumps(batch)) == batch


def test_state_is_refused_by_another_sampler_unless_told():
    saved = KeyedBatchSampler(80, 4, 1, 0, 2, epoch=3, position=6).state_dict()
    same = KeyedBatchSampler(80, 4, 1, 1, 2)
    same.load_state_dict(saved)
    assert (same.epoch, same.position) == (3, 6)
    others = {
        "batch size 4 -> 8": KeyedBatchSampler(80, 8, 1, 0, 2),
        "processes 2 -> 1": KeyedBatchSampler(80, 4, 1),
        "images 80 -> 81": KeyedBatchSampler(81, 4, 1, 0, 2),
        "seed 1 -> 2": KeyedBatchSampler(80, 4, 2, 0, 2),
    }
    for message, other in others.items():
        with pytest.raises(UserError, match=message):
            other.load_state_dict(saved)
        assert (other.epoch, other.position) == (0, 0)
        other.load_state_dict(saved, strict=False)
        # 48 of 80 samples of epoch 3 were seen: 0.6 of the new epoch is over.
        assert (other.epoch, other.position) == (3, round(0.6 * len(other)))


# The loader


def collect(loader, n=None):
    return [(images, labels) for images, labels in islice(iter(loader), n)]


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def test_streams_are_bit_equal_for_any_number_of_workers_and_after_a_resume():
    def three_epochs(workers):
        sampler = KeyedBatchSampler(40, 6, 11)
        loader = make_loader(a_dataset(), sampler, workers)
        stream = [batch for _ in range(3) for batch in collect(loader)]
        assert (sampler.epoch, sampler.position) == (3, 0)
        return stream

    whole = three_epochs(0)
    assert len(whole) == 18
    assert not torch.equal(whole[0][0], whole[6][0])
    assert equal(three_epochs(2), whole)
    assert equal(three_epochs(1), whole)
    for workers in (0, 2):
        sampler = KeyedBatchSampler(40, 6, 11)
        sampler.load_state_dict({**sampler.state_dict(), "epoch": 1, "position": 4})
        loader = make_loader(a_dataset(), sampler, workers)
        assert equal([batch for _ in range(2) for batch in collect(loader)], whole[10:])


@pytest.mark.parametrize("workers", [0, 2])
def test_position_counts_what_was_handed_out_not_what_was_prefetched(workers):
    sampler = KeyedBatchSampler(40, 4, 2)
    loader = make_loader(a_dataset(), sampler, workers)
    whole = collect(loader)
    batches = iter(loader)
    for taken in range(1, 4):
        next(batches)
        assert (sampler.epoch, sampler.position) == (1, taken)
    # Left in the middle, as a stopped run would; the same loader goes on where it was.
    batches.close()
    rest = collect(loader)
    assert len(rest) == 7
    assert (sampler.epoch, sampler.position) == (2, 0)
    again = make_loader(a_dataset(), KeyedBatchSampler(40, 4, 2, epoch=1, position=3), 0)
    assert equal(rest, collect(again))
    assert len(whole) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_drawn_from_the_global_generators(workers):
    loader = make_loader(a_dataset(), KeyedBatchSampler(40, 4), workers)
    before = torch.get_rng_state()
    for _ in range(2):
        collect(loader)
    iter(loader)
    assert torch.equal(torch.get_rng_state(), before)


def doubling(epoch, taken):
    """Batches of 4 at 8x8 until half of the first epoch, then of 8 at 12x6."""
    return BatchSpec(4, (8, 8)) if epoch == 0 and taken < 20 else BatchSpec(8, (12, 6), 0.5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_schedule_reaches_prefetched_batches_without_lag(workers):
    sampler = KeyedBatchSampler(40, 4, 2, schedule=doubling)
    loader = make_loader(a_dataset(), sampler, workers)
    shapes = [tuple(images.shape) for images, _ in collect(loader)]
    assert shapes == [(4, 3, 8, 8)] * 5 + [(8, 3, 12, 6)] * 2  # 20 + 16 of 40
    assert (sampler.epoch, sampler.position) == (1, 0)
    assert len(sampler) == 5
    state = sampler.state_dict() | {"epoch": 0, "position": 5}
    resumed = KeyedBatchSampler(40, 4, 2, schedule=doubling)
    resumed.load_state_dict(state)
    assert list(resumed) == list(KeyedBatchSampler(40, 4, 2, schedule=doubling))[5:]
    # The epoch that follows goes on with it, whoever gets there.
    assert list(KeyedBatchSampler(40, 4, 2, epoch=1, schedule=doubling)) == list(sampler)


@pytest.mark.parametrize("workers", [0, 2])
def test_size_and_batch_size_may_be_set_between_epochs(workers):
    sampler = KeyedBatchSampler(40, 4)
    loader = make_loader(a_dataset(), sampler, workers)
    collect(loader)
    sampler.batch_size, sampler.size = 10, (6, 6)
    assert [tuple(images.shape) for images, _ in collect(loader)] == [(10, 3, 6, 6)] * 4


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups are POSIX")
def test_workers_outlive_a_signal_to_the_process_group(tmp_path):
    """Ctrl-C reaches the whole group; the training process still needs the batches of its last step."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import signal, time, torch
        from leaven.recipes.common.data import KeyedDataset, make_loader
        from leaven.recipes.common.sampler import KeyedBatchSampler
        from leaven.recipes.common.sources import ArraySource

        def slow(image, key):
            time.sleep(0.02)
            return image

        if __name__ == "__main__":
            got = []
            signal.signal(signal.SIGINT, lambda *_: got.append("int"))
            signal.signal(signal.SIGTERM, lambda *_: got.append("term"))
            dataset = KeyedDataset(ArraySource(torch.zeros(60, 1, 2, 2, dtype=torch.uint8), None), slow)
            n = 0
            for images, _ in make_loader(dataset, KeyedBatchSampler(60, 2), workers=2):
                n += 1
                if n == 1:
                    print("ready", flush=True)
                    time.sleep(1.0)
            print(n, sorted(got), flush=True)
        """)
    )
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.stdout.readline() == "30 ['int', 'term']\n"
    assert process.wait(30) == 0


# Repeated augmentation


@pytest.mark.parametrize("world", [1, 2, 3])
def test_repeats_show_a_third_of_the_images_three_times_with_other_draws(world):
    n, repeats = 60, 3
    ranks = [
        list(KeyedBatchSampler(n, 5, 4, rank, world, epoch=2, repeats=repeats, drop_last=False))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    keys = [key for batches in ranks for batch in batches for key in batch]
    assert len(keys) == n
    assert len(set(keys)) == n  # no view twice
    views = Counter(key.index for key in keys)
    assert set(views.values()) == {3}
    assert len(views) == 20
    if world == 3:  # each rank sees an image once
        assert all(len({key.index for batch in batches for key in batch}) == 20 for batches in ranks)
    first_third = [key.index for batch in KeyedBatchSampler(n, 5, 4, epoch=2) for key in batch][:20]
    assert list(dict.fromkeys(sorted(views))) == sorted(first_third)


def test_repeats_draw_anew_in_every_epoch_and_one_is_none():
    epochs = [
        {key.epoch for batch in KeyedBatchSampler(30, 5, epoch=e, repeats=3) for key in batch}
        for e in range(4)
    ]
    assert epochs == [{3 * e, 3 * e + 1, 3 * e + 2} for e in range(4)]
    assert list(KeyedBatchSampler(31, 5, epoch=3, repeats=1)) == list(KeyedBatchSampler(31, 5, epoch=3))
    # A number that three does not divide: the last image comes less often.
    views = Counter(key.index for batch in KeyedBatchSampler(31, 1, repeats=3) for key in batch)
    assert sorted(views.values()) == [1] + [3] * 10
