"""torchvision's automatic augmentation and random erasing, and timm's mixup, with draws that are keyed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from leaven.recipes.common.sampler import Key, random_bits

Policy = Literal["none", "trivial", "randaugment"]

# Applied to a batch: images (B, C, H, W), class indices (B,), a keyed generator -> images and targets.
Mix = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]

_RANDAUGMENT_MAGNITUDE = 9  # of 30, torchvision's default


@contextmanager
def seeded(key: Key, purpose: str) -> Iterator[None]:
    """torch's generator of the CPU seeded by (seed, epoch, index, purpose) within, and as it was afterwards.

    torchvision's transforms draw from the global generator and take no other.
    """
    state = torch.get_rng_state()
    # Not torch.manual_seed: that would reseed a GPU's generator too, in a process that trains on one.
    torch.default_generator.manual_seed(int(random_bits(key.seed, key.epoch, key.index, purpose, 1)[0] >> 1))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def auto_augment(image: Tensor, key: Key, policy: Policy) -> Tensor:
    """TrivialAugmentWide or RandAugment (2 operations, magnitude 9 of 30 times the key's strength), by torchvision.

    Sources: Müller and Hutter, TrivialAugment (2021); Cubuk et al., RandAugment (2020).

    Args:
        image: uint8 (C, H, W), one or three channels.
        key: what the draws depend on.
        policy: "none" gives the image back.
    """
    if policy == "none":
        return image
    with seeded(key, "auto-augment"):
        augmented: Tensor = _transform(policy, round(_RANDAUGMENT_MAGNITUDE * key.strength))(image)
    return augmented


@lru_cache
def _transform(policy: Policy, magnitude: int) -> Any:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import RandAugment, TrivialAugmentWide

    if policy == "trivial":
        return TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)
    return RandAugment(magnitude=magnitude, interpolation=InterpolationMode.BILINEAR)


def random_erasing(image: Tensor, key: Key, probability: float) -> Tensor:
    """With this probability, a rectangle of 2 to 33 % of a normalised image becomes normal noise, per pixel.

    Source: Zhong et al., Random Erasing (2020); timm's mode "pixel".
    """
    if not probability:
        return image
    from torchvision.transforms.v2 import RandomErasing

    with seeded(key, "erasing"):
        erased: Tensor = RandomErasing(p=probability, value="random")(image)
    return erased


def mixing(mixup: float, cutmix: float, smoothing: float, classes: int) -> Mix | None:
    """timm's Mixup: one of mixup and CutMix per batch, their targets smoothed; None where both are 0.

    Sources: Zhang et al., mixup (2018); Yun et al., CutMix (2019).

    Args:
        mixup, cutmix: parameter of the Beta distribution of each, 0 for without.
        smoothing: label smoothing.
        classes: number of classes.
    """
    if not mixup and not cutmix:
        return None
    import timm.data

    data: Any = timm.data
    mixer = data.Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes)

    def mix(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        # It draws from NumPy's global generator and mixes in place.
        state = np.random.get_state()  # noqa: NPY002
        np.random.seed(int(torch.randint(2**32, (), generator=generator)))  # noqa: NPY002
        try:
            mixed: tuple[Tensor, Tensor] = mixer(images.clone(), labels)
        finally:
            np.random.set_state(state)  # noqa: NPY002
        return mixed

    return mix
