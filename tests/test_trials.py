"""Trials that raise, hang and die, and studies that are killed: what has ended counts, and the rest goes on."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from leaven.journal import Journal, JournalError, TornLineWarning
from leaven.trials import Outcome, TrialsError, run_trials

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="signals, locks and fork")
POOL = partial(ProcessPoolExecutor, mp_context=get_context("fork" if os.name == "posix" else "spawn"))


def trial(folder: str, name: str, does: str = "returns", seconds: float = 0.0) -> Any:
    """Leaves a line `name pid` in the folder, then does what it is told."""
    again = name in calls(Path(folder))
    with (Path(folder) / "calls").open("a") as file:
        file.write(f"{name} {os.getpid()}\n")
    time.sleep(seconds)
    match does:
        case "raises":
            raise ValueError("two\n  lines")
        case "exits":
            sys.exit(3)
        case "is interrupted":
            raise KeyboardInterrupt
        case "dies":
            os._exit(1)
        case "hangs":
            time.sleep(600)
        case "hangs once" if not again:
            time.sleep(600)
        case "returns what JSON cannot hold":
            return {1, 2}
    return {"of": name, "pair": (1, 2.5)}


def right(name: str) -> dict[str, Any]:
    """The result of a trial that returns."""
    return {"of": name, "pair": [1, 2.5]}


def study(folder: Path, *does: str, seconds: float = 0.0) -> dict[str, dict[str, Any]]:
    """Trials named t0, t1, ... that do these things."""
    return {
        f"t{i}": {"folder": str(folder), "name": f"t{i}", "does": what, "seconds": seconds}
        for i, what in enumerate(does)
    }


def calls(folder: Path) -> list[str]:
    """Names of the trials that were begun, in order."""
    path = folder / "calls"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet waited for does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(folder: Path, within: float = 10.0) -> bool:
    """Whether none of the processes that trials ran in is left."""
    pids = {int(line.split()[1]) for line in (folder / "calls").read_text().splitlines()} - {os.getpid()}
    end = time.monotonic() + within
    while alive := any(is_alive(pid) for pid in pids):
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    return not alive


def without_seconds(outcomes: Mapping[str, Outcome]) -> list[tuple[str, Any, str | None]]:
    return [(name, outcome.result, outcome.failure) for name, outcome in outcomes.items()]


# --- results


@pytest.mark.parametrize("executor", [None, POOL, ThreadPoolExecutor])
def test_results_come_in_order_whatever_ends_first(tmp_path: Path, executor: Any) -> None:
    trials = study(tmp_path, *["returns"] * 5)
    for i, arguments in enumerate(trials.values()):
        arguments["seconds"] = 0.3 - 0.06 * i
    outcomes = run_trials(trial, trials, executor=executor, workers=1 if executor is None else 3)
    assert without_seconds(outcomes) == [(name, right(name), None) for name in trials]
    assert outcomes["t0"].seconds > 0.29
    assert sorted(calls(tmp_path)) == list(trials)


@pytest.mark.parametrize("executor", [None, POOL])
def test_what_a_trial_raises_is_its_outcome(tmp_path: Path, executor: Any) -> None:
    does = ["raises", "returns", "exits", "returns what JSON cannot hold", "returns"]
    outcomes = run_trials(trial, study(tmp_path, *does), executor=executor)
    assert [outcome.result for outcome in outcomes.values()] == [None, right("t1"), None, None, right("t4")]
    failures = [outcome.failure or "" for outcome in outcomes.values()]
    assert failures[0].startswith("ValueError: two lines (test_trials.py:")
    assert failures[2].startswith("SystemExit: 3 (test_trials.py:")
    assert failures[3].startswith("TypeError: Object of type set is not JSON serializable (")
    assert calls(tmp_path) == list(outcomes)


class Unsayable(Exception):
    def __str__(self) -> str:
        return self.message  # which nobody has set


def unsayable(x: int) -> int:
    raise Unsayable


@pytest.mark.parametrize("executor", [None, POOL])
def test_an_exception_without_words_is_an_outcome_too(executor: Any) -> None:
    outcomes = run_trials(unsayable, {"a": {"x": 1}, "b": {"x": 2}}, executor=executor)
    failures = [outcome.failure or "" for outcome in outcomes.values()]
    assert all(failure.startswith("Unsayable (test_trials.py:") for failure in failures)


def test_what_cannot_be_sent_to_a_process_fails_by_name() -> None:
    outcomes = run_trials(lambda x: x, {"a": {"x": 1}, "b": {"x": 2}}, executor=POOL, workers=2)
    assert all("<lambda>" in (outcome.failure or "") for outcome in outcomes.values())


def test_no_trials_start_no_executor() -> None:
    assert run_trials(trial, {}, executor=lambda workers: pytest.fail("started")) == {}


# --- what hangs


@posix
def test_a_hung_trial_is_killed_and_the_others_complete(tmp_path: Path) -> None:
    trials = study(tmp_path, "returns", "hangs", "returns", "hangs", "returns", "returns")
    started = time.monotonic()
    outcomes = run_trials(trial, trials, executor=POOL, workers=2, time_limit=1.0)
    assert time.monotonic() - started < 20
    hung = {"t1", "t3"}
    assert without_seconds(outcomes) == [
        (name, None, "timed out after 1 s") if name in hung else (name, right(name), None) for name in trials
    ]
    assert 1.0 <= outcomes["t1"].seconds < 5.0
    assert gone(tmp_path)


@posix
def test_who_was_in_the_pool_with_it_runs_again(tmp_path: Path) -> None:
    trials = study(tmp_path, "hangs", "returns", "hangs once", "returns")
    trials["t1"]["seconds"] = (
        0.5  # t2 begins when t0 has 1.5 s left, and is cut off when it has 0.5 s left itself
    )
    outcomes = run_trials(trial, trials, executor=POOL, workers=2, time_limit=2.0)
    assert [outcome.failure is None for outcome in outcomes.values()] == [False, True, True, True]
    assert sorted(calls(tmp_path)) == ["t0", "t1", "t2", "t2", "t3"]


@posix
def test_waiting_does_not_count(tmp_path: Path) -> None:
    trials = study(tmp_path, *["returns"] * 5, seconds=0.4)
    outcomes = run_trials(trial, trials, executor=POOL, time_limit=1.5)
    assert all(outcome.failure is None for outcome in outcomes.values())


@posix
def test_a_pool_with_much_in_its_pipes_can_be_killed(tmp_path: Path) -> None:
    trials = {f"t{i}": {"ballast": "x" * 5_000_000} for i in range(3)}
    outcomes = run_trials(partial(sleep_beside, 600), trials, executor=POOL, workers=2, time_limit=1.0)
    assert [outcome.failure for outcome in outcomes.values()] == ["timed out after 1 s"] * 3


def sleep_beside(seconds: float, ballast: str) -> None:
    time.sleep(seconds)


# --- what dies


@posix
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_only_the_trial_that_kills_its_process_fails(tmp_path: Path, workers: int) -> None:
    trials = study(tmp_path, "returns", "dies", "returns", "returns", "dies", "returns", seconds=0.1)
    outcomes = run_trials(trial, trials, executor=POOL, workers=workers)
    failed = "its process died: killed, out of memory, crashed, or never started"
    assert without_seconds(outcomes) == [
        (name, None, failed) if arguments["does"] == "dies" else (name, right(name), None)
        for name, arguments in trials.items()
    ]
    # Two pools break: a trial can have been in each of them, and once on its own.
    assert max(calls(tmp_path).count(name) for name in trials) <= 3
    assert gone(tmp_path)


@posix
def test_all_may_die(tmp_path: Path) -> None:
    outcomes = run_trials(trial, study(tmp_path, *["dies"] * 4), executor=POOL, workers=2)
    assert [outcome.result for outcome in outcomes.values()] == [None] * 4
    assert all("died" in (outcome.failure or "") for outcome in outcomes.values())


@posix
def test_hanging_and_dying_together(tmp_path: Path) -> None:
    trials = study(tmp_path, "dies", "hangs", "returns", "hangs", "dies", "raises", "returns")
    outcomes = run_trials(trial, trials, executor=POOL, workers=3, time_limit=1.5)
    found = [(outcome.failure or "returned").split()[1:2] for outcome in outcomes.values()]
    assert found == [["process"], ["out"], [], ["out"], ["process"], ["two"], []]


@posix
def test_what_ended_as_the_pool_broke_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = futures.wait

    def late(running: Any, *args: Any) -> Any:
        done = sorted(real(running).done, key=lambda future: future.exception() is None)
        return SimpleNamespace(done=done)  # the broken one first

    monkeypatch.setattr(futures, "wait", late)
    trials = study(tmp_path, "returns", "dies")
    trials["t1"]["seconds"] = 0.5
    outcomes = run_trials(trial, trials, executor=POOL, workers=2)
    assert [outcome.failure is None for outcome in outcomes.values()] == [True, False]
    assert sorted(calls(tmp_path)) == ["t0", "t1"]


@posix
def test_a_suspect_is_started_once_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if waiting comes back with nothing, as it does when a time limit is near."""
    real = futures.wait
    monkeypatch.setattr(futures, "wait", lambda running, *args: real(running, 0.02))
    trials = study(tmp_path, "dies", "returns", "returns", seconds=0.5)
    trials["t0"]["seconds"] = 0.1
    outcomes = run_trials(trial, trials, executor=POOL, workers=2)
    assert [outcome.failure is None for outcome in outcomes.values()] == [False, True, True]
    assert sorted(calls(tmp_path)[:2]) == ["t0", "t1"]
    assert calls(tmp_path)[2:] == ["t0", "t1", "t2"]


