"""Loaders for training and for evaluation, and the backbone, from the common flags."""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from numpy.typing import NDArray
from torch import Tensor, nn

from leaven.callbacks import NoEffectWarning, evo_norm, replace_norm_act
from leaven.recipes.common.augment import DeviceAugment, TrainTransform, Transform, eval_transform
from leaven.recipes.common.data import Data, KeyedDataset, KeyedLoader, make_loader, open_data, spread
from leaven.recipes.common.decode import Reduction
from leaven.recipes.common.few_labels import hold_out
from leaven.recipes.common.flags import CommonSettings, ImageSettings, UserError
from leaven.recipes.common.policies import Policy
from leaven.recipes.common.sampler import KeyedBatchSampler, permutation
from leaven.recipes.common.sources import Source, Subset, labels_of

Size = tuple[int, int]

# How images are judged must not depend on how they were trained on: BatchNorm's moments are means over batches.
EVALUATION_BATCH = 64
CALIBRATION_IMAGES = 8 * EVALUATION_BATCH


@contextmanager
def user_errors(*errors: type[Exception]) -> Iterator[None]:
    """Show these exceptions as one line: for calls whose arguments come straight from flags."""
    try:
        yield
    except errors as error:
        raise UserError(str(error)) from error


def find_data(settings: ImageSettings) -> Data:
    """The images of ``--data``, less what ``--val-from-train`` keeps out."""
    data = open_data(
        settings.data,
        seed=settings.seed,
        max_bad_images=settings.max_bad_images,
        in_chans=settings.in_chans,
        image_column=settings.image_column,
        label_column=settings.label_column,
        shuffle_buffer=settings.shuffle_buffer,
    )
    return data if settings.val_from_train is None else hold_out(data, settings.val_from_train)


