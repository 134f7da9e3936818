"""A feature map that holds visible positions only and flows through unmodified modules.

``SparseMap`` is a duck type: a plain class with ``__torch_function__`` and the tensor methods that backbones call. An
operation either has an exact rule (``pointwise.py``, ``shape_rules.py``, ``spatial_rules.py``) or is refused with its
name and the module's. A Tensor subclass with the values as its storage would run unknown operations on them silently.
"""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Size, Tensor, nn

from leaven.pretext.spark.errors import SparseUnsupported
from leaven.pretext.spark.geometry import Geometry

Pad = tuple[int, int, int, int, float]
Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {}
"""Rules by function object: Dynamo can trace this lookup, and not one by name."""


class SparseMap:
    """Visible positions of a map whose outer shape is the dense one.

    Attributes:
        values: (B, T, *channels), T = keep * r * r in the order of ``Geometry``.
        geo: where the positions are; maps combine only if they share this very object.
        r: side of a mask cell at this resolution.
        tags: a letter per OUTER dimension: b, c, h, w, or t for h and w flattened. ``bchw`` permutes to ``bhwc``; a
            view that splits channels makes ``bcchw``. Channel dimensions of ``values`` are in that order.
        pad: a deferred constant padding (left, right, top, bottom, value) that the next convolution or pool consumes.
    """

    def __init__(
        self, values: Tensor, geo: Geometry, r: int, tags: str = "bchw", pad: Pad | None = None
    ) -> None:
        if geo.grad and not torch.is_grad_enabled():
            refuse(
                "an operation under no_grad",
                "gradients of everything before it would vanish silently "
                "(freeze by requires_grad, and use non-reentrant checkpointing)",
            )
        self.values = values
        self.geo = geo
        self.r = r
        self.tags = tags
        self.pad = pad

    @classmethod
    def from_images(cls, images: Tensor, geo: Geometry) -> "SparseMap":
        """Pack the visible pixels of (B, C, H, W); hidden pixels are not read."""
        return cls(geo.gather(images, images.shape[-1] // geo.grid[1]), geo, images.shape[-1] // geo.grid[1])

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = RULES.get(func)
        if rule is None:
            refuse(func, "it has no exact rule for hidden positions")
        return rule(func, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        refuse(f"Tensor.{name}", "it has no exact rule for hidden positions")

    # What modules read off a tensor: always the full, dense geometry, so that their own padding logic works.

    @property
    def shape(self) -> Size:
        channels = iter(self.values.shape[2:])
        height, width = (g * self.r for g in self.geo.grid)
        if self.pad is not None:
            left, right, top, bottom, _ = self.pad
            height, width = height + top + bottom, width + left + right
        sizes = {"b": self.geo.batch, "h": height, "w": width, "t": height * width}
        return Size([next(channels) if tag == "c" else sizes[tag] for tag in self.tags])

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.tags)

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def ndim(self) -> int:
        return len(self.tags)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def requires_grad(self) -> bool:
        return self.values.requires_grad

    @property
    def is_cuda(self) -> bool:
        return self.values.is_cuda

    def is_floating_point(self) -> bool:
        return self.values.is_floating_point()

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        return True

    def __len__(self) -> int:
        return self.geo.batch

    def __repr__(self) -> str:
        return f"SparseMap({tuple(self.shape)}, tags={self.tags!r}, cell side {self.r}, pad={self.pad})"

    # For the rules.

    def like(self, values: Tensor, tags: str | None = None) -> "SparseMap":
        """A map with other values, of the same geometry; ``self`` if the values are its own (an in-place operation)."""
        if values is self.values and tags is None:
            return self
        return SparseMap(values, self.geo, self.r, self.tags if tags is None else tags)

    def channel_dim(self, dim: int) -> int:
        """The dimension of ``values`` that holds outer dimension ``dim``, which must be tagged c."""
        dim %= len(self.tags)
        return 2 + self.tags[:dim].count("c")

    def plain(self, func: Any) -> Tensor:
        """The values, unless a padding is waiting that ``func`` would not see."""
        if self.pad is not None:
            refuse(func, "only a convolution or a pool can follow a padding")
        return self.values


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a rule for function objects; methods of ``torch.Tensor`` also become methods of ``SparseMap``."""

    def register(handler: Rule) -> Rule:
        for function in functions:
            RULES[function] = handler
            name = getattr(function, "__name__", "")
            if getattr(torch.Tensor, name, None) is function:
                setattr(SparseMap, name, _method(function, handler))
        return handler

    return register


def _method(function: Any, handler: Rule) -> Callable[..., Any]:
    def method(self: SparseMap, *args: Any, **kwargs: Any) -> Any:
        return handler(function, self, *args, **kwargs)

    return method


def refuse(func: Any, why: str) -> NoReturn:
    """Raise ``SparseUnsupported`` naming the operation and the module whose forward asked for it."""
    name = func if isinstance(func, str) else getattr(func, "__name__", repr(func))
    raise SparseUnsupported(f"SparK cannot run {name} in {_calling_module()}: {why}")


def _calling_module() -> str:
    """Qualified name of the innermost module on the Python stack. Costs nothing until something is refused."""
    modules: list[nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and (not modules or owner is not modules[-1]):
            modules.append(owner)
        frame = frame.f_back  # type: ignore[assignment]
    if not modules:
        return "the backbone"
    inner = modules[0]
    for outer in reversed(modules):
        for name, module in outer.named_modules():
            if module is inner:
                return f"{name.removeprefix('backbone.') or 'the backbone'} ({type(inner).__name__})"
    return type(inner).__name__
