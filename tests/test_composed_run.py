"""The composed run of benchmarks/: killed twice and started again, it ends as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "composed_run.py"


def start(work: Path) -> "subprocess.Popen[bytes]":
    words = [sys.executable, str(SCRIPT), "--data", "digits", "--work", str(work), "--small"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True, **quiet)


def kill_once(work: Path, file: str, lines: int) -> None:
    """Kill the whole process group when a file has so many lines."""
    process, end = start(work), time.monotonic() + 300
    try:
        path = work / file
        while not path.is_file() or path.read_text().count("\n") < lines:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def results(work: Path) -> dict[str, Any]:
    steps = json.loads((work / "composed_run.json").read_text())["steps"]
    return {
        step: {what: value for what, value in found.items() if not what.startswith("seconds")}
        for step, found in steps.items()
    }


@pytest.mark.slow
def test_killed_and_started_again_it_is_the_same(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait(900) == 0
    kill_once(broken, "1-spark/metrics.jsonl", 6)  # in the second epoch
    kill_once(broken, "3-scalekd/metrics.jsonl", 2)
    assert start(broken).wait(900) == 0
    assert results(whole) == results(broken)
    for step in ("1-spark", "teacher", "3-scalekd", "scratch"):
        left, right = (load_file(work / step / "backbone.safetensors") for work in (whole, broken))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
