"""The cross attention projector: turns a student's map into tokens that a transformer could have made."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]


class CrossAttentionProjector(nn.Module):
    """Learned queries, or tokens given as queries, attend to a student's map; out come as many tokens of the teacher.

    Keys and values are ``ReLU(norm(conv3x3(map))) + E`` with E learned; queries ``ReLU(W q)``; then multi-head
    attention with logits `tau` times as sharp as usual, LayerNorm, and a feed-forward layer of four times the width
    with its residual. E and the learned queries are made for one grid and resized to others.

    Source: Fan et al., ScaleKD, NeurIPS 2024 (arXiv 2411.06786), section 3, and the authors' code.

    Args:
        in_channels: of the student's map.
        out_channels: of the teacher's tokens.
        heads: must divide `out_channels`.
        key_grid: (h, w) of the map.
        query_grid: (h, w) of the tokens to make; None where queries are always given.
        tau: sharpness of the attention.
        norm: "batch", or "layer" for students without BatchNorm, whose results then do not depend on the batch.

    Raises:
        ValueError: heads that do not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int,
        key_grid: Grid,
        query_grid: Grid | None = None,
        tau: float = 5.0,
        norm: Literal["batch", "layer"] = "batch",
    ) -> None:
        super().__init__()
        if heads < 1 or out_channels % heads:
            raise ValueError(f"heads={heads} does not divide the teacher's {out_channels} channels")
        self.heads, self.tau = heads, tau
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(in_channels) if norm == "batch" else nn.LayerNorm(in_channels)
        self.key_position = nn.Parameter(torch.empty(1, in_channels, *key_grid))
        nn.init.trunc_normal_(self.key_position, std=0.02)
        self.queries = None if query_grid is None else nn.Parameter(torch.randn(1, out_channels, *query_grid))
        self.query_map = nn.Linear(out_channels, out_channels)  # the paper's 1x1 convolution
        self.q = nn.Linear(out_channels, out_channels)
        self.k = nn.Linear(in_channels, out_channels)
        self.v = nn.Linear(in_channels, out_channels)
        self.out = nn.Linear(out_channels, out_channels)
        self.out_norm = nn.LayerNorm(out_channels)
        self.feed_forward = nn.Sequential(
            nn.Linear(out_channels, 4 * out_channels), nn.ReLU(), nn.Linear(4 * out_channels, out_channels)
        )

    def forward(self, features: Tensor, queries: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """Tokens as a map (B, out_channels, H, W).

        Args:
            features: the student's map (B, in_channels, h, w).
            queries: (B, out_channels, H, W); the learned ones otherwise.
            grid: (H, W) that the learned queries are resized to.

        Raises:
            ValueError: no queries given, and none learned.
        """
        if queries is None:
            if self.queries is None:
                raise ValueError("this projector has no queries of its own: give it some")
            queries = resized(self.queries, grid or _grid(self.queries)).expand(len(features), -1, -1, -1)
        z = self.conv(features)
        z = (
            self.norm(z)
            if isinstance(self.norm, nn.BatchNorm2d)
            else self.norm(z.movedim(1, 3)).movedim(3, 1)
        )
        z = z.relu() + resized(self.key_position, _grid(features))
        keys, shape = z.flatten(2).mT, queries.shape
        asked = self.query_map(queries.flatten(2).mT).relu()
        tokens = self.out_norm(self._attend(asked, keys))
        tokens = tokens + self.feed_forward(tokens)
        made: Tensor = tokens.mT.unflatten(2, shape[2:])
        return made

    def _attend(self, asked: Tensor, keys: Tensor) -> Tensor:
        q, k, v = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x in (self.q(asked), self.k(keys), self.v(keys))
        )
        found = F.scaled_dot_product_attention(q, k, v, scale=self.tau * q.shape[-1] ** -0.5)
        out: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return out


def resized(table: Tensor, grid: Grid) -> Tensor:
    """A learned map (1, C, h, w) at another grid."""
    if _grid(table) == grid:
        return table
    return F.interpolate(table, grid, mode="bicubic", align_corners=False)


def _grid(x: Tensor) -> Grid:
    return x.shape[2], x.shape[3]
