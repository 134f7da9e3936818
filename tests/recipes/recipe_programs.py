"""Running recipes: in child processes, and what to compare afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leaven.recipes.common.flags import run_main


def refusal(main: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a recipe ends with, as `python recipes/...` would, with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    assert stopped.value.code == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return said


ROOT = Path(__file__).parents[2]
TINY = Path(__file__).parent / "tiny_run.py"
SPARK, TRAIN, EVALUATE, ROTNET, SEARCH, SCALEKD, DKM, PRIOR, DIFFUSION, LAYERS = (
    ROOT / "recipes" / f"{name}.py"
    for name in (
        "spark",
        "train",
        "evaluate",
        "rotnet",
        "schedule_search",
        "scalekd",
        "dkm",
        "functional_prior",
        "diffusion_features",
        "evonorm_search",
    )
)

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]

# What a resumed run must repeat to the bit; the rest of a row tells how fast it was.
EXACT = ("step", "epoch", "loss", "hidden", "lr", "weight_decay", "grad_norm")


def environment(**extra: str) -> dict[str, str]:
    """Of child processes: one thread, on the CPU, and nothing that a launcher left."""
    launched = ("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "GROUP_", "ROLE_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    return clean | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "ACCELERATE_USE_CPU": "1",
        **extra,
    }


def run(
    command: Sequence[str | Path], folder: Path, *, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; its output as text."""
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def start(command: Sequence[str | Path], folder: Path) -> subprocess.Popen[str]:
    """Start a program in a session, and so a process group, of its own; stdout and stderr together."""
    words = [str(word) for word in command]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, cwd=folder, env=environment(), start_new_session=True, **pipes)


def wait_for_line(process: subprocess.Popen[str], start: str) -> list[str]:
    """Read lines until one starts so; all lines read."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(start):
            return lines
    raise AssertionError(f"no line {start!r} in: {''.join(lines)}")


def wait_until_gone(folder: Path, seconds: float = 60) -> None:
    """Wait until no process but this one has its working directory in this folder any more."""
    end = time.monotonic() + seconds
    while left := [pid for pid in _processes() if _folder_of(pid) == folder]:
        assert time.monotonic() < end, f"still running after {seconds} s: {left}"
        time.sleep(0.1)


def kill_all(process: subprocess.Popen[str]) -> None:
    """Leave nothing of a process group behind, whatever a test did."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def log_of(run_folder: Path) -> list[dict[str, Any]]:
    """The exact part of metrics.jsonl."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name in EXACT} for line in lines]


def same_tensors(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether all tensors in two nested dicts are equal to the bit, and there are some."""
    left, right = dict(_tensors(a)), dict(_tensors(b))
    return bool(left) and left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def _tensors(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{name}", value


def _processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid()]


def _folder_of(pid: int) -> Path | None:
    try:
        # A zombie that waits for its parent has no folder any more.
        return Path(os.readlink(f"/proc/{pid}/cwd"))
    except OSError:
        return None


# What tells how fast a run was.
TIMES = {"step_s", "data_s", "images_per_s", "peak_memory_mib"}


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what tells how fast it was."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
