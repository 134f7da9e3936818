"""What does each stage of a frozen backbone know? Linear probes on its feature maps, and few labels per class."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaven.backbones import Stage, features
from leaven.backbones import stages as backbone_stages
from leaven.pretext.evaluation import linear_probe
from leaven.pretext.features import _batches, device_of, eval_mode

Labelled = tuple[Tensor | Iterable[Any], Tensor]


def probe_stages(
    backbone: nn.Module,
    train: Labelled,
    test: Labelled,
    stages: Sequence[Stage] | None = None,
    *,
    pool_to: int = 9600,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, float]:
    """Top-1 accuracy of a linear probe on the feature map of each stage.

    Each map is max-pooled to s x s, s as large as `pool_to` numbers per image allow: all stages are judged on about as
    many. 9600 gives RotNet's sides for the five layers of AlexNet (12, 7, 5, 6, 6). The probe is
    `leaven.pretext.linear_probe`, which standardises each of these numbers: batch norm without weights, as in the
    paper, would change nothing.

    All layers are in eval mode, without gradient; the modes come back, buffers and random state are as before.
    Source: Gidaris et al. 2018, section 3.2, after Zhang et al., Colorful Image Colorization, 2016.

    Args:
        backbone: any that has stages.
        train: normalised images (N, C, H, W) or a loader of batches, and their labels (N,) in the same order.
        test: the same, to be judged on.
        stages: which; by default all of `leaven.backbones.stages`.
        pool_to: most numbers per image and stage; a map of more channels is pooled to 1 x 1.
        seed: see `linear_probe`.
        batch_size: images per forward pass, when a tensor is given.

    Returns:
        Accuracy in [0, 1] by name of the stage, largest map first.

    Raises:
        NoStages: the backbone yields no feature maps.
        ValueError: see `extract_features` and `linear_probe`.
    """
    chosen = tuple(backbone_stages(backbone) if stages is None else stages)
    (train_maps, train_y), (test_maps, test_y) = (
        (pooled_maps(backbone, images, chosen, pool_to, batch_size), labels)
        for images, labels in (train, test)
    )
    names = [stage.name if stage.call == 0 else f"{stage.name} (call {stage.call})" for stage in chosen]
    return {
        name: linear_probe(known, train_y, asked, test_y, seed)
        for name, known, asked in zip(names, train_maps, test_maps, strict=True)
    }


def pooled_maps(
    backbone: nn.Module,
    images: Tensor | Iterable[Any],
    stages: Sequence[Stage],
    pool_to: int = 9600,
    batch_size: int = 64,
) -> list[Tensor]:
    """The maps of `stages`, max-pooled and flattened: one (N, C * s * s) in fp32 on the CPU per stage.

    No trace is left, see `probe_stages`.

    Args:
        backbone: any that has stages.
        images: normalised (N, C, H, W), or a loader of batches.
        stages: which, see `leaven.backbones.stages`.
        pool_to: most numbers per image and stage.
        batch_size: images per forward pass, when a tensor is given.

    Raises:
        ValueError: no stages, no images, or a batch size below 1.
    """
    if not stages or batch_size < 1:
        raise ValueError(
            "no stages to probe" if not stages else f"batch_size must be at least 1, not {batch_size}"
        )
    parts: list[list[Tensor]] = [[] for _ in stages]
    device = device_of(backbone)
    # Iterating a DataLoader draws from the global generator: restore it, or evaluating would change training.
    with torch.random.fork_rng(devices=[]), torch.no_grad(), eval_mode(backbone):
        for batch in _batches(images, batch_size):
            for part, found in zip(parts, features(backbone, batch.to(device), stages), strict=True):
                side = pooled_side(found.shape[1], min(found.shape[2:]), pool_to)
                part.append(F.adaptive_max_pool2d(found.float(), side).flatten(1).cpu())
    if not parts[0]:
        raise ValueError("no images to extract features from")
    return [torch.cat(part) for part in parts]


def pooled_side(channels: int, side: int, pool_to: int) -> int:
    """The largest s, from 1 to `side`, with s * s * channels at most `pool_to`."""
    fitting = [s for s in range(1, side + 1) if s * s * channels <= pool_to]
    return max(fitting, default=1)


def kshot_indices(targets: Tensor | Sequence[int], k: int, seed: int | None = None) -> Tensor:
    """K images of each class.

    Args:
        targets: (N,) class indices from 0.
        k: images per class.
        seed: None takes the first of each class in the order given, as RotNet's code does. A number draws them, and
            those of one seed are nested: what is among 20 is among 100.

    Returns:
        (K * classes,) indices, ascending.

    Raises:
        ValueError: k below 1, a class with fewer than k images, or unlabelled images.
    """
    labels = torch.as_tensor(targets)
    if k < 1 or len(labels) == 0 or int(labels.min()) < 0:
        raise ValueError(f"k must be at least 1 (it is {k}), and the targets class indices from 0")
    order = torch.arange(len(labels))
    if seed is not None:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in labels.unique():
        members = order[labels[order] == label]
        if len(members) < k:
            raise ValueError(f"class {int(label)} has {len(members)} images, fewer than the {k} asked for")
        chosen.append(members[:k])
    return torch.cat(chosen).sort().values
