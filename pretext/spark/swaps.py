"""The few modules whose own forward a sparse map cannot pass; their class is swapped in place, weights stay."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from leaven.pretext.spark.sparse_map import SparseMap


def synced_batch_norm(values: Tensor, norm: nn.modules.batchnorm._BatchNorm, group: Any = None) -> Tensor:
    """BatchNorm of (N, C) values by the moments of all processes' values; updates the running buffers.

    PyTorch's own runs on accelerators only and through a function that would not see the map. Sum and count are both
    reduced, so processes may differ in N.
    """
    count = torch.tensor(float(values.shape[0]), dtype=torch.float64, device=values.device)
    dist.all_reduce(count, group=group)
    n = float(count)
    wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    mean = all_reduce(wide.sum(0), group=group or dist.group.WORLD) / n
    centred = wide - mean
    var = all_reduce(centred.square().sum(0), group=group or dist.group.WORLD) / n
    if (
        norm.running_mean is not None
        and norm.running_var is not None
        and norm.num_batches_tracked is not None
    ):
        with torch.no_grad():
            norm.num_batches_tracked += 1
            momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
            norm.running_var.lerp_((var * n / (n - 1)).to(norm.running_var.dtype), momentum)
    out = centred * (var + norm.eps).rsqrt()
    if norm.affine:
        out = out * norm.weight + norm.bias
    return out.to(values.dtype)  # type: ignore[no-any-return]


class SyncBatchNorm(nn.SyncBatchNorm):
    """Moments over the visible positions of all processes."""

    def forward(self, input: Any) -> Any:
        """A map (B, C, h, w), or an ordinary tensor as ever."""
        distributed = self.training and dist.is_initialized() and dist.get_world_size(self.process_group) > 1
        if not (isinstance(input, SparseMap) and distributed):
            return super().forward(input)
        values = input.plain("SyncBatchNorm")
        return input.like(synced_batch_norm(values.flatten(0, 1), self, self.process_group).view_as(values))


class Hardswish(nn.Hardswish):
    """Dynamo does not ask ``__torch_function__`` for F.hardswish, so maps take the formula."""

    def forward(self, input: Any) -> Any:
        """x * relu6(x + 3) / 6."""
        if not isinstance(input, SparseMap):
            return super().forward(input)
        return input.like(F.hardswish(input.plain("hardswish")))


class Hardsigmoid(nn.Hardsigmoid):
    """As Hardswish."""

    def forward(self, input: Any) -> Any:
        """relu6(x + 3) / 6."""
        if not isinstance(input, SparseMap):
            return super().forward(input)
        return input.like(F.hardsigmoid(input.plain("hardsigmoid")))


class GlobalContext(nn.Module):
    """timm's: a softmax over positions says how much each counts in the context. Here over the visible ones."""

    def forward(self: Any, input: Any) -> Any:
        """A map (B, C, h, w), or an ordinary tensor as ever."""
        if not isinstance(input, SparseMap) or self.conv_attn is None:
            return super().forward(input)
        values = input.plain("GlobalContext")
        share = self.conv_attn(input).values.softmax(1)  # (B, T, 1)
        context = (values * share).sum(1)[:, :, None, None]
        if self.mlp_scale is not None:
            input = input * self.gate(self.mlp_scale(context))
        return input if self.mlp_add is None else input + self.mlp_add(context)


class EvoNorm2dS0(nn.Module):
    """timm's: it spreads a group's deviation to the full map, which a sparse map cannot tell from one that varies."""

    def forward(self: Any, input: Any) -> Any:
        """A map (B, C, h, w), or an ordinary tensor as ever."""
        if not isinstance(input, SparseMap):
            return super().forward(input)
        x = input.plain("EvoNorm2dS0")
        if self.apply_act:
            groups = x.unflatten(2, (self.groups, -1)).float()
            std = groups.var((1, 3), unbiased=False, keepdim=True).add(self.eps).sqrt().to(x.dtype)
            gated = x * (x * self.v.to(x.dtype)).sigmoid()
            x = (gated.unflatten(2, (self.groups, -1)) / std).flatten(2)
        return input.like(x * self.weight.to(x.dtype) + self.bias.to(x.dtype))


class InceptionAux(nn.Module):
    """torchvision's GoogLeNet: a classifier beside the trunk, fed by a 4x4 pooling. No feature map depends on it."""

    def forward(self: Any, input: Any) -> Any:
        """Nothing for a map, or an ordinary tensor as ever."""
        return None if isinstance(input, SparseMap) else super().forward(input)


_SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.SyncBatchNorm: SyncBatchNorm,
    nn.Hardswish: Hardswish,
    nn.Hardsigmoid: Hardsigmoid,
}
# By name, so that neither library is imported for it. Exactly these classes: a subclass may compute something else.
_BY_NAME: dict[str, type[nn.Module]] = {
    "timm.layers.global_context.GlobalContext": GlobalContext,
    "timm.layers.evo_norm.EvoNorm2dS0": EvoNorm2dS0,
    "torchvision.models.googlenet.InceptionAux": InceptionAux,
}


def swap(backbone: nn.Module) -> None:
    """Give the modules above their map-aware class; idempotent, and without effect on ordinary tensors."""
    for module in backbone.modules():
        kind = type(module)
        if kind not in _SWAPS and (bases := _bases(kind)):
            names = {"__module__": kind.__module__, "__reduce_ex__": _reduce}
            _SWAPS[kind] = type(kind.__name__, bases, names)
        if kind in _SWAPS:
            module.__class__ = _SWAPS[kind]


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """For copies and pickles of a class made above, which has its plain class's name and is not found by it."""
    plain = next(theirs for theirs, ours in _SWAPS.items() if ours is type(module))
    return _swapped, (plain,), module.__getstate__()


def _swapped(kind: type[nn.Module]) -> nn.Module:
    """A module of class `kind` with its map-aware class, empty yet."""
    module: nn.Module = nn.Module.__new__(kind)
    nn.Module.__init__(module)
    swap(module)
    return module


def _bases(kind: type[nn.Module]) -> tuple[type[nn.Module], ...]:
    """What the map-aware class of `kind` derives from, in order; nothing for a module that needs none."""
    if issubclass(kind, nn.SyncBatchNorm) and not issubclass(kind, SyncBatchNorm):
        return (kind, SyncBatchNorm)  # timm's SyncBatchNormAct calls super().forward: ours comes next in line
    ours = _BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")
    return () if ours is None or issubclass(kind, ours) else (ours, kind)


def unswap(backbone: nn.Module) -> None:
    """Give every swapped module its own class back."""
    plain = {ours: theirs for theirs, ours in _SWAPS.items()}
    for module in backbone.modules():
        if type(module) in plain:
            module.__class__ = plain[type(module)]
