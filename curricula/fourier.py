"""The Fourier crop: a smaller image that holds the low frequencies of a larger one, and nothing else.

Keeping the lowest B of H frequencies of a discrete Fourier transform and going back is a linear map of the image: for
one axis a real matrix R (B, H), for an image X the product R X R^T. It is built here from its closed form, so that it
serves rectangles, odd sizes and any floating-point type, and costs two small matrix products.

Source: Wang et al., EfficientTrain, ICCV 2023 (arXiv 2211.09703), section 3.2.
"""

from functools import lru_cache
from operator import index
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Align = Literal["center", "corner"]
Nyquist = Literal["symmetric", "upstream"]
Boundary = Literal["periodic", "reflect"]
Size = tuple[int, int]


def _check_settings(align: Align, nyquist: Nyquist, boundary: Boundary) -> None:
    for name, value, known in (
        ("align", align, Align),
        ("nyquist", nyquist, Nyquist),
        ("boundary", boundary, Boundary),
    ):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, not {value!r}")
    if boundary == "reflect" and align != "center":
        raise ValueError('boundary="reflect" is aligned by centres: leave align="corner" out')
    if boundary == "reflect" and nyquist == "upstream":
        raise ValueError('nyquist="upstream" is of the periodic crop: leave boundary="reflect" out')


def pair(size: Any) -> Size:
    """A side, or (h, w), as whole numbers.

    Raises:
        TypeError: neither.
    """
    try:
        h, w = (size, size) if hasattr(size, "__index__") else size
        return index(h), index(w)
    except (TypeError, ValueError):
        raise TypeError(f"a size is a whole number of pixels or two of them (h, w), not {size!r}") from None


def fourier_matrix(size: int, full: int, align: Align = "center", boundary: Boundary = "periodic") -> Tensor:
    """The matrix R (size, full), float64, that crops one axis: ``R @ x`` has the low frequencies of x (full,).

    With ``align="center"`` samples stand at the centres of the new pixels, as in any resize: the crop then commutes
    with flips and quarter turns. With "corner", as in the paper's code, the first sample stands on the first pixel,
    and content shifts by (full / size - 1) / 2 pixels. Rows sum to one; ``size == full`` gives the identity.

    Args:
        size: samples to keep, B.
        full: samples of the axis, H.
        align: where the new samples stand.
        boundary: "periodic" continues the axis by itself, as the Fourier transform does; "reflect" by its mirror
            image (the truncated cosine transform DCT-II), without a jump at the border; centre-aligned only.

    Raises:
        ValueError: a size that is not in 1..full, unknown settings, or "reflect" with "corner".
    """
    _check_settings(align, "symmetric", boundary)
    if not 1 <= size <= full:
        raise ValueError(f"cannot crop {full} samples to {size}: the size must be between 1 and {full}")
    if boundary == "reflect":
        return _cosine_matrix(size, full)
    turns, whole = _offsets(size, full, align)
    sine = torch.sin(torch.pi * turns * size)
    # Odd: all of the band -(B-1)/2..(B-1)/2. Even: both of its ends, +B/2 and -B/2, count half.
    below = torch.sin(torch.pi * turns) if size % 2 else torch.tan(torch.pi * turns)
    return torch.where(whole, float(size), sine / below.where(~whole, torch.ones_like(below))) / full


def _offsets(size: int, full: int, align: Align) -> tuple[Tensor, Tensor]:
    """Distance from old sample p to new sample n in turns of the axis, (size, full), and where it is a whole number."""
    n, p = torch.arange(size).unsqueeze(1), torch.arange(full).unsqueeze(0)
    # In integers: what is zero modulo one must be exactly that.
    steps, turn = n * full - p * size, size * full
    if align == "center":
        steps, turn = (2 * n + 1) * full - (2 * p + 1) * size, 2 * turn
    return steps.double() / turn, steps % turn == 0


def _cosine_matrix(size: int, full: int) -> Tensor:
    k = torch.arange(size, dtype=torch.float64)
    new = torch.cos(torch.pi * k * (torch.arange(size, dtype=torch.float64).unsqueeze(1) + 0.5) / size)
    old = torch.cos(torch.pi * k * (torch.arange(full, dtype=torch.float64).unsqueeze(1) + 0.5) / full)
    weight = torch.where(k == 0, 1.0, 2.0)
    return (new * weight) @ old.T / full


def _nyquist_matrix(size: int, full: int, align: Align) -> Tensor:
    """S (size, full) for even sizes: what the bin -B/2 adds where its partner +B/2 is left out."""
    turns, whole = _offsets(size, full, align)
    return torch.where(whole, 0.0, -torch.sin(torch.pi * turns * size)) / full


