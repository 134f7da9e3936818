"""What is seen when: keyed random numbers, sample keys, and the batch sampler that owns its position.

Randomness here is keyed, never positional. A draw is a pure function of (seed, epoch, index, purpose): it
depends neither on the number of workers, nor on the rank, nor on what was drawn before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from leaven.recipes.common.flags import UserError


@lru_cache
def _purpose_code(purpose: str) -> int:
    return int.from_bytes(blake2b(purpose.encode(), digest_size=8).digest(), "little")


def random_bits(seed: int, epoch: int, index: int, purpose: str, n: int) -> NDArray[np.uint64]:
    """`n` random 64-bit words, a pure function of the arguments.

    Philox is made for this: its key holds seed and purpose, its counter epoch and index. The raw words
    are used because numpy keeps those across versions, and does not promise that for its distributions.
    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).

    Args:
        seed, epoch, index: integers in [0, 2**64).
        purpose: what the draw is for; other purposes give independent draws.
        n: how many words.
    """
    # The lowest counter word is the one that Philox itself advances.
    return np.random.Philox(key=[seed, _purpose_code(purpose)], counter=[0, index, epoch, 0]).random_raw(n)


def uniform(seed: int, epoch: int, index: int, purpose: str, n: int = 1) -> NDArray[np.float64]:
    """`n` uniform numbers in [0, 1) with 53 random bits each, a pure function of the arguments."""
    words = random_bits(seed, epoch, index, purpose, n)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, n: int, purpose: str = "order") -> NDArray[np.int64]:
    """A random order of `range(n)`, a pure function of the arguments."""
    return np.argsort(random_bits(seed, epoch, 0, purpose, n), kind="stable")


# Sequences that batches are taken from in turn where data is read in blocks: of 1, 2, 4 or 8 workers, each has its own.
LANES = 8


def block_permutation(seed: int, epoch: int, blocks: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """`range(sum(blocks))`, block after block, in an order of blocks that is a pure function of the arguments."""
    ends = np.cumsum(blocks)
    order = permutation(seed, epoch, len(ends), "blocks")
    return np.concatenate([np.arange(ends[b] - blocks[b], ends[b]) for b in order])


def lane_order(seed: int, epoch: int, rank: int, n: int, batch_size: int, buffer: int) -> NDArray[np.int64]:
    """An order of `range(n)`, shuffled within about `buffer`: batch k is of the (k mod `LANES`)-th piece of the range.

    A loader hands batches to its workers in turn. So a worker reads a piece of the data, and keeps a window of it, and
    yet what is in a batch does not depend on the number of workers.
    Each place goes to itself plus a random number below `buffer`: as from a shuffle buffer, without a state.
    """
    batches = n // batch_size
    numbers = np.argsort(np.arange(batches) % LANES, kind="stable")  # of batches, lane by lane
    lane = np.repeat(numbers % LANES, batch_size)
    goal = np.arange(len(lane)) + buffer * uniform(seed, epoch, rank, "buffer", len(lane))
    order = np.arange(n)
    order[: len(lane)].reshape(batches, batch_size)[numbers] = np.lexsort((goal, lane)).reshape(
        batches, batch_size
    )
    return order


class Key(NamedTuple):
    """What a sample is asked for by; travels through the batch sampler to the worker that makes the sample.

    `size` (H, W) and `strength` carry a curriculum's wishes; None and 1.0 leave a transform as it was built.
    """

    seed: int
    epoch: int
    index: int  # type: ignore[assignment]  # in the way of tuple.index, which a key has no use for
    size: tuple[int, int] | None = None
    strength: float = 1.0


class BatchSpec(NamedTuple):
    """What one batch of a schedule looks like; see `KeyedBatchSampler`."""

    batch_size: int
    size: tuple[int, int] | None = None
    strength: float = 1.0


class KeyedBatchSampler(Sampler[list[Key]]):
    """Batches of keys for one rank, in an order keyed by (seed, epoch), from any position.

    The ranks share one order and take every `world_size`-th sample of it: disjoint, equally many batches
    on each. With `drop_last`, samples that do not fill a batch on every rank are left out of this epoch.
    Without it they form a shorter last batch, and up to `world_size - 1` samples are seen twice to keep
    the ranks equally long.

    A prefetching loader asks for keys ahead of time, so iterating does not move `position`: the loader of
    `make_loader` calls `advance` as it hands a batch out, and `next_epoch` when the epoch is over.
    `state_dict()` is therefore exact between any two batches.

    `batch_size`, `size` and `strength` may be set between epochs. Set within an epoch they would reach
    the batches after those already prefetched; a `schedule` has no such lag: it is asked for a batch's
    looks, by epoch and place in it, when the batch's keys are made.

    Args:
        n: samples in the data set.
        batch_size: samples per batch on this rank.
        seed: key of the order and of every draw of the transforms.
        rank, world_size: of this process.
        epoch, position: where to start; `position` counts the batches already taken in `epoch`.
        size, strength: put into every key.
        shuffle: False keeps the data set's own order (evaluation).
        drop_last: True for training.
        schedule: (epoch, samples of it that this rank has taken) -> `BatchSpec`, in place of `batch_size`, `size` and
            `strength`.
        repeats: repeated augmentation (Hoffer et al., 2020; Berman et al., 2019): an epoch has as many samples, of
            a `repeats`-th of the images, each that often with other draws; on several ranks the copies fall to
            different ones.
        blocks: lengths of the runs in which the data is read, see `Source`; a rank then has a piece of the blocks,
            which come in random order, and samples are shuffled within about `buffer` only, see `lane_order`.
        buffer: samples that are shuffled together, where there are blocks.

    Raises:
        UserError: less than one batch per epoch, with `drop_last`.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        position: int = 0,
        *,
        size: tuple[int, int] | None = None,
        strength: float = 1.0,
        shuffle: bool = True,
        drop_last: bool = True,
        schedule: Callable[[int, int], BatchSpec] | None = None,
        repeats: int = 1,
        blocks: NDArray[np.int64] | None = None,
        buffer: int = 1000,
    ) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.size, self.strength, self.schedule = size, strength, schedule
        self.shuffle, self.drop_last, self.repeats = shuffle, drop_last, repeats
        self.blocks, self.buffer = blocks, buffer
        self.epoch, self.position = epoch, position
        if len(self) == 0 and drop_last:
            raise UserError(
                f"{n} images do not fill one batch of {batch_size} on each of {world_size} process(es); "
                "lower --batch-size, or --global-batch-size where that is given"
            )

    @property
    def samples_per_rank(self) -> int:
        """Samples of an epoch that fall to each rank."""
        return self.n // self.world_size if self.drop_last else -(-self.n // self.world_size)

    def _slices(self) -> Iterator[tuple[int, int, BatchSpec]]:
        """First and last + 1 sample of every batch of this epoch, and what the batch looks like."""
        taken, total = 0, self.samples_per_rank
        while True:
            spec = BatchSpec(self.batch_size, self.size, self.strength)
            if self.schedule is not None:
                spec = self.schedule(self.epoch, taken)
            stop = taken + spec.batch_size
            if taken >= total or (self.drop_last and stop > total):
                return
            yield taken, min(stop, total), spec
            taken = stop

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, first = self.epoch, self.position
        each = self.samples_per_rank
        places = np.arange(self.rank, each * self.world_size, self.world_size)
        if not self.shuffle:
            order = np.arange(self.n)
        elif self.blocks is None:
            order = permutation(self.seed, epoch, self.n)
        else:
            order = block_permutation(self.seed, epoch, self.blocks)
            places = (
                lane_order(self.seed, epoch, self.rank, each, self.batch_size, self.buffer) + self.rank * each
            )
        order = np.repeat(order, self.repeats)[: self.n]
        # Copies of an image differ in the epoch that their draws are keyed by: no two (epoch, copy) share one.
        draws = epoch * self.repeats + np.arange(self.n) % self.repeats
        both = np.stack([draws, order], axis=1)
        mine = both[places % self.n]
        pairs = mine.tolist()
        for batch, (start, stop, spec) in enumerate(self._slices()):
            if batch >= first:
                yield [
                    Key(self.seed, draw, index, spec.size, spec.strength) for draw, index in pairs[start:stop]
                ]

    def __len__(self) -> int:
        """Batches in the whole epoch, those already taken included."""
        return sum(1 for _ in self._slices())

    def advance(self) -> None:
        """One more batch of this epoch was taken."""
        self.position += 1

    def next_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler stands, and what its order depends on."""
        fixed = {name: getattr(self, name) for name in ("n", "batch_size", "seed", "world_size")}
        return fixed | {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Go where `state` says.

        Args:
            state: from `state_dict`.
            strict: refuse a state taken with other data, batch size, seed or world size. False: go on at the
                nearest batch of the same epoch. That is not exact: some samples come twice, some not at all.

        Raises:
            UserError: this sampler differs from the one that was saved (strict only).
        """
        labels = {"n": "images", "batch_size": "batch size", "seed": "seed", "world_size": "processes"}
        changed = [name for name in labels if state[name] != getattr(self, name)]
        if changed and strict:
            changes = ", ".join(f"{labels[k]} {state[k]} -> {getattr(self, k)}" for k in changed)
            raise UserError(f"cannot resume exactly: {changes}; go back to the old values")
        self.epoch, self.position = state["epoch"], state["position"]
        if changed:
            share = state["position"] * state["batch_size"] * state["world_size"] / state["n"]
            self.position = min(len(self), round(share * self.n / (self.batch_size * self.world_size)))
