"""One image file -> uint8 (C, H, W), whatever the file holds; or `BadImage` with the reason."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

# What is listed when a folder is searched, lower case.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")

# What Pillow's readers raise on damaged files; they have no common base.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)


# Given the (H, W) of an image as it is stored: by how much (1, 2, 4, 8) it may come smaller, if that saves time.
Reduction = Callable[[tuple[int, int]], int]

_ORIENTATION = 0x0112  # EXIF's tag; from 5 on, rows and columns change places


class BadImage(Exception):
    """A file that is no readable image; the message says why, the path is the caller's to add."""


def read_image(path: str, in_chans: int = 3, reduction: Reduction | None = None) -> Tensor:
    """Read one file: uint8 (in_chans, H, W); see `decode`.

    Raises:
        BadImage: missing, unreadable, not an image, truncated.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from None
    return decode(data, in_chans, reduction)


def decode(data: bytes, in_chans: int = 3, reduction: Reduction | None = None) -> Tensor:
    """Decode an image file's bytes: uint8 (in_chans, H, W).

    By Pillow: it knows every kind of file named above, and torchvision's own decoders are deprecated.

    Args:
        data: the file.
        in_chans: 1 for grey, 3 for RGB.
        reduction: how much smaller a JPEG may come: its decoder then leaves the highest frequencies out, which takes
            less time than to decode and shrink.

    Raises:
        BadImage: not an image, truncated, or pixels without a defined range.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise BadImage("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if reduction is not None and image.format == "JPEG":
                _draft(image, reduction)
            return to_uint8(image, in_chans)
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise BadImage(" ".join(str(error).split()) or type(error).__name__) from None


def _draft(image: Image, reduction: Reduction) -> None:
    width, height = image.size
    turned = image.getexif().get(_ORIENTATION, 1) >= 5
    factor = reduction((width, height) if turned else (height, width))
    if factor > 1:
        image.draft(image.mode, (width // factor, height // factor))


def to_uint8(image: Image, in_chans: int) -> Tensor:
    """A Pillow image of any mode -> uint8 (in_chans, H, W), upright as EXIF says, on white where transparent.

    Raises:
        BadImage: float or 32-bit pixels, which have no defined range.
    """
    from PIL import Image as pil
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _from_16_bit(image)
    if image.has_transparency_data:
        # What is painted below full transparency is arbitrary, and was never meant to be seen.
        image = image.convert("RGBA")
        image = pil.alpha_composite(pil.new("RGBA", image.size, "white"), image)
    pixels = np.array(image.convert("L" if in_chans == 1 else "RGB"))
    # Left in the order of the file: torch resizes uint8 in less than half of the time so, to the same values.
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def _from_16_bit(image: Image) -> Image:
    """Modes I;16* and I to L by the 16-bit range; Pillow's own conversion clips at 255."""
    from PIL import Image as pil

    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise BadImage(f"pixels of mode {image.mode} have no defined range; save the file with 8 or 16 bits")
    return pil.fromarray(np.round(pixels / 257).astype(np.uint8))
