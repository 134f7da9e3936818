"""What `accelerate launch` or `torchrun` does to our process, and what we do about it."""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
PROGRAMS = ("accelerate", "accelerate-launch", "torchrun")
_MARKS = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}  # which they leave in the environment
_MODULES = ("accelerate.commands.", "torch.distributed.run", "torch.distributed.launch")


@dataclass(frozen=True)
class Launcher:
    """The process that started ours: its command line and the environment that *it* was started with."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def find_launcher() -> Launcher | None:
    """Our parent process if it is a launcher, else None.

    The parent is looked at, not our environment, which shells and everything they start inherit. Where there is
    no /proc (not Linux) the environment has to do, and the user's own choice of threads cannot be seen.
    """
    if not Path("/proc").is_dir():
        return Launcher(()) if _MARKS & os.environ.keys() else None
    try:
        parent = Path("/proc") / str(os.getppid())
        command = tuple((parent / "cmdline").read_bytes().decode(errors="replace").split("\0"))
        if not is_launcher(command):
            return None
        lines = (parent / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return Launcher(command, dict(line.split("=", 1) for line in lines if "=" in line))


def is_launcher(command: tuple[str, ...]) -> bool:
    """Whether a command line is `accelerate ...`, `torchrun ...` or one of them by `python -m ...`."""
    return any(Path(word).name in PROGRAMS or word.startswith(_MODULES) for word in command[:3])


def asked_processes(command: tuple[str, ...]) -> int | None:
    """The ``--num_processes`` of an `accelerate launch` command line; None if it names none."""
    for word, following in zip(command, (*command[1:], ""), strict=True):
        name, _, value = word.replace("-", "_").partition("=")
        if name == "__num_processes" and (value or following).isdigit():
            return int(value or following)
        if word.endswith(".py"):  # the rest is the script's own
            break
    return None


def choose_threads(
    environment: Mapping[str, str], launcher: Launcher | None, cores: int, local_processes: int
) -> tuple[int | None, str]:
    """How many CPU threads this process should use, and why in words; None: leave torch as it is.

    Launchers set OMP_NUM_THREADS=1 when the user chose nothing, which leaves most of a machine idle. Our own
    environment cannot tell the two apart. The launcher's can: it was copied before the launcher changed it.
    """
    chosen = environment.get("OMP_NUM_THREADS")
    if chosen is not None and launcher is None:
        return None, f"OMP_NUM_THREADS={chosen}"
    if chosen is not None and launcher is not None:
        if "OMP_NUM_THREADS" in launcher.environment:
            return None, f"OMP_NUM_THREADS={chosen}, set by you"
        if any("num_cpu_threads_per_process" in word.replace("-", "_") for word in launcher.command):
            return None, f"--num_cpu_threads_per_process {chosen}"
    threads = max(1, cores // local_processes)
    return threads, f"{cores} cores / {local_processes} process{'es' if local_processes > 1 else ''}"


def set_threads(local_processes: int = 1) -> str:
    """Set torch's CPU thread count by `choose_threads`; returns a line to print."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, why = choose_threads(os.environ, find_launcher(), cores, local_processes)
    if threads is not None:
        torch.set_num_threads(threads)
    line = f"threads: {torch.get_num_threads()} ({why})"
    # Threads that wait for each other on a core that somebody else uses cost more than they bring.
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if threads is not None and threads > 1 and busy > cores:
        line += f"; this machine is busy (load {busy:.1f}): if training crawls, set OMP_NUM_THREADS=1"
    return line


def stop_with_launcher() -> None:
    """Ask Linux for a SIGTERM when the launcher dies.

    `accelerate launch` with one process does not pass signals on: the training process would live on, unseen,
    with the GPU in its hands. Nothing is asked without a launcher: a run under `nohup python` must
    outlive its shell.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    if find_launcher() is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died between the two lines
        signal.raise_signal(signal.SIGTERM)