class BreaksIdle(ProcessPoolExecutor):
    """A process of the first pool dies while it has nothing to do, so that the next `submit` is refused."""

    made = 0

    def __init__(self, workers: int) -> None:
        super().__init__(workers, mp_context=get_context("fork"))
        type(self).made += 1
        self.first = type(self).made == 1

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        if self.first:
            raise BrokenProcessPool("A child process terminated abruptly")
        return super().submit(*args, **kwargs)


@posix
def test_nobody_is_blamed_for_a_process_that_died_idle(tmp_path: Path) -> None:
    trials = study(tmp_path, "returns", "returns")
    outcomes = run_trials(trial, trials, executor=BreaksIdle, workers=2)
    assert all(outcome.failure is None for outcome in outcomes.values())
    assert BreaksIdle.made == 2


SCRIPT = """
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from leaven.trials import run_trials

def pid(dies):
    return os._exit(1) if dies else os.getpid()

if __name__ == "__main__":
    fresh = partial(ProcessPoolExecutor, mp_context=get_context("spawn"), max_tasks_per_child=1)
    trials = {str(i): {"dies": i == 2} for i in range(6)}
    outcomes = run_trials(pid, trials, executor=fresh, workers=2, time_limit=30.0)
    print(*(outcome.result for outcome in outcomes.values()))
"""


