"""Build a plain backbone from a name, a dotted path or a module."""

import copy
import inspect
from typing import Any

from torch import nn

from leaven.backbones.classifier import around_classifier
from leaven.backbones.names import UnknownBackbone, import_factory, resolve

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Arguments that a timm family may lack without harm: a net without them takes any image size anyway,
# or keeps its one size. They change no state-dict key.
_SIZE_ARGUMENTS = ("img_size", "dynamic_img_size", "strict_img_size")

# torchvision's networks with auxiliary classifiers: in training they return several logits. They are built without.
AUXILIARY = {"tv:googlenet": ("aux1", "aux2"), "tv:inception_v3": ("AuxLogits",)}


def create(
    backbone: str | nn.Module,
    *,
    pretrained: bool = False,
    in_chans: int = 3,
    num_classes: int = 0,
    drop_path_rate: float | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> nn.Module:
    """A plain backbone, whose state-dict keys are those of plain timm or torchvision.

    Args:
        backbone: a name (see `resolve`), or a module, which is returned as it is. ``package.module:factory`` may name
            a module, too, which is copied, or what builds one: it is called with those of ``in_chans``,
            ``num_classes``, ``drop_path_rate``, ``pretrained`` that differ from their defaults here, and with
            ``image_size`` if it takes it.
        pretrained: load timm's or torchvision's default weights; the classifier stays fresh where theirs does not fit.
        in_chans: channels of the input images.
        num_classes: 0 for no classifier (timm); torchvision nets then keep the one they are built with. GoogLeNet and
            Inception of torchvision come without their auxiliary classifiers, as with ``aux_logits=False``.
        drop_path_rate: stochastic depth; refused by name where the net has none and the rate is not 0.
        image_size: for nets that are built for one size; other nets take any size and ignore it.

    Raises:
        UnknownBackbone: no such name.
        ValueError: an argument that this backbone cannot honour; one line.
    """
    wishes: dict[str, Any] = {"pretrained": pretrained, "in_chans": in_chans, "num_classes": num_classes}
    wishes["drop_path_rate"] = drop_path_rate
    defaults = {"pretrained": False, "in_chans": 3, "num_classes": 0, "drop_path_rate": None}
    asked = {key: value for key, value in wishes.items() if value != defaults[key]}
    if isinstance(backbone, nn.Module):
        if asked:
            raise ValueError(
                f"{', '.join(asked)}: not for a module that is already built; set it where you build it"
            )
        return backbone
    if not isinstance(backbone, str):
        raise ValueError(f"a backbone is a name or an nn.Module, not {backbone!r}")
    name = resolve(backbone)
    if name.startswith("tv:"):
        if pretrained and num_classes:
            return _torchvision_fresh_classifier(name, asked, image_size)
        return _torchvision(name, asked, image_size)
    if ":" in name and not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return _from_factory(name, asked, image_size)
    return _timm(name, wishes, image_size)


def data_config(model: nn.Module) -> dict[str, Any]:
    """``mean``, ``std``, ``input_size`` (C, H, W) and ``interpolation`` that the backbone was made for.

    timm's ``pretrained_cfg`` where the model has one, otherwise the ImageNet values.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    return {
        "mean": tuple(config.get("mean") or IMAGENET_MEAN),
        "std": tuple(config.get("std") or IMAGENET_STD),
        "input_size": tuple(config.get("input_size") or (3, 224, 224)),
        "interpolation": config.get("interpolation") or "bicubic",
    }


def _timm(name: str, wishes: dict[str, Any], image_size: int | tuple[int, int] | None) -> nn.Module:
    import timm

    arguments = dict(wishes, dynamic_img_size=True, strict_img_size=False)
    if image_size is not None:
        arguments["img_size"] = image_size
    while True:
        try:
            model: nn.Module = timm.create_model(name, **arguments)
        except TypeError as error:
            missing = [key for key in arguments if f"'{key}'" in str(error)]
            if "unexpected keyword" not in str(error) or not missing:
                raise
            for key in missing:
                if key not in _SIZE_ARGUMENTS and arguments[key]:
                    raise ValueError(f"{name} takes no {key}; leave it out") from None
                del arguments[key]
        else:
            return model


def _torchvision(name: str, asked: dict[str, Any], image_size: int | tuple[int, int] | None) -> nn.Module:
    from torchvision.models import get_model
    from torchvision.ops import StochasticDepth

    if "in_chans" in asked:
        raise ValueError(
            f"{name} takes 3 channels, not {asked['in_chans']}; take a timm name for other images"
        )
    arguments: dict[str, Any] = {"weights": "DEFAULT" if "pretrained" in asked else None}
    if "num_classes" in asked:
        arguments["num_classes"] = asked["num_classes"]
    if name in AUXILIARY and "pretrained" not in asked:
        arguments["init_weights"] = True  # the default, which warns
    if image_size is not None and name.startswith("tv:vit_"):
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height != width:
            raise ValueError(
                f"{name} takes square images only, not {height}x{width}; take a timm ViT for others"
            )
        arguments["image_size"] = height
    rate = asked.get("drop_path_rate")
    model: nn.Module
    try:
        with_rate = {} if rate is None else {"stochastic_depth_prob": rate}
        model = get_model(name.removeprefix("tv:"), **arguments, **with_rate)
    except TypeError as error:
        if rate is None or "stochastic_depth_prob" not in str(error):
            raise
        model = get_model(name.removeprefix("tv:"), **arguments)
        drops = [module for module in model.modules() if isinstance(module, StochasticDepth)]
        if rate and not drops:
            raise ValueError(f"{name} takes no drop_path_rate; leave it out") from None
        # Swin and MaxViT fix the rate in their builder; it grows linearly up to the last block's: scale it
        top = max((drop.p for drop in drops), default=0.0)
        for drop in drops:
            drop.p *= rate / top
    if name in AUXILIARY:
        _plain_inception(name, model)
    return model


def _plain_inception(name: str, model: Any) -> None:
    """Take the auxiliary classifiers out: with weights, torchvision refuses ``aux_logits=False``.

    With weights it also makes [-1, 1] of ImageNet-normalised images inside the network. No weights file would tell, so
    images are to be normalised so in the first place.
    """
    model.aux_logits = False
    for part in AUXILIARY[name]:
        setattr(model, part, None)
    if model.transform_input:
        model.transform_input = False
        model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def _torchvision_fresh_classifier(
    name: str, asked: dict[str, Any], image_size: int | tuple[int, int] | None
) -> nn.Module:
    """Pretrained but for the classifier: torchvision refuses another number of classes with its weights."""
    model = _torchvision(name, {k: v for k, v in asked.items() if k != "pretrained"}, image_size)
    donor = _torchvision(name, {k: v for k, v in asked.items() if k != "num_classes"}, image_size)
    _, taken = around_classifier(model, donor.state_dict())
    model.load_state_dict(taken, strict=False)
    if name in AUXILIARY:
        model.pretrained_cfg = donor.pretrained_cfg
    return model


def _from_factory(name: str, asked: dict[str, Any], image_size: int | tuple[int, int] | None) -> nn.Module:
    factory = import_factory(name)
    if isinstance(factory, nn.Module):
        if asked:
            raise ValueError(
                f"{name} is a network that is built already, and cannot be given {', '.join(asked)}: "
                "name a function that builds it and takes them"
            )
        return copy.deepcopy(factory)  # what is trained must not be what the next call gets
    signature = inspect.signature(factory)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    refused = [key for key in asked if key not in signature.parameters and not takes_any]
    if refused:
        raise ValueError(f"{name} takes no {', '.join(refused)}: {_how_to_take(refused)}")
    if image_size is not None and "image_size" in signature.parameters:
        asked = {**asked, "image_size": image_size}
    try:
        signature.bind(**asked)
    except TypeError as error:
        raise ValueError(f"{name} cannot be called with ({', '.join(asked)}): {error}") from None
    model = factory(**asked)
    if not isinstance(model, nn.Module):
        raise UnknownBackbone(f"{name} returned {type(model).__name__}, not an nn.Module")
    return model


def _how_to_take(refused: list[str]) -> str:
    if "num_classes" not in refused:
        return "add the argument to it, or do not ask for it"
    return "its classifier is built by that argument, 0 for none; add it, as in def factory(num_classes=0)"
