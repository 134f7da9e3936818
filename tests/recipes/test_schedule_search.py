"""recipes/schedule_search.py: what a trial trains, what the result means, resume, and errors."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from recipe_programs import SEARCH, run

from leaven.curricula import EfficientTrain
from leaven.curricula.search import SearchResult
from leaven.recipes.common.curriculum import read_schedule
from leaven.recipes.common.flags import run_main

Recipe = Callable[[Path], ModuleType]
SMALL = ["--backbone", "test_resnet", "--sizes", "32,48,64", "--batch-size", "8"]
SMALL += ["--epochs", "2", "--limit-batches", "4"]


def test_equal_stages_of_updates_or_of_computation(recipe: Recipe) -> None:
    module = recipe(SEARCH)
    steps = read_schedule(module.curriculum((32, 48, 64), "greedy"))
    assert [round(stage.until, 3) for stage in steps.stages] == [0.333, 0.667, 1.0]
    assert steps.shapes() == (32, 48, 64)
    compute = read_schedule(module.curriculum((32, 48, 64), "compute"))
    for end, share in ((compute.stages[0].until, 1 / 3), (compute.stages[1].until, 2 / 3)):
        assert compute.compute(end) == pytest.approx(share, abs=1e-3)


def test_what_a_whole_training_is(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    module = recipe(SEARCH)
    asked: list[Any] = []
    monkeypatch.setattr(module, "accuracy", lambda settings: asked.append(settings) or 0.5)
    settings = module.trainings(module.SearchSettings(sizes=(32, 48, 64), image_size=(64, 64)))
    assert module.whole(settings, "folder", (32, 48)) == 0.5
    under = asked[0]
    assert under.callbacks == ("efficienttrain",)
    curriculum = EfficientTrain(read_schedule(under.curriculum), image_size=64)
    assert [curriculum.size_at(t)[0] for t in (0, 0.3, 0.34, 0.6, 0.7, 1)] == [32, 32, 48, 48, 64, 64]
    assert under.output_dir == str(Path("folder") / "32-48-64")
    assert under.val_from_train == "20%"
    module.whole(settings, "folder", (64, 64))
    assert asked[1].callbacks == ()  # the baseline


def test_what_a_stage_is(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """About as many updates as were asked for, from the state's weights; judged after tuning at full size."""
    module = recipe(SEARCH)
    asked: list[Any] = []
    monkeypatch.setattr(module, "accuracy", lambda settings: asked.append(settings) or len(asked) / 10)
    settings = module.trainings(module.SearchSettings(sizes=(32, 64), image_size=(64, 64)))
    found = module.stage(settings, "folder", 20, 3, "folder/stages-64/backbone.safetensors", 2, 32, 95)
    trained, tuned = asked
    assert trained.image_size == (32, 32)
    assert trained.epochs * trained.limit_batches == 95
    assert trained.init == "folder/stages-64/backbone.safetensors"
    assert trained.sched == "constant"
    assert tuned.image_size == (64, 64)
    assert tuned.init == found["state"] == str(Path("folder") / "stages-64-32" / "backbone.safetensors")
    assert tuned.epochs == 3
    assert found["score"] == 0.2


@pytest.mark.parametrize("steps", [1, 20, 24, 29, 30, 49, 71])
def test_a_stage_fits_the_batches_that_there_are(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """An epoch has 20: one of 24 would end early, and sizes would be compared at unequal computation."""
    module = recipe(SEARCH)
    asked: list[Any] = []
    monkeypatch.setattr(module, "accuracy", lambda settings: asked.append(settings) or 0.5)
    settings = module.trainings(module.SearchSettings(sizes=(32, 64), image_size=(64, 64)))
    module.stage(settings, "folder", 20, 3, None, 1, 32, steps)
    done = asked[0].epochs * min(asked[0].limit_batches, 20)
    assert abs(done - steps) <= asked[0].epochs / 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["greedy", "compute"])
