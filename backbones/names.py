"""Names of backbones: one table of short-hands, and an error that suggests near names."""

import difflib
import importlib
import re
from collections.abc import Callable

from torch import nn

_SIZES = {"n": "nano", "ti": "tiny", "t": "tiny", "s": "small", "m": "medium", "b": "base", "l": "large"}
_SIZES |= {"h": "huge", "g": "giant", "xl": "xlarge"}

ALIASES: dict[str, str] = {
    **{f"convnext_{k}": f"convnext_{_SIZES[k]}" for k in ("n", "t", "s", "b", "l", "xl")},
    **{f"convnextv2_{k}": f"convnextv2_{_SIZES[k]}" for k in ("n", "t", "s", "b", "l", "h")},
    **{f"swin_{k}": f"swin_{_SIZES[k]}_patch4_window7_224" for k in ("t", "s", "b", "l")},
    **{f"swinv2_{k}": f"swinv2_{_SIZES[k]}_window8_256" for k in ("t", "s", "b")},
    **{f"vit_{k}": f"vit_{_SIZES[k]}_patch16_224" for k in ("ti", "t", "s", "b", "l")},
    **{f"vit_{k}_16": f"vit_{_SIZES[k]}_patch16_224" for k in ("ti", "t", "s", "b", "l")},
    **{f"vit_{k}_32": f"vit_{_SIZES[k]}_patch32_224" for k in ("s", "b")},
    **{f"deit_{k}": f"deit_{_SIZES[k]}_patch16_224" for k in ("ti", "t", "s", "b")},
    **{f"deit3_{k}": f"deit3_{_SIZES[k]}_patch16_224" for k in ("s", "m", "b", "l")},
    **{f"b{i}": f"efficientnet_b{i}" for i in range(8)},
    **{f"effnet_b{i}": f"efficientnet_b{i}" for i in range(8)},
    **{f"efficientnetb{i}": f"efficientnet_b{i}" for i in range(8)},
    **{f"effnetv2_{k}": f"efficientnetv2_{k}" for k in ("s", "m", "l", "xl")},
    **{f"efficientnet_v2_{k}": f"efficientnetv2_{k}" for k in ("s", "m", "l", "xl")},
    **{
        f"regnet{sep}{family}_{flops}": f"regnet{family}_{code}"
        for sep in ("", "_")
        for family in ("x", "y")
        for flops, code in {
            "200mf": "002",
            "400mf": "004",
            "600mf": "006",
            "800mf": "008",
            "1.6gf": "016",
            "1_6gf": "016",
            "3.2gf": "032",
            "3_2gf": "032",
            "4gf": "040",
            "8gf": "080",
            "16gf": "160",
            "32gf": "320",
        }.items()
    },
    "mobilenet_v1": "mobilenetv1_100",
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "mobilenetv1": "mobilenetv1_100",
    "mobilenetv2": "mobilenetv2_100",
    "mobilenetv3": "mobilenetv3_large_100",
    "mobilenetv3_small": "mobilenetv3_small_100",
    "mobilenetv3_large": "mobilenetv3_large_100",
    "wide_resnet50": "wide_resnet50_2",
    "resnext50": "resnext50_32x4d",
    "resnext101": "resnext101_32x8d",
    "pvt_v2": "pvt_v2_b0",
}
"""Short name, as papers and torchvision have it, to timm's name; see `resolve`."""


class UnknownBackbone(ValueError):
    """No backbone of that name. The message is one line and suggests near names."""


def resolve(name: str) -> str:
    """Canonical name of a backbone: a timm name, ``tv:NAME`` or ``package.module:factory``.

    A name that timm knows passes through, with or without a pretrained tag (``convnext_tiny.fb_in22k``);
    short-hands of the papers (``convnext_t``, ``vit_s/16``, ``resnet-50``) are looked up in `ALIASES`.

    Raises:
        UnknownBackbone: one line, with near names.
    """
    prefix, colon, rest = name.partition(":")
    if colon and prefix == "tv":
        if rest not in torchvision_names():
            raise UnknownBackbone(f"torchvision has no classification model {rest!r}{_near(name)}")
        return name
    if colon and prefix in ("hf-hub", "hf_hub", "local-dir"):  # timm's own sources
        return name
    if colon:
        import_factory(name)
        return name

    import timm

    arch, _, tag = name.partition(".")
    if timm.is_model(arch):
        if tag and tag not in (tags := _tags(arch)):
            known = ", ".join(sorted(tags)) or "none"
            raise UnknownBackbone(f"{arch} has no pretrained tag {tag!r}; timm knows: {known}")
        return name
    for spelling in (re.sub(r"[-/]", "_", name.lower()), re.sub(r"[-_]", "", name.lower())):
        if spelling in ALIASES:
            return ALIASES[spelling]
        if timm.is_model(spelling):
            return spelling
    raise UnknownBackbone(f"unknown backbone {name!r}{_near(name)}")


def import_factory(path: str) -> Callable[..., nn.Module]:
    """The callable named by a dotted path ``package.module:factory``.

    Raises:
        UnknownBackbone: the module or its attribute is missing, or is not callable.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name:
        raise UnknownBackbone(
            f"backbone {path!r} names no module; write package.module:factory or a plain name"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the user's module exists; something that it imports does not
        hint = _near(path) or "; write package.module:factory of an importable module"
        raise UnknownBackbone(f"backbone {path!r}: no module named {error.name!r}{hint}") from None
    factory: Callable[..., nn.Module] | None = getattr(module, attribute, None)
    if not callable(factory):
        near = difflib.get_close_matches(attribute, dir(module), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UnknownBackbone(f"backbone {path!r}: module {module_name} has no callable {attribute!r}{hint}")
    return factory


def torchvision_names() -> list[str]:
    """Names of torchvision's classification models."""
    import torchvision.models

    return list(torchvision.models.list_models(module=torchvision.models))


def _tags(arch: str) -> set[str]:
    import timm

    return {name.partition(".")[2] for name in timm.list_pretrained(f"{arch}.*")}


def _near(name: str) -> str:
    """``"; did you mean a, b?"`` over timm, torchvision and the short-hands, or an empty string."""
    import timm

    # torchvision's names carry a prefix but are searched without it: `googlenet` finds `tv:googlenet`
    bare = {known: f"tv:{known}" for known in torchvision_names()}
    if not name.startswith("tv:"):
        bare |= {known: known for known in [*timm.list_models(), *ALIASES]}
    found = difflib.get_close_matches(name.lower().removeprefix("tv:"), bare, n=4)
    return f"; did you mean {', '.join(bare[known] for known in found)}?" if found else ""