def build_backbone(
    settings: ImageSettings, size: Size, drop_path: float | None = None, classes: int | None = None
) -> nn.Module:
    """The backbone that the flags describe: ``--backbone --init --in-chans --grad-checkpointing``.

    Args:
        settings: the flags.
        size: (H, W) of the images.
        drop_path: stochastic depth.
        classes: of the library's own classifier, which need not be in ``--init`` and is then fresh; 0 to leave a
            classifier out where it can be. None: no classifier, and none in the file.

    Raises:
        UserError: it cannot do what the flags ask, or its weights cannot be had.
        UnknownBackbone: no such name.
    """
    from leaven.backbones import WeightsMismatch, create, load, load_around_classifier

    if drop_path is not None and not 0 <= drop_path < 1:
        raise UserError(f"--drop-path {drop_path} must be at least 0 and below 1")
    pretrained = settings.init == "pretrained"
    try:
        with user_errors(ValueError):
            backbone = create(
                settings.backbone,
                pretrained=pretrained,
                in_chans=settings.in_chans,
                num_classes=classes or 0,
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
            rebuild(backbone, settings.init)
            if classes is None:
                load(backbone, settings.init)
            else:
                fresh = load_around_classifier(backbone, settings.init)
                print_once(
                    f"--init {settings.init}: " + (f"all but {', '.join(fresh)}" if fresh else "all weights")
                )
    if isinstance(settings, CommonSettings) and settings.grad_checkpointing:
        switch: Any = getattr(backbone, "set_grad_checkpointing", None)
        if switch is None:
            raise UserError(
                f"--grad-checkpointing: {settings.backbone} does not offer it; leave the flag out"
            )
        switch()
    return backbone


def rebuild(backbone: nn.Module, weights: str) -> None:
    """Give the plain network the EvoNorm that the weights were trained with, if their file notes one.

    Raises:
        FileNotFoundError, WeightsMismatch: it is no file of weights.
        UserError: no BatchNorm of the network can be replaced.
    """
    from leaven.backbones import metadata

    if kind := metadata(weights).get("evonorm"):
        print_once(f"{weights}: BatchNorm replaced by EvoNorm-{kind}, as noted in the file")
        put_evonorm(backbone, kind)


def put_evonorm(backbone: nn.Module, kind: str) -> None:
    """Replace each BatchNorm and its activation by EvoNorm, in place.

    Raises:
        UserError: none can be replaced.
    """
    with warnings.catch_warnings(), user_errors(NoEffectWarning, ValueError):
        warnings.filterwarnings("error", "no layer of", NoEffectWarning)
        replace_norm_act(backbone, partial(evo_norm, kind))


def print_once(line: str) -> None:
    """Print on the main process alone."""
    if PartialState().is_main_process:
        print(line)


@dataclass(frozen=True)
class Images:
    """How the images of a run become tensors: what every loader of a recipe has in common.

    Attributes:
        data: where they come from.
        settings: batch size, workers, seed, where to augment.
        size: (H, W) that the network sees.
        mean, std: to normalise with, per channel, of images in [0, 1].
    """

    data: Data
    settings: ImageSettings
    size: Size
    mean: Sequence[float]
    std: Sequence[float]

    @classmethod
    def of(cls, data: Data, settings: ImageSettings, size: Size, backbone: nn.Module) -> "Images":
        """Normalised as the weights of ``--init`` were trained, or else by the data's own statistics."""
        from leaven.backbones import data_config, metadata

        known: dict[str, Any] = {"mean": data.mean, "std": data.std}
        if settings.init == "pretrained":
            known = data_config(backbone)
        elif settings.init is not None and "mean" in (notes := metadata(settings.init)):
            known = {name: json.loads(notes[name]) for name in ("mean", "std")}
        if len(known["mean"]) != settings.in_chans:
            channels = len(known["mean"])
            raise UserError(f"--init {settings.init} is for {channels} channels: add --in-chans {channels}")
        return cls(data, settings, size, known["mean"], known["std"])

    @property
    def notes(self) -> dict[str, Any]:
        """What a weights file should tell about the images that it was trained on."""
        from leaven.backbones import metadata

        moments = {"mean": json.dumps(list(self.mean)), "std": json.dumps(list(self.std))}
        init = self.settings.init
        surgery = {} if init in (None, "pretrained") else metadata(init)
        kept = {"evonorm": surgery["evonorm"]} if "evonorm" in surgery else {}
        shape = {"in_chans": self.settings.in_chans, "image_size": self.size}
        return {"data": self.data.name, **shape, **moments, **kept}

    def __str__(self) -> str:
        numbers = [", ".join(f"{value:.3f}" for value in values) for values in (self.mean, self.std)]
        return f"images {self.size[0]}x{self.size[1]}, normalised with mean {numbers[0]} and std {numbers[1]}"

    def train(
        self,
        scale: tuple[float, float],
        accelerator: Accelerator,
        *,
        hflip: float = 0.5,
        aa: Policy = "none",
        reprob: float = 0.0,
        repeats: int = 1,
        interpolation: str = "bicubic",
    ) -> tuple[KeyedLoader, Callable[[Any], Tensor]]:
        """Random resized crops, flips and what else `TrainTransform` can, for this process.

        Returns:
            The loader, and what makes images (B, C, H, W) of the first part of its batches: with
            ``--augment-on device`` that part is whole images and boxes, and cropping is yet to be done.
        """
        if not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(
                f"--crop-scale {scale[0]},{scale[1]} must be two shares of the area, the smaller first"
            )
        settings = cast(CommonSettings, self.settings)  # who trains has them
        rank, processes = accelerator.process_index, accelerator.num_processes
        sampler = KeyedBatchSampler(
            len(self.data.train), settings.batch_size, settings.seed, rank, processes, repeats=repeats,
            blocks=getattr(self.data.train, "blocks", None), buffer=settings.shuffle_buffer,
        )  # fmt: skip
        augment = None
        if settings.augment_on == "device":
            if aa != "none" or reprob:
                raise UserError("--augment-on device crops and flips only; leave --aa and --reprob out")
            # Whole images are stacked: a fifth more than the output keeps the pixels of most crops.
            stored = (self.size[0] * 6 // 5, self.size[1] * 6 // 5)
            augment = DeviceAugment(
                self.size, scale, hflip, self.mean, self.std, interpolation=interpolation, stored=stored
            )
        transform: Transform = TrainTransform(
            self.size, scale, hflip, self.mean, self.std, interpolation=interpolation, aa=aa, reprob=reprob
        )
        if augment is not None:
            transform = augment.draw
        dataset = KeyedDataset(self.data.train, transform)
        pin = accelerator.device.type == "cuda"
        loader = make_loader(dataset, sampler, settings.workers, pin_memory=pin)
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format

        def images(part: Any) -> Tensor:
            pixels: Tensor = augment(*part) if augment else part
            return pixels.contiguous(memory_format=layout)

        return loader, images

    def whole(
        self,
        source: Source,
        most: int,
        size: Size | None = None,
        *,
        crop_pct: float = 1.0,
        share: tuple[int, int] = (0, 1),
    ) -> KeyedLoader:
        """Whole images, resized to cover the size and centre-cropped, in order; at most ``most``, evenly spread.

        Args:
            source: the images.
            most: how many at most.
            size: (H, W), None for the one of training.
            crop_pct: share of the resized image that the crop keeps, per side.
            share: (i, n) for the i-th of n disjoint parts, as for one of n processes.
        """
        part = Part(source, most, share)
        transform = eval_transform(size or self.size, crop_pct, self.mean, self.std)
        sampler = KeyedBatchSampler(
            len(part), EVALUATION_BATCH, self.settings.seed, shuffle=False, drop_last=False
        )
        return make_loader(KeyedDataset(part, transform), sampler, self.settings.workers)

    def calibration(self) -> KeyedLoader:
        """Whole training images to take BatchNorm's statistics from, in random order, always the same.

        Files lie class by class, and a batch of one class lacks the variance between classes. What is read in blocks
        stays in order: each image would be a block to read.
        """
        train = self.data.train
        some = spread(train, CALIBRATION_IMAGES)
        if getattr(train, "blocks", None) is None:
            some = some[permutation(0, 0, len(some), "calibration")]
        return self.whole(Subset(train, some), len(some))


class Part:
    """At most ``most`` images of a source, evenly spread over it (`spread`); of those the i-th of n equal pieces."""

    def __init__(self, source: Source, most: int, share: tuple[int, int] = (0, 1)) -> None:
        self.source, self.indices = source, spread(source, most)
        if share != (0, 1):
            self.indices = np.array_split(self.indices, share[1])[share[0]]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> NDArray[np.int64]:
        """All labels (n,), without reading the images."""
        return labels_of(self.source)[self.indices]

    def image(self, index: int, reduction: Reduction | None = None) -> Tensor:
        return self.source.image(int(self.indices[index]), reduction)

    def label(self, index: int) -> int | None:
        return self.source.label(int(self.indices[index]))
