"""Masks with an exact count of visible cells per image (Tian et al. 2023, section 3.1)."""

import torch
from torch import Tensor


def visible_count(cells: int, ratio: float) -> int:
    """How many of ``cells`` stay visible at mask ratio ``ratio`` (Python's half-to-even rounding, as upstream).

    Raises:
        ValueError: if no cell or every cell would be visible.
    """
    keep = round(cells * (1 - ratio))
    if not 0 < ratio < 1 or not 0 < keep < cells:
        raise ValueError(
            f"mask ratio {ratio} leaves {keep} of {cells} cells visible; "
            "some must be visible and some hidden: choose another ratio, a larger image or a smaller mask cell"
        )
    return keep


def sample_mask(
    batch: int, grid: tuple[int, int], ratio: float = 0.6, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a mask (batch, fh, fw), True = visible, with the same exact count of visible cells in every image.

    The draw is made on the CPU whatever the training device, so that a seed means the same mask everywhere.

    Args:
        batch: images.
        grid: cells (fh, fw) of an image.
        ratio: share of cells hidden, in (0, 1), rounded to a whole number of visible cells.
        generator: of the CPU; None takes the global one.

    Raises:
        ValueError: if no cell or every cell would be visible.
    """
    cells = grid[0] * grid[1]
    keep = visible_count(cells, ratio)
    order = torch.rand(batch, cells, generator=generator).argsort(dim=1)
    mask = torch.zeros(batch, cells, dtype=torch.bool)
    return mask.scatter_(1, order[:, :keep], True).view(batch, *grid)


def visible_ids(mask: Tensor, keep: int | None = None) -> Tensor:
    """Row-major ids of the visible cells, ascending: (B, fh, fw) bool -> (B, keep) int64.

    Args:
        mask: True = visible.
        keep: the count, where it is known. It is then checked on the device, without waiting for it.

    Raises:
        ValueError: if the mask is not Boolean, hides everything, or its images differ in visible cells
            (every tensor of the sparse encoder has a static shape, which needs one count).
    """
    if mask.dtype != torch.bool or mask.ndim != 3:
        raise ValueError(
            f"mask must be bool (B, fh, fw), True = visible; got {mask.dtype} {tuple(mask.shape)}"
        )
    counts = mask.flatten(1).sum(1)
    if keep is not None:
        torch._assert_async((counts == keep).all(), f"every image must have {keep} visible cells")
    else:
        keep = int(counts[0])
        if keep == 0 or not bool((counts == keep).all()):
            raise ValueError(
                "every image must have the same number, at least one, of visible cells; "
                f"got {counts.min()} to {counts.max()}"
            )
    return (~mask).flatten(1).to(torch.uint8).argsort(dim=1, stable=True)[:, :keep]


def upsample_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest upsampling of a mask (B, fh, fw) to (B, 1, H, W); ``size`` must be whole multiples of the grid."""
    _, fh, fw = mask.shape
    return mask.repeat_interleave(size[0] // fh, 1).repeat_interleave(size[1] // fw, 2).unsqueeze(1)
