"""The benchmarks that are made of runs of the recipes, without a run: what is done, and what is not done again."""

import json
import sys
import zipfile
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import diffusion_features
import dkm_head
import evonorm_layers
import scalekd
import scalekd_arms
import study
from ledger import Ledger, Run, data_sets

from leaven.recipes.common.start import read_settings
from leaven.recipes.scalekd import ScaleKDSettings
from leaven.trials import run_trials


def test_images_are_unpacked_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cifar10-jpeg").mkdir()
    with zipfile.ZipFile(tmp_path / "cifar10-jpeg" / "cifar10-jpeg-12k.zip", "w") as archive:
        for name in ("train/cat/0.jpg", "train/dog/1.jpg", "test/cat/2.jpg"):
            archive.writestr(f"cifar10-jpeg/{name}", name)
    work, plain = tmp_path / "work", zipfile.ZipFile.extractall

    def killed(self: zipfile.ZipFile, path: Any) -> None:
        plain(self, path, ["cifar10-jpeg/train/cat/0.jpg"])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", killed)
        with pytest.raises(KeyboardInterrupt):
            data_sets(tmp_path, work)
    cifar = Path(data_sets(tmp_path, work)["cifar"])
    assert len([*cifar.rglob("*.jpg")]) == 3
    assert [*work.iterdir()] == [cifar]


def test_a_teacher_that_is_not_here_is_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger knows it from another machine; the students need its weights."""
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({"name": scalekd.taught().name, "top1": 0.7}) + "\n")
    trained = []

    def execute(chains: Any, data: Any, work: Any, jobs: int, ledger: Ledger) -> None:
        trained.extend(run.name for chain in chains for run in chain if run.name not in ledger.rows)

    monkeypatch.setattr(scalekd, "LEDGER", path)
    monkeypatch.setattr(scalekd, "execute", execute)
    monkeypatch.setattr(scalekd, "data_sets", lambda data, work: {})
    how = {"data": tmp_path, "work": tmp_path, "jobs": 1}
    monkeypatch.setattr(scalekd, "arguments", lambda *_: Namespace(step="teacher", **how))
    scalekd.main()
    assert trained == [scalekd.taught().name]
    (tmp_path / scalekd.taught().name).mkdir()
    (tmp_path / scalekd.taught().name / "backbone.safetensors").touch()
    scalekd.main()
    assert len(trained) == 1


def test_an_ablation_leaves_the_settings_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints have them; a run that goes on is refused if they differ."""
    asked: list[Any] = []
    monkeypatch.setattr(scalekd_arms, "distilled", lambda settings, *_: (asked.append(settings), []))
    settings = ScaleKDSettings()
    scalekd_arms.without("frequency", settings, None, None, None)  # type: ignore[arg-type]
    assert asked[0].alpha_freq == 0
    assert settings == ScaleKDSettings()


def test_memory_is_that_of_a_layer_within_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its input has a gradient, for which more is kept."""
    monkeypatch.setattr(evonorm_layers, "SHAPES", ((2, 32, 8, 8),))
    monkeypatch.setattr(
        evonorm_layers, "interleaved", lambda ways, **_: {name: {"ratio_to_BN, ReLU": 1} for name in ways}
    )
    monkeypatch.setattr(torch, "compile", lambda module: module)
    rows = evonorm_layers.cost()["2x32x8x8, eager"]
    x = torch.randn(2, 32, 8, 8, requires_grad=True) * 1.0
    for name, layer in evonorm_layers.layers(32).items():
        assert rows[name]["kept_mib"] == evonorm_layers.kept(layer, x)


RUNS = [dkm_head.backbone(data, kind) for data in dkm_head.SIDE for kind in dkm_head.BACKBONES]
RUNS += [
    diffusion_features.training(data, kind, 0)
    for data in diffusion_features.SETS
    for kind in diffusion_features.HOW
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_recipes_take_the_flags_and_warm_up_for_a_part_of_the_run(run: Run) -> None:
    recipe = Path(run.words[0]).stem
    module = import_module(f"leaven.recipes.{recipe}")
    kinds = [v for k, v in vars(module).items() if k.endswith("Settings") and v.__module__ == module.__name__]
    settings: Any = read_settings(kinds[0], list(run.words[1:]), recipe=recipe)
    assert settings.warmup_epochs <= settings.epochs / 4


@pytest.mark.parametrize(("settings", "again"), [({"steps": (1, 2)}, 0), ({"steps": (3,)}, 1)])
def test_a_study_goes_on_from_the_results_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], again: int
) -> None:
    """What is in the committed results is not done again, unless it is of other settings."""
    trials, journal = {"five": {"x": 5}}, tmp_path / "first.jsonl"
    run_trials(lambda x: x + 1, trials, journal=journal)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    (tmp_path / "results").mkdir()
    known = {"settings": {"steps": [1, 2]}, "trials": [line for line in lines if "name" in line]}
    (tmp_path / "results" / "sums.json").write_text(json.dumps(known))
    called = []

    def run(function: Any, trials: Any, *, journal: Path, **how: Any) -> None:
        run_trials(lambda x: called.append(x) or x + 1, trials, journal=journal)

    monkeypatch.setattr(study, "run_trials", run)
    monkeypatch.setattr(sys, "argv", ["sums.py", "--data", str(tmp_path), "--work", str(tmp_path / "work")])
    study.study(
        str(tmp_path / "sums.py"), "", lambda *_: (None, trials), lambda found: ([*found], "one"), settings
    )
    report = json.loads((tmp_path / "results" / "sums.json").read_text())
    assert len(called) == again
    assert (report["results"], report["trials"][0]["result"]) == (["five"], 6)
