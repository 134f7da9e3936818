"""Checks of the images around RotNet: what gives the rotation away, and what undoes its labels."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaven.backbones.probe import seeded
from leaven.pretext.evaluation import few_label_probe
from leaven.pretext.rotnet import rotate4, rotate_random

Rotate = Callable[[Tensor], tuple[Tensor, Tensor]]

# JPEG works on blocks of this side.
_BLOCK = 8
# Pairs of rows of a border profile, and of those behind them that it is compared with.
_EDGE, _INSIDE = 4, 3
# Steps between rows that are correlated with the step around the border.
_SEAM = 3
# Copies are made of this many images at a time.
_BATCH = 16
# Parts of the names, in lower case, of what turns or mirrors images.
_TURNING = ("flip", "mirror", "rot", "transpos", "affine")
# Policies whose rotations are small: their labels stay right.
_POLICIES = ("autoaugment", "randaugment", "trivialaugment", "augmix")


class Rotate4(nn.Module):
    """`rotate4` as a transform of batches: the last one of a composition that turns images into (copies, labels)."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, S, S) -> (4B, C, S, S) and labels (4B,)."""
        return rotate4(images)


def check_order(transforms: Any) -> None:
    """Refuse a composition that turns or mirrors images after `Rotate4`, when they have their labels already.

    For the mirror image h of a quarter turn, h(turn(x, 1)) = turn(h(x), 3): with a random flip after the rotation,
    labels 1 and 3 belong to the same images, and no network can be right more often than in 75 % of cases. (A
    vertical flip mixes 0 and 2 besides.) Before the rotation, flips are welcome. `RotNet` rotates by itself, last.

    Known by name, whatever the library (torchvision v1 and v2, kornia, albumentations): flips, rotations, affine
    maps and transpositions, nested or not. The inside of a function of your own is not seen, nor that of policies
    such as RandAugment, whose small rotations leave the labels right.

    Args:
        transforms: a list, a ``Compose``, an ``nn.Sequential``, or anything else with transforms inside.

    Raises:
        TypeError: nothing that transforms, or a dictionary: check each of its compositions.
        ValueError: the first offender, by name.
    """
    if isinstance(transforms, dict) or not (
        callable(transforms) or isinstance(transforms, list | tuple) or hasattr(transforms, "transforms")
    ):
        raise TypeError(
            f"check_order needs a transform or a composition of some, not {type(transforms).__name__}"
        )
    rotation = ""
    for transform in _flattened(transforms):
        name = _name(transform)
        if rotation and (name.lower() == "d4" or any(word in name.lower() for word in _TURNING)):
            raise ValueError(
                f"{name} comes after {rotation}, whose labels are then wrong (mirrored, label 1 looks like label 3: "
                "a ceiling of 75 %); put it before the rotation"
            )
        if isinstance(transform, Rotate4) or any(_bare(transform) is f for f in (rotate4, rotate_random)):
            rotation = name


def _flattened(transforms: Any) -> Iterator[Any]:
    """The transforms inside, in order."""
    inner = getattr(transforms, "transforms", None)
    if inner is None and isinstance(transforms, list | tuple | nn.Sequential | nn.ModuleList):
        inner = transforms
    name = _name(transforms)
    if inner is None or name.lower().startswith(_POLICIES):
        yield transforms
        return
    for _ in range(2 if name == "RandomOrder" else 1):  # each may come after each
        for each in inner:
            yield from _flattened(each)


def _bare(transform: Any) -> Any:
    return _bare(transform.func) if isinstance(transform, partial) else transform


def _name(transform: Any) -> str:
    bare = _bare(transform)
    return getattr(bare, "__name__", type(bare).__name__)


@dataclass(frozen=True)
class CueAudit:
    """Accuracy, in [0, 1], at which each trivial statistic predicts the rotation of held-out images; 0.25 is chance.

    Attributes:
        as_given: of the images as they are. Of photographs more than chance: light comes from above, and edges show it.
        pipeline: of the same images, each in all four turns before anything else happens to them. That leaves no
            trace of which way up they were: what is told comes from the pipeline. Exactly 0.25, and not by luck, if
            each step before the rotation commutes with quarter turns.
    """

    as_given: dict[str, float]
    pipeline: dict[str, float]


