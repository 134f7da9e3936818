"""Is a layer worth something? Short trainings of small networks with it, hardest network first, and two rejections."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaven.callbacks.evonorm.evolved import EvolvedNormAct2d
from leaven.callbacks.evonorm.genome import Genome
from leaven.callbacks.evonorm.replace import NormActFactory, replace_norm_act

_THREADS = torch.get_num_threads()  # of a fresh process


class Rejected(Exception):
    """The genome is not worth more work; the message says why.

    Attributes:
        value: the accuracy that was too low or the norm that was too large.
    """

    def __init__(self, reason: str, value: float = float("nan")) -> None:
        super().__init__(reason)
        self.value = value


@dataclass(frozen=True)
class Task:
    """Images to learn, normalised, in memory.

    Attributes:
        x, y: for training, (N, C, H, W) and class indices (N,).
        x_val, y_val: to score on.
        classes: how many.
    """

    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor
    classes: int


@dataclass(frozen=True)
class Budget:
    """How a candidate is trained and when it is rejected.

    Attributes:
        steps, batch_size, lr: SGD with Nesterov's momentum 0.9, the rate falling to 0 as half a cosine.
        weight_decay: of what is not 1-D.
        quality_steps: the training is looked at after so many updates; 0: it is not.
        quality: least accuracy by then.
        stability_steps: of ascent, see `stability`; 0: none.
        stability: largest norm of the gradient that is borne.
    """

    steps: int = 300
    batch_size: int = 64
    lr: float = 0.1
    weight_decay: float = 1e-4
    quality_steps: int = 100
    quality: float = 0.2
    stability_steps: int = 20
    stability: float = 1e8


def resnet(classes: int, in_chans: int, stride: int) -> nn.Module:
    """Three pre-activation bottlenecks: timm's ResNetV2, thin."""
    from timm import layers
    from timm.models.resnetv2 import ResNetV2

    timms: Any = layers
    model: nn.Module = ResNetV2(
        layers=[1, 1, 1], channels=(32, 64, 128), num_classes=classes, in_chans=in_chans, stem_chs=16,
        stem_type="fixed" if stride == 2 else "deep", conv_layer=timms.create_conv2d, norm_layer=timms.BatchNormAct2d,
    )  # fmt: skip
    return model


def mobilenet(classes: int, in_chans: int, stride: int) -> nn.Module:
    """Inverted bottlenecks: torchvision's MobileNetV2, thin."""
    from torchvision.models import MobileNetV2
    from torchvision.ops import Conv2dNormActivation

    settings = [[1, 8, 1, 1], [3, 12, 1, 2], [3, 16, 1, 1], [3, 24, 1, 2]]
    model: Any = MobileNetV2(classes, inverted_residual_setting=settings, round_nearest=4, dropout=0.0)
    model.features[0][0] = nn.Conv2d(in_chans, 32, 3, stride, 1, bias=False)
    model.features[-1] = Conv2dNormActivation(24, 96, kernel_size=1, activation_layer=nn.ReLU6)
    model.classifier[1] = nn.Linear(96, classes)
    found: nn.Module = model
    return found


def efficientnet(classes: int, in_chans: int, stride: int) -> nn.Module:
    """Inverted bottlenecks with squeeze and excitation: torchvision's EfficientNet, thin."""
    from torchvision.models import EfficientNet
    from torchvision.models.efficientnet import MBConvConfig

    rows = [(1, 3, 1, 16, 8), (3, 3, 2, 8, 12), (3, 5, 1, 12, 16), (3, 3, 2, 16, 24)]
    settings = [MBConvConfig(*row, 1, 1.0, 1.0) for row in rows]
    model: Any = EfficientNet(
        settings, dropout=0.0, stochastic_depth_prob=0.0, num_classes=classes, last_channel=96
    )
    model.features[0][0] = nn.Conv2d(in_chans, 16, 3, stride, 1, bias=False)
    found: nn.Module = model
    return found


# Hardest first: what fails there needs no more work.
ANCHORS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "mobilenet": mobilenet,
    "efficientnet": efficientnet,
    "resnet": resnet,
}


def build(anchor: str, task: Task, factory: NormActFactory | None, seed: int) -> nn.Module:
    """An anchor with fresh weights and a layer in place of BatchNorm and activation; None leaves those.

    Raises:
        ValueError: no such anchor.
    """
    if anchor not in ANCHORS:
        raise ValueError(f"no anchor {anchor!r}; there are: {', '.join(ANCHORS)}")
    torch.manual_seed(seed)
    stride = 1 if task.x.shape[-1] <= 16 else 2  # of the stem
    model = ANCHORS[anchor](task.classes, task.x.shape[1], stride)
    if factory is not None:
        replace_norm_act(model, factory, example=task.x[:2])
    return model


