"""A backbone for `--backbone benchmarks.group_norm_nets:resnet10t`: GroupNorm where the original has BatchNorm."""

from typing import Any

import timm
from torch import nn


def group_norm(num_features: int, **_: Any) -> nn.Module:
    """GroupNorm of 32 groups at most, as EvoNorm's S series takes them."""
    return nn.GroupNorm(max(d for d in range(1, 33) if num_features % d == 0), num_features)


def resnet10t(**how: Any) -> nn.Module:
    return timm.create_model("resnet10t", norm_layer=group_norm, **how)
