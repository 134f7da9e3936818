"""recipes/dkm.py: tables of all kinds, features of images, studies in processes and on a cluster, resume, errors."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recipe_programs import DKM, refusal, start

from leaven.bayes import DeepKernelMachine
from leaven.bayes.deep_kernel_machine import Prediction
from leaven.recipes.common.flags import UserError, run_main
from leaven.recipes.common.run_folder import RunFolder
from leaven.recipes.common.study import StudySettings, report, run_study
from leaven.recipes.common.tables import Scale, open_table
from leaven.trials import Outcome

Recipe = Callable[[Path], ModuleType]
QUICK = ["--steps", "40", "--inducing", "10", "--nu", "1"]


def results(folder: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "results.json").read_text())
    return found


def numbers(n: int = 60) -> np.ndarray[Any, np.dtype[np.float64]]:
    x = np.random.default_rng(0).normal(size=(n, 3))
    return np.column_stack([x, x[:, 0] - 2 * x[:, 1], x[:, 2] ** 2])


def write_csv(path: str = "table.csv") -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["a", "b", "c", "y", "z"], *numbers().tolist()])


def write_folder() -> None:
    """As the UCI splits lie."""
    Path("folder").mkdir()
    np.savetxt("folder/data.txt", numbers())
    np.savetxt("folder/index_features.txt", [0, 1, 2], fmt="%d")
    np.savetxt("folder/index_target.txt", [3], fmt="%d")
    for k in range(2):
        order = np.random.default_rng(k).permutation(60)
        np.savetxt(f"folder/index_train_{k}.txt", order[6:], fmt="%d")
        np.savetxt(f"folder/index_test_{k}.txt", order[:6], fmt="%d")


def test_a_folder_that_does_not_fit_together_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder()
    with pytest.raises(UserError, match=r"--target is of .csv and .parquet files: folder says itself"):
        open_table("folder", "y")
    np.savetxt("folder/index_target.txt", [5], fmt="%d")
    with pytest.raises(UserError, match=r"index_target.txt must name columns from 0 to 4 of data.txt"):
        open_table("folder", None)
    write = numbers()
    write[6, 1] = math.nan
    np.savetxt("folder/data.txt", write)
    np.savetxt("folder/index_target.txt", [4], fmt="%d")
    with pytest.raises(UserError, match=r"row 7 of data.txt has what is no number"):
        open_table("folder", None)


def test_lines_are_counted_as_they_lie_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b\n\n\n1,2\n3\n")
    with pytest.raises(UserError, match="line 5 has 1 values for 2 columns"):
        open_table(str(tmp_path / "table.csv"), "b")


@pytest.mark.skipif(sys.platform == "win32", reason="locks")
def test_a_journal_that_another_process_holds_is_one_line(tmp_path: Path) -> None:
    path = str(tmp_path / "journal.jsonl")
    program = f"from leaven.journal import Journal; from pathlib import Path; j = Journal(Path({path!r}))"
    source = str(Path(__file__).parents[2] / "src")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    pipes["env"] = os.environ | {"PYTHONPATH": source}
    with subprocess.Popen(
        [sys.executable, "-c", f"{program}; print(flush=True); input()"], **pipes
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(UserError, match="is in use by another process"):
            run_study(dict, {"a": {}}, StudySettings(), RunFolder(tmp_path))
        holder.communicate(b"\n")


def test_an_infinite_likelihood_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a true class with probability 0; JSON has no such number."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    outcomes = {
        str(i): Outcome({"nll": nll, "rmse": 1.0}, None, 1.0) for i, nll in enumerate((math.inf, 2.0))
    }
    report(outcomes, RunFolder(tmp_path), [])
    assert "nll: inf\nrmse: 1.0000 ± 0.0000" in capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert found["summary"]["nll"] == {"mean": "inf", "standard error": None}
    assert [each["result"]["nll"] for each in found["trials"].values()] == ["inf", 2.0]


def test_the_default_table(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(DKM).main(["--steps", "60", "--inducing", "20", "--output-dir", "out"])
    said = capsys.readouterr().out
    assert "diabetes: 442 rows, 10 inputs, target progression" in said
    assert "smoke test" in said
    (trial,) = results()["trials"].values()
    assert trial["result"]["nu"] in ("1", "100", "inf")
    assert trial["result"]["rmse"] < 70  # guessing the mean: 77
    assert results()["summary"]["rmse"]["standard error"] is None


def test_files_give_the_same_numbers(recipe: Recipe) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason='needs pyarrow: pip install "leaven[parquet]"')
    parquet = pytest.importorskip("pyarrow.parquet")
    write_csv()
    columns = dict(zip("abcyz", numbers().T, strict=True))
    parquet.write_table(pyarrow.table(columns), "table.parquet")
    for name in ("table.csv", "table.parquet"):
        recipe(DKM).main([*QUICK, "--data", name, "--target", "y", "--output-dir", name + "-out"])
    assert results("table.csv-out")["summary"] == results("table.parquet-out")["summary"]
    Path("broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"cannot read broken\.parquet"):
        open_table("broken.parquet", "y")


def test_columns_and_rows_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv()
    opened = open_table("table.csv", "y,z")
    assert (opened.columns, opened.targets) == (("a", "b", "c"), ("y", "z"))
    np.testing.assert_array_equal(opened.y, numbers()[:, 3:])
    train, test = opened.split(0)
    assert sorted([*train, *test]) == list(range(60))
    assert len(test) == 6
    assert not np.array_equal(opened.split(1)[1], test)


def test_a_constant_column_stays_at_0() -> None:
    """What differs from it among the test rows keeps its unit. The deviation of these is 3e-17 as computed."""
    column = np.full((455, 1), 0.1)
    scale = Scale(column)
    torch.testing.assert_close(scale(column), torch.zeros(455, 1))
    torch.testing.assert_close(scale(np.array([[1.1]])), torch.ones(1, 1))


def test_a_name_may_hold_a_comma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open("table.csv", "w", newline="") as file:
        csv.writer(file).writerows([["a", "b", "c", "y, in metres", "z"], *numbers().tolist()])
    assert open_table("table.csv", "y, in metres").targets == ("y, in metres",)


def test_columns_may_be_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pandas does where they have no names."""
    monkeypatch.chdir(tmp_path)
    with open("table.csv", "w", newline="") as file:
        csv.writer(file).writerows([range(5), *numbers().tolist()])
    assert open_table("table.csv", "3").columns == ("0", "1", "2", "4")


