"""`tv:NAME@ROOT`: torchvision's classification data sets, read where they lie."""

from __future__ import annotations

import difflib
import inspect
import os
from typing import Any

from torch import Tensor

from leaven.recipes.common.decode import DAMAGED, BadImage, Reduction, to_uint8
from leaven.recipes.common.flags import UserError
from leaven.recipes.common.sources import TolerantSource, show_path

DOWNLOAD = "?download"


class TorchvisionSource(TolerantSource):
    """A torchvision data set of (Pillow image, class) pairs.

    Args:
        dataset: built without transforms.
        name: what to call it in messages.
        in_chans: 1 for grey, 3 for RGB.
        max_bad_images: how many unreadable images to bear.
    """

    def __init__(self, dataset: Any, name: str, in_chans: int = 3, max_bad_images: int = 10) -> None:
        super().__init__(len(dataset), _labels(dataset), max_bad_images)
        self.dataset, self.in_chans, self._name = dataset, in_chans, name

    def read(self, index: int, reduction: Reduction | None = None) -> Tensor:
        try:
            return to_uint8(self.dataset[index][0], self.in_chans)
        except DAMAGED as error:
            raise BadImage(" ".join(str(error).split()) or type(error).__name__) from None

    def name(self, index: int) -> str:
        return f"image {index} of {self._name}"


def _labels(dataset: Any) -> Any:
    """All classes, without decoding an image, from where torchvision's data sets keep them; else None."""
    for attribute in ("targets", "labels", "_labels"):
        values = getattr(dataset, attribute, None)
        if values is not None and len(values) == len(dataset):
            return values
    for attribute in ("samples", "_samples"):
        if hasattr(dataset, attribute):
            return [sample[1] for sample in getattr(dataset, attribute)]
    return None


def open_torchvision(
    spec: str, in_chans: int = 3, max_bad_images: int = 10
) -> tuple[TorchvisionSource, TorchvisionSource, tuple[str, ...], str]:
    """Open `tv:NAME@ROOT`, or `tv:NAME@ROOT?download` to let torchvision fetch it first.

    Returns:
        training and held-out source, class names, name of the held-out split.

    Raises:
        UserError: unknown data set, files not there, or no classification data set with a split.
    """
    import torchvision.datasets

    name, _, root = spec.removeprefix("tv:").partition("@")
    if not name or not root:
        raise UserError(f"--data {spec}: expected tv:NAME@ROOT, as in tv:CIFAR10@./data")
    download, root = root.endswith(DOWNLOAD), os.path.expanduser(root.removesuffix(DOWNLOAD))
    names = [n for n in torchvision.datasets.__all__ if inspect.isclass(getattr(torchvision.datasets, n))]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise UserError(
            f"--data {spec}: torchvision has no data set {name}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    if download and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--data {spec}: download with one process first, then drop {DOWNLOAD}")
    factory = getattr(torchvision.datasets, name)
    train, _ = _first_split(factory, spec, root, ("train", "trainval"), download)
    val, val_name = _first_split(factory, spec, root, ("val", "valid", "test"), download)
    try:
        sources = [TorchvisionSource(dataset, name, in_chans, max_bad_images) for dataset in (train, val)]
    except (TypeError, ValueError):
        raise _no_classes(spec, name) from None
    labels = sources[0].labels
    if labels is None or labels.ndim != 1:
        raise _no_classes(spec, name)
    classes = tuple(map(str, getattr(train, "classes", None) or range(int(labels.max()) + 1)))
    return sources[0], sources[1], classes, val_name


def _first_split(
    factory: Any, spec: str, root: str, splits: tuple[str, ...], download: bool
) -> tuple[Any, str]:
    """The first of `splits` that the data set knows, opened, and its name."""
    parameters = inspect.signature(factory).parameters
    options = {"download": download} if "download" in parameters else {}
    required = [p for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if [p.name for p in required] != ["root"] or not {"train", "split"} & set(parameters):
        raise UserError(
            f"--data {spec}: {factory.__name__} has no train and test split; give a folder of its images"
        )
    if "train" in parameters:
        return _construct(
            factory, spec, root, train="train" in splits, **options
        ), "train" if "train" in splits else "test"
    for split in splits:
        try:
            return _construct(factory, spec, root, split=split, **options), split
        except ValueError:  # torchvision's word for an unknown split
            continue
    raise UserError(f"--data {spec}: {factory.__name__} has no split named {' or '.join(splits)}")


def _construct(factory: Any, spec: str, root: str, **options: Any) -> Any:
    try:
        return factory(root, **options)
    except ImportError as error:
        raise UserError(
            f"--data {spec}: {factory.__name__} needs a package that is not here: {error}"
        ) from None
    except (RuntimeError, OSError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise UserError(
            f"--data {spec}: {factory.__name__} cannot be read from {show_path(root)} ({reason}); "
            f"put its files there, or let torchvision fetch them: '{spec.removesuffix(DOWNLOAD)}{DOWNLOAD}'"
        ) from None


def _no_classes(spec: str, name: str) -> UserError:
    return UserError(
        f"--data {spec}: {name} does not give one class per image; give a folder of its images instead"
    )
