"""A tiny network, an objective around it, and callbacks that exercise every kind of hook point."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from leaven.callbacks import Callback, Progress, map_images
from leaven.callbacks.core import Handle
from leaven.pretext import Output


class TinyNet(nn.Module):
    """Conv, BatchNorm, dropout, linear, with timm's interface and HF's argument name."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(4, classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(x.mean((2, 3)))
        return x if pre_logits else self.head(x)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(pixel_values))


class Objective(nn.Module):
    """Classification as an objective: owns the backbone, returns a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = TinyNet()

    def forward(self, images: Tensor, labels: Tensor) -> Output:
        return Output(F.cross_entropy(self.backbone(images), labels), {})


class ScaleInput(Callback):
    """An input callback: brightens the images of the whole model as training goes on."""

    slot = "input"

    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterable[Handle]:
        self.progress = progress
        yield model.register_forward_pre_hook(self.scale, with_kwargs=True)

    def scale(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not module.training:
            return None
        return map_images(lambda x: x * (1 + self.progress.fraction), args, kwargs)


class InvertInput(Callback):
    """Claims the same slot as `ScaleInput`."""

    slot = "input"

    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterable[Handle]:
        yield model.register_forward_pre_hook(self.invert, with_kwargs=True)

    def invert(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return map_images(torch.neg, args, kwargs) if module.training else None


class CentreGradient(Callback):
    """A gradient hook: takes the mean out of the first layer's gradient, before any all-reduce."""

    slot = "first-layer-gradient"
    binds = "backbone"

    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterable[Handle]:
        yield model.stem.weight.register_hook(self.centre)

    def centre(self, gradient: Tensor) -> Tensor:
        return gradient - gradient.mean()


class ScaleStem(Callback):
    """A hook on an inner module, with its scheduled number in a tensor as compiled code wants it."""

    order = 60
    binds = "backbone"

    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterable[Handle]:
        self.progress = progress
        self.factor = torch.ones(())
        yield model.stem.register_forward_hook(self.scale)

    def update(self) -> None:
        self.factor.fill_(1 + self.progress.fraction)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update()

    def scale(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return output * self.factor.to(output) if module.training else None


def batch(seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Images (size, 3, 16, 16) and labels (size,) that can be learnt."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (size,), generator=generator)
    images = torch.randn(size, 3, 16, 16, generator=generator)
    images[torch.arange(size), labels] += 2.0
    return images, labels


def train_step(
    model: nn.Module, optimizer: Optimizer, seed: int, device: str | torch.device = "cpu"
) -> Tensor:
    """One update on batch `seed`; dropout is keyed by the seed too."""
    torch.manual_seed(seed)
    images, labels = (each.to(device) for each in batch(seed))
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def run_twice(script: str, out: Path) -> None:
    """Run a test file as a script, in two processes of one gloo group; each is told the folder `out`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(out)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)[-3000:]


def assert_same(a: Any, b: Any) -> None:
    """Equal bit for bit, through dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A state dict that does not follow the module."""
    return {key: value.clone() for key, value in module.state_dict().items()}


def hook_count(module: nn.Module, *optimizers: Optimizer) -> int:
    """How many hooks of any kind a model and its optimizers carry."""
    owners = [*module.modules(), *module.parameters(), *optimizers]
    return sum(
        len(value)
        for owner in owners
        for name in (*vars(owner), "_backward_hooks", "_post_accumulate_grad_hooks")
        if "hook" in name and isinstance(value := getattr(owner, name, None), dict)
    )
