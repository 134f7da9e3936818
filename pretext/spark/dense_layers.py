"""What each kind of layer does under a mask, when maps stay dense (SparK's encoder, for the layers of any convnet).

Two principles. A layer that mixes positions sees zeros at hidden ones, and what comes out is zeroed there again. A
layer that averages over positions counts the visible ones. Layers that work on one position at a time need no rule.
"""

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leaven.pretext.spark.dense_mask import Mask, active_mask, masked
from leaven.pretext.spark.dense_norms import masked_batch_norm, masked_group_norm, masked_group_variance

NCHW, NHWC = (-2, -1), (1, 2)


class Masked(nn.Module):
    """Base of the rules: the plain module, unless a mask is active and a map comes in.

    `with_rule` combines a rule with a plain class into the class that a converted module is given.
    """

    _plain: ClassVar[type[nn.Module]]
    _space: ClassVar[tuple[int, int]] = NCHW

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The plain forward or, under a mask, the rule's."""
        mask = active_mask(self)
        if mask is None or x.dim() <= 2 or all(x.shape[i] == 1 for i in self._space):
            return self.plain_forward(x, *args, **kwargs)  # no mask, a vector, or a pooled map
        return self.masked_forward(mask, x, *args, **kwargs)

    def plain_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module does when it is not converted."""
        return self._plain.forward(self, *args, **kwargs)

    def masked_forward(self, mask: Mask, x: Tensor) -> Tensor:
        """The rule. By default: any pointwise layer, whose bias makes something else of the zeros."""
        return self.zeroed(mask, self.plain_forward(x))

    def visible(self, mask: Mask, x: Tensor) -> Tensor:
        """Visible positions, bool, in the layout of the map `x`; refuses a map that does not fit the cells."""
        if x.dim() < 4:
            raise mask.refuse(
                self, f"works on tokens {tuple(x.shape)}, not on a map; it has no exact sparse form"
            )
        rows, columns = (x.shape[i] for i in self._space)
        found = mask.at(rows, columns)
        if found is None:
            cells = "x".join(map(str, mask.cells.shape[1:]))
            raise mask.refuse(self, f"a map of {rows}x{columns} positions does not fit {cells} mask cells")
        return found if self._space == NCHW else found.movedim(1, -1)

    def zeroed(self, mask: Mask, y: Tensor) -> Tensor:
        """`y` with zeros at hidden positions."""
        return torch.where(self.visible(mask, y), y, 0.0)

    # Pickled as the plain module, so that a file needs nothing of this package; a deep copy (an EMA of the whole
    # objective) stays converted. Protocol 0, because the later ones insist on the object's own class.
    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(0)
        function, (_, *arguments), *state = reduced
        return (function, (self._plain, *arguments), *state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin: Any = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        module: Any = self
        twin.__setstate__(copy.deepcopy(module.__getstate__(), memo))
        return twin


class MaskedNHWC(Masked):
    """A pointwise layer on maps (B, h, w, C)."""

    _space = NHWC

    def masked_forward(self, mask: Mask, x: Tensor) -> Tensor:
        if len(getattr(self, "normalized_shape", "1")) > 1:
            raise mask.refuse(self, "normalises over positions, which has no exact sparse form")
        return super().masked_forward(mask, x)


class Window(Masked):
    """Convolution, or a sum over a window: zeros in, zeros out. Strides and padding must keep the map on the grid."""

    def masked_forward(self, mask: Mask, x: Tensor) -> Tensor:
        if getattr(self, "padding_mode", "zeros") != "zeros":
            raise mask.refuse(self, f"padding_mode={self.padding_mode!r} has no exact sparse form")
        if getattr(self, "kernel_size", None) != (1, 1):
            x = mask.fill(x, 0.0)
        return self.zeroed(mask, self.plain_forward(x))


class MaxPool(Masked):
    """Hidden positions never win. On a map that was padded before, they are zeros like that padding."""

    def masked_forward(self, mask: Mask, x: Tensor) -> Tensor:
        return self.zeroed(mask, self.plain_forward(mask.fill(x, torch.finfo(x.dtype).min)))


class AvgPool(Masked):
    """Mean of the visible positions of a window; where padding is counted, hidden positions are padding too."""

    def masked_forward(self, mask: Mask, x: Tensor) -> Tensor:
        pool: Any = self
        x = mask.fill(x, 0.0)
        y: Tensor = self.plain_forward(x)
        visible = mask.at(x.shape[-2], x.shape[-1])
        if visible is not None and not pool.count_include_pad and not pool.divisor_override:
            share = self.plain_forward(visible.to(torch.promote_types(x.dtype, torch.float32)))
            y = (y / torch.where(share > 0, share, 1.0)).to(y.dtype)
        return self.zeroed(mask, y)


class Pooled(Masked):
    """Whatever looks across positions by a mean or maximum over the whole map only: gates and global pools.

    Hidden positions are filled with the mean of the visible ones, which leaves mean and maximum as they are.
    """

    _power: ClassVar[int] = 1

    def masked_forward(self, mask: Mask, x: Tensor) -> Tensor:
        filled = self.filled(mask, x, self._power)
        with masked(None):  # what is inside works on pooled values
            y: Tensor = self.plain_forward(filled)
        return self.zeroed(mask, y) if y.shape == x.shape else y

    def filled(self, mask: Mask, x: Tensor, power: int = 1) -> Tensor:
        """`x` with the (power) mean of an image's visible positions at its hidden ones."""
        visible = self.visible(mask, x)
        visible = visible.unsqueeze(1) if x.dim() == 5 else visible  # (B, paths, C, h, w)
        count = visible.sum(self._space, keepdim=True).clamp(min=1)
        wide = torch.promote_types(x.dtype, torch.float32)
        mean = torch.where(visible, x, 0.0).to(wide).pow(power).sum(self._space, keepdim=True) / count
        mean = mean if power == 1 else mean.clamp(min=torch.finfo(wide).tiny).pow(1 / power)
        return torch.where(visible, x, mean.to(x.dtype))