def test_a_fresh_process_for_every_trial(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=100
    )
    pids = done.stdout.split()
    assert len(set(pids)) == 6, done.stderr
    assert pids[2] == "None"


# --- executors whose workers are elsewhere


class Cluster(Executor):
    """As Dask's: futures are never `running`, can be cancelled, and their worker goes on all the same."""

    def __init__(self) -> None:
        self.given: list[Future[Any]] = []

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.given.append(future)

        def work() -> None:
            outcome = function(*args, **kwargs)
            if not future.cancelled():
                future.set_result(outcome)

        threading.Thread(target=work, daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        assert not wait


def test_elsewhere_a_hung_trial_is_cancelled_and_its_worker_is_lost(tmp_path: Path) -> None:
    cluster, trials = Cluster(), study(tmp_path, "hangs", "returns", "returns", "returns")
    outcomes = run_trials(trial, trials, executor=lambda workers: cluster, workers=2, time_limit=0.5)
    assert [outcome.failure for outcome in outcomes.values()] == ["timed out after 0.5 s", None, None, None]
    assert [future.cancelled() for future in cluster.given] == [True, False, False, False]


def test_with_all_workers_lost_the_rest_is_not_called_failed(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    run = partial(run_trials, trial, study(tmp_path, "hangs", "returns"), time_limit=0.5, journal=journal)
    with pytest.raises(TrialsError, match=r"^every worker is lost .* 1 trials were not run"):
        run(executor=lambda workers: Cluster())
    assert [json.loads(line)["name"] for line in journal.read_text().splitlines()] == ["t0"]


def test_dask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed", reason="needs Dask: pip install distributed")
    monkeypatch.syspath_prepend(ROOT)  # the workers import this file by its name, tests.test_trials
    settings = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**settings) as cluster, distributed.Client(cluster) as client:
        run = partial(run_trials, trial, executor=lambda workers: client.get_executor(), workers=2)
        dying = run(study(tmp_path, "dies", "returns", "returns"))  # Dask tries it three times more
        hanging = run(study(tmp_path, "hangs", "returns", "raises", "returns"), time_limit=5.0)
    failures = [outcome.failure or "returned" for outcome in (*dying.values(), *hanging.values())]
    expected = ["KilledWorker:", "returned", "returned", "timed", "returned", "ValueError:", "returned"]
    assert [failure.split()[0] for failure in failures] == expected


# --- the journal


def test_a_journal_says_what_has_ended(tmp_path: Path) -> None:
    journal = tmp_path / "new folder" / "journal.jsonl"
    outcomes = run_trials(trial, study(tmp_path, "returns", "raises"), journal=journal)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line.keys() for line in lines] == [{"name", "arguments", "result", "failure", "seconds"}] * 2
    for line in lines:
        assert Outcome(line["result"], line["failure"], line["seconds"]) == outcomes[line["name"]]


