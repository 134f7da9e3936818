"""Callbacks that attach to any training loop: `attach` them to a model and its optimizer, and train on."""

from leaven.callbacks.core import (
    Attached,
    AttachError,
    Callback,
    NoEffectWarning,
    Progress,
    ResumeWarning,
    attach,
    map_images,
    updates,
)
from leaven.callbacks.ema import EMA
from leaven.callbacks.evonorm import EvoNorm, evo_norm, replace_norm_act
from leaven.callbacks.knn_probe import KNNProbe
from leaven.callbacks.second_moment import patch_second_moment
from leaven.callbacks.tract import TrAct, remove_tract, tract, tract_gradient

__all__ = [
    "EMA",
    "AttachError",
    "Attached",
    "Callback",
    "EvoNorm",
    "KNNProbe",
    "NoEffectWarning",
    "Progress",
    "ResumeWarning",
    "TrAct",
    "attach",
    "evo_norm",
    "map_images",
    "patch_second_moment",
    "remove_tract",
    "replace_norm_act",
    "tract",
    "tract_gradient",
    "updates",
]
