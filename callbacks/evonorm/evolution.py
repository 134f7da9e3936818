"""Ageing evolution of layers for several scores at once, as ask and tell."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Literal

from leaven.callbacks.evonorm.genome import Genome
from leaven.callbacks.evonorm.space import SearchSpace

_TRIES = 1000  # mutations of one parent, before another winner is taken
_WINNERS = 20  # of which none has such a child, before the search is given up


@dataclass(frozen=True)
class Candidate:
    """A genome that was asked for.

    Attributes:
        number: counted from 0.
        genome: what to judge.
        parent: number of the one it was made from; None for a start.
    """

    number: int
    genome: Genome
    parent: int | None = None


@dataclass(frozen=True)
class Member:
    """A candidate with its scores, one of each anchor; larger is better."""

    candidate: Candidate
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)


class AgeingEvolution:
    """A population whose oldest members leave as new ones come; the winner of a small tournament is changed a little.

    Candidates depend on the seed, their number and what was told before, on nothing else: the same tells in the same
    order give the same search. Genomes that compute what was asked for before are not asked for again.

    Source: Liu et al. 2020, section 4 (tournament on several scores); Real et al., Regularized Evolution for Image
    Classifier Architecture Search, AAAI 2019 (ageing).

    Args:
        space: where genomes come from.
        population: members at most; so many starts come first.
        tournament: share of the population that a winner is taken from, at least two members.
        winner: "pareto", a random one of those that none in the tournament surpasses in all scores; "average", the best
            mean. For Optuna's NSGA-II take `NSGA2` in place of this class.
        start: the first candidates; random ones follow.
        accept: an empty string for genomes that are worth a trial, see `FreeChecks`; None takes all.
        seed: of everything random.
        random_only: every candidate at random, for comparison.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(
        self,
        space: SearchSpace,
        population: int = 100,
        tournament: float = 0.05,
        winner: Literal["pareto", "average"] = "pareto",
        *,
        start: Sequence[Genome] = (),
        accept: Callable[[Genome], str] | None = None,
        seed: int = 0,
        random_only: bool = False,
    ) -> None:
        if population < 2 or not 0 < tournament <= 1:
            raise ValueError(
                f"population must be at least 2 and tournament in (0, 1]: {population}, {tournament}"
            )
        if winner not in ("pareto", "average"):
            nsga2 = "; NSGA-II is the class leaven.callbacks.evonorm.NSGA2"
            other = nsga2 if str(winner) == "nsga2" else ""
            raise ValueError(f'winner must be "pareto" or "average", not {winner!r}{other}')
        self.space, self.population, self.tournament, self.winner = space, population, tournament, winner
        self.start, self.accept, self.seed, self.random_only = tuple(start), accept, seed, random_only
        self.members: deque[Member] = deque(maxlen=population)
        self.history: list[Member] = []
        self.rejected: dict[int, str] = {}
        self.looked_at = 0  # genomes that were drawn, those that `accept` refused among them
        self._asked: dict[int, Candidate] = {}
        self._keys: set[str] = set()

    def ask(self) -> Candidate:
        """The next candidate; so many may be asked for as one likes before they are told.

        Raises:
            ValueError: the space has no more genomes that are worth a trial, or hardly any.
        """
        number = len(self._asked)
        rng = Random(f"{self.seed}/{number}")
        parent: int | None = None
        if number < len(self.start):
            genome = self.start[number]
        elif self.random_only or len(self.history) < self.population or len(self.members) < 2:
            genome = self._random(rng)
        else:
            genome, parent = self._child(rng)
        candidate = Candidate(number, genome, parent)
        self._asked[number] = candidate
        self._keys.add(genome.key)
        return candidate

    def tell(self, number: int, scores: Sequence[float] | None, why: str = "") -> None:
        """How a candidate did; None for one that failed or was rejected, and why.

        Raises:
            KeyError: it was not asked for.
        """
        candidate = self._asked[number]
        if scores is None:
            self.rejected[number] = why
            return
        member = Member(candidate, tuple(scores))
        self.members.append(member)
        self.history.append(member)

    def best(self, n: int = 1) -> list[Member]:
        """By mean score, best first, of all that were told; of equals the older."""
        return sorted(self.history, key=lambda each: (-each.mean, each.candidate.number))[:n]

    def front(self) -> list[Member]:
        """Those of all that were told that none surpasses."""
        return pareto_front(self.history)

    def _child(self, rng: Random) -> tuple[Genome, int]:
        for _ in range(_WINNERS):
            size = max(2, round(self.tournament * len(self.members)))
            chosen = rng.sample(list(self.members), min(size, len(self.members)))
            if self.winner == "average":
                won = max(chosen, key=lambda each: (each.mean, -each.candidate.number))
            else:
                won = rng.choice(pareto_front(chosen))
            parent = self.space.padded(won.candidate.genome)
            genome = self._new(partial(self.space.mutate, parent, rng))
            if genome is not None:
                return genome, won.candidate.number
        raise self._exhausted()

    def _random(self, rng: Random) -> Genome:
        for _ in range(_WINNERS):
            genome = self._new(lambda: self.space.random(rng))
            if genome is not None:
                return genome
        raise self._exhausted()

    def _exhausted(self) -> ValueError:
        return ValueError(
            f"no new genome of {self.space.nodes} nodes in {_WINNERS * _TRIES} draws after {len(self._asked)} "
            "candidates: ask for fewer, or take a space with more nodes"
        )

    def _new(self, draw: Callable[[], Genome]) -> Genome | None:
        """One that was not asked for before and is worth a trial; None if there is none for long."""
        for _ in range(_TRIES):
            genome = draw()
            self.looked_at += 1
            if self._fits(genome):
                return genome
        return None

    def _fits(self, genome: Genome) -> bool:
        return genome.key not in self._keys and not (self.accept and self.accept(genome))


def pareto_front(members: Sequence[Member]) -> list[Member]:
    """Those that no other surpasses: at least as good in every score, and better in one. In their order."""

    def surpassed(a: Member, b: Member) -> bool:
        pairs = list(zip(a.scores, b.scores, strict=True))
        return all(y >= x for x, y in pairs) and any(y > x for x, y in pairs)

    return [a for a in members if not any(surpassed(a, b) for b in members)]
