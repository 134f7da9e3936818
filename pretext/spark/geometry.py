"""Where the visible positions are, and the two moves between them and a dense map.

Token order is ``(keep, r, r)``: visible cells ascending, then the positions inside each cell, row by row. In that order
a convolution whose kernel equals its stride is a reshape and a matrix product.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Geometry:
    """The visible cells of a batch: ids (B, keep) on a grid (gh, gw). It is the mask, and travels with the map.

    Attributes:
        grad: whether gradients were recorded when the map was made. A map that meets an operation with recording
            switched off inside such a pass would lose gradients silently (``SparseMap.__init__`` refuses).
        spconv: whether convolutions that spconv can serve go through it (``spconv_rule.py``).
        pairs: its index pairs, by cell side, kernel and dilation.
    """

    def __init__(self, ids: Tensor, grid: tuple[int, int], *, spconv: bool = False) -> None:
        self.ids = ids
        self.grid = grid
        self.batch, self.keep = ids.shape
        self.grad = torch.is_grad_enabled()
        self.spconv = spconv
        self.pairs: dict[Any, tuple[Tensor, Tensor]] = {}
        self._rows: dict[int, Tensor] = {}
        self._windows: dict[tuple[int, int, int], Tensor] = {}

    def rows(self, r: int) -> Tensor:
        """Row numbers of the visible positions in a (B*H*W, C) matrix, cells of side ``r``: (B*keep*r*r,)."""
        if r not in self._rows:
            (gh, gw), ids = self.grid, self.ids
            offset = torch.arange(r, device=ids.device)
            y = (ids // gw * r)[:, :, None, None] + offset[:, None]
            x = (ids % gw * r)[:, :, None, None] + offset
            image = torch.arange(self.batch, device=ids.device)[:, None, None, None]
            self._rows[r] = ((image * (gh * r) + y) * (gw * r) + x).flatten()
        return self._rows[r]

    def windows(self, r: int, halo: tuple[int, int]) -> Tensor:
        """Row numbers in the (N, C) visible values of every cell with the positions around it, N where hidden.

        Args:
            r: side of a cell.
            halo: how many positions above and below, left and right.

        Returns:
            (B * keep * (r + 2 * halo[0]) * (r + 2 * halo[1]),).
        """
        key = (r, *halo)
        if key not in self._windows:
            (gh, gw), (ph, pw), ids = self.grid, halo, self.ids
            height, width, n = gh * r, gw * r, ids.numel() * r * r
            where = torch.full((self.batch * height * width,), n, device=ids.device)
            where = where.index_copy(0, self.rows(r), torch.arange(n, device=ids.device))
            where = F.pad(where.view(self.batch, height, width), (pw, pw, ph, ph), value=n)
            down, across = (torch.arange(r + 2 * p, device=ids.device) for p in halo)
            y = (ids // gw * r)[:, :, None, None] + down[:, None]
            x = (ids % gw * r)[:, :, None, None] + across
            image = torch.arange(self.batch, device=ids.device)[:, None, None, None]
            self._windows[key] = where[image, y, x].flatten()
        return self._windows[key]

    def scatter(self, values: Tensor, r: int, fill: float = 0.0) -> Tensor:
        """Packed values (B, T, C) to a dense map (B, C, gh*r, gw*r), channels last in memory, ``fill`` where hidden."""
        (gh, gw), channels = self.grid, values.shape[-1]
        dense = _Scatter.apply(values.flatten(0, 1), self.rows(r), self.batch * gh * gw * r * r, fill)
        return dense.view(self.batch, gh * r, gw * r, channels).permute(0, 3, 1, 2)  # type: ignore[no-any-return]

    def gather(self, dense: Tensor, r: int) -> Tensor:
        """The visible positions of a dense map (B, C, gh*r, gw*r): (B, T, C). Hidden positions are never read."""
        batch, channels = dense.shape[:2]
        rows = dense.permute(0, 2, 3, 1).reshape(-1, channels)
        return _Gather.apply(rows, self.rows(r)).view(batch, -1, channels)  # type: ignore[no-any-return]


class _Scatter(torch.autograd.Function):
    """Rows into a filled matrix. The rows are unique, so its gradient is a gather and not an accumulation."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, total: int, fill: float) -> Tensor:
        ctx.save_for_backward(rows)
        dense = values.new_full((total, values.shape[1]), fill)
        if torch.compiler.is_compiling():  # in place, torch.compile 2.11 loses the gradient
            return dense.index_copy(0, rows, values)
        return dense.index_copy_(0, rows, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        return _Gather.apply(grad, rows), None, None, None


class _Gather(torch.autograd.Function):
    """Rows out of a matrix; its gradient is a copy into zeros (index_select's own would accumulate)."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.total = dense.shape[0]
        return dense.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        return _Scatter.apply(grad, rows, ctx.total, 0.0), None
