"""The dense masked encoder: SparK's encoder on dense maps, for the backbone's own modules.

Layers that look across positions are given a subclass of their class (``module.__class__``), whose forward reads the
mask that `dense_encode` sets for its own call. Outside of it they do what they always did, bit for bit; weights,
state-dict keys and hooks are not touched. Independent of the packed encoder, which it is there to check.
"""

import copy
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from leaven.backbones import Stage, features
from leaven.pretext.spark.crop_check import crop_check
from leaven.pretext.spark.dense_layers import Masked
from leaven.pretext.spark.dense_mask import Mask, masked
from leaven.pretext.spark.dense_rules import rules, with_rule
from leaven.pretext.spark.errors import SparseUnsupported

# What each converted backbone was when it passed the crop check: its classes, and the maps asked for.
_checked: WeakKeyDictionary[nn.Module, set[tuple[object, ...]]] = WeakKeyDictionary()


def dense_encode(backbone: nn.Module, images: Tensor, mask: Tensor, stages: Sequence[Stage]) -> list[Tensor]:
    """Feature maps (B, C, h, w) of visible cells, largest first, with zeros at hidden positions.

    Hidden pixels are never used, not even if they are NaN. The first call converts the backbone (see `convert`);
    so does the first call after a layer was replaced.

    Args:
        backbone: a plain backbone, which is converted in place; `restore` undoes it.
        images: (B, C, H, W).
        mask: bool (B, fh, fw), True = visible, on square cells.
        stages: which maps, from ``leaven.backbones.stages``.

    Raises:
        SparseUnsupported: the backbone cannot be masked exactly; the message names the module.
        ValueError: mask and images do not fit.
    """
    if mask.dtype != torch.bool or mask.dim() != 3 or mask.shape[0] != images.shape[0]:
        raise ValueError(
            f"mask must be bool (B, fh, fw) with B = {images.shape[0]}, got {mask.dtype} {tuple(mask.shape)}"
        )
    height, width = images.shape[-2:]
    rows, columns = mask.shape[1:]
    cell = height // rows
    if (rows * cell, columns * cell) != (height, width):
        raise ValueError(f"images of {height}x{width} px do not fit {rows}x{columns} square mask cells")
    if not torch.compiler.is_compiling():
        # Disabled here and not where it is defined: the decorator imports torch._dynamo, which takes seconds.
        torch.compiler.disable(_prepare)(backbone, stages, cell, images.shape[1])
    elif not any(isinstance(module, Masked) for module in backbone.modules()):
        raise RuntimeError(
            "the backbone is not converted: call dense_encode once before compiling, or convert"
        )
    return masked_features(backbone, images, mask, stages, cell)


def convert(backbone: nn.Module, stages: Sequence[Stage], cell: int, in_chans: int = 3) -> None:
    """Make a backbone ready for `dense_encode`, in place, or refuse it.

    Every module keeps its weights, hooks and place. That a masked pass is exact is not taken on trust from the list of
    rules: a float64 copy of the backbone with random norm weights must pass `crop_check`.

    Args:
        backbone: a plain backbone, untouched if it is refused.
        stages: the maps that will be asked for; the check covers the layers they need.
        cell: side of a mask cell in pixels.
        in_chans: channels of the images.

    Raises:
        SparseUnsupported: one line that names the module.
    """
    plain = copy.deepcopy(backbone)
    restore(plain)
    crop_check(plain, _swap, masked_features, stages, cell, in_chans, offsets=(1.0, -4.0))
    _swap(backbone)
    _checked.setdefault(backbone, set()).add(_state(backbone, stages, cell))


def restore(backbone: nn.Module) -> None:
    """Give every module its own class back."""
    converted: Any = [module for module in backbone.modules() if isinstance(module, Masked)]
    for module in converted:
        module.__class__ = module._plain


def masked_features(
    backbone: nn.Module, images: Tensor, mask: Tensor, stages: Sequence[Stage], cell: int
) -> list[Tensor]:
    """`dense_encode` of a converted backbone, without its checks."""
    current = Mask(mask, cell, backbone)
    with masked(current):
        maps = features(backbone, current.fill(images, 0.0), stages)
    for stage, x in zip(stages, maps, strict=True):
        if current.at(x.shape[-2], x.shape[-1]) is None:
            raise SparseUnsupported(
                f"{stage.name}: its map, {tuple(x.shape)}, does not fit {tuple(mask.shape[1:])} cells"
            )
    maps = [current.fill(x, 0.0) for x in maps]
    if not torch.compiler.is_compiling():
        for x in maps:
            if x.requires_grad:
                x.register_hook(current.remember)
    return maps


def _swap(backbone: nn.Module) -> None:
    for module, rule in list(rules(backbone)):
        module.__class__ = with_rule(module._plain if isinstance(module, Masked) else type(module), rule)


def _prepare(backbone: nn.Module, stages: Sequence[Stage], cell: int, in_chans: int) -> None:
    """Convert unless that was done, for these maps and for the layers that the backbone has now."""
    if _state(backbone, stages, cell) not in _checked.get(backbone, ()):
        convert(backbone, stages, cell, in_chans)


def _state(backbone: nn.Module, stages: Sequence[Stage], cell: int) -> tuple[object, ...]:
    return (tuple(map(type, backbone.modules())), tuple(stages), cell)
