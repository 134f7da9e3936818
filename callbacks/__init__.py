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
from leaven.callbacks.knn_probe import KNNProbe
from leaven.callbacks.second_moment import patch_second_moment
from leaven.callbacks.tract import TrAct, remove_tract, tract, tract_gradient

__all__ = [
    "EMA",
    "AttachError",
    "Attached",
    "Callback",
    "KNNProbe",
    "NoEffectWarning",
    "Progress",
    "ResumeWarning",
    "TrAct",
    "attach",
    "map_images",
    "patch_second_moment",
    "remove_tract",
    "tract",
    "tract_gradient",
    "updates",
]
