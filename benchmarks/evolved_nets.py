"""Backbones with the best layer of results/evonorm_search.json: `--backbone benchmarks.evolved_nets:resnet18`."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torchvision
from torch import nn

from leaven.callbacks import replace_norm_act
from leaven.callbacks.evonorm import Genome, evolved_norm

SEARCHES = Path(__file__).parent / "results" / "evonorm_search.json"


def best() -> Genome:
    """The best of all searches that were not random, by the images that they were judged on."""
    rows = [row for row in json.loads(SEARCHES.read_text())["searches"] if row["arm"] != "random"]
    return Genome.from_json(json.dumps(max(rows, key=lambda row: row["validation"])["genome"]))


def evolved(net: nn.Module) -> nn.Module:
    replace_norm_act(net, partial(evolved_norm, best()))
    return net


def resnet18(**how: Any) -> nn.Module:
    return evolved(torchvision.models.resnet18(**how))


def regnetx_002(**how: Any) -> nn.Module:
    return evolved(timm.create_model("regnetx_002", **how))
