"""The searches against brute force and against plain re-implementations, on objectives whose answer is known."""

import itertools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leaven.curricula.search import SearchResult, Tried, compute_search, greedy_search
from leaven.trials import TrialsError

ROOT = Path(__file__).parents[2]
SIZES = (96, 128, 160, 192, 224)
Sizes = tuple[int, ...]
posix = pytest.mark.skipif(os.name != "posix", reason="signals and fork")
POOL = partial(ProcessPoolExecutor, mp_context=get_context("fork" if os.name == "posix" else "spawn"))


def accuracy(sizes: Sizes, weights: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0), gain: float = 1.5) -> float:
    """Loses with every missing pixel, later stages more; the first ones gain by easy beginnings."""
    lost = [(1 - size / 224) * weight for size, weight in zip(sizes, weights, strict=True)]
    return 80.0 + gain * (1 - sizes[0] / 224) - sum(lost)


def random_accuracy(sizes: Sizes, seed: int) -> Any:
    """Any number for any schedule, of a type that JSON does not know."""
    return np.float32(np.random.default_rng([seed, *sizes]).integers(0, 10))


def logged(sizes: Sizes, folder: Path, objective: Callable[[Sizes], float] = accuracy) -> float:
    with (folder / "calls").open("a") as calls:
        calls.write(f"{sizes}\n")
    return objective(sizes)


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def monotone(sizes: Sequence[int], stages: int) -> list[Sizes]:
    """All schedules that never shrink."""
    return list(itertools.combinations_with_replacement(sorted(sizes), stages))


def plain_greedy(
    train: Callable[[Sizes], float], sizes: Sequence[int], stages: int, tolerance: float
) -> Sizes:
    """Algorithm 1 once more, by looking at every monotone schedule instead of building candidates."""
    full = max(sizes)
    needed = train((full,) * stages) - tolerance
    chosen: Sizes = ()
    for stage in range(1, stages + 1):
        rest = (full,) * (stages - stage)
        fits = [s for s in monotone(sizes, stages) if s[: stage - 1] == chosen and s[stage:] == rest]
        good = [s for s in fits if train(s) >= needed or s[stage - 1] == full]
        chosen = min(good)[:stage]
    return chosen


# --- the greedy search


def test_a_known_answer() -> None:
    """Stage 1 gains 1.0 of lost resolution, stages 2 and 3 lose 1.0 and 2.0 of it: paid for by stage 1."""
    result = greedy_search(accuracy, SIZES, 5)
    lost = 1 - 96 / 224
    assert result.sizes == (96, 96, 224, 224, 224)
    assert result.score == pytest.approx(80 + (1.5 - 0.5 - 1.0) * lost)
    assert [row.sizes for row in result.tried if row.chosen] == [(224,) * 5, (96, *[224] * 4), result.sizes]


