"""Many independent trials, one after another or on any `concurrent.futures.Executor`, with a journal to resume from.

Searches and studies over many splits are made of trials: calls of one function that need nothing of each other.
The function gets all it needs as arguments, seeds included, so that its result depends neither on the executor,
nor on the number of workers, nor on which trials ran before.
"""

import ctypes
import json
import math
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from concurrent import futures
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from time import monotonic
from typing import Any

from leaven.journal import Journal

__all__ = ["Outcome", "TrialsError", "run_trials"]

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class TrialsError(ValueError):
    """Trials cannot be run as asked; one line says why and what to do."""


@dataclass(frozen=True)
class Outcome:
    """How one trial ended.

    Attributes:
        result: what the function returned, as JSON gives it back (a tuple has become a list); None if it failed.
        failure: None, or one line that says why there is no result.
        seconds: how long it ran.
    """

    result: Any
    failure: str | None
    seconds: float


def run_trials(
    function: Callable[..., Any],
    trials: Mapping[str, Mapping[str, Any]],
    *,
    executor: Callable[[int], futures.Executor] | None = None,
    workers: int = 1,
    time_limit: float | None = None,
    journal: str | Path | None = None,
) -> dict[str, Outcome]:
    """Call ``function(**arguments)`` for every trial; what one of them raises is its outcome and stops no other.

    With a process pool, a trial that exceeds ``time_limit`` fails and its pool is killed, since there is no other
    way to stop it; a trial whose process dies fails too. Trials that went down with another one run again from
    their start. Processes that a trial has started itself are not killed with it.

    On other executors a trial over its time is cancelled, and its worker counts as lost, since it may still be busy.

    Args:
        function: returns what JSON can hold. For processes it must pickle; settings are bound with
            `functools.partial`.
        trials: name -> keyword arguments, which JSON must be able to hold.
        executor: makes an executor of that many workers: `ProcessPoolExecutor`, or
            ``partial(ProcessPoolExecutor, mp_context=get_context("spawn"))`` if this process has used CUDA, or on a
            cluster ``lambda workers: dask_client.get_executor()``. It is called again when a pool has been killed.
            None: one trial after another in this process.
        workers: trials at a time; the executor must have as many free workers, or waiting counts as running.
        time_limit: seconds that a trial may run, start-up of its worker included.
        journal: file that gets one JSON line for every trial that ends. Trials with a result in it are not run
            again; failed ones are. Trials are compared by name and arguments, the function is not: use another
            journal for another function or other bound settings. A journal may serve several studies in turn,
            not at once. See `leaven.journal.Journal`.

    Returns:
        name -> `Outcome`, in the order of ``trials``.

    Raises:
        TrialsError: on arguments that do not fit together, a journal that knows a trial by other arguments, or
            when all workers are lost.
        JournalError: on a journal that is in use, damaged or not writable.
        KeyboardInterrupt: as raised; trials that have ended are in the journal.
    """
    if executor is None and (time_limit is not None or workers != 1):
        raise TrialsError("time_limit and workers need an executor; pass executor=ProcessPoolExecutor")
    if workers < 1 or (time_limit is not None and not 0 < time_limit < math.inf):
        raise TrialsError(f"workers and time_limit must be positive numbers, not {workers} and {time_limit}")
    digests = {name: _digest(name, arguments) for name, arguments in trials.items()}
    with nullcontext() if journal is None else closing(Journal(Path(journal))) as book:
        outcomes = {} if book is None else _finished(book, digests)
        left = {name: arguments for name, arguments in trials.items() if name not in outcomes}

        def record(name: str, outcome: Outcome) -> None:
            if book is not None:
                book.append({"name": name, "arguments": digests[name], **asdict(outcome)})
            outcomes[name] = outcome

        if executor is None:
            for name, arguments in left.items():
                record(name, _call(function, arguments))
        elif left:
            _Parallel(function, left, executor, workers, time_limit, record).run()
    return {name: outcomes[name] for name in trials}


