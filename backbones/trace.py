"""Find the feature maps of a module that does not declare them: record every call of one forward pass."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

# Their outputs are no maps of a network: pooled to some size, or a map with a border for the next layer.
_NO_MAPS = (
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d),
)


@dataclass
class Call:
    """One call of one submodule during a forward pass."""

    name: str
    count: int = 0
    """How many calls of the same module went before."""
    takes_image: bool = False
    """Its input is the very image that the network was given."""
    takes: int | None = None
    """Reduction of its input, where that is a map."""
    gives: int | None = None
    """Reduction of its output, where that is a map."""
    channels: int = 0
    channels_last: bool = False
    output: Any = None
    version: int = 0
    children: list["Call"] = field(default_factory=list)

    @property
    def overwritten(self) -> bool:
        """The output was changed in place after the module returned it."""
        return bool(self.output._version != self.version)


def trace(model: nn.Module, image: Tensor, entry: str) -> Call:
    """Run ``model`` (or its method `entry`) on `image` (1, C, H, W) and return the tree of calls."""
    root = Call(entry, takes_image=True, takes=1)
    stack, counts = [root], Counter[str]()

    def enter(name: str) -> Callable[..., None]:
        def pre_hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            found = map_of(given, image)
            call = Call(name, counts[name], given is image, found[0] if found else None)
            counts[name] += 1
            stack[-1].children.append(call)
            stack.append(call)

        return pre_hook

    def leave(module: nn.Module, _args: Any, output: Any) -> None:
        call = stack.pop()
        call.output = output
        call.version = output._version if isinstance(output, Tensor) else 0
        found = None if isinstance(module, _NO_MAPS) else map_of(output, image)
        if found is not None:
            call.gives, call.channels, call.channels_last = found

    handles = []
    try:
        for name, module in model.named_modules():
            if module is not model:
                handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
                handles.append(module.register_forward_hook(leave))
        root.output = getattr(model, entry)(image) if entry else model(image)
    finally:
        for handle in handles:
            handle.remove()
    return root


def map_of(x: Any, image: Tensor) -> tuple[int, int, bool] | None:
    """(reduction, channels, channels_last) of a feature map; None for anything else, 1x1 maps included."""
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[0] != image.shape[0]:
        return None
    _, a, b, c = x.shape
    if (side := reduction(image.shape[-2:], (b, c))) is not None:
        return side, a, False
    if (side := reduction(image.shape[-2:], (a, b))) is not None:
        return side, c, True
    return None


def reduction(image: Sequence[int], size: Sequence[int], declared: int | None = None) -> int | None:
    """Image side over map side, where both sides agree on it; None where they do not, and for 1x1.

    Several ratios may round to one map: `declared` wins if it is one of them. Nets that crop at borders
    (Inception: 35 of 299, AlexNet: 27 of 224) get the nearest power of two.
    """
    pairs = list(zip(image, size, strict=True))
    if all(m == 1 for m in size) or any(m > side for side, m in pairs):
        return None

    def fits(ratio: int) -> bool:
        return all(side // ratio <= m <= -(-side // ratio) for side, m in pairs)

    if declared is not None and fits(declared):
        return declared
    ratio = round(image[0] / size[0])
    if fits(ratio) and any(side % ratio == 0 for side in image):
        return ratio
    power = 2 ** round(math.log2(image[0] / size[0]))
    lost = [side / power - m for side, m in pairs]  # pixels cropped, about as many on both sides
    if (
        all(-1 <= x <= min(4, m / 2) for x, (_, m) in zip(lost, pairs, strict=True))
        and abs(lost[0] - lost[1]) <= 2
    ):
        return int(power)
    return ratio if fits(ratio) else None


def maps(call: Call) -> list[Call]:
    """The calls inside `call`, in order, whose outputs are the feature maps of a network.

    A child counts as one map unless it spans several reductions: then its own children are taken instead. So
    the four layers of a ResNet come out, and not the convolutions inside a block that strides.
    """
    found = []
    for child in call.children:
        inner = maps(child)
        if _spans(child, inner):
            found += inner
            if child.gives is not None and all(call.gives != child.gives for call in inner):
                found.append(child)
        elif child.gives is not None:
            found.append(child)
    return found


def _spans(call: Call, inner: list[Call]) -> bool:
    reductions = [c.gives for c in inner if c.gives is not None]
    takes = call.takes or 0
    if call.gives is not None:
        return call.takes is not None and any(takes < r < call.gives for r in reductions)
    if isinstance(call.output, Tensor):  # pooled, or a sequence: a head unless it is a whole network
        return any(r > takes for r in reductions)
    return True  # a tuple or dict of maps


def trunk(root: Call, found: list[Call]) -> Call:
    """The innermost call that is given the image itself and makes all the maps: all that has to run."""
    for child in root.children:
        if child.takes_image and all(f"{call.name}.".startswith(f"{child.name}.") for call in found):
            return trunk(child, found)
    return root


def tokens_after(root: Call, last: Call, model: nn.Module) -> bool:
    """Most parameters sit in modules that run after the last map on its pixels as a sequence (B, N, C).

    Those of a single layer that cuts the image into patches do not count: of few tokens it may be the larger part.
    """
    order: list[Call] = []

    def visit(call: Call) -> None:
        for child in call.children:
            visit(child)
            order.append(child)

    visit(root)
    channel_axis = 3 if last.channels_last else 1
    pixels = last.output.numel() // last.output.shape[channel_axis]
    names = set()
    for call in order[next(i for i, call in enumerate(order) if call is last) + 1 :]:
        shape = call.output.shape if isinstance(call.output, Tensor) else ()
        if len(shape) == 3 and pixels <= shape[1] < pixels + 8:
            names.add(call.name)
    inside = {p for name in names for p in model.get_submodule(name).parameters()}
    patches = (
        set(model.get_submodule(last.name).parameters()) if last.takes_image and not last.children else set()
    )
    return 2 * sum(p.numel() for p in inside) > sum(p.numel() for p in set(model.parameters()) - patches)