@pytest.mark.parametrize("executor", [None, POOL])
def test_what_has_a_result_is_not_run_again(tmp_path: Path, executor: Any) -> None:
    trials = study(tmp_path, "returns", "raises", "returns", "returns")
    journal = tmp_path / "journal"
    some = {name: trials[name] for name in ("t2", "t1", "t0")}
    before = run_trials(trial, some, executor=executor, journal=journal)
    after = run_trials(trial, trials, executor=executor, journal=journal)
    assert calls(tmp_path) == ["t2", "t1", "t0", "t1", "t3"]
    assert list(after) == list(trials)
    assert all(after[name] == before[name] for name in ("t0", "t2"))  # seconds too
    assert list(run_trials(trial, {"t3": trials["t3"]}, journal=journal)) == ["t3"]
    assert len(calls(tmp_path)) == 5


def test_a_trial_by_other_arguments_is_refused(tmp_path: Path) -> None:
    journal, trials = tmp_path / "journal", study(tmp_path, "returns", "raises")
    run_trials(trial, trials, journal=journal)
    for name in trials:  # one with a result, one that failed
        changed = {**trials, name: {**trials[name], "seconds": 0.1}}
        with pytest.raises(TrialsError, match=rf"knows trial '{name}' by other arguments; rename") as error:
            run_trials(trial, changed, journal=journal)
        assert "\n" not in str(error.value)
    reordered = {name: dict(reversed(arguments.items())) for name, arguments in trials.items()}
    run_trials(trial, reordered, journal=journal)
    assert calls(tmp_path) == ["t0", "t1", "t1"]


