"""The packed encoder: visible positions only, through the user's unmodified modules."""

from collections.abc import Sequence

from torch import Tensor, nn

from leaven.backbones import Stage, features
from leaven.pretext.spark import pointwise, shape_rules, spatial_rules  # noqa: F401  (they register the rules)
from leaven.pretext.spark.geometry import Geometry
from leaven.pretext.spark.sparse_map import SparseMap, refuse


def packed_encode(
    backbone: nn.Module, images: Tensor, geo: Geometry, stages: Sequence[Stage]
) -> list[tuple[Tensor, int]]:
    """Feature maps at visible positions: values (B, T, C) and the cell's side there, per stage, largest map first."""
    maps = features(backbone, SparseMap.from_images(images, geo), stages)
    packed = []
    for feature in maps:
        if not isinstance(feature, SparseMap):
            refuse("the end of the encoder", "a feature map came out dense")
        feature = feature.permute(0, 3, 1, 2) if feature.tags == "bhwc" else feature
        if feature.tags != "bchw" or feature.pad is not None:
            refuse("the end of the encoder", f"a feature map must be (B, C, h, w), this one is {feature!r}")
        packed.append((feature.values, feature.r))
    return packed
