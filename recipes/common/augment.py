"""Crop, mirror and normalise: per sample, on uint8, antialiased, with parameters drawn by key.

`TrainTransform` and `eval_transform` run in the loader's workers. `DeviceAugment` draws the same boxes
in the workers and cuts them out on the device, for when a GPU waits for its loader.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from leaven.recipes.common.policies import Policy, auto_augment, random_erasing
from leaven.recipes.common.sampler import Key, uniform

Size = tuple[int, int]
Range = tuple[float, float]


class Transform(Protocol):
    """A stored image, uint8 (C, H, W), and its key -> what goes into the batch."""

    def __call__(self, image: Tensor, key: Key) -> Any: ...


class Box(NamedTuple):
    """A crop in pixels of the stored image, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def random_box(key: Key, stored: Size, size: Size, scale: Range, ratio: Range, hflip: float) -> Box:
    """The box of a random resized crop, and a coin for the flip.

    The area is uniform in `scale`, the aspect log-uniform in `ratio` times the output's own aspect, the
    position uniform. After ten shapes that do not fit the image: the largest central box with an aspect
    in `ratio`.
    Source: Szegedy et al., Going Deeper with Convolutions (2015), section 6; ten tries as in torchvision.

    Args:
        key: what the draws depend on.
        stored: (H, W) of the image.
        size: (h, w) of the output.
        scale: range of the box's share of the image's area.
        ratio: range of the box's width / height, relative to the output's.
        hflip: probability of mirroring.
    """
    height, width = stored
    flip = bool(uniform(key.seed, key.epoch, key.index, "flip")[0] < hflip)
    draws = uniform(key.seed, key.epoch, key.index, "crop", 22).tolist()
    narrowest, widest = (r * size[1] / size[0] for r in ratio)
    for u_area, u_aspect in zip(draws[:10], draws[10:20], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect = narrowest * (widest / narrowest) ** u_aspect
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return Box(int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w, flip)
    aspect = min(max(width / height, narrowest), widest)
    h, w = max(1, min(height, round(width / aspect))), max(1, min(width, round(height * aspect)))
    return Box((height - h) // 2, (width - w) // 2, h, w, flip)


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, mirror, automatic augmentation, normalise, erase: uint8 (C, H, W) -> float (C, h, w).

    See `random_box`, `auto_augment` (the only one to read the key's strength) and `random_erasing`.

    Args:
        size: (h, w) of the output; a size in the key wins.
        scale: range of the crop's share of the image's area.
        hflip: probability of mirroring.
        mean, std: per channel, of images in [0, 1].
        ratio: range of the crop's width / height, relative to the output's.
        interpolation: "bicubic" or "bilinear".
        aa: automatic augmentation.
        reprob: probability of erasing a rectangle.
    """

    size: Size
    scale: Range
    hflip: float
    mean: Sequence[float]
    std: Sequence[float]
    ratio: Range = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    aa: Policy = "none"
    reprob: float = 0.0

    def __call__(self, image: Tensor, key: Key) -> Tensor:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        size = key.size or self.size
        *box, flip = random_box(key, _size_of(image), size, self.scale, self.ratio, self.hflip)
        mode = InterpolationMode(self.interpolation)
        image = F.resized_crop(image, *box, list(size), interpolation=mode, antialias=True)
        image = auto_augment(F.horizontal_flip(image) if flip else image, key, self.aa)
        return random_erasing(normalise(image, self.mean, self.std), key, self.reprob)

    def reduction(self, stored: Size, key: Key) -> int:
        """By how much the image may be smaller than `stored` (H, W) and still fill the output: 1, 2, 4 or 8.

        Only where a curriculum asks for a size: a JPEG is then decoded in less time, and other images look as ever.
        """
        if key.size is None:
            return 1
        box = random_box(key, stored, key.size, self.scale, self.ratio, self.hflip)
        room = min(box.height / key.size[0], box.width / key.size[1])
        return max(factor for factor in (1, 2, 4, 8) if factor <= max(1, room))


def eval_transform(
    size: Size, crop_pct: float, mean: Sequence[float], std: Sequence[float], interpolation: str = "bicubic"
) -> Transform:
    """Resize until the image just covers `size / crop_pct`, crop the centre, normalise.

    Args:
        size: (h, w) of the output; a size in the key wins.
        crop_pct: share of the resized image that the crop keeps, per side; 1.0 keeps all that fits.
        mean, std: per channel, of images in [0, 1].
        interpolation: "bicubic" or "bilinear".
    """
    return partial(_eval, size=size, crop_pct=crop_pct, mean=mean, std=std, interpolation=interpolation)


def _eval(
    image: Tensor,
    key: Key,
    *,
    size: Size,
    crop_pct: float,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
) -> Tensor:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    size = key.size or size
    covering = covering_size(
        _size_of(image), (math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct))
    )
    image = F.resize(image, list(covering), interpolation=InterpolationMode(interpolation), antialias=True)
    return normalise(F.center_crop(image, list(size)), mean, std)


def covering_size(stored: Size, size: Size) -> Size:
    """The smallest (H, W) with the aspect of `stored` that covers `size`, rounded as in torchvision."""
    (height, width), (h, w) = stored, size
    if h * width >= w * height:  # the height decides
        return h, max(w, h * width // height)
    return max(h, w * height // width), w


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (..., C, H, W) -> float32, (pixel / 255 - mean) / std per channel."""
    shift, scale = _moments(tuple(mean), tuple(std))
    return image.to(torch.float32, copy=True).sub_(shift).div_(scale)


@lru_cache
def _moments(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(C, 1, 1), of pixels from 0 to 255; made once, not for every image."""
    shift, scale = (255 * torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    return shift, scale


def _size_of(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]


class DeviceAugment:
    """Random resized crop, mirror and normalise on the device, of the boxes that `TrainTransform` would cut.

    `draw` is the dataset's transform: it leaves an image as it is stored, or resized as a whole to
    `stored`, and adds its box. The batch's first part is then a pair, which this object turns into
    images:

        augment = DeviceAugment((224, 224), (0.67, 1.0), 0.5, mean, std, stored=(256, 256))
        loader = make_loader(KeyedDataset(source, augment.draw), sampler, workers)
        for (pixels, boxes), labels in loader:
            images = augment(pixels.to(device), boxes.to(device))

    kornia's functional operations do the work. Its RandomResizedCrop would not do: it draws its own
    parameters, and shrinks without antialiasing. Here a Gaussian with the variance of the loader's
    antialiasing filter comes first.

    Args:
        size, scale, hflip, mean, std, ratio, interpolation: as in `TrainTransform`.
        stored: (H, W) to which the workers resize whole images, so that images of several sizes can be
            stacked; None: the images all have one size.
    """

    def __init__(
        self,
        size: Size,
        scale: Range,
        hflip: float,
        mean: Sequence[float],
        std: Sequence[float],
        ratio: Range = (3 / 4, 4 / 3),
        interpolation: str = "bicubic",
        stored: Size | None = None,
    ) -> None:
        self.size, self.scale, self.hflip, self.ratio = size, scale, hflip, ratio
        self.mean, self.std, self.interpolation, self.stored = mean, std, interpolation, stored

    def draw(self, image: Tensor, key: Key) -> tuple[Tensor, Tensor]:
        """In the worker: the stored image, uint8 (C, H, W), and (5,): top, left, height, width, flip."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        height, width = _size_of(image)
        box = random_box(key, (height, width), key.size or self.size, self.scale, self.ratio, self.hflip)
        if self.stored is not None:
            # Box and image are stretched alike, so the box still frames what it framed.
            mode = InterpolationMode(self.interpolation)
            image = F.resize(image, list(self.stored), interpolation=mode, antialias=True)
        y, x = image.shape[-2] / height, image.shape[-1] / width
        return image, torch.tensor(
            [box.top * y, box.left * x, box.height * y, box.width * x, float(box.flip)]
        )

    def __call__(self, pixels: Tensor, boxes: Tensor, size: Size | None = None) -> Tensor:
        """Cut the boxes out.

        Args:
            pixels: uint8 (B, C, H, W).
            boxes: (B, 5) from `draw`, on the same device.
            size: (h, w) of the output, None for the one given at first.

        Returns:
            float32 (B, C, h, w), normalised.
        """
        from kornia.enhance import normalize
        from kornia.geometry.transform import remap

        size = size or self.size
        images = _antialias(pixels.float() / 255, boxes, size)
        x, y = _sampling_grid(boxes, size)
        images = remap(images, x, y, mode=self.interpolation, padding_mode="border", align_corners=True)
        mean, std = (
            torch.tensor(values, dtype=images.dtype, device=images.device) for values in (self.mean, self.std)
        )
        return normalize(images.clamp(0, 1), mean, std)


def _sampling_grid(boxes: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Where each output pixel's centre lies in the stored image: x and y, each (B, h, w)."""
    top, left, height, width, flip = (column.view(-1, 1) for column in boxes.unbind(1))
    (h, w), device = size, boxes.device
    y = top + (torch.arange(h, device=device) + 0.5) * height / h - 0.5
    x = (torch.arange(w, device=device) + 0.5) * width / w - 0.5
    x = left + torch.where(flip > 0, width - 1 - x, x)
    # As in a crop that is resized, nothing outside the box is seen.
    y = torch.minimum(torch.maximum(y, top), top + height - 1)
    x = torch.minimum(torch.maximum(x, left), left + width - 1)
    return x[:, None, :].expand(-1, h, w), y[:, :, None].expand(-1, h, w)


def _antialias(images: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """Blur (B, C, H, W) where a box is larger than the output, by as much as it is.

    A triangle filter for shrinking by f has variance f^2 / 6, of which bilinear sampling brings 1 / 6.
    """
    from kornia.filters import gaussian_blur2d

    shrink = boxes[:, 2:4] / torch.tensor(size, device=boxes.device)
    largest = [max(1.0, stored / out) for stored, out in zip(_size_of(images), size, strict=True)]
    if largest == [1.0, 1.0]:
        return images
    sigma = ((shrink.square() - 1) / 6).clamp(min=1e-6).sqrt()
    # Three sigmas to each side, from sizes alone: asking the boxes would wait for the device.
    reach = [math.ceil(3 * math.sqrt((f * f - 1) / 6)) for f in largest]
    reach = [min(r, stored - 1) for r, stored in zip(reach, _size_of(images), strict=True)]
    blurred: Tensor = gaussian_blur2d(images, (2 * reach[0] + 1, 2 * reach[1] + 1), sigma)
    return blurred
