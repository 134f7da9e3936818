"""A search for layers: candidates in rounds, on any executor, with a journal."""

from collections.abc import Callable
from concurrent.futures import Executor
from math import isfinite
from pathlib import Path
from typing import Any

from leaven.callbacks.evonorm.evolution import AgeingEvolution
from leaven.trials import TrialsError, run_trials


def search(
    evolution: AgeingEvolution,
    judge: Callable[[str], Any],
    candidates: int,
    *,
    round_size: int = 8,
    executor: Callable[[int], Executor] | None = None,
    workers: int = 1,
    time_limit: float | None = None,
    journal: str | Path | None = None,
    report: Callable[[AgeingEvolution], object] | None = None,
) -> AgeingEvolution:
    """Judge so many candidates, a round at a time; what a round found is told in the order in which it was asked for.

    So the search depends neither on the executor nor on who was faster, and a resumed one is the uninterrupted one:
    what the journal knows is not judged again. With more candidates it is what it would have been with so many from the
    start. A candidate whose judge fails, hangs or dies, or gives a score that is not finite, is rejected. Once the
    search has gone on from that, the journal has it as a rejection, and it is not judged again either.

    Args:
        evolution: what asks.
        judge: called as ``judge(genome=JSON)``: ``{"scores": [...]}`` or ``{"rejected": reason}``. For processes it
            must pickle.
        candidates: in all.
        round_size: asked for before anything of the round is told.
        executor, workers, time_limit, journal: see `run_trials`; the limit is for one candidate.
        report: called after every round.

    Returns:
        The evolution.

    Raises:
        ValueError: no candidates, or rounds without any.
        TrialsError: the judge failed for each candidate; or see `run_trials`.
    """
    if candidates < 1 or round_size < 1:
        raise ValueError(f"candidates and round_size must be at least 1, got {candidates} and {round_size}")
    done, failed = 0, list[str]()
    reasons: dict[str, str] = {}  # genome -> why the judge failed for it
    loose: dict[str, dict[str, str]] = {}  # trials that `run_trials` would run again on resume
    while done < candidates:
        asked = [evolution.ask() for _ in range(min(round_size, candidates - done))]
        trials = {f"candidate {each.number}": {"genome": each.genome.to_json()} for each in asked}
        outcomes = run_trials(
            judge, trials, executor=executor, workers=workers, time_limit=time_limit, journal=journal
        )
        for candidate, outcome in zip(asked, outcomes.values(), strict=True):
            found = outcome.result or {}
            why = outcome.failure or found.get("rejected", "")
            if not why and not all(map(isfinite, found["scores"])):
                why = "a score is not a finite number"
            if outcome.failure:
                failed.append(outcome.failure)
                name = f"candidate {candidate.number}"
                loose[name] = trials[name]
                reasons[trials[name]["genome"]] = outcome.failure
            evolution.tell(candidate.number, None if why else found["scores"], why)
        done += len(asked)
        # Another verdict would lead to other candidates than those that are in the journal by then. A judge that has
        # failed for all may be mended.
        if journal is not None and loose and len(failed) < done:
            run_trials(lambda genome: {"rejected": reasons[genome]}, loose, journal=journal)
            loose = {}
        if report is not None:
            report(evolution)
    if len(failed) == candidates:
        raise TrialsError(
            f"the judge failed for each of {candidates} candidates, for the last with {failed[-1]}"
        )
    return evolution
