"""Threads and signals under a launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recipe_programs import environment

from leaven.recipes.common.launcher import (
    Launcher,
    asked_processes,
    choose_threads,
    find_launcher,
    is_launcher,
)
from leaven.recipes.common.signals import StopRequest, exit_code

ACCELERATE = ("/venv/bin/python", "/venv/bin/accelerate", "launch", "recipes/spark.py")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (ACCELERATE, True),
        (("python", "-m", "accelerate.commands.launch", "x.py"), True),
        (("/usr/bin/python3", "/venv/bin/accelerate-launch", "x.py"), True),
        (("python", "-m", "torch.distributed.run", "x.py"), True),
        (("/venv/bin/python", "/venv/bin/torchrun", "x.py"), True),
        (("bash", "-c", "accelerate launch x.py"), False),
        (("python", "train.py", "--name", "accelerate"), False),
        (("-zsh",), False),
        ((), False),
    ],
)
def test_launchers_are_told_by_their_command_line(command: tuple[str, ...], expected: bool) -> None:
    assert is_launcher(command) is expected


@pytest.mark.parametrize(
    ("environment", "launcher", "processes", "threads"),
    [
        ({}, None, 1, 8),
        ({}, None, 2, 4),
        ({}, None, 16, 1),
        ({"OMP_NUM_THREADS": "1"}, None, 1, None),  # python recipes/x.py: the user's own
        ({"OMP_NUM_THREADS": "1"}, Launcher(ACCELERATE), 1, 8),  # the launcher's doing
        ({"OMP_NUM_THREADS": "1"}, Launcher(ACCELERATE), 4, 2),
        ({"OMP_NUM_THREADS": "1"}, Launcher(ACCELERATE, {"OMP_NUM_THREADS": "1"}), 1, None),
        ({"OMP_NUM_THREADS": "3"}, Launcher(ACCELERATE, {"OMP_NUM_THREADS": "3"}), 1, None),
        ({"OMP_NUM_THREADS": "1"}, Launcher((*ACCELERATE[:3], "--num_cpu_threads_per_process=1")), 1, None),
        (
            {"OMP_NUM_THREADS": "1"},
            Launcher((*ACCELERATE[:3], "--num-cpu-threads-per-process", "1")),
            1,
            None,
        ),
    ],
)
def test_the_users_choice_of_threads_wins_and_the_launchers_does_not(
    environment: dict[str, str], launcher: Launcher | None, processes: int, threads: int | None
) -> None:
    assert choose_threads(environment, launcher, 8, processes)[0] == threads


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        (ACCELERATE, None),
        ((*ACCELERATE[:3], "--num_processes", "2", "x.py"), 2),
        ((*ACCELERATE[:3], "--num-processes=4", "x.py"), 4),
        ((*ACCELERATE, "--num_processes", "2"), None),  # a flag of the script
    ],
)
def test_how_many_processes_were_asked_for(command: tuple[str, ...], asked: int | None) -> None:
    assert asked_processes(command) == asked


def test_pytest_is_no_launcher() -> None:
    assert find_launcher() is None


SHOW = """
import torch
from leaven.recipes.common.launcher import find_launcher, set_threads
launcher = find_launcher()
print("OMP_NUM_THREADS" in launcher.environment, set_threads())
"""


@pytest.mark.parametrize("chosen", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_real_launchers_environment_is_read(tmp_path: Path, chosen: bool) -> None:
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    env = environment()
    if not chosen:
        del env["OMP_NUM_THREADS"]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        str(script),
    ]
    shown = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120).stdout.strip()
    cores = len(os.sched_getaffinity(0))
    expected = f"threads: {cores} ({cores} cores / 1 process)"
    if chosen:
        expected = "threads: 1 (OMP_NUM_THREADS=1, set by you)"
    assert shown.partition(";")[0] == f"{chosen} {expected}"  # behind it, that the machine is busy


ORPHAN = """
import os, signal, subprocess, sys, time
if sys.argv[1] == "parent":
    child = subprocess.Popen([sys.executable, __file__, "child", *sys.argv[2:]], stdout=subprocess.PIPE, text=True)
    print(child.stdout.readline(), end="", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
from leaven.recipes.common import launcher
if sys.argv[2] == "launched":
    launcher.is_launcher = lambda command: True
launcher.stop_with_launcher()
signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[3], "w").write("asked to stop"), os._exit(0)))
print(os.getpid(), flush=True)
time.sleep(2 if sys.argv[2] == "alone" else 60)
open(sys.argv[3], "w").write("lived on")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux signals the death of a parent")
@pytest.mark.parametrize(("how", "expected"), [("launched", "asked to stop"), ("alone", "lived on")])
def test_the_death_of_a_launcher_is_a_sigterm_and_that_of_a_shell_is_not(
    tmp_path: Path, how: str, expected: str
) -> None:
    script, result = tmp_path / "orphan.py", tmp_path / "result"
    script.write_text(ORPHAN)
    command = [sys.executable, str(script), "parent", how, str(result)]
    subprocess.run(command, env=environment(), stdout=subprocess.PIPE, timeout=120)
    end = time.monotonic() + 60
    while not (result.exists() and result.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    assert result.read_text() == expected


def test_the_first_signal_counts_and_the_rest_change_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.signum == 0
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGINT
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert (exit_code(signal.SIGTERM), exit_code(signal.SIGINT)) == (143, 130)
