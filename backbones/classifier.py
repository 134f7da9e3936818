"""Which part of a network is its classifier, and loading weights around it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Module paths of the classifier, as in ``("fc",)``; empty where there is none.

    timm's networks say it themselves, with and without a classifier built in. Of any other network it is the last
    linear layer, in order of registration; without one the last convolution (SqueezeNet).
    """
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    get: Any = getattr(model, "get_classifier", None)
    if "classifier" in config or get is not None:
        declared = config.get("classifier") or ()
        names = [declared] if isinstance(declared, str) else list(declared)
        heads = get() if get is not None else ()
        heads = heads if isinstance(heads, tuple) else (heads,)
        # LeViT's classifier module has a norm beside the linear layer that its configuration names.
        names += [name for name, module in model.named_modules() if name and any(module is h for h in heads)]
        return tuple(dict.fromkeys(names))
    for kind in (nn.Linear, nn.Conv2d):
        found = [name for name, module in model.named_modules() if isinstance(module, kind)]
        if found:
            return (found[-1],)
    return ()


def around_classifier(
    model: nn.Module, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What of `model` and of `state` must agree when the classifier need not, and what of `state` to load.

    Returns:
        The entries of the model that `state` must have, and those of `state` that it should have. A classifier
        that fits is among both; one that is missing, of another shape or too much is in neither.
    """
    own = model.state_dict()
    heads = tuple(f"{name}." for name in classifier_names(model))
    mine = {key: value for key, value in own.items() if heads and key.startswith(heads)}
    theirs = {key: value for key, value in state.items() if heads and key.startswith(heads)}
    if {key: value.shape for key, value in mine.items()} == {k: v.shape for k, v in theirs.items()}:
        return own, dict(state)
    return (
        {key: value for key, value in own.items() if key not in mine},
        {key: value for key, value in state.items() if key not in theirs},
    )
