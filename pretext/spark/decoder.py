"""From sparse maps to an image: densify each map, then the light decoder (Tian et al. 2023, section 3.2)."""

from collections.abc import Sequence
from itertools import pairwise
from math import log2

import torch
from torch import Tensor, nn

from leaven.pretext.spark.geometry import Geometry
from leaven.pretext.spark.masking import upsample_mask


class Densify(nn.Module):
    """One map: norm over visible positions, a learned token at hidden ones, projection to the decoder's width.

    Args:
        channels: of the encoder's map.
        width: of the decoder at this resolution.
        norm: "bn", "ln" or "none".
        first: the smallest map, projected 1x1 (or not at all if the widths agree) instead of 3x3.
    """

    def __init__(self, channels: int, width: int, norm: str, first: bool) -> None:
        super().__init__()
        self.norm: nn.Module = nn.Identity()
        if norm != "none":
            self.norm = nn.BatchNorm1d(channels) if norm == "bn" else nn.LayerNorm(channels, eps=1e-6)
        self.mask_token = nn.Parameter(torch.empty(1, channels, 1, 1))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.proj: nn.Module
        if first:
            self.proj = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)
        else:
            self.proj = nn.Conv2d(channels, width, 3, padding=1)

    def forward(self, values: Tensor, geo: Geometry, r: int, mask: Tensor) -> Tensor:
        """Packed values (B, T, C) of cells of side ``r`` and the mask (B, fh, fw) to (B, width, fh*r, fw*r)."""
        normed = self.norm(values.flatten(0, 1)).view_as(values)
        dense = geo.scatter(normed, r)
        visible = upsample_mask(mask, (dense.shape[2], dense.shape[3]))
        return self.proj(torch.where(visible, dense, self.mask_token.to(dense.dtype)))  # type: ignore[no-any-return]


class DecoderBlock(nn.Module):
    """Twice the side: transposed convolution, then two 3x3 convolutions with BatchNorm, ReLU6 between them only."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(inplace=True),
            nn.Conv2d(width, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) to (B, out, 2h, 2w)."""
        return self.conv(self.up(x))  # type: ignore[no-any-return]


class LightDecoder(nn.Module):
    """log2(reduction) blocks that halve the width and double the side, with skips by addition, then 1x1 to pixels.

    Args:
        reduction: of the smallest map, a power of two.
        width: at the smallest map, divisible by ``reduction``.
        channels: of the image.
    """

    def __init__(self, reduction: int, width: int, channels: int = 3) -> None:
        super().__init__()
        widths = [width // 2**i for i in range(int(log2(reduction)) + 1)]
        self.blocks = nn.ModuleList(DecoderBlock(a, b) for a, b in pairwise(widths))
        self.head = nn.Conv2d(widths[-1], channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor | None]) -> Tensor:
        """Densified maps, smallest first, one per block or None, to an image (B, channels, H, W)."""
        x: Tensor | None = None
        for block, skip in zip(self.blocks, maps, strict=True):
            if skip is not None:
                x = skip if x is None else x + skip
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]
