"""SparK: sparse and hierarchical masked modelling for convolutional backbones (Tian et al., ICLR 2023)."""

from leaven.pretext.spark.errors import SparseUnsupported, UntrainedWarning
from leaven.pretext.spark.masking import sample_mask
from leaven.pretext.spark.spark import SparK

__all__ = ["SparK", "SparseUnsupported", "UntrainedWarning", "sample_mask"]
