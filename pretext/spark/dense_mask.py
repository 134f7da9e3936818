"""Which mask the dense encoder's layers run under: a context variable, never a global."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from leaven.pretext.spark.errors import SparseUnsupported


class Mask:
    """One encoder pass: the visible cells, at the resolution of any map.

    Args:
        cells: bool (B, fh, fw), True = visible.
        cell: side of a cell in pixels.
        backbone: the module that runs under the mask; only to name modules in errors.
    """

    def __init__(self, cells: Tensor, cell: int, backbone: nn.Module) -> None:
        self.cells = cells
        self.cell = cell
        self.backbone = backbone
        self.grad_enabled = torch.is_grad_enabled()
        self.seen: set[int] = set()  # ids of the modules that ran under this mask, outside torch.compile
        self._at: dict[int, Tensor] = {}

    def at(self, height: int, width: int) -> Tensor | None:
        """Visible positions, bool (B, 1, height, width), or None for a map that is not on the grid of cells."""
        rows, columns = self.cells.shape[1:]
        side = height // rows
        if side == 0 or (rows * side, columns * side) != (height, width) or self.cell % side:
            return None
        if side not in self._at:
            self._at[side] = self.cells.repeat_interleave(side, 1).repeat_interleave(side, 2).unsqueeze(1)
        return self._at[side]

    def fill(self, x: Tensor, value: float) -> Tensor:
        """`x` (B, C, h, w) with `value` at hidden positions; untouched where it is not on the grid (a padded map)."""
        visible = self.at(x.shape[-2], x.shape[-1])
        # where, not a product: a NaN or infinity at a hidden position must leave no trace, nor in the gradient
        return x if visible is None else torch.where(visible, x, value)

    def refuse(self, module: nn.Module, why: str) -> SparseUnsupported:
        """The error that names `module`."""
        names = {id(m): name for name, m in self.backbone.named_modules()}
        name = names.get(id(module)) or "the backbone"
        return SparseUnsupported(f"{name} ({type(module).__name__}): {why}")

    def remember(self, _grad: Tensor) -> None:
        """Gradient hook of the encoder's maps: offers this mask to layers that checkpointing recomputes."""
        task = torch._C._current_graph_task_id()
        masks = _masks_in_backward(task)
        if (
            self not in masks
        ):  # weakly: the variable outlives the backward pass, the mask and its backbone need not
            _BACKWARD.set((task, [weakref.ref(m) for m in (*masks, self)]))


class _Traced:
    """Where the mask is while torch.compile traces, which cannot set a ContextVar.

    Only the tracer sees the change: Dynamo records it, finds it undone at the end, and compiled code has none.
    """

    def __init__(self) -> None:
        self.mask: Mask | None = None


_ACTIVE: ContextVar[Mask | None] = ContextVar("leaven_spark_mask", default=None)
_BACKWARD: ContextVar[tuple[int, list[weakref.ref[Mask]]]] = ContextVar("leaven_spark_backward")
_TRACED = _Traced()


@contextmanager
def masked(mask: Mask | None) -> Iterator[None]:
    """Converted modules called inside run under `mask`; with None, as if they had not been converted."""
    if torch.compiler.is_compiling():
        before, _TRACED.mask = _TRACED.mask, mask
        try:
            yield
        finally:
            _TRACED.mask = before
    else:
        token = _ACTIVE.set(mask)
        try:
            yield
        finally:
            _ACTIVE.reset(token)


def active_mask(module: nn.Module) -> Mask | None:
    """The mask that `module` runs under now, None for a dense pass.

    Raises:
        SparseUnsupported: gradients are off inside an encoder pass that wants them (reentrant checkpointing loses
            the mask), or a checkpoint could be recomputed under more than one mask.
    """
    if torch.compiler.is_compiling():
        return _TRACED.mask
    mask = _ACTIVE.get()
    if mask is None:
        return _mask_of_recomputation(module)
    if mask.grad_enabled and not torch.is_grad_enabled():
        raise mask.refuse(
            module,
            "runs without gradients inside an encoder pass that has them; use non-reentrant checkpointing, "
            "and freeze layers by requires_grad instead of torch.no_grad",
        )
    mask.seen.add(id(module))
    return mask


def _mask_of_recomputation(module: nn.Module) -> Mask | None:
    """Activation checkpointing runs a layer again during backward, when the encoder's context has long ended.

    The gradient reaches the encoder's maps before it reaches any layer, so that `Mask.remember` has by then noted
    which masks this backward pass is about.
    """
    task = torch._C._current_graph_task_id()
    masks = [m for m in _masks_in_backward(task) if id(module) in m.seen] if task != -1 else []
    if len(masks) > 1:
        raise masks[0].refuse(
            module,
            "one backward pass through two masked passes cannot be checkpointed; call backward after each",
        )
    return masks[0] if masks else None


def _masks_in_backward(task: int) -> list[Mask]:
    noted, masks = _BACKWARD.get((-1, []))
    return [mask for ref in masks if (mask := ref()) is not None] if noted == task else []