def test_a_line_cut_off_anywhere_is_dropped(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    run_trials(trial, study(tmp_path, "returns", "returns"), journal=journal)
    content = journal.read_bytes()
    first = content.index(b"\n") + 1
    for end in range(first + 1, len(content)):
        journal.write_bytes(content[:end])
        with pytest.warns(TornLineWarning, match=r"the last line of .*journal was cut off"):
            opened = Journal(journal)
        assert [entry["name"] for entry in opened.entries] == ["t0"]
        opened.append({"name": "next"})
        opened.close()
        assert journal.read_bytes() == content[:first] + b'{"name": "next"}\n'


@pytest.mark.parametrize(
    "content", [b"hello", b"hello\n", b"\x00\x00", b'{"name": "t0"', b'{"a": 1}\n[]\n', b"\n"]
)
def test_what_is_not_a_journal_is_not_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "precious"
    path.write_bytes(content)
    if content.startswith(b'{"name'):  # as our own line, torn
        with pytest.warns(TornLineWarning):
            Journal(path).close()
        return
    with pytest.raises(JournalError, match=r"line.* of .*precious is not that of a journal"):
        Journal(path)
    assert path.read_bytes() == content


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(TrialsError, match=r"metrics.jsonl is not a journal of trials"):
        run_trials(trial, {}, journal=path)


def test_a_journal_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=f"cannot open the journal .*: {os.strerror(errno.EISDIR)}"):
        run_trials(trial, {}, journal=tmp_path)


# --- studies that are stopped


