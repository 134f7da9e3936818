"""benchmarks/soak.py in small: two recipes, two kills each; and that it can tell two runs apart."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from recipe_programs import ROOT, run

SOAK = ROOT / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    sys.path.insert(0, str(SOAK.parent))
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_two_recipes_survive_two_kills(tmp_path: Path) -> None:
    command = [sys.executable, SOAK, "--kills", "2", "--only", "train,dkm", "--work", tmp_path / "work"]
    done = run([*command, "--out", tmp_path / "soak.json"], tmp_path, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "soak.json").read_text())["recipes"]
    assert {name: (row["kills"], row["equal"]) for name, row in found.items()} == {
        "train": (2, True),
        "dkm": (2, True),
    }


def test_journals_are_compared_by_what_they_say(soak: ModuleType, tmp_path: Path) -> None:
    recipe = soak.Recipe("", "journal.jsonl")
    entries = [{"name": name, "arguments": "digest", "result": 0.5, "seconds": 1} for name in ("a", "b")]
    for folder, lines in (
        ("whole", entries),
        ("order", entries[::-1]),
        ("slower", [{**entry, "seconds": 2} for entry in entries]),
        ("other", [entries[0], {**entries[1], "result": 0.25}]),
        ("short", entries[:1]),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    same = {
        name: soak.equal(tmp_path / "whole", tmp_path / name, recipe)
        for name in ("order", "slower", "other", "short")
    }
    assert same == {"order": True, "slower": True, "other": False, "short": False}


def test_runs_are_compared_by_log_and_weights(soak: ModuleType, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    recipe = soak.Recipe("")
    row, weight = {"step": 1, "loss": 0.5, "step_s": 1.0}, torch.ones(3)
    for folder, log, value in (
        ("whole", row, weight),
        ("slower", {**row, "step_s": 2.0}, weight),
        ("log", {**row, "loss": 0.5000001}, weight),
        ("weights", row, weight * 1.0000001),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "metrics.jsonl").write_text(json.dumps(log) + "\n")
        save_file({"w": value}, tmp_path / folder / "backbone.safetensors")
    same = {
        name: soak.equal(tmp_path / "whole", tmp_path / name, recipe) for name in ("slower", "log", "weights")
    }
    assert same == {"slower": True, "log": False, "weights": False}


def test_an_end_that_is_not_as_documented_is_told(soak: ModuleType, tmp_path: Path) -> None:
    for log, code, text in (
        ("good", 2, "error: cannot write x\n"),
        ("trace", 1, "Traceback (most recent call last):\nOSError: no\n"),
        ("silent", 0, "all well\n"),
        ("two", 2, "error: cannot write x\nerror: cannot write y\n"),
    ):
        (tmp_path / log).write_text(text)
        assert (soak.ended(tmp_path, log, code, "cannot write") == "") == (log == "good"), log
