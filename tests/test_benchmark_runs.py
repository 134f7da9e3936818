"""The command lines that benchmarks give to recipes: do the recipes take them?"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from leaven.recipes.common.start import read_settings

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import diffusion_features
import dkm_head
from ledger import Run

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
