"""An independent oracle for sparse encoders: the plain network on the visible crop (float64).

A sparse encoder that sees one block of an image and nothing around it must do to that block what the plain network does
to an image of that block alone: the network's zero padding stands where hidden zeros do. This holds for features, for
the gradient of every parameter and for BatchNorm's running moments, and it needs no other implementation.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from leaven.backbones import Stage, features

TOLERANCE = 1e-9
GRID = (2, 3)

Encode = Callable[[Tensor, Tensor], list[Tensor]]
"""``encode(images, mask) -> maps`` of one model, which it may have converted in place."""


class Pass(NamedTuple):
    """What one forward and backward pass produces."""

    maps: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


class Crops(NamedTuple):
    """Images of which only one block, at a different place in each, is visible."""

    images: Tensor  # (2, C, 2 cells, 3 cells), noise where hidden
    mask: Tensor  # (2, 2, 3)
    crops: Tensor  # (2, C, 1 cell, 1 or 2 cells): the visible blocks
    places: list[tuple[int, int]]  # row and column of each block's first cell

    def of(self, full: Tensor) -> Tensor:
        """The visible block of a map (B, C, h, w) of the whole images."""
        side, columns = full.shape[-2] // GRID[0], self.crops.shape[-1] // self.crops.shape[-2]
        blocks = [
            image[:, row * side : (row + 1) * side, column * side : (column + columns) * side]
            for image, (row, column) in zip(full, self.places, strict=True)
        ]
        return torch.stack(blocks)


def one_block(cell: int, columns: int = 1, channels: int = 3, hidden: float | None = None) -> Crops:
    """Two images with one visible block of `columns` cells each; `hidden` is put at hidden pixels, else noise."""
    generator = torch.Generator().manual_seed(columns)
    crops = torch.randn(2, channels, cell, columns * cell, generator=generator, dtype=torch.float64)
    images = torch.randn(
        2, channels, GRID[0] * cell, GRID[1] * cell, generator=generator, dtype=torch.float64
    )
    if hidden is not None:
        images.fill_(hidden)
    mask = torch.zeros(2, *GRID, dtype=torch.bool)
    places = [(0, 1), (1, 0)]
    for i, (row, column) in enumerate(places):
        mask[i, row, column : column + columns] = True
        images[i, :, row * cell : (row + 1) * cell, column * cell : (column + columns) * cell] = crops[i]
    return Crops(images, mask, crops, places)


def randomise(model: nn.Module, images: Tensor) -> nn.Module:
    """Random norm weights, layer scales and running moments: their initial zeros and ones hide errors.

    Running moments are those of `images`, shaken: moments unlike the data's make deep nets amplify rounding by 1e8.
    """
    generator = torch.Generator().manual_seed(0)
    model.double().train()
    norms: list[Any] = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == 0:  # a classifier of no classes, in older timm
                continue
            if parameter.dim() <= 1 or parameter.max() == parameter.min():
                parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5)
        for norm in norms:
            norm.momentum = 1.0
        model(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            for moment in (norm.running_mean, norm.running_var):
                moment.mul_(torch.rand(moment.shape, generator=generator, dtype=torch.float64) * 0.2 + 0.9)
    return model


def without_drops(model: nn.Module) -> nn.Module:
    """Drop rates to 0: an encoder and the oracle would draw differently."""
    for module in model.modules():
        for kind, rate in (("Dropout", "p"), ("StochasticDepth", "p"), ("DropPath", "drop_prob")):
            if kind in type(module).__name__:
                setattr(module, rate, 0.0)
    return model


def plain_pass(model: nn.Module, crops: Tensor, stages: Sequence[Stage], training: bool) -> Pass:
    """The network itself on images of the visible blocks."""
    return _run(model, lambda: features(model, crops, stages), lambda maps: maps, training)


def masked_pass(model: nn.Module, encode: Encode, case: Crops, training: bool) -> Pass:
    """The sparse encoder on the whole images, seen at the visible blocks."""
    return _run(
        model, lambda: encode(case.images, case.mask), lambda maps: [case.of(m) for m in maps], training
    )


def rounding(model: nn.Module, crops: Tensor, stages: Sequence[Stage], training: bool) -> Pass:
    """How the plain network responds to a change of its input by 1e-15: what no implementation can do better than."""
    generator = torch.Generator().manual_seed(7)
    before = plain_pass(model, crops, stages, training)
    shaken = crops * (1 + 1e-15 * torch.randn(crops.shape, generator=generator, dtype=torch.float64))
    after = plain_pass(model, shaken, stages, training)
    return Pass(
        [a - b for a, b in zip(after.maps, before.maps, strict=True)],
        {k: after.gradients[k] - before.gradients[k] for k in before.gradients},
        {k: after.buffers[k] - before.buffers[k] for k in before.buffers},
    )


def disagreements(found: Pass, expected: Pass, noise: Callable[[], Pass]) -> list[str]:
    """What differs by more than rounding. `noise` (see `rounding`) is asked only if something exceeds `TOLERANCE`."""
    scale = max([0.0, *(float(g.abs().max()) for g in expected.gradients.values())])
    # A bias in front of a norm has gradient zero; what is left of it is rounding of the other gradients' size.
    triples = [
        (f"map {i}", f, e, 0.0) for i, (f, e) in enumerate(zip(found.maps, expected.maps, strict=True))
    ]
    assert found.gradients.keys() == expected.gradients.keys()
    triples += [
        (f"gradient of {k}", found.gradients[k], e, 1e-3 * scale) for k, e in expected.gradients.items()
    ]
    triples += [(f"buffer {k}", found.buffers[k], e, 0.0) for k, e in expected.buffers.items()]
    wrong = {}
    for name, f, e, floor in triples:
        error, size = _largest(f - e) if f.shape == e.shape else float("inf"), max(_largest(e), floor)
        if not error <= TOLERANCE * size:  # NaN is wrong
            wrong[name] = error
    if not wrong:
        return []
    shaken = noise()
    allowed = {f"map {i}": _largest(m) for i, m in enumerate(shaken.maps)}
    allowed |= {f"gradient of {k}": max(map(_largest, shaken.gradients.values())) for k in shaken.gradients}
    allowed |= {f"buffer {k}": _largest(b) for k, b in shaken.buffers.items()}
    return [
        f"{k}: off by {error:.1e}, own rounding {allowed[k]:.1e}"
        for k, error in wrong.items()
        if not error <= 100 * allowed[k]
    ]


def hidden_values(maps: Sequence[Tensor], mask: Tensor) -> float:
    """The largest absolute value at a hidden position of any map (B, C, h, w)."""
    largest = 0.0
    for m in maps:
        side = m.shape[-2] // mask.shape[1]
        visible = mask.repeat_interleave(side, 1).repeat_interleave(side, 2).unsqueeze(1)
        largest = max(largest, _largest(m.detach()[(~visible).expand_as(m)]))
    return largest


class Leaks(TorchDispatchMode):
    """Looks at what every convolution wider than 1x1 and every average pool is given at hidden positions.

    Below the modules, at the operations themselves, so that functional calls are seen too.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask
        self.seen = 0
        self.largest = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mixes = func is torch.ops.aten.avg_pool2d.default
        mixes |= func is torch.ops.aten.convolution.default and tuple(args[1].shape[2:]) != (1, 1)
        rows, columns = self.mask.shape[1:]
        if mixes and args[0].dim() == 4:
            batch, _, height, width = args[0].shape
            fits = height % rows == 0 and width % columns == 0 and height // rows == width // columns
            # the pool that counts visible positions is given the mask itself, (B, 1, h, w)
            if batch == len(self.mask) and fits:
                self.seen += 1
                self.largest = max(self.largest, hidden_values([args[0]], self.mask))
        return func(*args, **(kwargs or {}))


@contextmanager
def no_random_draws() -> Iterator[None]:
    """Fails if the global random state moved: drop path or dropout would make a comparison meaningless."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the network drew random numbers"


def _run(
    model: nn.Module,
    forward: Callable[[], list[Tensor]],
    block: Callable[[list[Tensor]], list[Tensor]],
    training: bool,
) -> Pass:
    """One pass with a random linear functional of the maps; the model's buffers and gradients are put back."""
    buffers = {k: b.clone() for k, b in model.named_buffers()}
    model.train(training).zero_grad(set_to_none=True)
    with no_random_draws():
        maps = block(forward())
    generator = torch.Generator().manual_seed(3)
    loss = sum((m * torch.randn(m.shape, generator=generator, dtype=m.dtype)).sum() for m in maps)
    assert isinstance(loss, Tensor)
    loss.backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    after = {k: b.clone().double() for k, b in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for k, b in model.named_buffers():
            b.copy_(buffers[k])
    return Pass([m.detach() for m in maps], gradients, after)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
