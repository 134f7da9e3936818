"""Any backbone: names, stages, first layers, weights."""

from leaven.backbones.build import create, data_config
from leaven.backbones.classifier import classifier_names
from leaven.backbones.first_layers import first_layers
from leaven.backbones.layer_groups import layer_groups
from leaven.backbones.names import ALIASES, UnknownBackbone, resolve
from leaven.backbones.stages import NoStages, Stage, features, stages, unused_parameters
from leaven.backbones.weights import WeightsMismatch, load, load_around_classifier, metadata, save

__all__ = [
    "ALIASES",
    "NoStages",
    "Stage",
    "UnknownBackbone",
    "WeightsMismatch",
    "classifier_names",
    "create",
    "data_config",
    "features",
    "first_layers",
    "layer_groups",
    "load",
    "load_around_classifier",
    "metadata",
    "resolve",
    "save",
    "stages",
    "unused_parameters",
]