PROGRAM = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_trials import POOL, study, trial
from leaven.journal import Journal
from leaven.trials import run_trials
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what it starts with &
folder = Path(sys.argv[1])
journal = folder / "journal"
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a program that goes on from `PROGRAM`, in a process group of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str) -> subprocess.Popen[str]:
        text = PROGRAM.format(tests=str(Path(__file__).parent)) + program
        process = subprocess.Popen(
            [sys.executable, "-c", text, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_until(condition: Callable[[], bool], within: float = 30.0) -> None:
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@posix
def test_killed_in_the_middle_of_a_line(tmp_path: Path, start: Callable[..., Any]) -> None:
    process = start("""
class Cut:
    def __init__(self, file): self.file, self.writes = file, 0
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, line):
        self.writes += 1
        if self.writes < 3:
            return self.file.write(line)
        self.file.write(line[:len(line) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

lock = Journal._lock
def cut(self):
    lock(self)
    self._file = Cut(self._file)
Journal._lock = cut
run_trials(trial, study(folder, *["returns"] * 5), journal=journal)
""")
    assert process.wait(60) == -signal.SIGKILL
    assert calls(tmp_path) == ["t0", "t1", "t2"]
    assert not (tmp_path / "journal").read_bytes().endswith(b"\n")
    trials = study(tmp_path, *["returns"] * 5)
    with pytest.warns(TornLineWarning) as caught:
        outcomes = run_trials(trial, trials, journal=tmp_path / "journal")
    assert caught[0].filename == __file__  # the warning points at the user's line
    assert without_seconds(outcomes) == [(name, right(name), None) for name in trials]
    assert calls(tmp_path) == ["t0", "t1", "t2", "t2", "t3", "t4"]


@posix
def test_a_killed_study_leaves_no_process_and_no_lock(tmp_path: Path, start: Callable[..., Any]) -> None:
    process = start("""
run_trials(trial, study(folder, "returns", "hangs", "hangs"), executor=POOL, workers=2, journal=journal)
""")
    wait_until(lambda: len(calls(tmp_path)) == 3)
    with pytest.raises(JournalError, match=r"^the journal .*journal is in use by another process$"):
        run_trials(trial, {}, journal=tmp_path / "journal")
    process.kill()
    process.wait()
    if sys.platform.startswith("linux"):
        assert gone(tmp_path)
    trials = study(tmp_path, "returns", "returns", "returns")
    del trials["t1"], trials["t2"]
    run_trials(trial, trials, journal=tmp_path / "journal")
    assert sorted(calls(tmp_path)) == ["t0", "t1", "t2"]


@posix
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_ctrl_c_ends_the_study(
    tmp_path: Path, start: Callable[..., Any], send: Callable[[int, int], None]
) -> None:
    process = start("""
run_trials(trial, study(folder, "returns", "hangs", "raises", "hangs"), executor=POOL, workers=2, journal=journal)
""")
    wait_until(lambda: len(calls(tmp_path)) == 4)
    send(process.pid, signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT
    assert gone(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["t0", "t2"]


@pytest.mark.parametrize("executor", [None, POOL])
def test_an_interrupt_is_not_an_outcome(tmp_path: Path, executor: Any) -> None:
    trials = study(tmp_path, "returns", "returns", "is interrupted", "returns")
    with pytest.raises(KeyboardInterrupt):
        run_trials(trial, trials, executor=executor, journal=tmp_path / "journal")
    assert calls(tmp_path) == ["t0", "t1", "t2"]
    trials["t2"]["does"] = "returns"
    run_trials(trial, trials, executor=executor, journal=tmp_path / "journal")
    assert calls(tmp_path) == ["t0", "t1", "t2", "t2", "t3"]


@posix
def test_what_ended_just_before_an_interrupt_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = futures.wait

    def interrupted(running: Any, *args: Any) -> Any:
        real(running)
        raise KeyboardInterrupt

    monkeypatch.setattr(futures, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_trials(
            trial, study(tmp_path, *["returns"] * 4), executor=POOL, workers=2, journal=tmp_path / "journal"
        )
    monkeypatch.undo()
    run_trials(trial, study(tmp_path, "returns", "returns"), journal=tmp_path / "journal")
    assert sorted(calls(tmp_path)) == ["t0", "t1"]


@posix
@pytest.mark.parametrize("executor", ["None", "POOL"])
def test_a_full_disk_ends_the_study_in_one_line(
    tmp_path: Path, start: Callable[..., Any], executor: str
) -> None:
    process = start(f"""
import resource
run_trials(trial, study(folder, "returns"), journal=journal)
resource.setrlimit(resource.RLIMIT_FSIZE, (journal.stat().st_size + 20, resource.RLIM_INFINITY))
run_trials(trial, study(folder, "returns", "returns"), executor={executor}, journal=journal)
""")
    _, stderr = process.communicate(timeout=60)
    assert f"JournalError: cannot write to the journal {tmp_path}/journal: " in stderr.splitlines()[-1]
    run_trials(trial, study(tmp_path, "returns", "returns"), journal=tmp_path / "journal")
    assert calls(tmp_path) == ["t0", "t1", "t1"]


@posix
def test_a_line_that_did_not_fit_does_not_spoil_the_next(tmp_path: Path) -> None:
    """Trials that ended together are written one after another, also when the disk was full for the first."""
    done = subprocess.run(
        [sys.executable, "-c", f"""
import resource
from pathlib import Path
from leaven.journal import Journal, JournalError
journal = Journal(Path({str(tmp_path / "journal")!r}))
journal.append({{"a": 1}})
resource.setrlimit(resource.RLIMIT_FSIZE, (15, resource.RLIM_INFINITY))
try:
    journal.append({{"b": "long"}})
except JournalError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.append({{"c": 3}})
"""],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Journal(tmp_path / "journal").entries == [{"a": 1}, {"c": 3}]


# --- refusals


def test_what_cannot_be_done_is_refused_in_one_line(tmp_path: Path) -> None:
    run = partial(run_trials, trial, study(tmp_path, "returns"))
    with pytest.raises(TrialsError, match=r"^time_limit and workers need an executor"):
        run(time_limit=5.0)
    with pytest.raises(TrialsError, match=r"^time_limit and workers need an executor"):
        run(workers=2)
    with pytest.raises(TrialsError, match=r"^time_limit cannot stop threads"):
        run(executor=ThreadPoolExecutor, time_limit=5.0)
    for wrong in (
        {"workers": 0},
        {"time_limit": 0.0},
        {"time_limit": float("inf")},
        {"time_limit": float("nan")},
    ):
        with pytest.raises(TrialsError, match=r"^workers and time_limit must be positive numbers"):
            run(executor=POOL, **wrong)
    with pytest.raises(
        TrialsError, match=r"^arguments of trial 'a' must be what JSON can hold .*functools.partial"
    ):
        run_trials(trial, {"a": {"folder": tmp_path}})
    assert calls(tmp_path) == []


def test_importing_it_is_cheap() -> None:
    program = "import sys, leaven.trials; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy"} & set(json.loads(done.stdout.replace("'", '"')))
