"""Many runs of the recipes, each done once: a line per finished run in a committed file, whatever machine did it."""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# glibc keeps freed memory, in huge pages: fewer page faults, 5 to 30 % faster, for all arms alike.
MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "MALLOC_TOP_PAD_": "268435456"}
MEMORY |= {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


@dataclass(frozen=True)
class Run:
    """One run of a recipe: its name, its command line without ``--output-dir``, and whose weights it starts from."""

    name: str
    words: tuple[str, ...]
    start: "Run | None" = None


class Ledger:
    """The finished runs, by name."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, Lock()
        lines = path.read_text().splitlines() if path.is_file() else []
        self.rows: dict[str, dict[str, Any]] = {row["name"]: row for row in map(json.loads, lines)}

    def top1(self, run: Run) -> float:
        score: float = self.rows[run.name]["top1"]
        return score

    def seconds(self, run: Run) -> float:
        """What the updates of a run took, validation left out."""
        spent: float = self.rows[run.name]["seconds"]
        return spent

    def add(self, run: Run, folder: Path) -> None:
        """Write down what came out of a run."""
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        row = {"name": run.name, "command": " ".join(run.words)}
        if run.start is not None:
            row["start"] = run.start.name
        training = [each["step_s"] for each in log if "val_top1" not in each]
        row |= {"updates": len(log), "seconds": round(sum(training), 1)}
        row |= {"loss": round(statistics.mean(each["loss"] for each in log[-20:]), 4)}
        if "val_top1" in log[-1]:
            row["top1"] = round(log[-1]["val_top1"], 5)
        curve = [(each["step"], round(each["val_top1"], 5)) for each in log if "val_top1" in each]
        if len(curve) > 1:
            row["curve"] = curve
        row["card"] = card(folder / "README.md")
        with self.lock, self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            self.rows[run.name] = row


def card(path: Path) -> dict[str, float]:
    """The results in a run's model card, as numbers."""
    results = path.read_text().split("## Results")[1].split("## Data")[0]
    rows = re.findall(r"^\| (.+) \| ([\d.]+)(%?) \|$", results, re.MULTILINE)
    return {what: float(value) / (100 if percent else 1) for what, value, percent in rows}


def arguments(description: str | None, steps: Sequence[str]) -> argparse.Namespace:
    """The command line of a benchmark that is made of runs."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=steps)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    return parser.parse_args()


def data_sets(folder: Path, work: Path) -> dict[str, str]:
    """Where the two sets of images lie: photos as they are, and the small ones unpacked below `work`."""
    work.mkdir(parents=True, exist_ok=True)
    cifar = work / "cifar10-jpeg"
    if not cifar.is_dir():
        with TemporaryDirectory(dir=work) as unpacked:  # all of it or nothing, whatever kills this
            zipfile.ZipFile(folder / "cifar10-jpeg" / "cifar10-jpeg-12k.zip").extractall(unpacked)
            (Path(unpacked) / cifar.name).rename(cifar)
    return {"photos": str((folder / "imagenette224-mini").resolve()), "cifar": str(cifar)}


def execute(
    chains: Sequence[Sequence[Run]], data: dict[str, str], work: Path, jobs: int, ledger: Ledger
) -> None:
    """Do what is not in the ledger: so many chains at a time on one thread each, their runs one after another.

    What was stopped goes on where it was. A run whose start is not here any more does that first.
    """
    environment = os.environ | MEMORY | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}

    def one(run: Run) -> None:
        folder = work / run.name
        words = [data.get(word, word) for word in run.words]
        if run.start is not None:
            weights = work / run.start.name / "backbone.safetensors"
            if not weights.is_file():
                one(run.start)
            words += ["--init", str(weights)]
        command = [sys.executable, *words, "--output-dir", str(folder), "--resume", "auto"]
        with (work / f"{run.name}.log").open("a") as log:
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log).returncode
        if code:
            raise SystemExit(f"{run.name} failed ({code}): see {work / run.name}.log")
        if run.name not in ledger.rows:
            ledger.add(run, folder)
        print(f"done: {run.name}", flush=True)

    def chain(runs: Sequence[Run]) -> None:
        for run in runs:
            if run.name not in ledger.rows:
                one(run)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(chain, chains))


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation, and the values by seed."""
    mean, sd = statistics.mean(values), statistics.stdev(values)
    return {"mean": round(mean, 4), "sd": round(sd, 4), "seeds": [round(v, 4) for v in values]}


def interval95(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % confidence interval of the mean."""
    from scipy import stats

    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return round(mean - reach, 4), round(mean + reach, 4)
