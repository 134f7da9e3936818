"""Which rule of the dense masked encoder each layer of a backbone falls under."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from leaven.pretext.spark.dense_layers import (
    AveragedLater,
    AvgPool,
    BatchNorm,
    DropBlock,
    EvoNormS0,
    GlobalPool,
    GlobalResponseNorm,
    GlobalResponseNormNHWC,
    GroupNorm,
    Masked,
    MaskedNHWC,
    MaxPool,
    MeanSquare,
    Pooled,
    PooledNHWC,
    Refused,
    Upsample,
    Window,
)

# By the class whose forward a module runs, so that a subclass that overrides it does not inherit a rule, and nothing
# needs importing.
_RULES: dict[str, type[Masked]] = {
    "torch.nn.modules.conv.Conv2d": Window,
    "torch.nn.modules.linear.Linear": MaskedNHWC,
    "torch.nn.modules.batchnorm._BatchNorm": BatchNorm,
    "torch.nn.modules.batchnorm.SyncBatchNorm": BatchNorm,
    "torch.nn.modules.normalization.GroupNorm": GroupNorm,
    "torch.nn.modules.normalization.LayerNorm": MaskedNHWC,
    "torch.nn.modules.normalization.RMSNorm": MaskedNHWC,
    "torch.nn.modules.pooling.MaxPool2d": MaxPool,
    "torch.nn.modules.pooling.AvgPool2d": AvgPool,
    "torch.nn.modules.pooling.AdaptiveAvgPool2d": GlobalPool,
    "torch.nn.modules.pooling.AdaptiveMaxPool2d": GlobalPool,
    "torch.nn.modules.upsampling.Upsample": Upsample,
    "torchvision.models.convnext.LayerNorm2d": Masked,
    "torchvision.ops.misc.FrozenBatchNorm2d": Masked,
    "torchvision.ops.misc.SqueezeExcitation": Pooled,
    "torchvision.ops.drop_block.DropBlock2d": DropBlock,
    "timm.layers.adaptive_avgmax_pool.FastAdaptiveAvgPool": GlobalPool,
    "timm.layers.drop.DropBlock2d": DropBlock,
    "timm.layers.eca.CecaModule": Pooled,
    "timm.layers.eca.EcaModule": Pooled,
    "timm.layers.evo_norm.EvoNorm2dS0": EvoNormS0,
    "timm.layers.filter_response_norm.FilterResponseNormAct2d": MeanSquare,
    "timm.layers.filter_response_norm.FilterResponseNormTlu2d": MeanSquare,
    "timm.layers.grn.GlobalResponseNorm": GlobalResponseNorm,
    "timm.layers.norm_act.BatchNormAct2d": BatchNorm,
    "timm.layers.norm_act.FrozenBatchNormAct2d": Masked,
    "timm.layers.norm_act.SyncBatchNormAct": BatchNorm,
    "timm.layers.pool2d_same.AvgPool2dSame": Window,  # pads by itself, and counts what it pads
    "timm.layers.pool2d_same.MaxPool2dSame": MaxPool,
    "timm.layers.selective_kernel.SelectiveKernelAttn": Pooled,
    "timm.layers.split_attn.SplitAttn": Masked,
    "timm.layers.squeeze_excite.EffectiveSEModule": Pooled,
    "timm.layers.squeeze_excite.SEModule": Pooled,
    "timm.layers.squeeze_excite.SqueezeExciteCl": PooledNHWC,
    "timm.models._efficientnet_blocks.SqueezeExcite": Pooled,
    "timm.models.hgnet.EseModule": Pooled,
    "timm.models.hgnet.LearnableAffineBlock": Masked,
    "timm.models.senet.SEModule": Pooled,
    **{f"timm.layers.norm.{name}": GroupNorm for name in ("GroupNorm", "GroupNorm1")},
    **{f"timm.layers.norm_act.{name}": GroupNorm for name in ("GroupNormAct", "GroupNorm1Act")},
    **{
        f"timm.layers.{file}.{kind}{act}{layout}{precision}": Masked if layout else MaskedNHWC
        for file, act in (("norm", ""), ("norm_act", "Act"))
        for kind in ("LayerNorm", "RmsNorm", "SimpleNorm")
        for layout in ("", "2d")
        for precision in ("", "Fp32")
    },
}
_CLASSES: dict[tuple[type[nn.Module], type[Masked]], type[Masked]] = {}
# Layers of torch.nn that need no rule: they work on one position, or hold other modules, or pad with zeros.
_POINTWISE = ("activation", "dropout", "container", "flatten", "linear", "module", "channelshuffle")
# Layers whose output a parent averages over the map in its own forward.
_AVERAGED_LATER: dict[str, Callable[[Any], nn.Module]] = {
    "timm.layers.split_attn.SplitAttn": lambda parent: parent.act0,
    "timm.models.focalnet.FocalModulation": lambda parent: parent.focal_layers[-1],
}


def rules(backbone: nn.Module) -> Iterator[tuple[nn.Module, type[Masked]]]:
    """Every module of a backbone that needs a rule, with it."""
    averaged_later = set()
    for module in backbone.modules():
        plain = module._plain if isinstance(module, Masked) else type(module)
        part = _AVERAGED_LATER.get(_where_forward_is_from(plain))
        if part is not None:
            averaged_later.add(part(module))
        rule = AveragedLater if module in averaged_later else _rule(plain)
        if rule is GlobalResponseNorm and getattr(module, "channel_dim", 1) == -1:
            rule = GlobalResponseNormNHWC
        if rule is not None:
            yield module, rule


def with_rule(plain: type[nn.Module], rule: type[Masked]) -> type[Masked]:
    """The class for a module of class `plain` under `rule`; it goes by the plain class's name."""
    if (plain, rule) not in _CLASSES:
        names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
        _CLASSES[plain, rule] = type(plain.__name__, (rule, plain), {"_plain": plain, **names})
    return _CLASSES[plain, rule]


def _rule(plain: type[nn.Module]) -> type[Masked] | None:
    forward = _where_forward_is_from(plain)
    if forward in _RULES:
        return _RULES[forward]
    if issubclass(plain, nn.Conv2d):
        return Window
    package, _, kind = forward.rpartition(".")
    if not package.startswith("torch.nn.modules.") or kind in ("LocalResponseNorm", "_ConstantPadNd"):
        return None
    pointwise = package.removeprefix("torch.nn.modules.") in _POINTWISE and kind != "MultiheadAttention"
    return None if pointwise else Refused


def _where_forward_is_from(plain: type[nn.Module]) -> str:
    forward = plain.forward
    return f"{forward.__module__}.{forward.__qualname__.removesuffix('.forward')}"
