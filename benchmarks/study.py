"""What the benchmarks that are made of trials share: run them, each once, and write down what came out."""

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ledger import MEMORY
from timing import machine

from leaven.trials import run_trials

Trials = dict[str, dict[str, Any]]


def study(
    script: str,
    description: str | None,
    prepare: Callable[[Path, Path, int], tuple[Callable[..., Any], Trials]],
    summary: Callable[[dict[str, Any]], tuple[Any, str]],
    settings: dict[str, Any],
) -> None:
    """The command line of a study: its trials, or with --table what is in so far.

    Args:
        script: ``__file__`` of the benchmark; its name is that of the journal and of the results.
        description: its docstring.
        prepare: makes the function and the trials from --data, --work and --jobs.
        summary: makes rows and a table in words from outcomes by name.
        settings: for the results.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    name, work = Path(script).stem, args.work.resolve()
    journal, path = work / f"{name}.jsonl", Path(script).parent / "results" / f"{name}.json"
    if not journal.is_file() and path.is_file():  # of another machine: what it has done with these settings
        known = json.loads(path.read_text())
        if known["settings"] == json.loads(json.dumps(settings)):
            work.mkdir(parents=True, exist_ok=True)
            journal.write_text("".join(json.dumps(line) + "\n" for line in known["trials"]))
    if not args.table:
        os.environ.update(MEMORY)  # of the processes to come
        function, trials = prepare(args.data.resolve(), work, args.jobs)
        pool = partial(ProcessPoolExecutor, mp_context=get_context("spawn"))
        run_trials(function, trials, executor=pool, workers=args.jobs, journal=journal, time_limit=3600)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    outcomes = {line["name"]: line for line in lines if "name" in line}
    rows, words = summary(outcomes)
    report = {
        "machine": machine("cpu"),
        "settings": settings,
        "results": rows,
        "trials": list(outcomes.values()),
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(words)