def _digest(name: str, arguments: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(arguments, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise TrialsError(
            f"arguments of trial {name!r} must be what JSON can hold ({error}); "
            "bind anything else to the function with functools.partial"
        ) from error
    return blake2b(text.encode(), digest_size=8).hexdigest()


def _finished(journal: Journal, digests: Mapping[str, str]) -> dict[str, Outcome]:
    """The trials that have a result in the journal."""
    found = {}
    for entry in journal.entries:
        try:
            name, digest, outcome = entry.pop("name"), entry.pop("arguments"), Outcome(**entry)
        except (KeyError, TypeError) as error:
            raise TrialsError(f"{journal.path} is not a journal of trials; name another file") from error
        if digests.get(name, digest) != digest:
            raise TrialsError(
                f"{journal.path} knows trial {name!r} by other arguments; rename it or use another journal"
            )
        if name in digests and outcome.failure is None:
            found[name] = outcome
    return found


def _call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Outcome:
    """One trial. The result goes through JSON here, so that it is the same with and without a journal."""
    started = monotonic()
    try:
        result, failure = json.loads(json.dumps(function(**arguments))), None
    except (Exception, SystemExit) as error:  # a trial may fail in any way; the study goes on
        frame = traceback.extract_tb(error.__traceback__)[-1]
        result, failure = None, f"{_one_line(error)} ({Path(frame.filename).name}:{frame.lineno})"
    return Outcome(result, failure, monotonic() - started)


def _call_in_pool(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Outcome:
    """One trial in a process of a pool.

    A pool's processes outlive a killed parent, and would train on beside the resumed study: Linux can prevent it.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    return _call(function, arguments)


class _Parallel:
    """Runs trials on an executor: never more than it has workers, so that what is handed over is running."""

    def __init__(
        self,
        function: Callable[..., Any],
        trials: Mapping[str, Mapping[str, Any]],
        executor: Callable[[int], futures.Executor],
        workers: int,
        time_limit: float | None,
        record: Callable[[str, Outcome], None],
    ) -> None:
        self.function, self.trials, self.record = function, trials, record
        self.executor, self.workers, self.time_limit = executor, workers, time_limit
        self.waiting = deque(trials)
        # Were running when a process died. Each runs alone, and stays here until it has ended.
        self.suspects: deque[str] = deque()
        self.running: dict[
            futures.Future[Outcome], tuple[str, float]
        ] = {}  # name, and when it was handed over
        self.pool = executor(workers)

    def run(self) -> None:
        """Run all. Whatever happens, no process of a pool is left."""
        try:
            if self.time_limit is not None and isinstance(self.pool, futures.ThreadPoolExecutor):
                raise TrialsError("time_limit cannot stop threads; pass executor=ProcessPoolExecutor")
            while self.waiting or self.suspects or self.running:
                try:
                    self._submit()
                    self._collect()
                except futures.BrokenExecutor:
                    self._blame(self._start_again())
                self._stop_overdue()
        except BaseException:
            try:
                self._save_finished()
            finally:
                _kill(self.pool)
            raise
        self.pool.shutdown(wait=isinstance(self.pool, futures.ProcessPoolExecutor))

    def _submit(self) -> None:
        """Hand over as many trials as there are free workers."""
        if self.suspects and not self.running:
            self._start(self.suspects[0])
        while self.waiting and not self.suspects and len(self.running) < self.workers:
            self._start(self.waiting[0])
            self.waiting.popleft()

    def _start(self, name: str) -> None:
        call = _call_in_pool if isinstance(self.pool, futures.ProcessPoolExecutor) else _call
        future = self.pool.submit(call, self.function, self.trials[name])
        self.running[future] = (name, monotonic())

    def _collect(self) -> None:
        """Wait until a trial ends or its time does, and take what has ended."""
        timeout = None
        if self.time_limit is not None:
            first = min(started for _, started in self.running.values())
            timeout = max(0.0, first + self.time_limit - monotonic())
        for future in futures.wait(self.running, timeout, futures.FIRST_COMPLETED).done:
            name, started = self.running[future]
            try:
                outcome = future.result()
            except futures.BrokenExecutor:
                raise
            except Exception as error:  # the executor's: it cannot be pickled, its Dask worker was lost, ...
                outcome = _failed(_one_line(error), started)
            del self.running[future]
            self._end(name, outcome)

    def _end(self, name: str, outcome: Outcome) -> None:
        self.record(name, outcome)
        if self.suspects and self.suspects[0] == name:
            self.suspects.popleft()

    def _save_finished(self) -> None:
        for future, (name, _) in list(self.running.items()):
            if future.done() and not future.cancelled() and future.exception() is None:
                del self.running[future]
                self._end(name, future.result())

    def _start_again(self) -> list[tuple[str, float]]:
        """Kill the pool and make another; returns what went down with it."""
        _kill(self.pool)
        self._save_finished()
        lost = list(self.running.values())
        self.running.clear()
        self.pool = self.executor(self.workers)
        return lost

    def _blame(self, lost: list[tuple[str, float]]) -> None:
        """A pool does not tell whose process died: a trial that ran alone did it, of several each is run alone."""
        if len(lost) > 1:
            self.suspects.extend(name for name, _ in lost)
        else:
            for name, started in lost:  # none if a process died idle
                self._end(
                    name,
                    _failed("its process died: killed, out of memory, crashed, or never started", started),
                )

    def _stop_overdue(self) -> None:
        if self.time_limit is None:
            return
        latest = monotonic() - self.time_limit
        overdue = [f for f, (_, started) in self.running.items() if started <= latest and not f.done()]
        for future in overdue:
            name, started = self.running.pop(future)
            future.cancel()  # in vain in a process pool, which is killed below
            self._end(name, _failed(f"timed out after {self.time_limit:g} s", started))
        if overdue and isinstance(self.pool, futures.ProcessPoolExecutor):
            self.waiting.extendleft(name for name, _ in reversed(self._start_again()))
        else:
            self.workers -= len(overdue)
        if self.workers == 0 and self.waiting:
            raise TrialsError(
                f"every worker is lost to a trial that ran out of time, {len(self.waiting)} trials were not run; "
                "restart the workers and resume from the journal"
            )


def _kill(pool: futures.Executor) -> None:
    """Shut down at once. Only a process pool can be stopped in the middle of its tasks."""
    if isinstance(pool, futures.ProcessPoolExecutor):
        # Private, but before Python 3.14 there is no other way.
        for process in list((pool._processes or {}).values()):
            process.kill()
    pool.shutdown(wait=isinstance(pool, futures.ProcessPoolExecutor))


def _failed(why: str, started: float) -> Outcome:
    return Outcome(None, why, monotonic() - started)


def _one_line(error: BaseException) -> str:
    try:
        words = " ".join(str(error).split())
    except Exception:  # some classes cannot say themselves, for want of an attribute
        words = ""
    return f"{type(error).__name__}: {words}".removesuffix(": ")