def cue_audit(
    images: Tensor | Iterable[Any], *, rotate: Rotate = rotate4, limit: int = 128, seed: int = 0
) -> CueAudit:
    """How well do statistics without any idea of content predict the rotation?

    A network takes the shortest way to the labels. If the phase of a resampling grid or a dark border tells them, it
    learns that. Four statistics, each read by a logistic regression on half of the images, are tested on the rest:

    - "texture": one 3x3 convolution with random filters, ReLU, mean over positions;
    - "border": contrast between neighbouring rows at each side, relative to that a little further inside: padding,
      black bars;
    - "wrap": how steps between the first rows of each side go with the step to the row on the opposite side. Periodic
      resampling (a Fourier crop, say) blends the two; on a grid aligned at the corner it samples nearer to the seam on
      one side than on the other. Inside the image such a shift by less than a pixel is not to be seen;
    - "grid": contrast between neighbouring pixels by position modulo 8: the blocks of JPEG files.

    Args:
        images: (N, C, S, S) of any dtype, or an iterable of such batches, where a batch may be a tuple that starts
            with the images. At least 24 px.
        rotate: the pipeline from these images to copies and labels; give whatever stands before and after the
            rotation in it, as in ``lambda x: rotate4(crop(x))``.
        limit: at most so many images are used, the first.
        seed: decides the halves, the filters, and what `rotate` draws from the global generator.

    Raises:
        ValueError: fewer than 8 images, or images that are too small.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        pixels = _first(images, limit)
        if len(pixels) < 8:
            raise ValueError(f"an audit needs 8 images or more, and better 100; these are {len(pixels)}")
        with seeded(seed, pixels.device):
            order = torch.randperm(len(pixels))
            halves = [_turned_cues(pixels[part], rotate, seed) for part in order.tensor_split(2)]
    as_given, pipeline = {}, {}
    for name in _CUES:
        (train, train_y), (test, test_y) = ((cues[name], labels) for cues, labels in halves)
        pipeline[name] = _accuracy(
            train.flatten(0, 1), train_y.flatten(), test.flatten(0, 1), test_y.flatten()
        )
        as_given[name] = _accuracy(train[0], train_y[0], test[0], test_y[0])
    return CueAudit(as_given, pipeline)


def _accuracy(train: Tensor, train_y: Tensor, test: Tensor, test_y: Tensor) -> float:
    return few_label_probe(train, train_y, test, test_y, range(len(train)))


def _turned_cues(pixels: Tensor, rotate: Rotate, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics (4, M, D) by name and labels (4, M) of all M copies, for each of four turns before the pipeline."""
    cues: dict[str, list[Tensor]] = {name: [] for name in _CUES}
    labels = []
    for turn in range(4):
        for part in torch.rot90(pixels, turn, (2, 3)).split(_BATCH):
            copies, y = rotate(part)
            labels.append(y.cpu())
            if min(copies.shape[2:]) < 3 * _BLOCK:
                raise ValueError(f"an audit needs images of 24 px or more, not {tuple(copies.shape[2:])}")
            copies = copies.cpu().double()
            for name, cue in _CUES.items():
                cues[name].append(cue(copies, seed))
    return {k: torch.cat(v).unflatten(0, (4, -1)) for k, v in cues.items()}, torch.cat(labels).view(4, -1)


def _texture(images: Tensor, seed: int) -> Tensor:
    """(M, 16): mean over positions of the ReLU of 3x3 convolutions, 4 random filters in 4 turns each."""
    generator = torch.Generator().manual_seed(seed)
    filters = torch.randn(4, images.shape[1], 3, 3, generator=generator, dtype=images.dtype)
    filters = filters - filters.mean((1, 2, 3), keepdim=True)
    turned = torch.cat([torch.rot90(filters, turn, (2, 3)) for turn in range(4)])
    spread = images.std((1, 2, 3), keepdim=True).clamp(min=1e-12)
    return F.conv2d(images / spread, turned).relu().mean((2, 3))


def _border(images: Tensor, _seed: int) -> Tensor:
    """(M, 16): log contrast of the first 4 pairs of rows from each side, less that of the 3 pairs behind them."""
    floor = 1e-3 * images.std((1, 2, 3)).clamp(min=1e-12)[:, None]
    profiles = []
    for turn in range(4):
        rows = torch.rot90(images, turn, (2, 3))[:, :, : _EDGE + _INSIDE + 1]
        contrast = (rows.diff(dim=2).abs().mean((1, 3)) + floor).log()
        profiles.append(contrast[:, :_EDGE] - contrast[:, _EDGE:].mean(1, keepdim=True))
    return torch.cat(profiles, 1)


def _wrap(images: Tensor, _seed: int) -> Tensor:
    """(M, 12): correlation of the first 3 steps between rows from each side with that to the opposite side's row."""
    floor = 1e-3 * images.var((1, 2, 3)).clamp(min=1e-12)[:, None]
    seams = []
    for turn in range(4):
        rows = torch.rot90(images, turn, (2, 3))
        steps = -rows[:, :, : _SEAM + 1].diff(dim=2)
        around = rows[:, :, -1:] - rows[:, :, :1]
        energy = (steps.square().mean((1, 3)) + floor) * (around.square().mean((1, 3)) + floor)
        seams.append((steps * around).mean((1, 3)) / energy.sqrt())
    return torch.cat(seams, 1)


def _grid(images: Tensor, _seed: int) -> Tensor:
    """(M, 16): log contrast of neighbours by position modulo 8 down and across, without 8 px at each side."""
    floor = 1e-3 * images.std((1, 2, 3)).clamp(min=1e-12)[:, None]
    phases = []
    for axis, other in ((2, 3), (3, 2)):
        contrast = images.diff(dim=axis).abs().mean((1, other))
        whole = (images.shape[axis] - 2 * _BLOCK) // _BLOCK * _BLOCK
        by_phase = contrast[:, _BLOCK : _BLOCK + whole].unflatten(1, (-1, _BLOCK)).mean(1) + floor
        phases.append((by_phase / by_phase.mean(1, keepdim=True)).log())
    return torch.cat(phases, 1)


_CUES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "texture": _texture,
    "border": _border,
    "wrap": _wrap,
    "grid": _grid,
}


def _first(images: Tensor | Iterable[Any], limit: int) -> Tensor:
    """The first images (N, C, S, S) of a tensor or an iterable of batches, at most `limit`."""
    if isinstance(images, Tensor):
        return images[:limit]
    found: list[Tensor] = []
    for batch in images:
        found.append(batch[0] if isinstance(batch, tuple | list) else batch)
        if sum(map(len, found)) >= limit:
            break
    return torch.cat(found)[:limit] if found else torch.empty(0)