class PooledNHWC(Pooled):
    """The same for maps (B, h, w, C)."""

    _space = NHWC


class MeanSquare(Pooled):
    """Looks across positions by the mean square alone (filter response norm)."""

    _power = 2


class GlobalPool(Pooled):
    """An adaptive pool, which must be to one position."""

    def masked_forward(self, mask: Mask, x: Tensor) -> Tensor:
        y = super().masked_forward(mask, x)
        if y.numel() != x.shape[0] * x.shape[1]:
            raise mask.refuse(self, "pools to more than one position, which has no exact sparse form")
        return y


class AveragedLater(Pooled):
    """A layer whose output its parent averages over the map before anything else looks across positions."""

    def masked_forward(self, mask: Mask, x: Tensor) -> Tensor:
        return self.filled(mask, self.plain_forward(x))


class GlobalResponseNorm(Masked):
    """ConvNeXt V2: an L2 norm over positions, to which zeros add nothing."""

    def masked_forward(self, mask: Mask, x: Tensor) -> Tensor:
        return self.zeroed(mask, self.plain_forward(self.zeroed(mask, x)))


class GlobalResponseNormNHWC(GlobalResponseNorm):
    """The same for maps (B, h, w, C)."""

    _space = NHWC


class BatchNorm(Masked):
    """Moments of the visible positions of the batch (and of all processes); the activation of timm's layers after."""

    def masked_forward(self, mask: Mask, x: Tensor) -> Tensor:
        norm: Any = self
        if not self.training and norm.running_mean is not None:
            return self.zeroed(mask, self.plain_forward(x))
        return self.zeroed(mask, _activated(self, masked_batch_norm(norm, x, self.visible(mask, x))))


class GroupNorm(Masked):
    """Moments of the visible positions of each image and group."""

    def masked_forward(self, mask: Mask, x: Tensor) -> Tensor:
        norm: Any = self
        return self.zeroed(mask, _activated(self, masked_group_norm(norm, x, self.visible(mask, x))))


class EvoNormS0(Masked):
    """x sigmoid(v x) / (standard deviation of image and group), over visible positions (Liu et al. 2020, table 2)."""

    def masked_forward(self, mask: Mask, x: Tensor) -> Tensor:
        norm: Any = self
        if norm.v is None:
            return super().masked_forward(mask, x)
        visible = self.visible(mask, x)
        v, weight, bias = (p.view(1, -1, 1, 1) for p in (norm.v, norm.weight, norm.bias))
        variance = masked_group_variance(x, visible, norm.groups)
        y = x * (x * v).sigmoid() / (variance + norm.eps).sqrt().to(x.dtype)
        return self.zeroed(mask, y * weight + bias)


class Upsample(Masked):
    """Nearest neighbour by a whole factor stays inside the cell; every other mode looks beyond it."""

    def masked_forward(self, mask: Mask, x: Tensor) -> Tensor:
        layer: Any = self
        y: Tensor = self.plain_forward(x)
        if layer.mode != "nearest" or y.shape[-2] % x.shape[-2] or y.shape[-1] % x.shape[-1]:
            raise mask.refuse(self, f"interpolates ({layer.mode}), which has no exact sparse form")
        return self.zeroed(mask, y)


class DropBlock(Masked):
    """Draws blocks that know nothing of cells."""

    def masked_forward(self, mask: Mask, x: Tensor) -> Tensor:
        if self.training:
            raise mask.refuse(self, "drops blocks across cells; build the backbone without it")
        y: Tensor = self.plain_forward(x)
        return y


class Refused(Masked):
    """A layer that looks across positions and has no rule."""

    def masked_forward(self, mask: Mask, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise mask.refuse(self, "looks across positions, and has no exact sparse form here")


def _activated(norm: nn.Module, y: Tensor) -> Tensor:
    """timm's norm layers carry a drop layer and an activation."""
    for name in ("drop", "act"):
        y = getattr(norm, name)(y) if hasattr(norm, name) else y
    return y
