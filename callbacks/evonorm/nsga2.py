"""The search by Optuna's NSGA-II, for comparison with ageing evolution; needs the extra ``optuna``."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from leaven.callbacks.evonorm.evolution import AgeingEvolution, Candidate
from leaven.callbacks.evonorm.genome import ARITY, INITIAL, Genome, Node
from leaven.callbacks.evonorm.space import SearchSpace

_TRIES = 100  # children that are no new candidates, before a random one is taken


class NSGA2(AgeingEvolution):
    """Ask and tell as `AgeingEvolution`; parents, crossover and mutation are Optuna's NSGA-II.

    A genome is one choice of a primitive for each node and one of each of its inputs. The first population is random,
    after `start`.

    Source: Deb et al., A fast and elitist multiobjective genetic algorithm: NSGA-II, IEEE TEVC 2002.

    Args:
        space, population, start, accept, seed: see `AgeingEvolution`.
        scores: how many a candidate gets.

    Raises:
        ImportError: Optuna is not there.
    """

    def __init__(
        self,
        space: SearchSpace,
        population: int = 100,
        *,
        scores: int,
        start: Sequence[Genome] = (),
        accept: Callable[[Genome], str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(space, population, start=start, accept=accept, seed=seed)
        try:
            import optuna
        except ImportError as error:
            raise ImportError('NSGA-II is Optuna\'s: pip install "leaven[optuna]"') from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
        self._failed = optuna.trial.TrialState.FAIL
        self._study: Any = optuna.create_study(directions=["maximize"] * scores, sampler=sampler)
        self._trials: list[Any] = []

    def ask(self) -> Candidate:
        number = len(self._asked)
        for _ in range(_TRIES if number >= max(self.population, len(self.start)) else 0):
            trial = self._study.ask()
            genome = self._suggested(trial)
            self.looked_at += 1
            if self._fits(genome):
                break
            self._study.tell(trial, state=self._failed)
        else:
            self._study.enqueue_trial(self._choices(self._given(number)))
            trial = self._study.ask()
            genome = self._suggested(trial)
        self._trials.append(trial)
        candidate = Candidate(number, genome)
        self._asked[number] = candidate
        self._keys.add(genome.key)
        return candidate

    def tell(self, number: int, scores: Sequence[float] | None, why: str = "") -> None:
        super().tell(number, scores, why)
        if scores is None:
            self._study.tell(self._trials[number], state=self._failed)
        else:
            self._study.tell(self._trials[number], list(scores))

    def _given(self, number: int) -> Genome:
        """One to start with, or a random one."""
        if number < len(self.start):
            return self.space.padded(self.start[number])
        return self._random(Random(f"{self.seed}/{number}"))

    def _suggested(self, trial: Any) -> Genome:
        nodes: list[Node] = []
        for i in range(self.space.nodes):
            op = trial.suggest_categorical(f"primitive {i}", self.space.primitives)
            inputs = [trial.suggest_int(f"input {i} {n}", 0, len(INITIAL) + i - 1) for n in range(2)]
            nodes.append((op, tuple(inputs[: ARITY[op]])))
        return Genome(tuple(nodes), len(INITIAL) + self.space.nodes - 1, self.space.eps)

    def _choices(self, genome: Genome) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        for i, (op, inputs) in enumerate(genome.nodes):
            chosen[f"primitive {i}"] = op
            chosen |= {f"input {i} {n}": (*inputs, 0)[n] for n in range(2)}
        return chosen
