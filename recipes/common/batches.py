"""Loaders for training and for evaluation, and the backbone, from the common flags."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from leaven.recipes.common.augment import DeviceAugment, eval_transform, train_transform
from leaven.recipes.common.data import Data, KeyedDataset, KeyedLoader, make_loader
from leaven.recipes.common.flags import CommonSettings, UserError
from leaven.recipes.common.sampler import KeyedBatchSampler
from leaven.recipes.common.sources import Source

Size = tuple[int, int]


@contextmanager
def user_errors(*errors: type[Exception]) -> Iterator[None]:
    """Show these exceptions as one line: for calls whose arguments come straight from flags."""
    try:
        yield
    except errors as error:
        raise UserError(str(error)) from error


def build_backbone(settings: CommonSettings, size: Size, drop_path: float | None = None) -> nn.Module:
    """The backbone that the flags describe: ``--backbone --init --in-chans --grad-checkpointing``.

    Raises:
        UserError: it cannot do what the flags ask, or its weights cannot be had.
        UnknownBackbone: no such name.
    """
    from leaven.backbones import WeightsMismatch, create, load

    pretrained = settings.init == "pretrained"
    try:
        with user_errors(ValueError):
            backbone = create(
                settings.backbone,
                pretrained=pretrained,
                in_chans=settings.in_chans,
                drop_path_rate=drop_path,
                image_size=size,
            )
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        line = str(error).split("\n")[0]
        raise UserError(
            f"--init pretrained: no weights for {settings.backbone} could be had ({line})"
        ) from error
    if settings.init is not None and not pretrained:
        with user_errors(FileNotFoundError, WeightsMismatch):
            load(backbone, settings.init)
    if settings.grad_checkpointing:
        switch: Any = getattr(backbone, "set_grad_checkpointing", None)
        if switch is None:
            raise UserError(
                f"--grad-checkpointing: {settings.backbone} does not offer it; leave the flag out"
            )
        switch()
    return backbone


def statistics(
    data: Data, backbone: nn.Module, settings: CommonSettings
) -> tuple[Sequence[float], Sequence[float], str]:
    """Mean and standard deviation to normalise with, and a line that says whose they are."""
    from leaven.backbones import data_config

    mean, std, whose = data.mean, data.std, f"of {data.name}"
    if settings.init == "pretrained":
        config = data_config(backbone)
        mean, std, whose = config["mean"], config["std"], "that the pretrained weights expect"
    numbers = [", ".join(f"{value:.3f}" for value in values) for values in (mean, std)]
    return mean, std, f"normalised with mean ({numbers[0]}) and std ({numbers[1]}) {whose}"


def train_batches(
    data: Data,
    size: Size,
    scale: tuple[float, float],
    mean: Sequence[float],
    std: Sequence[float],
    settings: CommonSettings,
    accelerator: Accelerator,
) -> tuple[KeyedLoader, Callable[[Any], Tensor]]:
    """Random resized crops (bicubic) and flips: a loader, and what makes images (B, C, H, W) of a batch's first part.

    With ``--augment-on device`` the loader hands out whole images and boxes, and the second function crops.
    """
    sampler = KeyedBatchSampler(
        len(data.train),
        settings.batch_size,
        settings.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    augment = None
    if settings.augment_on == "device":
        # Whole images are stacked: a fifth more than the output keeps the pixels of most crops.
        stored = (size[0] * 6 // 5, size[1] * 6 // 5)
        augment = DeviceAugment(size, scale, 0.5, mean, std, stored=stored)
    transform = augment.draw if augment else train_transform(size, scale, 0.5, mean, std)
    loader = make_loader(
        KeyedDataset(data.train, transform),
        sampler,
        settings.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format

    def images(part: Any) -> Tensor:
        pixels: Tensor = augment(*part) if augment else part
        return pixels.contiguous(memory_format=layout)

    return loader, images


class Part:
    """At most ``most`` images of a source, evenly spread over it."""

    def __init__(self, source: Source, most: int) -> None:
        self.source, self.n = source, min(most, len(source))

    def __len__(self) -> int:
        return self.n

    def image(self, index: int) -> Tensor:
        return self.source.image(index * len(self.source) // self.n)

    def label(self, index: int) -> int | None:
        return self.source.label(index * len(self.source) // self.n)


def eval_batches(
    source: Source,
    size: Size,
    mean: Sequence[float],
    std: Sequence[float],
    settings: CommonSettings,
    most: int,
) -> KeyedLoader:
    """Whole images, resized and centre-cropped to ``size``, in their order; at most ``most`` of them."""
    part = Part(source, most)
    transform = eval_transform(size, 1.0, mean, std)
    sampler = KeyedBatchSampler(len(part), settings.batch_size, settings.seed, shuffle=False, drop_last=False)
    return make_loader(KeyedDataset(part, transform), sampler, settings.workers)
