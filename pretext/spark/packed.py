"""The packed encoder: visible positions only, through the user's unmodified modules."""

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from leaven.backbones import Stage, features
from leaven.pretext.spark import pointwise, shape_rules, spatial_rules  # noqa: F401  (they register the rules)
from leaven.pretext.spark.crop_check import crop_check
from leaven.pretext.spark.geometry import Geometry
from leaven.pretext.spark.masking import visible_ids
from leaven.pretext.spark.sparse_map import SparseMap, refuse
from leaven.pretext.spark.swaps import swap, unswap


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


def check_packed(
    backbone: nn.Module, stages: Sequence[Stage], cell: int, in_chans: int, *, spconv: bool = False
) -> None:
    """Refuse a backbone whose packed maps are not those of the plain network (`crop_check`).

    Every operation has an exact rule or is refused; what a backbone computes from a map's outer shape (a sum divided
    by height times width, say) is seen by no rule.

    Raises:
        SparseUnsupported: one line that names the module.
    """

    def encode(
        net: nn.Module, images: Tensor, mask: Tensor, stages: Sequence[Stage], cell: int
    ) -> list[Tensor]:
        geo = Geometry(visible_ids(mask), (mask.shape[1], mask.shape[2]), spconv=spconv)
        return [geo.scatter(values, r) for values, r in packed_encode(net, images, geo, stages)]

    plain = copy.deepcopy(backbone)
    unswap(plain)
    crop_check(plain, swap, encode, stages, cell, in_chans)
