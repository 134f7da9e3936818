"""Objectives: modules that turn a batch into a loss and own a backbone; and the protocols that judge them."""

from leaven.pretext.evaluation import (
    extract_features,
    knn,
    knn_protocol,
    linear_probe,
    linear_protocol,
    recalibrate_batchnorm,
)
from leaven.pretext.output import Output
from leaven.pretext.spark import SparK, SparseUnsupported

__all__ = [
    "Output",
    "SparK",
    "SparseUnsupported",
    "extract_features",
    "knn",
    "knn_protocol",
    "linear_probe",
    "linear_protocol",
    "recalibrate_batchnorm",
]
