"""Supervised classification as an objective, and its evaluation."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from leaven.backbones import save
from leaven.pretext.features import device_of, eval_mode
from leaven.pretext.output import Output


class Supervised(nn.Module):
    """Cross-entropy of a network with its own classifier, by timm's losses.

    Args:
        model: gives logits (B, N), as `leaven.backbones.create(name, num_classes=N)` builds it.
        smoothing: label smoothing of class indices, in [0, 1). Soft labels are taken as they are: timm's Mixup
            smooths them itself.
        bce: one binary cross-entropy per class in place of softmax (Wightman et al., ResNet strikes back, 2021).

    Attributes:
        backbone: the model, classifier included.

    Raises:
        ValueError: a smoothing out of range.
    """

    def __init__(self, model: nn.Module, smoothing: float = 0.0, bce: bool = False) -> None:
        import timm.loss

        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, not {smoothing}")
        self.backbone = model
        losses: Any = timm.loss
        self.of_indices, self.of_soft = (
            losses.LabelSmoothingCrossEntropy(smoothing),
            losses.SoftTargetCrossEntropy(),
        )
        if bce:
            self.of_indices, self.of_soft = (
                losses.BinaryCrossEntropy(smoothing),
                losses.BinaryCrossEntropy(0.0),
            )

    def forward(self, images: Tensor, targets: Tensor) -> Output:
        """The loss, and in training terms its accuracy.

        Args:
            images: (B, C, H, W), normalised.
            targets: class indices (B,), or soft labels (B, N).

        Returns:
            The mean loss. Logs, where the targets are indices: `top1` and, of more than five classes, `top5`, shares.

        Raises:
            ValueError: the model gives no logits (B, N), or the targets do not fit them.
        """
        logits = logits_of(self.backbone, self.backbone(images))
        targets = targets_of(logits, targets)
        if targets.ndim == 2:
            return Output(self.of_soft(logits, targets), {})
        right = _right(logits.detach(), targets).float()
        logs = {"top1": right[:, 0].mean()}
        if logits.shape[1] > 5:
            logs["top5"] = right.sum(1).mean()
        return Output(self.of_indices(logits, targets), logs)

    def no_weight_decay(self) -> set[str]:
        """The names that timm's networks want without weight decay."""
        own: Any = getattr(self.backbone, "no_weight_decay", tuple)
        return {f"backbone.{name}" for name in own()}

    def export(self, path: str | os.PathLike[str], *, name: str | None = None, **metadata: Any) -> None:
        """Write the model's weights, classifier included; see `leaven.backbones.save`."""
        save(self.backbone, path, name=name, metadata=metadata)


def logits_of(model: nn.Module, output: Any) -> Tensor:
    """What a model returned, as logits (B, N) in float32 at least: bfloat16 would give a loss to two digits.

    Raises:
        ValueError: it is something else, such as the tuple of a network with auxiliary classifiers.
    """
    if isinstance(output, tuple):
        raise ValueError(
            f"{type(model).__name__} must return logits (B, N), not {type(output).__name__}: build it without further "
            "outputs, as with torchvision's aux_logits=False"
        )
    if not isinstance(output, Tensor) or output.ndim != 2:
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{type(model).__name__} must return logits (B, N), not {what}")
    return output.to(torch.promote_types(output.dtype, torch.float32))


def targets_of(logits: Tensor, targets: Tensor, ignored: int | None = None) -> Tensor:
    """Targets that fit logits (B, N): soft labels (B, N) in their type, or class indices (B,) as int64.

    That indices are classes is checked on the CPU alone. Elsewhere reading them would wait for the device, whose own
    kernels assert it.

    Args:
        logits: (B, N).
        targets: (B, N) or (B,).
        ignored: an index that stands for no label, where the loss knows one.

    Raises:
        ValueError: other shapes, indices of a floating type, or that are no classes.
    """
    if targets.ndim == 2:
        if targets.shape != logits.shape:
            raise ValueError(f"soft labels {tuple(targets.shape)} for logits {tuple(logits.shape)}")
        return targets.to(logits.dtype)
    if targets.shape != logits.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"class indices ({len(logits)},) of an integer type or soft labels {tuple(logits.shape)} are needed, not "
            f"{tuple(targets.shape)} of {targets.dtype}"
        )
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (targets < 0) | (targets >= logits.shape[1])
        if ignored is not None:
            wrong &= targets != ignored
        if wrong.any():
            without = "" if ignored is None else f", or {ignored} for images without a label"
            raise ValueError(
                f"class indices must be from 0 to {logits.shape[1] - 1}{without}, not {int(targets[wrong][0])}"
            )
    return targets.long()


def count_correct(model: nn.Module, batches: Iterable[Any]) -> Tensor:
    """How often a classifier is right, in eval mode and without a trace: modes and random state come back.

    Args:
        model: gives logits (B, N).
        batches: of (images, class indices, ...), on any device.

    Returns:
        (3,) int64 on the model's device: right at the first guess, right within five guesses, images; to be summed
        over processes.
    """
    device = device_of(model)
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), eval_mode(model):
        for images, labels, *_ in batches:
            right = _right(model(images.to(device)), labels.to(device))
            counts += torch.stack([right[:, 0].sum(), right.sum(), torch.tensor(len(right), device=device)])
    return counts


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """Boolean (B, 5), or fewer where there are fewer classes: which of the first guesses, in order, is right."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
