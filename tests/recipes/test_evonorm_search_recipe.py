"""recipes/evonorm_search.py: searches, goes on after a kill, ranks again, says what is wrong."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from recipe_programs import LAYERS, refusal, start

from leaven.callbacks import EvoNorm
from leaven.callbacks.evonorm import Genome

Recipe = Callable[[Path], ModuleType]
QUICK = [
    "--candidates",
    "8",
    "--population",
    "3",
    "--steps",
    "6",
    "--quality-steps",
    "3",
    "--quality",
    "0.01",
]
QUICK += ["--stability-steps", "1", "--round-size", "4", "--anchors", "resnet,mobilenet", "--labels", "20"]


def lines(folder: str) -> list[Any]:
    entries = [json.loads(line) for line in Path(folder, "journal.jsonl").read_text().splitlines()]
    return [(entry["name"], entry["arguments"], entry["result"]) for entry in entries]


def test_a_search_and_what_it_leaves(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(LAYERS).main([*QUICK, "--output-dir", "out"])
    said = capsys.readouterr().out
    assert "candidate 8/8" in said
    assert "digits are a smoke test" in said
    assert "the held-out part is closed" in said
    found = json.loads(Path("out/search.json").read_text())["found"]
    assert found == sorted(found, key=lambda each: (-each["mean"], each["candidate"]))
    assert set(found[0]["scores"]) == {"resnet", "mobilenet"}
    best = Genome.from_json(Path("out/layer.json").read_text())
    assert best.formula() == found[0]["formula"]
    assert best.meta["candidate"] == found[0]["candidate"]
    EvoNorm(genome="out/layer.json")
    for name in ("scores", "front"):
        assert Path(f"out/plots/{name}.png").stat().st_size > 5000


@pytest.mark.parametrize(("classes", "least"), [(2, 0.75), (3, 2 / 3), (10, 0.2)])
def test_the_least_accuracy_can_be_had(classes: int, least: float) -> None:
    from leaven.recipes.evonorm_search import EvoNormSearchSettings, budget

    assert budget(EvoNormSearchSettings(), classes).quality == least


def test_a_search_may_be_given_more_candidates(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    module = recipe(LAYERS)
    few = ["--candidates", "3", "--round-size", "2", "--steps", "2", "--quality-steps", "0"]
    more = [*QUICK, *few, "--candidates", "5"]
    module.main([*more, "--output-dir", "whole"])
    module.main([*QUICK, *few, "--output-dir", "grown"])
    module.main([*more, "--output-dir", "grown", "--resume", "auto"])
    assert lines("grown") == lines("whole")
    assert Path("grown/layer.json").read_text() == Path("whole/layer.json").read_text()
    again = [*QUICK, *few, "--output-dir", "grown", "--resume", "auto"]
    assert "candidates 5 -> 3" in refusal(lambda: module.main(again), capsys)
    assert "nodes 10 -> 9" in refusal(lambda: module.main([*again, "--nodes", "9"]), capsys)


@pytest.mark.slow
def test_ranking_again(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    module = recipe(LAYERS)
    module.main([*QUICK, "--output-dir", "out"])
    module.main([*QUICK, "--rerank", "out", "--top", "2", "--seeds", "2", "--output-dir", "again"])
    ranking = json.loads(Path("again/rerank.json").read_text())["ranking"]
    assert len(ranking) == 2 + 7
    assert {"bn_relu", "evonorm_s0", "evonorm_b0"} < {each["name"] for each in ranking}
    assert all(len(each["seeds"]) == 2 for each in ranking if each["mean"] is not None)
    assert "the held-out part is closed" not in capsys.readouterr().out.split("run folder: out")[1]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_stopped_is_the_whole_search(recipe: Recipe, signum: int) -> None:
    module = recipe(LAYERS)
    module.main([*QUICK, "--output-dir", "whole"])
    program = start([sys.executable, LAYERS, *QUICK, "--output-dir", "cut"], Path())
    journal = Path("cut/journal.jsonl")
    while not journal.is_file() or len(journal.read_text().splitlines()) < 3:
        assert program.poll() is None
    program.send_signal(signum)
    assert program.wait(60) == (143 if signum == signal.SIGTERM else -signal.SIGKILL)
    assert len(lines("cut")) < 8
    module.main([*QUICK, "--output-dir", "cut", "--resume", "auto"])
    assert lines("cut") == lines("whole")
    assert Path("cut/layer.json").read_text() == Path("whole/layer.json").read_text()


@pytest.mark.slow
def test_processes_and_a_cluster_that_loses_a_worker(recipe: Recipe) -> None:
    module = recipe(LAYERS)
    module.main([*QUICK, "--output-dir", "serial"])
    program = start([sys.executable, LAYERS, *QUICK, "--jobs", "2", "--output-dir", "processes"], Path())
    assert program.wait(200) == 0, program.stdout.read() if program.stdout else ""
    assert sorted(lines("processes")) == sorted(lines("serial"))
    distributed = pytest.importorskip("distributed", reason='needs Dask: pip install "leaven[cluster]"')
    settings: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**settings) as cluster:
        flags = [*QUICK, "--jobs", "2", "--dask", cluster.scheduler_address, "--output-dir", "dask"]
        program = start([sys.executable, LAYERS, *flags], Path())
        os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)  # its nanny starts another
        assert program.wait(200) == 0, program.stdout.read() if program.stdout else ""
    assert sorted(lines("dask")) == sorted(lines("serial"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--start", "swish"], "genome swish: "),
        (["--start", "bad.json"], "genome bad.json: not a genome"),
        (["--start", "evonorm_b0"], "is not in the S series"),
        (["--anchors", "vgg"], "--anchors vgg: there are mobilenet, efficientnet, resnet"),
        (["--backbone", "resnet18"], "--backbone and --init are not of this recipe"),
        (["--candidates", "0"], "--candidates must be at least 1"),
        (["--population", "1"], "population must be at least 2"),
        (["--rerank", "nowhere"], "no search.json there"),
        (["--val-from-train", "none"], "a search must not see the held-out images"),
        (["--time-limit", "9"], "--time-limit needs processes of their own"),
        (["--random", "--winner", "nsga2"], "--random has no parents"),
        (["--quality", "0.99"], "none of 8 candidates learnt anything"),
    ],
)
def test_wrong_flags(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    Path("bad.json").write_text("[]")
    module = recipe(LAYERS)
    assert message in refusal(lambda: module.main([*QUICK, *flags]), capsys)
    assert Path("runs").exists() == ("--quality" in flags)  # the others are refused before anything is made
