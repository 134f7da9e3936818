"""Objectives: modules that turn a batch into a loss and own a backbone; and the protocols that judge them."""

from leaven.pretext.evaluation import (
    extract_features,
    few_label_probe,
    few_protocol,
    knn,
    knn_protocol,
    linear_probe,
    linear_protocol,
    recalibrate_batchnorm,
)
from leaven.pretext.output import Output
from leaven.pretext.spark import SparK, SparseUnsupported
from leaven.pretext.supervised import Supervised, count_correct

__all__ = [
    "Output",
    "SparK",
    "SparseUnsupported",
    "Supervised",
    "count_correct",
    "extract_features",
    "few_label_probe",
    "few_protocol",
    "knn",
    "knn_protocol",
    "linear_probe",
    "linear_protocol",
    "recalibrate_batchnorm",
]