def fourier_crop(
    x: Tensor,
    size: int | Size,
    align: Align = "center",
    nyquist: Nyquist = "symmetric",
    boundary: Boundary = "periodic",
) -> Tensor:
    """The low frequencies of images (..., H, W) as smaller images (..., h, w).

    Linear, keeps the mean, acts on each channel by itself; gradients flow. Values may leave the range of the input
    (Gibbs' ringing), so images are cropped after normalisation and never turned back into uint8. Half precision is
    computed in float32, also under autocast, and given back in its own type. The memory format is kept.

    Source: Wang et al., EfficientTrain, ICCV 2023 (arXiv 2211.09703), low-frequency cropping.

    Args:
        x: floating-point images; a size equal to their own leaves an axis as it is.
        size: side, or (h, w).
        align: see `fourier_matrix`; "corner" is the paper's code.
        nyquist: what becomes of the highest frequency of an even size: "symmetric" keeps its mean over both signs,
            "upstream" is the paper's code (real part of one sign), which adds a faint checkerboard.
        boundary: see `fourier_matrix`.

    Raises:
        TypeError: integer images, or a size that is none.
        ValueError: a size larger than the image, unknown settings, or settings that exclude each other.
    """
    _check_settings(align, nyquist, boundary)
    _check_images(x, "fourier_crop")
    h, w = pair(size)
    height, width = x.shape[-2:]
    if h > height or w > width:
        raise ValueError(f"cannot crop images of {height}x{width} to {h}x{w}: the size must not be larger")
    if (h, w) == (height, width):
        return x
    rows, columns = (_matrix(*axis, align, boundary, x) for axis in ((h, height), (w, width)))
    cropped = sandwich(rows, x, columns)
    if nyquist == "upstream" and h % 2 == 0 and w % 2 == 0:
        rows, columns = (_matrix(*axis, align, "nyquist", x) for axis in ((h, height), (w, width)))
        cropped = cropped - sandwich(rows, x, columns)
    return like(cropped, x)


def fourier_pad(
    x: Tensor, size: int | Size, align: Align = "center", boundary: Boundary = "periodic"
) -> Tensor:
    """Images (..., h, w) enlarged to (..., H, W) with zeros for the frequencies that they lack.

    The adjoint of `fourier_crop` times H W / (h w). Cropping what was padded gives an odd size back exactly, as does
    ``boundary="reflect"`` any size; of an even size the highest frequency is halved.

    Args:
        x: floating-point images.
        size: side, or (H, W).
        align, boundary: as in `fourier_crop`.

    Raises:
        TypeError: integer images.
        ValueError: a size smaller than the image.
    """
    _check_settings(align, "symmetric", boundary)
    _check_images(x, "fourier_pad")
    height, width = pair(size)
    h, w = x.shape[-2:]
    if height < h or width < w:
        raise ValueError(f"cannot pad images of {h}x{w} to {height}x{width}: the size must not be smaller")
    rows = _matrix(h, height, align, boundary, x) * (height / h)
    columns = _matrix(w, width, align, boundary, x) * (width / w)
    return like(sandwich(rows.T, x, columns.T), x)


def _check_images(x: Any, function: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{function} needs a tensor of images, not a {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{function} needs floating-point images, not {x.dtype}: normalise them first")


def _matrix(size: int, full: int, align: Align, kind: Boundary | Literal["nyquist"], x: Tensor) -> Tensor:
    """On the device of x and in the type that the product is computed in: at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # A compiler traces through a cache, and says so each time.
    build = _build.__wrapped__ if torch.compiler.is_compiling() else _build
    return build(size, full, align, kind, x.device, dtype)


@lru_cache(maxsize=64)
def _build(
    size: int,
    full: int,
    align: Align,
    kind: Boundary | Literal["nyquist"],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    with torch.inference_mode(False):  # what is kept must serve training too
        if kind == "nyquist":
            return _nyquist_matrix(size, full, align).to(device, dtype)
        return fourier_matrix(size, full, align, kind).to(device, dtype)


def sandwich(rows: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """rows @ x @ columns^T for every channel, in full precision also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return rows @ (x.to(rows.dtype) @ columns.T)


def like(result: Tensor, x: Tensor) -> Tensor:
    """In the type and memory format of x."""
    result = result.to(x.dtype)
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        result = result.contiguous(memory_format=torch.channels_last)
    return result


class FourierCrop(nn.Module):
    """`fourier_crop` as a module, or as a transform in a list of torchvision's v2 transforms, after normalisation.

    Args:
        size, align, nyquist, boundary: as in `fourier_crop`.

    Raises:
        TypeError, ValueError: see `fourier_crop`.
    """

    def __init__(
        self,
        size: int | Size,
        align: Align = "center",
        nyquist: Nyquist = "symmetric",
        boundary: Boundary = "periodic",
    ) -> None:
        super().__init__()
        _check_settings(align, nyquist, boundary)
        if min(pair(size)) < 1:
            raise ValueError(f"a size is at least 1, not {size}")
        self.size, self.align, self.nyquist, self.boundary = size, align, nyquist, boundary

    def forward(self, x: Tensor) -> Tensor:
        """(..., H, W) to (..., h, w)."""
        return fourier_crop(x, self.size, self.align, self.nyquist, self.boundary)

    def extra_repr(self) -> str:
        return f"{self.size}, align={self.align!r}, nyquist={self.nyquist!r}, boundary={self.boundary!r}"
