"""Features of a data set, computed once and read by cell."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leaven.pretext.diffusion.blocks import default_call
from leaven.pretext.diffusion.features import Cell, DiffusionFeatures
from leaven.pretext.shards import check_space, digest, fingerprint, open_shard, save_shard


def write_features(
    folder: str | os.PathLike[str],
    features: DiffusionFeatures,
    batches: Iterable[tuple[Tensor, Tensor]],
    total: int,
    dtype: torch.dtype = torch.float16,
    batch_size: int = 64,
) -> int:
    """Write the features of all images, a file for each batch; what was stopped goes on where it was.

    Held-out images are counted from 0, too: give them features of another seed. With the training images' noise, at the
    same places in two parts that lie class by class, the noise tells the class.

    Args:
        folder: for the files ``00000.safetensors`` and so on; made if missing.
        features: what to compute.
        batches: images (B, C, H, W) and labels (B,), the same in every run; images are counted from 0.
        total: of the images, for the size to be known before it is written.
        dtype: of what is written.
        batch_size: noisy images per pass.

    Returns:
        Bytes of all files.

    Raises:
        FileExistsError: the folder has features of another model, of other settings, or of other images.
        OSError: the disk is too small for all of it.
        ValueError: another number of images came.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made_by, written, done = notes(features) | {"dtype": str(dtype), "total": str(total)}, 0, 0
    for number, (images, labels) in enumerate(batches):
        path = folder / f"{number:05}.safetensors"
        own = made_by | {"images": digest({"images": images, "labels": labels})}
        if path.is_file():
            with open_shard(path) as file:
                if changed := [key for key, value in own.items() if file.metadata().get(key) != value]:
                    raise FileExistsError(f"{path} was made with another {changed[0]}: take an empty folder")
        else:
            indices = torch.arange(done, done + len(images))
            found = features(images, indices, batch_size=batch_size)
            tensors = {json.dumps(cell): value.to("cpu", dtype).contiguous() for cell, value in found.items()}
            tensors["labels"] = labels.cpu()
            if number == 0:
                check_space(folder, tensors, len(images), total)
            save_shard(path, tensors, own)
        written += path.stat().st_size
        done += len(images)
    if done != total:
        raise ValueError(f"{total} images were announced and {done} came: {folder} is not complete")
    return written


class FeatureCache(Mapping[Cell, Tensor]):
    """What `write_features` wrote: maps (N, C, k, k) of all images by cell, in float32, read when they are asked for.

    Args:
        folder: see `write_features`.
        features: what they must have been made by; None takes what there is.

    Attributes:
        labels: (N,).

    Raises:
        FileNotFoundError: no features there.
        ValueError: they are of another model or of other settings, not complete, or a file is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], features: DiffusionFeatures | None = None) -> None:
        # By number: by name, 100000 comes before 99999.
        paths = sorted(Path(folder).glob("[0-9]*.safetensors"), key=lambda path: int(path.stem))
        if not paths:
            raise FileNotFoundError(f"no cached features in {folder}: write_features makes them")
        self._files: list[Any] = [open_shard(path) for path in paths]
        if features is not None:
            for key, value in notes(features).items():
                if self._files[0].metadata().get(key) != value:
                    raise ValueError(
                        f"the features in {folder} were made with another {key}: write them again"
                    )
        names = json.loads(self._files[0].metadata()["cells"])
        self._names = {Cell(*name): json.dumps(name) for name in names}
        total = int(self._files[0].metadata()["total"])
        self.labels = torch.cat([file.get_tensor("labels") for file in self._files])
        if len(self.labels) != total:
            raise ValueError(f"{folder} has {len(self.labels)} of {total} images: write_features goes on")

    def __getitem__(self, cell: Cell) -> Tensor:
        name = self._names[cell]
        return torch.cat([file.get_tensor(name).float() for file in self._files])

    def __iter__(self) -> Iterator[Cell]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def notes(features: DiffusionFeatures) -> dict[str, str]:
    """What features depend on, besides the images; of functions, that there are some."""
    schedule = features.schedule
    return {
        "model": fingerprint(features.model),
        "schedule": "own function" if schedule is None else digest({"abar": schedule.alphas_cumprod}),
        "cells": json.dumps(features.cells),
        "draws": str(features.draws),
        "seed": str(features.seed),
        "encoder": "none" if features.encode is None else "own function",
        "call": "default" if features.call is default_call else "own function",
    }