def test_a_search_finds_a_curriculum_and_does_nothing_twice(tmp_path: Path, method: str) -> None:
    """As a program: its trainings are processes that import it again."""
    command = [sys.executable, str(SEARCH), *SMALL, "--sizes", "32,64", "--stages", "2"]
    command += ["--method", method, "--jobs", "2", "--output-dir", "out"]
    said = run(command, tmp_path, timeout=400).stdout
    out = tmp_path / "out"
    report = json.loads((out / "search.json").read_text())
    assert f"--callbacks efficienttrain --curriculum {report['curriculum']}" in said
    assert read_schedule(report["curriculum"]).full == 64
    tried = [(row["stage"], row["sizes"]) for row in report["tried"]]
    assert tried == ([(0, [64]), (1, [32])] if method == "greedy" else [(1, [32]), (1, [64])])
    assert all(0 <= row["score"] <= 1 for row in report["tried"])
    lines = (out / f"journal-{method}.jsonl").read_text()
    run([*command, "--resume", "auto"], tmp_path, timeout=400)
    assert (out / f"journal-{method}.jsonl").read_text() == lines
    assert json.loads((out / "search.json").read_text())["curriculum"] == report["curriculum"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--sizes", "64"], ["--sizes 64", "two"]),
        (["--stages", "1"], ["--stages must be at least 2"]),
        (["--callbacks", "efficienttrain"], ["leave --callbacks, --curriculum"]),
        (["--method", "random"], ["--method", "greedy"]),
        (["--data", "nowhere"], ["nowhere"]),
        (["--curriculum", "et_pp"], ["leave --callbacks, --curriculum and --replay-buffer out"]),
        (["--dry-run"], ["--dry-run: a search has none"]),
        (["--image-size", "32"], ["--image-size is the largest of --sizes, 64"]),
        (["--finetune-epochs", "3"], ["--finetune-epochs is of --method compute"]),
        (["--method", "compute", "--tolerance", "0.1"], ["--tolerance is of --method greedy"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_wrong_flags(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], flags: list[str], parts: list[str]
) -> None:
    module = recipe(SEARCH)
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: module.main([*SMALL, *flags]))
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]


def searched(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[Any]:
    """Searches that train nothing: what they were asked for."""
    asked: list[Any] = []

    def search(function: Any, sizes: Any, stages: int, **how: Any) -> Any:
        asked.append({"function": function, **how})
        return SearchResult((32,) * stages, 0.5, ())

    monkeypatch.setattr(module, "greedy_search", search)
    monkeypatch.setattr(module, "compute_search", search)
    return asked


def test_a_search_goes_on_only_with_what_it_began_with(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recipe(SEARCH)
    searched(monkeypatch, module)
    module.main([*SMALL, "--output-dir", "out"])
    written = Path("out/config.yaml").read_text()
    module.main([*SMALL, "--output-dir", "out", "--resume", "auto", "--jobs", "2", "--time-limit", "60"])
    changed = (["--lr", "0.01"], ["--seed", "3"], ["--epochs", "5"], ["--backbone", "resnet10t"])
    for flags in changed:
        with pytest.raises(SystemExit) as stopped:
            run_main(
                lambda flags=flags: module.main([*SMALL, *flags, "--output-dir", "out", "--resume", "auto"])
            )
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert f"cannot resume out exactly: {flags[0][2:]} " in said
        assert f"-> {flags[1]}; go back to the old values" in said
    assert Path("out/config.yaml").read_text().replace("jobs: 2", "jobs: 1") == written.replace(
        "time_limit: null", "time_limit: 60.0"
    )


def test_the_budget_of_a_stage_knows_the_limit_of_batches(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recipe(SEARCH)
    asked = searched(monkeypatch, module)
    module.main([*SMALL, "--method", "compute", "--output-dir", "out"])  # 2 epochs of 4 batches, 3 stages
    assert asked[0]["budget"] == 2 * 4 * 64**2 / 3
    assert asked[0]["function"].args[2] == 4


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_search_in_one_line(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, signum: int
) -> None:
    module = recipe(SEARCH)

    def killed(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signum)
        time.sleep(5)

    monkeypatch.setattr(module, "greedy_search", killed)
    before = signal.getsignal(signum)
    with pytest.raises(SystemExit) as stopped:
        module.main([*SMALL, "--output-dir", "out"])
    assert stopped.value.code == 128 + signum
    assert f"stopped by signal {int(signum)}" in capsys.readouterr().out
    assert signal.getsignal(signum) is before
