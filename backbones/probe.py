"""Run a backbone on a small image and leave no trace in it."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ImageSize = int | tuple[int, int] | None

# What a network raises when the image does not suit it: shape mismatches are RuntimeErrors, size checks are
# assertions or ValueErrors.
UNSUITABLE = (RuntimeError, ValueError, AssertionError)


def reason_of(error: BaseException) -> str:
    """What an error says, in one line of 200 characters at most; an assertion without words says what it is."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode, then put back modes, buffers, gradients and random states, bit for bit."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, b, b.clone()) for module in model.modules() for name, b in _buffers(module)]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    python_state = random.getstate()
    devices = {p.device for p in [*model.parameters(), *model.buffers()] if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            model.eval()
            for parameter, _ in gradients:
                parameter.grad = None
            yield
    finally:
        random.setstate(python_state)
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global random numbers, of the CPU and of a device, from a seed; afterwards they go on where they were.

    `torch.manual_seed` alone seeds every device that there is, and what no block has put aside does not come back.
    """
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        if cuda or device.type in ("cpu", "meta"):
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, buffer) for name, buffer in module._buffers.items() if buffer is not None)


def candidate_images(model: nn.Module, image_size: ImageSize) -> Iterator[Tensor]:
    """Images (1, C, H, W) to try in turn, in the model's dtype and on its device.

    A net of one size gets that size. Any other gets an image that is not square, so that the layout of a
    map (NCHW or NHWC) cannot be mistaken.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    for height, width in _sizes(model, image_size):
        for channels in _channels(model):
            generator = torch.Generator().manual_seed(0)
            image = torch.randn(1, channels, height, width, generator=generator)
            yield image.to(device=like.device, dtype=like.dtype)


def first_that_runs(run: Callable[[Tensor], Any], images: Iterator[Tensor]) -> tuple[Tensor, Any]:
    """The first image on which `run` succeeds, and its result; otherwise the first image's error."""
    failure: Exception | None = None
    for image in images:
        try:
            return image, run(image)
        except UNSUITABLE as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _sizes(model: nn.Module, image_size: ImageSize) -> list[tuple[int, int]]:
    if image_size is not None:
        return [image_size if isinstance(image_size, tuple) else (image_size, image_size)]
    config = getattr(model, "pretrained_cfg", None) or {}
    own = [getattr(getattr(model, "patch_embed", None), "img_size", None), getattr(model, "image_size", None)]
    own.append(tuple(config["input_size"][1:]) if config.get("input_size") else None)
    known = [(s, s) if isinstance(s, int) else tuple(s) for s in own if s is not None]
    free = [(224, 256), (224, 224), (32, 32)]
    # a net of one size may fail in any way at another (MViTv2: IndexError), so that its own comes first
    sized = bool(config.get("fixed_input_size")) or own[0] is not None or own[1] is not None
    return [*known, *free] if sized else [free[0], *known, *free[1:]]


def _channels(model: nn.Module) -> list[int]:
    declared = getattr(model, "in_chans", None)
    convs = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    first = next((conv.in_channels for conv in convs), 3)
    candidates = [declared] if isinstance(declared, int) else []
    return list(dict.fromkeys([*candidates, first, 3, 1]))