def train(model: nn.Module, task: Task, budget: Budget, seed: int) -> float:
    """Accuracy on the held-out images after training.

    Raises:
        Rejected: a loss that is not finite, or too little learnt by `Budget.quality_steps`.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": budget.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=budget.lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(1, budget.steps + 1):
        rows = torch.randint(len(task.x), (budget.batch_size,), generator=generator)
        loss = F.cross_entropy(model(task.x[rows]), task.y[rows])
        if not torch.isfinite(loss):
            raise Rejected(f"the loss is {float(loss.detach())} at update {step}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step == budget.quality_steps:
            reached = accuracy(model, task)
            if reached < budget.quality:
                raise Rejected(f"quality: {reached:.3f} after {step} updates", reached)
    return accuracy(model, task)


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    """Top-1 on the held-out images; the model is back in training mode afterwards."""
    model.eval()
    right = [
        model(x).argmax(1) == y for x, y in zip(task.x_val.split(256), task.y_val.split(256), strict=True)
    ]
    model.train()
    return float(torch.cat(right).double().mean())


def stability(model: nn.Module, task: Task, budget: Budget, seed: int) -> float:
    """The largest gradient norm that ascent on it finds; every step turns each kernel by a tenth of its length.

    The paper ascends on the weights for 100 steps and rejects what passes 1e8; how it scales the steps is not told, and
    is decided here.

    Raises:
        Rejected: the limit is passed, or the norm is not finite.
    """
    kernels = [p for p in model.parameters() if p.ndim > 1]
    rows = torch.randint(len(task.x), (16,), generator=torch.Generator().manual_seed(seed))
    x, y, largest = task.x[rows], task.y[rows], 0.0
    model.train()
    for step in range(budget.stability_steps + 1):
        ascends = step < budget.stability_steps
        loss = F.cross_entropy(model(x), y)
        gradients = torch.autograd.grad(loss, kernels, create_graph=ascends)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        value = float(norm.detach())
        largest = max(largest, value)
        if not value <= budget.stability:
            raise Rejected(f"stability: a gradient of {value:.2g} after {step} steps of ascent", value)
        if not ascends:
            break
        for p, up in zip(kernels, torch.autograd.grad(norm.clamp_min(1e-30).log(), kernels), strict=True):
            with torch.no_grad():
                p.add_(up * (0.1 * p.norm() / up.norm().clamp_min(1e-30)))
    return largest


def judge(
    genome: Genome | str, task: Task, budget: Budget, anchors: Sequence[str] = tuple(ANCHORS), seed: int = 0
) -> Any:
    """Scores of a genome on every anchor, in their order, or why it is rejected.

    Args:
        genome: or JSON, as `search` gives it.
        task, budget: the images, and how to train on them.
        anchors: by name, the hardest first.
        seed: of weights and batches.

    Returns:
        ``{"scores": [...]}`` or ``{"rejected": reason}``, which JSON can hold.

    Raises:
        ValueError: no anchor of that name.
    """
    genome = Genome.from_json(genome) if isinstance(genome, str) else genome
    factory = partial(EvolvedNormAct2d, genome)
    scores = []
    try:
        for anchor in anchors:
            if budget.stability_steps:
                try:
                    stability(build(anchor, task, factory, seed), task, budget, seed)
                except Rejected as error:
                    raise Rejected(f"{anchor}, {error}") from None
        for anchor in anchors:
            try:
                scores.append(train(build(anchor, task, factory, seed), task, budget, seed))
            except Rejected as error:
                raise Rejected(f"{anchor}, {error}") from None
    except Rejected as error:
        return {"rejected": str(error)}
    return {"scores": scores}


@lru_cache(maxsize=1)
def _task(path: str, classes: int) -> Task:
    x, y, x_val, y_val = torch.load(path)
    return Task(x, y, x_val, y_val, classes)


def judge_file(
    path: str, classes: int, budget: Budget, anchors: Sequence[str], jobs: int, genome: str, seed: int = 0
) -> Any:
    """`judge` for processes: the task is read from a file, once in each; threads are divided among `jobs`.

    Args:
        path: of a `torch.save` of (x, y, x_val, y_val), see `Task`.
        classes, budget, anchors, seed: see `judge`.
        jobs: processes at a time.
        genome: as JSON.
    """
    torch.set_num_threads(max(1, _THREADS // jobs))
    return judge(genome, _task(path, classes), budget, anchors, seed)
