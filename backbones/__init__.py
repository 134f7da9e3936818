"""Any backbone: names, stages, first layers, weights."""

from leaven.backbones.build import create, data_config
from leaven.backbones.first_layers import first_layers
from leaven.backbones.names import ALIASES, UnknownBackbone, resolve
from leaven.backbones.stages import NoStages, Stage, features, stages, unused_parameters
from leaven.backbones.weights import WeightsMismatch, load, save

__all__ = [
    "ALIASES",
    "NoStages",
    "Stage",
    "UnknownBackbone",
    "WeightsMismatch",
    "create",
    "data_config",
    "features",
    "first_layers",
    "load",
    "resolve",
    "save",
    "stages",
    "unused_parameters",
]
