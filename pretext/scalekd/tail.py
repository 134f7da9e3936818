"""The last part of a transformer teacher: what a student's projected map is sent through."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Layout = Literal["tokens", "nhwc", "nchw"]
Call = tuple[tuple[Any, ...], dict[str, Any]]


class NoTail(ValueError):
    """The teacher has no last part that ScaleKD could use. The message is one line."""


@dataclass
class Targets:
    """What one pass of the teacher gives.

    Attributes:
        logits: (B, classes), or whatever the teacher returns.
        map: the last map, normed, (B, C, H, W).
        entry: what entered the tail, as the teacher's layers hand it on.
        grid: (h, w) of the entry.
        calls: further arguments of each of the tail's layers, such as rotary embeddings.
    """

    logits: Any
    map: Tensor
    entry: Tensor
    grid: tuple[int, int]
    calls: list[Call] = field(default_factory=list)

    def as_map(self, tail: "TeacherTail") -> Tensor:
        """The entry as a map (B, C, h, w), without prefix tokens."""
        return tail._map(self.entry, self.grid)


class TeacherTail:
    """The layers of a teacher that run one after another to its last, normed map.

    Kept out of the module tree of whoever holds it, and shared by copies: no parameter of the teacher is trained, saved
    or counted. The teacher is frozen, and put in eval mode at every pass.

    Args:
        teacher: gives logits when it is called.
        layers: modules of it, called in this order, each with the output of the one before; the last one is the final
            norm, or what stands for it. Further arguments that the teacher hands to a layer are handed on.
        layout: of what enters the first layer: "tokens" (B, prefix + h w, C), "nhwc" or "nchw".
        prefix: tokens before those of the map.

    Raises:
        NoTail: the teacher does not run these layers one after another.
    """

    def __init__(
        self, teacher: nn.Module, layers: Sequence[nn.Module], layout: Layout = "tokens", prefix: int = 0
    ) -> None:
        if not layers:
            raise NoTail("the tail of a teacher needs a layer or more")
        self.teacher = teacher.requires_grad_(False).eval()
        self.layers, self.layout, self.prefix = tuple(layers), layout, prefix
        self._per_image: set[tuple[int, int | str]] | None = (
            None  # arguments of layers that go with the images
        )

    def __deepcopy__(self, memo: Any) -> "TeacherTail":
        return self

    @staticmethod
    def of(teacher: nn.Module) -> "TeacherTail":
        """That of one of timm's Swins, vision transformers (ViT, DeiT, BEiT, EVA, DINO) or ConvNeXts.

        The last stage, with the downsampling before it; of a network whose maps all have one size, the last quarter
        of its blocks. Then the final norm, which where the network pools first is that of the pooled tokens.

        Raises:
            NoTail: another kind of network.
        """
        name = type(teacher).__name__
        part: Any = teacher
        if name in ("SwinTransformer", "SwinTransformerV2"):
            return TeacherTail(teacher, [part.layers[-1], part.norm], "nhwc")
        if name in ("VisionTransformer", "VisionTransformerDistilled", "Beit", "Eva"):
            depth = len(part.blocks)
            norms = [getattr(part, each, None) for each in ("norm", "fc_norm")]
            norm = next((n for n in norms if n is not None and not isinstance(n, nn.Identity)), nn.Identity())
            blocks = list(part.blocks[depth * 3 // 4 :])
            return TeacherTail(teacher, [*blocks, norm], "tokens", part.num_prefix_tokens)
        if name == "ConvNeXt":
            return TeacherTail(teacher, [part.stages[-1], part.norm_pre], "nchw")
        raise NoTail(
            f"no tail is known of a {name}: take a Swin, ViT, DeiT, BEiT, EVA, DINO or ConvNeXt of timm, or give "
            "tail=TeacherTail(teacher, layers, layout)"
        )

    @torch.no_grad()
    def targets(self, images: Tensor) -> Targets:
        """One pass of the teacher.

        Raises:
            NoTail: the layers did not run one after another.
        """
        self._follow(images)
        logits, entry, calls, outputs = self._pass(images)
        if self._per_image is None:
            one, two = (self._pass(images[:1].expand(n, -1, -1, -1))[2] for n in (1, 2))
            self._per_image = set(_varying(one, two))
        body = self.layers[:-1] or self.layers
        if len(outputs) != len(body):
            raise NoTail(
                f"the tail's layers must each run once: of {len(body)}, {len(outputs)} calls in one pass of the teacher"
            )
        last = self.layers[-1](outputs[-1]) if len(self.layers) > 1 else outputs[-1]
        grid = self._grid(entry, images)
        exit_grid = grid if self.layout == "tokens" else self._grid(last, images)
        return Targets(logits, self._map(last, exit_grid), entry, grid, calls)

    def __call__(self, tokens: Tensor, targets: Targets) -> Tensor:
        """Send a map (B, C, h, w) through the tail; its gradients flow, the teacher's weights get none.

        Args:
            tokens: as many images as in `targets`, or a multiple of them: several views, one after another.
            targets: of the pass that gives the prefix tokens and further arguments.

        Returns:
            The normed map (B, C', H, W).
        """
        self._follow(tokens)
        views = len(tokens) // len(targets.entry)
        x: Tensor = self._entry(tokens, targets, views)
        for number, layer in enumerate(self.layers):
            args, kwargs = targets.calls[number] if number < len(targets.calls) else ((), {})
            given = [self._for_views(number, i, each, views) for i, each in enumerate(args)]
            x = layer(
                x, *given, **{key: self._for_views(number, key, each, views) for key, each in kwargs.items()}
            )
        return self._map(x, (int(tokens.shape[2]), int(tokens.shape[3])))

    def _follow(self, x: Tensor) -> None:
        """Bring the teacher to the device of `x`: copies share it, and one that was moved has taken it along."""
        first = next(self.teacher.parameters(), None)
        if first is not None and first.device != x.device:
            self.teacher.to(x.device)

    def _entry(self, tokens: Tensor, targets: Targets, views: int) -> Tensor:
        if self.layout == "nchw":
            return tokens
        if self.layout == "nhwc":
            return tokens.movedim(1, 3)
        if not self.prefix:  # of cached targets the entry is then a map
            return tokens.flatten(2).mT
        prefix = targets.entry[:, : self.prefix].repeat(views, 1, 1).to(tokens.dtype)
        return torch.cat([prefix, tokens.flatten(2).mT], 1)

    def _map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.layout == "tokens":
            x = x[:, self.prefix :].mT.unflatten(2, grid)
        return x.movedim(3, 1) if self.layout == "nhwc" else x

    def _grid(self, x: Tensor, images: Tensor) -> tuple[int, int]:
        if self.layout == "nhwc":
            return x.shape[1], x.shape[2]
        if self.layout == "nchw":
            return x.shape[2], x.shape[3]
        n = x.shape[1] - self.prefix
        height, width = images.shape[-2:]
        rows = round((n * height / width) ** 0.5)
        if rows * (n // rows) != n:
            raise NoTail(f"{n} tokens are no grid of an image {height}x{width}")
        return rows, n // rows

    def goes_with_images(self, number: int, key: int | str) -> bool:
        """Whether this argument of the tail's layer has a row for each image; known after the first pass."""
        return (number, key) in (self._per_image or ())

    def _for_views(self, number: int, key: int | str, value: Any, views: int) -> Any:
        """An argument of a layer for so many views of the images."""
        if views > 1 and self.goes_with_images(number, key):
            return value.repeat(views, *([1] * (value.ndim - 1)))
        return value

    def _pass(self, images: Tensor) -> tuple[Any, Tensor, list[Call], list[Tensor]]:
        """Logits, what entered the tail, further arguments of its layers, and their outputs; without the last layer."""
        entries: list[Tensor] = []
        calls: list[Call] = []
        outputs: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entries.append(args[0])
            calls.append((args[1:], kwargs))

        def after(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs.append(output)

        handles = []
        try:
            for layer in self.layers[:-1] or self.layers:
                handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(layer.register_forward_hook(after))
            logits = self.teacher.eval()(images)
        finally:
            for handle in handles:
                handle.remove()
        if not entries:
            raise NoTail("the tail's first layer did not run in a pass of the teacher")
        return logits, entries[0], calls, outputs


def _varying(one: list[Call], two: list[Call]) -> Iterator[tuple[int, int | str]]:
    """Which arguments have another first dimension when there are more images."""
    for number, ((args, kwargs), (args2, kwargs2)) in enumerate(zip(one, two, strict=True)):
        pairs: list[tuple[int | str, Any, Any]] = [
            (i, a, b) for i, (a, b) in enumerate(zip(args, args2, strict=True))
        ]
        pairs += [(key, kwargs[key], kwargs2[key]) for key in kwargs]
        for key, a, b in pairs:
            if isinstance(a, Tensor) and a.shape != b.shape:
                yield number, key
