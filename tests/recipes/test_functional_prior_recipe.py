"""recipes/functional_prior.py: tables and images, baselines, pictures, studies that go on, errors."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from recipe_programs import PRIOR, refusal
from torch import nn

from leaven.bayes import FunctionalPrior, PosteriorSamples
from leaven.recipes.common.flags import UserError

Recipe = Callable[[Path], ModuleType]
QUICK = ["--fit-steps", "3", "--critic-steps", "5", "--functions", "16", "--points", "20", "--chains", "2"]
QUICK += ["--burn-in", "60", "--thin", "5", "--draws", "9"]


def results(folder: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "results.json").read_text())
    return found


def write_line(noise: float = 0.1, name: str = "line.csv") -> None:
    """One input, one target."""
    drawn = np.random.default_rng(0)
    x = drawn.uniform(-2, 2, 80)
    with open(name, "w", newline="") as file:
        rows = np.column_stack([x, np.sin(2 * x) + noise * drawn.normal(size=80)])
        csv.writer(file).writerows([["x", "y"], *rows.tolist()])


@pytest.mark.slow
def test_a_line_is_learnt_and_drawn(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    write_line()
    flags = [
        "--fit-steps",
        "40",
        "--functions",
        "64",
        "--distance",
        "energy",
        "--burn-in",
        "1000",
        "--thin",
        "50",
    ]
    flags += ["--draws", "15", "--chains", "2", "--noise", "0.02", "--baselines"]
    recipe(PRIOR).main([*flags, "--data", "line.csv", "--target", "y", "--output-dir", "out"])
    (trial,) = results()["trials"].values()
    found = trial["result"]
    assert found["rmse"] < 0.25  # guessing the mean: 0.7
    assert found["nll"] < 0
    assert {f"{who}{what}" for who in ("map ", "ensemble ") for what in ("rmse", "nll")} < found.keys()
    assert {"r-hat", "effective draws", "clamped"} < found.keys()
    for name in ("prior", "distance", "band"):
        assert Path(f"out/plots/{name}-split0-seed0.png").stat().st_size > 5000
    assert "line.csv: 80 rows, 1 inputs, target y" in capsys.readouterr().out

    # What is kept is the posterior that was judged.
    net = nn.Sequential(nn.Linear(1, 100), nn.Tanh(), nn.Linear(100, 1))
    prior = FunctionalPrior(net)
    prior.load_state_dict(torch.load("out/posterior/split0-seed0.prior.pt"))
    samples = PosteriorSamples.load("out/posterior/split0-seed0.safetensors")
    values = samples.predict(prior, torch.linspace(-1, 1, 7).unsqueeze(1))
    assert values.shape == (20, 7, 1)


@pytest.mark.slow
def test_the_same_again_and_another_prior(recipe: Recipe) -> None:
    write_line()
    flags = [*QUICK, "--data", "line.csv", "--target", "y", "--splits", "2"]
    module = recipe(PRIOR)
    for folder, more in (
        ("a", []),
        ("b", []),
        ("c", ["--prior", "standard"]),
        ("d", ["--family", "hierarchical"]),
    ):
        module.main([*flags, *more, "--output-dir", folder])
    assert results("a")["summary"] == results("b")["summary"]
    assert results("a")["summary"] != results("c")["summary"] != results("d")["summary"]
    assert not Path("c/plots/distance-split0-seed0.png").exists()
    raw = torch.load("c/posterior/split0-seed0.prior.pt")["families.0/weight.raw"]
    assert float(torch.nn.functional.softplus(raw)) == pytest.approx(1, abs=1e-6)


def test_other_data_is_not_gone_on_with(recipe: Recipe) -> None:
    write_line()
    flags = [*QUICK, "--data", "line.csv", "--target", "y", "--output-dir", "out"]
    module = recipe(PRIOR)
    module.main(flags)
    before = Path("out/journal.jsonl").read_text()
    module.main([*flags, "--resume", "auto"])  # nothing is left to do
    assert Path("out/journal.jsonl").read_text() == before
    write_line(noise=0.2)
    with pytest.raises(UserError, match="its trials learnt from other data"):
        module.main([*flags, "--resume", "auto"])


@pytest.mark.parametrize(
    "how",
    [
        [],
        pytest.param(["--hidden", "20", "--baselines"], marks=pytest.mark.slow),
        pytest.param(
            ["--scope", "last_block", "--chunk-size", "4", "--gp-on", "pixels"], marks=pytest.mark.slow
        ),
        pytest.param(["--scope", "last_block", "--chunk-size", "4"], marks=pytest.mark.slow),
    ],
)
def test_images(recipe: Recipe, how: list[str]) -> None:
    flags = [*QUICK, "--backbone", "test_resnet", "--labels", "5", "--image-size", "32", "--ood", "digits"]
    recipe(PRIOR).main([*flags, *how, "--workers", "0", "--batch-size", "8", "--output-dir", "out"])
    (trial,) = results()["trials"].values()
    found = trial["result"]
    assert found["ood auroc"] == 0.5  # the same images
    assert 0 <= found["accuracy"] <= 1
    assert ("ensemble accuracy" in found) == ("--baselines" in how)
    for name in ("prior", "distance"):
        assert Path(f"out/plots/{name}-seed0.png").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--noise", "0"], "--noise must be greater than 0"),
        (["--friction", "1"], "--friction must be between 0 and 1"),
        (["--draws", "3"], "--draws must be at least 6"),
        (["--fit-steps", "0"], "--fit-steps must be at least 1"),
        (["--hidden", "0"], "--hidden: widths of at least 1"),
        (["--prior", "standard", "--family", "flow"], "leave out --family flow"),
        (["--scope", "all"], "--scope all is of images: add --backbone"),
        (["--backbone", "test_resnet", "--scope", "all", "--hidden", "9"], "--hidden is of heads"),
        (["--gp-variance", "-1"], "--gp-variance must be greater than 0"),
        (["--distance", "w2"], "--distance"),
    ],
)
def test_wrong_flags(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    module = recipe(PRIOR)
    assert message in refusal(lambda: module.main(flags), capsys)
