"""The feature maps of any backbone: which there are, and how to get them in one pass."""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from leaven.backbones.probe import (
    UNSUITABLE,
    ImageSize,
    candidate_images,
    first_that_runs,
    reason_of,
    untouched,
)
from leaven.backbones.trace import Call, maps, reduction, tokens_after, trace, trunk


class NoStages(ValueError):
    """The backbone yields no feature maps. The message is one line."""


@dataclass(frozen=True)
class Stage:
    """One feature map of a backbone, and where `features` finds it."""

    name: str
    """Path of the module whose output it is."""
    channels: int
    """C of the map (B, C, h, w)."""
    reduction: int
    """Image side over map side."""
    index: int | None = None
    """Index into the net's own ``forward_intermediates`` (timm); None: taken by a hook on the module."""
    call: int = 0
    """Which call of the module in one pass, for modules that are called more than once."""
    channels_last: bool = False
    """The module returns (B, h, w, C)."""
    overwritten: bool = False
    """The net later changes the map in place, so that it must be copied."""
    entry: str = ""
    """What to call for one pass: "" the model itself, "forward_features", or the path of a submodule."""


def stages(model: nn.Module, image_size: ImageSize = None) -> tuple[Stage, ...]:
    """The feature maps of a backbone, largest first: the last map at each distinct reduction.

    timm's own ``feature_info`` and ``forward_intermediates`` where the model has them; any other module is
    run once on a small image, and its containers are walked down as far as they span several reductions.
    Channels and reductions are those of real maps. The model is left untouched, bit for bit.

    Args:
        model: a plain backbone.
        image_size: side of the image to run on, where the net insists on one.

    Raises:
        NoStages: the net yields no maps, or did not run.
    """
    if hasattr(getattr(model, "feature_info", None), "out_indices"):  # a plain model holds a list of dicts
        raise NoStages(f"{type(model).__name__} is timm's features_only wrapper; pass the plain model")
    declared = hasattr(model, "forward_intermediates") and hasattr(model, "feature_info")
    observe, read = (_all_intermediates, _declared) if declared else (_trace, _traced)
    with untouched(model), torch.no_grad():
        try:
            image, seen = first_that_runs(lambda x: observe(model, x), candidate_images(model, image_size))
        except UNSUITABLE as error:
            raise NoStages(
                f"{type(model).__name__} did not run on a test image; pass image_size: {reason_of(error)}"
            ) from None
        found = read(model, image, seen)
    last = {stage.reduction: stage for stage in found}
    if not last:
        raise NoStages(
            f"{type(model).__name__} returned no feature map (B, C, h, w) for an image {tuple(image.shape)}"
        )
    return tuple(last[r] for r in sorted(last))


def features(model: nn.Module, images: Any, stages: Sequence[Stage]) -> list[Any]:
    """The maps (B, C, h, w) of `stages`, largest first, in one pass through the unmodified model.

    `images` is handed on unseen, so that it may be any object the model's operations understand. No hook
    outlives the call; several threads may call it on one model.

    Raises:
        RuntimeError: a stage's module did not run.
    """
    if not stages:
        return []
    if stages[0].index is not None:
        return _intermediates(model, images, [stage.index for stage in stages])
    out: list[Any] = [None] * len(stages)
    hooks = [(model.get_submodule(stage.name), _recorder(out, i, stage)) for i, stage in enumerate(stages)]
    run = _entry(model, stages[0].entry)
    if torch.compiler.is_compiling():
        _run_traced(run, images, hooks)
    else:
        handles = []
        try:
            for module, hook in hooks:
                handles.append(module.register_forward_hook(hook))
            run(images)
        finally:
            for handle in handles:
                handle.remove()
    for stage, found in zip(stages, out, strict=True):
        if found is None:
            raise RuntimeError(
                f"{stage.name} of {type(model).__name__} was not run, or its hooks were skipped; "
                "pass the plain model, and compile what calls features rather than the backbone alone"
            )
    return out


def unused_parameters(model: nn.Module, stages: Sequence[Stage], image_size: ImageSize = None) -> set[str]:
    """Names of the trainable parameters that get no gradient from the maps of `stages`: heads, mostly.

    Found by one backward pass on a small image; the model is left untouched. Under DDP these must be
    frozen or put on the ignore list.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with untouched(model), torch.enable_grad():
        images = candidate_images(model, image_size)
        _, outputs = first_that_runs(lambda image: features(model, image, stages), images)
        loss = torch.stack([output.sum() for output in outputs]).sum()
        if not loss.requires_grad:
            return set(parameters)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None}


def _recorder(out: list[Any], i: int, stage: Stage) -> Callable[[nn.Module, Any, Any], None]:
    thread = None if torch.compiler.is_compiling() else threading.get_ident()
    calls = [0]

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if thread is not None and thread != threading.get_ident():
            return  # another thread is running the same model
        if calls[0] == stage.call:
            if stage.overwritten:
                output = output.clone()
            out[i] = output.permute(0, 3, 1, 2) if stage.channels_last else output
        calls[0] += 1

    return record


def _run_traced(run: Callable[[Any], Any], images: Any, hooks: list[tuple[nn.Module, Any]]) -> None:
    """Run with hooks inside torch.compile, which cannot trace `register_forward_hook` but can trace this."""
    before = [module._forward_hooks for module, _ in hooks]
    try:
        for i, (module, hook) in enumerate(hooks):
            module._forward_hooks = {**module._forward_hooks, f"leaven{i}": hook}  # type: ignore[dict-item]
        run(images)
    finally:
        for (module, _), hooks_before in zip(hooks, before, strict=True):
            module._forward_hooks = hooks_before


def _entry(model: nn.Module, entry: str) -> Callable[[Any], Any]:
    if entry == "forward_features":
        method: Any = model.forward_features
        return cast(Callable[[Any], Any], method)
    return model.get_submodule(entry)


def _intermediates(model: nn.Module, images: Any, indices: Iterable[int | None]) -> list[Any]:
    method: Any = model.forward_intermediates
    out: list[Any] = method(
        images, indices=list(indices), norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
    )
    return out


def _all_intermediates(model: nn.Module, image: Tensor) -> list[Tensor]:
    info: Any = model.feature_info
    return _intermediates(model, image, range(len(info)))


def _declared(model: nn.Module, image: Tensor, outputs: list[Tensor]) -> list[Stage]:
    info: Any = model.feature_info
    found = []
    for i, (entry, output) in enumerate(zip(info, outputs, strict=True)):
        side = reduction(image.shape[-2:], output.shape[-2:], entry.get("reduction"))
        if side is not None:
            found.append(Stage(entry.get("module", f"intermediate {i}"), output.shape[1], side, index=i))
    return found


def _trace(model: nn.Module, image: Tensor) -> Call:
    return trace(model, image, "forward_features" if hasattr(model, "forward_features") else "")


def _traced(model: nn.Module, _image: Tensor, root: Call) -> list[Stage]:
    found = maps(root)
    if found and tokens_after(root, found[-1], model):
        raise NoStages(
            f"{type(model).__name__} works on a sequence of tokens after {found[-1].name}: no feature maps; "
            "timm's vision transformers give theirs"
        )
    entry = root.name
    if not entry and not any(call.count for call in found):  # calls are counted over the whole pass
        entry = trunk(root, found).name
    return [
        Stage(c.name, c.channels, c.gives, None, c.count, c.channels_last, c.overwritten, entry)
        for c in found
        if c.gives is not None
    ]