def test_what_cannot_be_learnt(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    """A nu that fails loses the choice; numbers that fail are no result."""
    write_csv()
    module = recipe(DKM)
    flags = ["--steps", "40", "--inducing", "10", "--data", "table.csv", "--target", "y"]
    module.main([*flags, "--nu", "1,1e300", "--output-dir", "out"])
    (trial,) = results()["trials"].values()
    assert trial["result"]["nu"] == "1"
    with open("table.csv", "w", newline="") as file:
        csv.writer(file).writerows([["a", "b", "c", "y"], *(numbers()[:, :4] * [1, 1, 1, 1e300]).tolist()])
    with pytest.raises(UserError, match="no trial of 1 came to an end"):
        module.main([*flags, "--nu", "1", "--output-dir", "huge"])
    assert "too large to be standardised" in capsys.readouterr().out


def test_the_folder_says_which_rows(recipe: Recipe) -> None:
    write_folder()
    opened = open_table("folder", None)
    np.testing.assert_array_equal(opened.y[:, 0], numbers()[:, 3])
    np.testing.assert_array_equal(opened.split(1)[1], np.loadtxt("folder/index_test_1.txt"))
    recipe(DKM).main([*QUICK, "--data", "folder", "--splits", "2", "--seeds", "2", "--output-dir", "out"])
    assert list(results()["trials"]) == [f"split {k}, seed {s}" for k in (0, 1) for s in (0, 1)]
    assert results()["summary"]["nll"]["standard error"] > 0


def test_trials_find_the_run_folder_from_anywhere(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a cluster were started in other folders."""
    import leaven.recipes.common.study as study

    asked: list[Any] = []

    def run_study(trial: Any, *_: Any) -> None:
        asked.extend(trial.args)
        raise UserError("enough")

    monkeypatch.setattr(study, "run_study", run_study)
    with pytest.raises(UserError, match="enough"):
        recipe(DKM).main([*QUICK, "--output-dir", "out"])
    assert asked[2] == str(Path("out").resolve())


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
def test_the_likeliest_nu_is_by_the_predictive_distribution(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, likelihood: str
) -> None:
    """E log p(y | f) would take the surer machine, of "100" here, whose predictions are the worse."""
    module = recipe(DKM)
    y = torch.tensor([[1.0], [-1.0]]).repeat(10, 1) if likelihood == "gaussian" else torch.arange(20) % 2

    class Machine:
        def __init__(self, nu: str) -> None:
            self.nu = nu

        def __call__(self, x: torch.Tensor) -> Prediction:
            unsure = self.nu == "1"
            if likelihood == "gaussian":
                variance, noise = (0.9, 0.1) if unsure else (0.0, 0.3)
                return Prediction(
                    torch.zeros(len(x), 1), torch.full((len(x), 1), variance), torch.tensor(noise)
                )
            mean = torch.tensor([0.0, 0.0, 0.0 if unsure else 1.0]).expand(len(x), 3)  # no label is 2
            return Prediction(mean, torch.full((len(x), 1), 100.0 * unsure), None)

        def expected_log_prob(self, prediction: Prediction, y: torch.Tensor) -> torch.Tensor:
            return DeepKernelMachine.expected_log_prob(
                SimpleNamespace(out_features=3, draws=500), prediction, y
            )

    monkeypatch.setattr(module, "build", lambda settings, x, outputs, nu, likelihood: Machine(nu))
    monkeypatch.setattr(module, "fit", lambda machine, x, y, **how: machine)
    settings = module.DKMSettings(nu=("100", "1"))
    assert module.learn(settings, torch.randn(20, 3), y, 3, 0, likelihood)[1] == "1"


def test_units_are_the_targets_own(recipe: Recipe) -> None:
    """A target a thousand times as large: errors a thousand times as large, densities lower by log 1000."""
    found = []
    for factor in (1, 1000):
        with open("table.csv", "w", newline="") as file:
            rows = numbers()[:, :4] * [1, 5, 1, factor]
            csv.writer(file).writerows([["a", "b", "c", "y"], *rows.tolist()])
        recipe(DKM).main([*QUICK, "--data", "table.csv", "--target", "y", "--output-dir", f"out{factor}"])
        found.append(results(f"out{factor}")["summary"])
    assert found[1]["rmse"]["mean"] == pytest.approx(1000 * found[0]["rmse"]["mean"], rel=1e-3)
    assert found[1]["nll"]["mean"] == pytest.approx(found[0]["nll"]["mean"] + np.log(1000), abs=1e-3)


@pytest.mark.slow
def test_processes_and_a_cluster_that_loses_a_worker_give_the_same(recipe: Recipe) -> None:
    distributed = pytest.importorskip("distributed", reason='needs Dask: pip install "leaven[cluster]"')
    write_csv()
    module = recipe(DKM)
    flags = [*QUICK, "--data", "table.csv", "--target", "y", "--seeds", "4"]
    module.main([*flags, "--output-dir", "serial"])
    program = start([sys.executable, DKM, *flags, "--jobs", "2", "--output-dir", "processes"], Path())
    assert program.wait(120) == 0, program.stdout.read() if program.stdout else ""
    settings: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**settings) as cluster:
        address = cluster.scheduler_address
        program = start(
            [sys.executable, DKM, *flags, "--jobs", "2", "--dask", address, "--output-dir", "dask"], Path()
        )
        os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)  # its nanny starts another
        assert program.wait(180) == 0, program.stdout.read() if program.stdout else ""
    for folder in ("processes", "dask"):
        for name, trial in results("serial")["trials"].items():
            assert results(folder)["trials"][name]["result"] == trial["result"]


@pytest.mark.slow
def test_what_was_stopped_goes_on(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv()
    flags = [
        "--steps",
        "300",
        "--inducing",
        "10",
        "--nu",
        "1",
        "--data",
        "table.csv",
        "--target",
        "y",
        "--seeds",
        "3",
    ]
    program = start([sys.executable, DKM, *flags, "--output-dir", "out"], Path())
    journal = Path("out/journal.jsonl")
    while not journal.is_file() or not journal.read_text():
        assert program.poll() is None
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 143
    assert program.stdout is not None
    assert "study stopped by signal 15: what was trained is kept" in program.stdout.read()
    done = journal.read_text().splitlines()
    assert 1 <= len(done) < 3
    module = recipe(DKM)
    with pytest.raises(SystemExit):
        run_main(lambda: module.main([*flags, "--depth", "2", "--output-dir", "out", "--resume", "auto"]))
    assert "depth 3 -> 2" in capsys.readouterr().err
    module.main([*flags, "--output-dir", "out", "--resume", "auto"])
    assert journal.read_text().splitlines()[: len(done)] == done
    module.main([*flags, "--output-dir", "whole"])
    for name, trial in results("whole")["trials"].items():
        assert results()["trials"][name]["result"] == trial["result"]


def test_images(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--backbone", "resnet10t", "--labels", "20", "--image-size", "32", "--ood", "digits"]
    flags += ["--workers", "0", "--steps", "150", "--inducing", "30", "--nu", "10"]
    recipe(DKM).main([*flags, "--output-dir", "out"])
    (trial,) = results()["trials"].values()
    assert trial["result"].keys() == {"accuracy", "nll", "brier", "ece", "nu", "ood auroc"}
    assert trial["result"]["accuracy"] > 0.7
    assert trial["result"]["ood auroc"] == 0.5  # the same images
    assert Path("out/plots/reliability-seed0.png").is_file()
    said = capsys.readouterr().out
    assert "--labels 20: 200 of 1437 training images" in said
    assert "resnet10t: statistics of 14 BatchNorm layers taken anew" in said
    found = torch.load("out/inputs.pt")
    machine, _ = kept_machine("out")
    accuracy = float((machine(found["val"][0]).probs().argmax(1) == found["val"][1]).double().mean())
    assert accuracy == pytest.approx(trial["result"]["accuracy"])


def kept_machine(folder: str) -> tuple[DeepKernelMachine, dict[str, Any]]:
    """The trained machine of a run folder, as the page says."""
    kept = torch.load(f"{folder}/machines/split0-seed0.pt", weights_only=True)
    machine = DeepKernelMachine(**kept["arguments"])
    machine.load_state_dict(kept["state_dict"])
    return machine.eval(), kept


def test_the_machine_of_a_table_is_kept(recipe: Recipe) -> None:
    recipe(DKM).main(["--steps", "20", "--inducing", "10", "--nu", "1,10", "--output-dir", "out"])
    (trial,) = results()["trials"].values()
    machine, kept = kept_machine("out")
    assert kept["arguments"]["nu"] == float(trial["result"]["nu"])
    table = open_table("diabetes", None, 0)
    _, test = table.split(0)
    with torch.no_grad():
        rows = (torch.as_tensor(table.x[test]) - kept["x_mean"]) / kept["x_std"]
        told = machine(rows.float()).mean * kept["y_std"] + kept["y_mean"]
    rmse = (told - torch.as_tensor(table.y[test])).square().mean().sqrt()
    assert float(rmse) == pytest.approx(trial["result"]["rmse"], rel=1e-4)


def test_columns_are_of_whichever_data_is_hf(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from leaven.recipes.common import study

    asked = []
    monkeypatch.setattr(
        study, "find_data", lambda settings: asked.append((settings.data, settings.label_column))
    )
    hf = study.StudySettings(backbone="resnet18", data="hf:a", label_column="y", ood="folder")
    other = study.StudySettings(backbone="resnet18", data="folder", label_column="y", ood="hf:a")
    none = study.StudySettings(backbone="resnet18", data="folder", label_column="y")
    for settings in (hf, other):
        study.images_of(settings, settings.data)
        study.images_of(settings, str(settings.ood))
    study.images_of(none, none.data)  # to be refused there
    assert asked == [("hf:a", "y"), ("folder", None), ("folder", None), ("hf:a", "y"), ("folder", "y")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nu", "0"], "--nu 0: numbers greater than 0, or inf"),
        (["--nu", "much"], "--nu much: numbers greater than 0, or inf"),
        (["--data", "digits"], "--data digits is of images: add --backbone"),
        (["--data", "pictures"], "--data pictures is of images: add --backbone"),
        (["--data", "nowhere"], "--data nowhere: no such table"),
        (["--data", "empty"], "no data.txt in it"),
        (["--data", "text.txt"], "a table is a .csv or .parquet file"),
        (["--data", "table.csv"], "add --target COLUMN; there are: a, b, c, y, z"),
        (
            ["--data", "table.csv", "--target", "yy"],
            "--target yy: no such column in table.csv; did you mean y?",
        ),
        (["--data", "table.csv", "--target", "a,b,c,y,z"], "nothing is left in table.csv"),
        (["--data", "gaps.csv", "--target", "y"], "column 'b' has '' in row 3, which is no number"),
        (["--data", "headless.csv", "--target", "1"], "headless.csv: its first line is numbers (0.1257302"),
        (["--data", "twice.csv", "--target", "y"], "column 'a' is there twice"),
        (["--data", "ragged.csv", "--target", "y"], "line 4 has 2 values for 5 columns"),
        (["--data", "short.csv", "--target", "y"], "9 rows are too few"),
        (["--data", "semicolons.csv", "--target", "y"], "separated by semicolons"),
        (["--data", "underscores.csv", "--target", "y"], "has '1_000' in row 2, which is no number"),
        (["--labels", "10"], "--labels is of images: add --backbone"),
        (["--backbone", "resnet18", "--target", "y", "--data", "digits"], "--target is of tables"),
        (["--time-limit", "5"], "--time-limit needs processes of their own"),
        (["--data", "folder", "--splits", "3"], "--splits 3: folder has 2"),
        (["--skr", "0.5"], "--skr must be at least 1"),
        (["--depth", "0"], "--depth must be at least 1"),
    ],
)
def test_wrong_flags(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    write_csv()
    write_folder()
    Path("empty").mkdir()
    Path("pictures/a").mkdir(parents=True)
    Path("pictures/a/1.png").touch()
    Path("text.txt").write_text("1 2 3")
    lines = Path("table.csv").read_text().splitlines()
    Path("short.csv").write_text("\n".join(lines[:10]))
    Path("ragged.csv").write_text("\n".join([*lines[:3], "1,2", *lines[4:]]))
    Path("headless.csv").write_text("\n".join(lines[1:]))
    Path("twice.csv").write_text("\n".join(["a,a,c,y,z", *lines[1:]]))
    Path("semicolons.csv").write_text("\n".join(lines).replace(",", ";"))
    Path("underscores.csv").write_text("\n".join([*lines[:2], "1_000,2,3,4,5", *lines[3:]]))
    gap = lines[3].split(",")
    Path("gaps.csv").write_text("\n".join([*lines[:3], ",".join([gap[0], "", *gap[2:]]), *lines[4:]]))
    module = recipe(DKM)
    assert message in refusal(lambda: module.main(flags), capsys)


def test_a_study_that_is_refused_leaves_no_folder(recipe: Recipe) -> None:
    flags = ["--backbone", "resnet10t", "--init", "nowhere.safetensors", "--workers", "0"]
    program = start([sys.executable, DKM, *flags], Path())
    assert program.wait(60) == 2
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("library", "flags", "extra"),
    [
        ("pyarrow", ["--data", "table.parquet", "--target", "y"], 'pip install "leaven[parquet]"'),
        ("distributed", ["--dask", "tcp://127.0.0.1:1"], 'pip install "leaven[cluster]"'),
    ],
)
def test_a_missing_extra_is_named(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, library: str, flags: list[str], extra: str
) -> None:
    Path("table.parquet").touch()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError) as error:
        recipe(DKM).main([*QUICK, *flags])
    assert extra in str(error.value)


def test_a_cluster_that_does_not_answer(recipe: Recipe) -> None:
    pytest.importorskip("distributed", reason='needs Dask: pip install "leaven[cluster]"')
    with pytest.raises(UserError, match=r"--dask tcp://127\.0\.0\.1:1: no scheduler answers there"):
        recipe(DKM).main([*QUICK, "--dask", "tcp://127.0.0.1:1"])