@pytest.mark.parametrize("tolerance", [0.0, 0.3, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("weights", [(0, 0, 1), (1, 2, 3), (3, 2, 1), (-1, 0.5, 0.7), (-1, -1, -1)])
def test_it_finds_what_brute_force_finds(weights: tuple[float, ...], tolerance: float) -> None:
    """Of all schedules that are good enough, the one that is smallest in the first stage, then in the second, ..."""
    train = partial(accuracy, weights=weights, gain=0.0)
    result = greedy_search(train, SIZES, 3, tolerance=tolerance)
    needed = train((224,) * 3) - tolerance
    # With losses that add up, what is good enough with the later stages at full size is what greedy looks at.
    best: Sizes = ()
    for stage in range(3):
        best += (
            min(s[stage] for s in monotone(SIZES, 3) if s[:stage] == best and good(train, s, stage, needed)),
        )
    assert result.sizes == best
    assert result.score == train(best) >= needed


def good(train: Callable[[Sizes], float], sizes: Sizes, stage: int, needed: float) -> bool:
    full = (*sizes[: stage + 1], *[224] * (2 - stage))
    return train(full) >= needed


@pytest.mark.parametrize("tolerance", [0.0, 2.0])
@pytest.mark.parametrize("seed", range(20))
def test_any_objective(seed: int, tolerance: float) -> None:
    train = partial(random_accuracy, seed=seed)
    result = greedy_search(train, SIZES[::-1], 4, tolerance=tolerance)
    assert result.sizes == plain_greedy(train, SIZES, 4, tolerance)
    assert result.score == train(result.sizes) >= train((224,) * 4) - tolerance
    assert list(result.sizes) == sorted(result.sizes)
    for row in result.tried:
        assert row.score == train(row.sizes)
        assert list(row.sizes) == sorted(row.sizes)


def test_what_it_asks_for(tmp_path: Path) -> None:
    """The baseline, then per stage the sizes between the stage before and the full one."""
    result = greedy_search(partial(logged, folder=tmp_path), SIZES, 5)
    asked = [(224,) * 5]
    asked += [(size, 224, 224, 224, 224) for size in SIZES[:4]]
    asked += [(96, size, 224, 224, 224) for size in SIZES[:4]]
    asked += [(96, 96, size, 224, 224) for size in SIZES[:4]]  # none is good enough: it ends here
    assert calls(tmp_path) == [str(sizes) for sizes in asked]
    assert [row.sizes for row in result.tried] == asked
    assert [row.stage for row in result.tried] == [0] + [1] * 4 + [2] * 4 + [3] * 4


def test_a_baseline_that_is_given_is_not_measured(tmp_path: Path) -> None:
    train = partial(logged, folder=tmp_path)
    result = greedy_search(train, SIZES, 5, baseline=75.0)
    assert str((224,) * 5) not in calls(tmp_path)
    assert result.sizes == plain_greedy(accuracy, SIZES, 5, tolerance=5.0)
    hopeless = greedy_search(train, SIZES, 5, baseline=99.0)
    assert (hopeless.sizes, hopeless.score) == ((224,) * 5, 99.0)
    assert not any(row.chosen for row in hopeless.tried)


def test_ties_and_bumps() -> None:
    """As good as the baseline is good enough; a smaller size is taken though a larger one between is not."""
    table = {96: 0.5, 128: 0.7, 160: 0.6, 192: 0.8, 224: 0.7}
    result = greedy_search(partial(first_stage, table=table), SIZES, 1)
    assert (result.sizes, result.score) == ((128,), 0.7)
    assert greedy_search(partial(first_stage, table=dict.fromkeys(SIZES, 0.5)), SIZES, 4).sizes == (96,) * 4


def first_stage(sizes: Sizes, table: dict[int, float]) -> float:
    return table[sizes[0]]


def test_one_size_leaves_nothing_to_search() -> None:
    result = greedy_search(accuracy, [224], 5)
    assert result.sizes == (224,) * 5
    assert len(result.tried) == 1


def failing(sizes: Sizes) -> float:
    match sizes[0]:
        case 96:
            raise RuntimeError("out of memory")
        case 128:
            return math.nan
    return 1.0


def test_what_fails_is_not_acceptable_and_is_listed() -> None:
    result = greedy_search(failing, SIZES, 2)
    assert result.sizes == (160, 160)
    failed, diverged = result.tried[1:3]
    assert failed.score is None
    assert (failed.failure or "").startswith("RuntimeError: out of memory (test_search.py:")
    assert diverged.score is not None
    assert math.isnan(diverged.score)
    assert not failed.chosen
    assert not diverged.chosen


@pytest.mark.parametrize(("broken", "why"), [(96, "RuntimeError: out of memory"), (128, "it is NaN")])
def test_without_a_baseline_there_is_no_search(broken: int, why: str) -> None:
    with pytest.raises(TrialsError, match=f"^the baseline has no score: {why}"):
        greedy_search(failing, [64, broken], 2)


# --- the search at equal compute


def area(size: int) -> float:
    return size * size / 1e4


def learn(
    state: Any, stage: int, size: int, steps: int, best: Sequence[int] = (96, 160, 224)
) -> dict[str, Any]:
    """The state is all that was done before; the score prefers one size in each stage."""
    done = [*(state or []), [stage, size, steps]]
    return {"state": done, "score": -sum(abs(size - best[stage - 1]) for stage, size, _ in done)}


def test_each_stage_takes_the_best_and_goes_on_from_it() -> None:
    result = compute_search(learn, SIZES, 3, cost=area, budget=100.0)
    assert (result.sizes, result.score) == ((96, 160, 224), 0.0)
    assert [row.sizes for row in result.tried] == [
        *((size,) for size in SIZES),
        *((96, size) for size in SIZES),
        *((96, 160, size) for size in SIZES),
    ]
    assert [row.sizes for row in result.tried if row.chosen] == [(96,), (96, 160), (96, 160, 224)]


def remember(state: Any, stage: int, size: int, steps: int, folder: Path) -> dict[str, Any]:
    with (folder / "calls").open("a") as file:
        file.write(f"{state} {stage} {size} {steps}\n")
    return {"state": f"{state}/{size}", "score": random_accuracy((stage, size), seed=len(str(state)))}


def plain_compute(train: Callable[..., dict[str, Any]], budget: float, stages: int) -> tuple[Sizes, float]:
    state, chosen, score = "start", (), -math.inf
    for stage in range(1, stages + 1):
        found = {size: train(state, stage, size, math.floor(budget / area(size))) for size in SIZES}
        score = max(one["score"] for one in found.values())
        size = max(size for size, one in found.items() if one["score"] == score)
        state, chosen = found[size]["state"], (*chosen, size)
    return chosen, score


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_it_makes_the_same_calls_as_a_plain_loop(tmp_path: Path, stages: int) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    train = partial(remember, folder=tmp_path / "a")
    result = compute_search(train, SIZES[::-1], stages, cost=area, budget=77.0, start="start")
    expected = plain_compute(partial(remember, folder=tmp_path / "b"), 77.0, stages)
    assert (result.sizes, result.score) == expected
    assert calls(tmp_path / "a") == calls(tmp_path / "b")


def test_steps_pay_for_the_budget_and_no_more() -> None:
    seen: dict[int, int] = {}

    def train(state: Any, stage: int, size: int, steps: int) -> dict[str, Any]:
        seen[size] = steps
        return {"state": None, "score": 0}

    compute_search(train, SIZES, 1, cost=area, budget=50.0)
    assert seen == {96: 54, 128: 30, 160: 19, 192: 13, 224: 9}
    compute_search(train, [1], 1, cost=lambda size: 0.1, budget=0.3)  # 0.3 / 0.1 is 2.9999999999999996
    assert seen[1] == 3


def test_of_equals_the_largest_and_sizes_may_shrink() -> None:
    result = compute_search(partial(learn, best=(160, 160)), (128, 192), 2, cost=area, budget=100.0)
    assert result.sizes == (192, 192)
    assert compute_search(partial(learn, best=(224, 96)), SIZES, 2, cost=area, budget=100.0).sizes == (
        224,
        96,
    )


def stumble(state: Any, stage: int, size: int, steps: int, last: int = 2) -> dict[str, Any]:
    if size == 96 or stage > last:
        raise RuntimeError("out of memory")
    return {"state": [state, size], "score": math.nan if size == 128 else -size}


def test_what_fails_does_not_go_on() -> None:
    result = compute_search(stumble, SIZES, 2, cost=area, budget=100.0)
    assert result.sizes == (160, 160)
    assert [row.failure is None for row in result.tried] == [False, True, True, True, True] * 2
    with pytest.raises(TrialsError, match=r"^no size has a score in stage 2: RuntimeError: out of memory"):
        compute_search(partial(stumble, last=1), SIZES, 2, cost=area, budget=100.0)
    with pytest.raises(TrialsError, match=r"^no size has a score in stage 1: KeyError: 'score'"):
        compute_search(lambda *_: {"state": 1}, SIZES, 2, cost=area, budget=100.0)


# --- both: processes, resume, refusals, words


def search(kind: str, folder: Path, **options: Any) -> SearchResult:
    """One of the two searches, over trainings that leave a line in the folder."""
    if kind == "greedy":
        return greedy_search(partial(logged, folder=folder), SIZES, 5, **options)
    return compute_search(partial(remember, folder=folder), SIZES, 3, cost=area, budget=77.0, **options)


def without_seconds(result: SearchResult) -> tuple[Any, ...]:
    rows = [(row.stage, row.sizes, row.score, row.failure, row.chosen) for row in result.tried]
    return result.sizes, result.score, rows


@pytest.mark.parametrize("kind", ["greedy", "compute"])
def test_two_processes_find_the_same(tmp_path: Path, kind: str) -> None:
    serial = search(kind, tmp_path)
    parallel = search(kind, tmp_path, executor=POOL, workers=2, time_limit=60.0)
    assert without_seconds(serial) == without_seconds(parallel)


PROGRAM = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_search
folder, kind, after = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
real = test_search.calls
for name in ("accuracy", "random_accuracy"):
    def deadly(*args, _objective=getattr(test_search, name), **more):
        if len(test_search.calls(folder)) > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return _objective(*args, **more)
    setattr(test_search, name, deadly)
test_search.logged.__defaults__ = (test_search.accuracy,)
test_search.search(kind, folder, journal=folder / "journal")
"""


@posix
@pytest.mark.parametrize("kind", ["greedy", "compute"])
def test_a_killed_search_trains_only_what_is_missing(tmp_path: Path, kind: str) -> None:
    """Killed in the middle of a training: that one is begun again, those before it are not."""
    after = 7
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir()
    part.mkdir()
    expected = search(kind, whole)
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program, str(part), kind, str(after)], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert calls(part) == calls(whole)[: after + 1]
    resumed = search(kind, part, journal=part / "journal")
    assert without_seconds(resumed) == without_seconds(expected)
    assert calls(part) == calls(whole)[: after + 1] + calls(whole)[after:]
    assert search(kind, part, journal=part / "journal") == resumed
    assert len(calls(part)) == len(calls(whole)) + 1


def once(state: Any, stage: int, size: int, steps: int, folder: Path) -> dict[str, Any]:
    """Fails at size 96 as long as there is no file `mended`; then that is the best size."""
    if size == 96 and not (folder / "mended").exists():
        raise RuntimeError("out of memory")
    return {"state": f"{state}/{size}", "score": -size}


def test_a_search_may_take_another_turn_on_resume(tmp_path: Path) -> None:
    """What failed is tried again. If it now wins, the stages after it are new trials, not other arguments."""
    options: dict[str, Any] = {"cost": area, "budget": 77.0, "journal": tmp_path / "journal"}
    train = partial(once, folder=tmp_path)
    assert compute_search(train, SIZES, 2, **options).sizes == (128, 128)
    (tmp_path / "mended").touch()
    assert compute_search(train, SIZES, 2, **options).sizes == (96, 96)


@pytest.mark.parametrize(
    ("sizes", "stages", "why"),
    [
        ([], 5, r"sizes must be different numbers of pixels, not \[\]"),
        ([0, 224], 5, "sizes must be different numbers"),
        ([96, 224, 96], 5, "sizes must be different numbers"),
        ([96, 224], 0, "a schedule has at least one stage, not 0"),
    ],
)
def test_what_is_no_schedule_is_refused(sizes: list[int], stages: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        greedy_search(accuracy, sizes, stages)
    with pytest.raises(ValueError, match=why):
        compute_search(learn, sizes, stages, cost=area, budget=100.0)


def test_numbers_that_make_no_sense_are_refused() -> None:
    for wrong in ({"tolerance": -0.1}, {"tolerance": math.nan}, {"baseline": math.nan}):
        with pytest.raises(ValueError, match="tolerance must not be negative and baseline not NaN"):
            greedy_search(accuracy, SIZES, 5, **wrong)
    with pytest.raises(
        ValueError, match=r"^a budget of 2 does not pay for a step at size 160, which costs 2.56$"
    ):
        compute_search(learn, SIZES, 3, cost=area, budget=2.0)
    with pytest.raises(ValueError, match="the cost of a step must be greater than 0: at size 96 it is 0"):
        compute_search(learn, SIZES, 3, cost=lambda size: 0.0, budget=2.0)


def test_the_table_hides_nothing() -> None:
    tried = (
        Tried(0, (224, 224), 0.8, None, 12.34, chosen=True),
        Tried(1, (96, 224), 0.81234, None, 5.0, chosen=True),
        Tried(1, (160, 224), None, "timed out after 10 s", 10.0),
        Tried(2, (96, 96), 0.7, None, 1000.0),
    )
    result = SearchResult((96, 224), 0.81234, tried)
    assert repr(result) == "SearchResult(sizes=(96, 224), score=0.81234)"
    assert result.table().splitlines() == [
        "stage  sizes       score    seconds",
        "    0  224 224    0.8000       12.3  chosen",
        "    1  96 224     0.8123        5.0  chosen",
        "    1  160 224         -       10.0  failed: timed out after 10 s",
        "    2  96 96      0.7000     1000.0",
    ]
    assert SearchResult((224,), 1.0, ()).table() == "stage  sizes     score    seconds"
