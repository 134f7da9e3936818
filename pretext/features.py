"""Pooled features of any backbone, for evaluation: norm layers in eval mode, nothing disturbed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leaven.backbones import NoStages, Stage, features, stages
from leaven.backbones.probe import (
    UNSUITABLE,
    ImageSize,
    candidate_images,
    first_that_runs,
    reason_of,
    untouched,
)


def extract_features(
    backbone: nn.Module,
    loader_or_images: Tensor | Iterable[Any],
    device: torch.device | str | None = None,
    *,
    batch_size: int = 64,
) -> Tensor:
    """Pooled features of all images, with every norm and dropout layer in eval mode.

    Which features: timm models give their pooled features before the classifier; other networks with feature
    maps at two or more strides (torchvision, your own) the mean over positions of their last map; any other
    module what its final linear layer reads, or without one its output (maps and tokens are averaged).

    Afterwards every submodule is in the mode it was in, and the global random state is as before.

    Args:
        backbone: any vision backbone.
        loader_or_images: normalised images (N, C, H, W), or an iterable of batches of them, where a batch may
            be a tuple that starts with the images.
        device: where the backbone is; default: where its parameters are.
        batch_size: images per forward pass, when a tensor is given.

    Returns:
        (N, D) features, fp32, on the CPU, in the order given (so give labels in it too: no shuffling loader).

    Raises:
        ValueError: on no images, images that are not floating point, or an output that is not a tensor.
    """
    collected = []
    device = torch.device(device) if device is not None else device_of(backbone)
    # Iterating a DataLoader draws from the global generator: restore it, or evaluating would change training.
    with torch.random.fork_rng(devices=[]), torch.no_grad(), eval_mode(backbone):
        maps = None
        for images in _batches(loader_or_images, batch_size):
            if maps is None:
                maps = last_map(backbone, (images.shape[-2], images.shape[-1]))
            collected.append(pooled_features(backbone, images.to(device), maps).float().cpu())
    if not collected:
        raise ValueError("no images to extract features from")
    return torch.cat(collected)


def recalibrate_batchnorm(
    backbone: nn.Module, batches: Tensor | Iterable[Any], *, batch_size: int = 64
) -> int:
    """Replace every BatchNorm's running statistics by those of `batches`; weights are not touched.

    After SparK they describe the visible positions of masked images and are off on whole ones (so are they
    after weight averaging). Each batch counts by its number of images. All other layers are in eval mode:
    unlike in `torch.optim.swa_utils.update_bn`, dropout is off and every submodule keeps its mode afterwards.

    Args:
        backbone: changed in place.
        batches: normalised images (N, C, H, W), or an iterable of batches of them, where a batch may be a
            tuple that starts with the images.
        batch_size: images per forward pass, when a tensor is given.

    Returns:
        The number of BatchNorm layers recalibrated; 0 leaves the backbone as it was.

    Raises:
        ValueError: on no images, or images that are not floating point.
    """
    norms = [
        module
        for module in backbone.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    device, seen = device_of(backbone), 0
    with torch.random.fork_rng(devices=[]), torch.no_grad(), eval_mode(backbone):
        try:
            for images in _without_rest_of_one(_batches(batches, batch_size)):
                seen += len(images)
                for norm in norms:
                    if not norm.training:  # the first batch
                        norm.training = True
                        norm.reset_running_stats()
                    norm.momentum = len(images) / seen
                backbone(images.to(device))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if not seen:
        raise ValueError("no images to recalibrate BatchNorm with")
    return len(norms)


def _without_rest_of_one(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """A single image joins the batch before it: alone, a norm of pooled features has no variance, and raises."""
    held: Tensor | None = None
    for images in batches:
        if held is not None and len(images) == 1 < len(held) and images.shape[1:] == held.shape[1:]:
            images = torch.cat([held, images])
        elif held is not None:
            yield held
        held = images
    if held is not None:
        yield held


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """`module.eval()`, then each submodule's own mode again: a user's frozen layers stay frozen."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


def _batches(loader_or_images: Tensor | Iterable[Any], batch_size: int) -> Iterator[Tensor]:
    """Image batches (B, C, H, W), whatever was given."""
    batches = (
        torch.split(loader_or_images, batch_size)
        if isinstance(loader_or_images, Tensor)
        else loader_or_images
    )
    for batch in batches:
        images = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(images, Tensor) or not images.is_floating_point():
            what = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be normalised floating-point tensors (B, C, H, W), not {what}")
        if len(images):
            yield images


def device_of(module: nn.Module) -> torch.device:
    """Where its parameters are; the CPU for a module without any."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def last_map(backbone: nn.Module, image_size: ImageSize) -> tuple[Stage, ...]:
    """The map whose mean is the pooled features; none where they are read otherwise, see `extract_features`."""
    if hasattr(backbone, "forward_head"):
        return ()
    try:
        maps = stages(backbone, image_size=image_size)
    except NoStages:
        return ()
    return maps[-1:] if len(maps) > 1 else ()


def pooled_features(backbone: nn.Module, images: Tensor, maps: tuple[Stage, ...]) -> Tensor:
    """Features (B, D) as `extract_features` collects them, with gradient, in whatever mode the backbone is in.

    From the backbone as it is now: nothing here must outlive a copy or a replaced layer.

    Args:
        backbone: any vision backbone.
        images: (B, C, H, W), normalised.
        maps: `last_map` of it.
    """
    model: Any = backbone
    if hasattr(model, "forward_head"):
        return _pooled(model.forward_head(model.forward_features(images), pre_logits=True))
    return _pooled(features(backbone, images, maps)[-1] if maps else _before_classifier(backbone, images))


def try_features(
    backbone: nn.Module, maps: tuple[Stage, ...], image_size: ImageSize
) -> tuple[Tensor, list[str]]:
    """Features (1, D) of some image, and the names of the parameters without a part in them. Leaves no trace.

    Raises:
        ValueError: the backbone does not run on an image of this size, or gives no features.
    """
    parameters = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    with untouched(backbone), torch.enable_grad():
        images = candidate_images(backbone, image_size)
        try:
            _, found = first_that_runs(lambda image: pooled_features(backbone, image, maps), images)
        except UNSUITABLE as error:
            what = type(backbone).__name__
            raise ValueError(
                f"{what} did not run on a test image; pass image_size: {reason_of(error)}"
            ) from None
        if not found.requires_grad:
            return found, sorted(parameters)
        gradients = torch.autograd.grad(found.sum(), list(parameters.values()), allow_unused=True)
    unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    return found.detach(), unused


def _before_classifier(model: nn.Module, images: Tensor) -> Any:
    """The model's output, or the input of the linear layer whose output that is: logits are no features."""
    calls: list[tuple[Any, Any]] = []
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [
        module.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
        for module in linear
    ]
    try:
        found = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return next((read for read, output in calls if output is found), found)


def _pooled(output: Any) -> Tensor:
    """(B, D) as it is; maps (B, D, h, w) and tokens (B, T, D) averaged over positions."""
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the backbone must return features (B, D), tokens (B, T, D) or maps (B, D, h, w), not {shape}"
        )
    if output.ndim == 4:
        return output.mean((2, 3))
    return output.mean(1) if output.ndim == 3 else output
