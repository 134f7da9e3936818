"""Two searches for a schedule of image sizes: the smallest that cost no accuracy, or the best at equal compute.

Sources: Wang et al., EfficientTrain, ICCV 2023 (arXiv 2211.09703), Algorithm 1; Wang et al., EfficientTrain++,
TPAMI 2024 (arXiv 2405.08768), Algorithm 2. The authors released neither search. What the papers leave open
(ties, failures, sizes that no longer grow) is decided here and said below.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from leaven.trials import Outcome, TrialsError, run_trials

__all__ = ["SearchResult", "Tried", "compute_search", "greedy_search"]


@dataclass(frozen=True)
class Tried:
    """One training that a search has tried.

    Attributes:
        stage: that was being decided, from 1; 0 for the baseline.
        sizes: in pixels, of every stage of that training.
        score: that it reached; None if it failed.
        failure: why there is no score; None if there is one.
        seconds: that it took.
        chosen: whether the search went on from it.
    """

    stage: int
    sizes: tuple[int, ...]
    score: float | None
    failure: str | None
    seconds: float
    chosen: bool = False


@dataclass(frozen=True)
class SearchResult:
    """What a search has found.

    Attributes:
        sizes: in pixels, of each stage; the stages are of equal length (`greedy_search`: in steps,
            `compute_search`: in compute).
        score: of that schedule.
        tried: everything that was tried, failures included, in order.
    """

    sizes: tuple[int, ...]
    score: float
    tried: tuple[Tried, ...] = field(repr=False)

    def table(self) -> str:
        """All that was tried, a line each."""
        width = max([5, *(len(_name(row.sizes)) for row in self.tried)])
        lines = [f"stage  {'sizes':<{width}}     score    seconds"]
        for row in self.tried:
            score = "-" if row.score is None else f"{row.score:.4f}"
            note = f"failed: {row.failure}" if row.failure else "chosen" * row.chosen
            line = f"{row.stage:>5}  {_name(row.sizes):<{width}}  {score:>8}  {row.seconds:>9.1f}  {note}"
            lines.append(line.rstrip())
        return "\n".join(lines)


def greedy_search(
    train: Callable[[tuple[int, ...]], float],
    sizes: Sequence[int],
    stages: int,
    *,
    baseline: float | None = None,
    tolerance: float = 0.0,
    executor: Callable[[int], Executor] | None = None,
    workers: int = 1,
    time_limit: float | None = None,
    journal: str | Path | None = None,
) -> SearchResult:
    """Make the stages smaller, first to last, as long as the finished network is as good as without.

    All stages start at the full size, the largest. Then each in turn gets the smallest size, not below that of the
    stage before, with which a whole training reaches ``baseline - tolerance``; the stages after it are still at
    full size. If none does, this stage and so all later ones keep the full size. A smaller size that does is taken
    even if a larger one does not. A training that fails, or scores NaN, does not.

    Each stage asks for up to ``len(sizes) - 1`` whole trainings, which run at the same time if the executor has
    the workers. With noisy scores the smallest size may pass by luck: average over seeds in ``train``.

    Args:
        train: image size in pixels of each stage -> final score, larger is better. The stages are of equal length.
            Settings that do not change, seeds too, are bound to it; see `run_trials` for what processes ask.
        sizes: candidates in pixels; the largest is the full size.
        stages: how many.
        baseline: score of the training at full size; None: it is measured.
        tolerance: how much of the baseline may be lost.
        executor, workers, time_limit, journal: as for `run_trials`; the limit is for one training.

    Raises:
        ValueError: sizes or stages that are no schedule, a negative tolerance, or a baseline that is NaN.
        TrialsError: if the baseline fails.

    Source: EfficientTrain, Algorithm 1.
    """
    sizes = _checked(sizes, stages)
    if not tolerance >= 0 or (baseline is not None and math.isnan(baseline)):
        raise ValueError(f"tolerance must not be negative and baseline not NaN: {tolerance}, {baseline}")
    run = partial(run_trials, executor=executor, workers=workers, time_limit=time_limit, journal=journal)
    function = partial(_final_score, train)
    full, chosen, tried = sizes[-1], (sizes[-1],) * stages, []
    if baseline is None:
        rows = _rows(0, run(function, {_name(chosen): {"sizes": chosen}}), [chosen])
        if not _scores(rows):
            raise TrialsError(f"the baseline has no score: {rows[0].failure or 'it is NaN'}")
        ((baseline, _),) = _scores(rows)
        tried.append(replace(rows[0], chosen=True))
    score = baseline
    for i in range(stages):
        smallest = chosen[i - 1] if i > 0 else sizes[0]
        schedules = [(*chosen[:i], size, *chosen[i + 1 :]) for size in sizes if smallest <= size < full]
        outcomes = run(function, {_name(schedule): {"sizes": schedule} for schedule in schedules})
        rows = _rows(i + 1, outcomes, schedules)
        good = [found for found in _scores(rows) if found[0] >= baseline - tolerance]
        if good:
            score, chosen = good[0]
        tried += [replace(row, chosen=row.sizes == chosen) for row in rows]
    return SearchResult(chosen, score, tuple(tried))


def compute_search(
    train_stage: Callable[[Any, int, int, int], Mapping[str, Any]],
    sizes: Sequence[int],
    stages: int,
    *,
    cost: Callable[[int], float],
    budget: float,
    start: Any = None,
    executor: Callable[[int], Executor] | None = None,
    workers: int = 1,
    time_limit: float | None = None,
    journal: str | Path | None = None,
) -> SearchResult:
    """Find the size that makes the best use of each stage's compute, one stage after another.

    In every stage each size trains on from the best state so far, for as many steps as the budget pays for, and is
    then judged after a short fine-tuning at full size. The best goes on, from its state before the fine-tuning. Of
    equals the largest is taken, since fewer images have to be loaded for it. A training that fails, or scores NaN,
    is not. Nothing keeps sizes from shrinking from one stage to the next, though `Schedule` refuses such a result.

    Args:
        train_stage: called as ``train_stage(state, stage, size, steps)``: the state to go on from, the stage from 1,
            the size in pixels and the number of steps. Trains, saves, fine-tunes a copy at full size and returns
            ``{"state": ..., "score": ...}``: something that JSON can hold and that leads to what was saved, such
            as the path of a checkpoint, and the fine-tuned copy's score, larger is better. Candidates may run at
            the same time, and must not write to the same file.
        sizes: candidates in pixels.
        stages: how many.
        cost: size -> compute of a step, in any unit. Measured seconds are more honest than the area.
        budget: compute of a stage, in the unit of ``cost``.
        start: the state that the first stage is given.
        executor, workers, time_limit, journal: as for `run_trials`; the limit is for one stage of one candidate. A
            resumed search needs the states that its journal names.

    Raises:
        ValueError: sizes or stages that are no schedule, or a budget that does not pay for a step.
        TrialsError: if every size fails in a stage.

    Source: EfficientTrain++, Algorithm 2.
    """
    sizes = _checked(sizes, stages)
    steps = {size: _steps(budget, cost(size), size) for size in sizes}
    run = partial(run_trials, executor=executor, workers=workers, time_limit=time_limit, journal=journal)
    chosen: tuple[int, ...] = ()
    state, score, tried = start, math.nan, []
    for stage in range(1, stages + 1):
        schedules = [(*chosen, size) for size in sizes]
        fixed = {"state": state, "stage": stage}
        trials = {_name(s): {**fixed, "size": s[-1], "steps": steps[s[-1]]} for s in schedules}
        outcomes = run(partial(_stage_score, train_stage), trials)
        rows = _rows(stage, outcomes, schedules)
        if not _scores(rows):
            raise TrialsError(f"no size has a score in stage {stage}: {rows[0].failure or 'it is NaN'}")
        score, chosen = max(_scores(rows))
        state = outcomes[_name(chosen)].result["state"]
        tried += [replace(row, chosen=row.sizes == chosen) for row in rows]
    return SearchResult(chosen, score, tuple(tried))


def _final_score(train: Callable[[tuple[int, ...]], float], sizes: tuple[int, ...]) -> dict[str, float]:
    return {"score": float(train(sizes))}


def _stage_score(
    train_stage: Callable[[Any, int, int, int], Mapping[str, Any]],
    state: Any,
    stage: int,
    size: int,
    steps: int,
) -> dict[str, Any]:
    found = train_stage(state, stage, size, steps)
    return {"state": found["state"], "score": float(found["score"])}


def _rows(stage: int, outcomes: Mapping[str, Outcome], schedules: Sequence[tuple[int, ...]]) -> list[Tried]:
    """The schedules and what became of them, in the order of the schedules."""
    rows = []
    for sizes in schedules:
        outcome = outcomes[_name(sizes)]
        score = None if outcome.failure else outcome.result["score"]
        rows.append(Tried(stage, sizes, score, outcome.failure, outcome.seconds))
    return rows


def _scores(rows: Sequence[Tried]) -> list[tuple[float, tuple[int, ...]]]:
    """Score and sizes of the rows that can be compared."""
    return [(row.score, row.sizes) for row in rows if row.score is not None and not math.isnan(row.score)]


def _name(sizes: Sequence[int]) -> str:
    """Of a trial: all that led to it, so that a journal serves a search that takes another turn on resume."""
    return " ".join(map(str, sizes))


def _steps(budget: float, cost: float, size: int) -> int:
    if not cost > 0:
        raise ValueError(f"the cost of a step must be greater than 0: at size {size} it is {cost:g}")
    steps = int(budget / cost * (1 + 1e-9))  # 0.3 / 0.1 is just below 3
    if steps < 1:
        raise ValueError(
            f"a budget of {budget:g} does not pay for a step at size {size}, which costs {cost:g}"
        )
    return steps


def _checked(sizes: Sequence[int], stages: int) -> tuple[int, ...]:
    """The sizes, smallest first."""
    if (
        not sizes
        or min(sizes) < 1
        or len(set(sizes)) < len(sizes)
        or any(size != int(size) for size in sizes)
    ):
        raise ValueError(f"sizes must be different numbers of pixels, not {list(sizes)}")
    if stages < 1:
        raise ValueError(f"a schedule has at least one stage, not {stages}")
    return tuple(sorted(sizes))
