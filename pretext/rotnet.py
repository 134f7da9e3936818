"""RotNet: predict by which quarter turn an image was rotated (Gidaris, Singh, Komodakis, ICLR 2018, 1803.07728)."""

import copy
import os
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaven.backbones import create, resolve, save
from leaven.backbones.probe import ImageSize
from leaven.pretext.features import eval_mode, last_map, pooled_features, try_features
from leaven.pretext.output import Output


def rotate4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every image in all four quarter turns: copy ``4 * i + y`` is image i, counter-clockwise by 90 * y degrees.

    Exact: pixels are moved and never interpolated. The copies of an image stay together, so that splitting a batch
    by images (micro-batches, ranks) never splits it by labels, which batch norm would give away. Augment before,
    once per image: what comes after the rotation can undo the labels, see `check_order`.
    Source: section 2.1 of the paper; order and direction as in its code.

    Args:
        x: (B, C, S, S), any dtype; the memory format is kept.

    Returns:
        The copies (4B, C, S, S), and their labels (4B,): 0, 1, 2, 3, 0, 1, ...

    Raises:
        ValueError: the images are not square.
    """
    pixels, plane, channels_last = _pixels(x)
    copies = torch.stack([torch.rot90(pixels, y, plane) for y in range(4)], dim=1).flatten(0, 1)
    labels = torch.arange(4, device=x.device).repeat(len(x))
    return copies.permute(0, 3, 1, 2) if channels_last else copies, labels


def rotate_random(x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Every image in one quarter turn, drawn at random: a quarter of the work of `rotate4` per image and epoch.

    The paper's author finds it not significantly worse, given more epochs.

    Args:
        x: (B, C, S, S), any dtype; the memory format is kept.
        generator: of the CPU, so that the draw is the same on every device; None takes the global one.

    Returns:
        The images (B, C, S, S), each turned counter-clockwise by 90 degrees times its label, and the labels (B,).

    Raises:
        ValueError: the images are not square.
    """
    pixels, plane, channels_last = _pixels(x)
    labels = torch.randint(4, (len(x),), generator=generator).to(x.device)
    each = labels.view(-1, 1, 1, 1)
    # Half turns and quarter turns by selection: shapes never depend on the draw, which compilers need.
    turned = torch.where(each % 2 == 1, torch.rot90(pixels, 1, plane), pixels)
    turned = torch.where(each >= 2, torch.rot90(turned, 2, plane), turned).contiguous()
    return turned.permute(0, 3, 1, 2) if channels_last else turned, labels


class RotNet(nn.Module):
    """Which of four quarter turns was it? A linear classifier on the pooled features of any backbone.

    The features are those of `leaven.pretext.extract_features`: what the backbone's own classifier reads, so that a
    backbone with a classifier serves as well. Images come augmented, and are rotated here, last; whether that gives the
    rotation away, `leaven.pretext.cue_audit` can tell.

    Source: Gidaris et al., Unsupervised Representation Learning by Predicting Image Rotations, ICLR 2018 (arXiv
    1803.07728).

    Args:
        backbone: a name for `leaven.backbones.create`, or your own module.
        mode: "all" turns every image in all four ways, so that each step costs four passes per image; "random" in
            one way.
        head: gives logits (B, 4) for features (B, D); by default a linear layer.
        image_size: side of the images, where the backbone insists on one.

    Attributes:
        rotation_direction: "ccw": label 1 is a quarter turn counter-clockwise; see `clockwise_head`.

    Raises:
        ValueError: an unknown mode, or a backbone that gives no features.
    """

    rotation_direction = "ccw"

    def __init__(
        self,
        backbone: nn.Module | str,
        *,
        mode: Literal["all", "random"] = "all",
        head: nn.Module | None = None,
        image_size: ImageSize = None,
    ) -> None:
        super().__init__()
        if mode not in ("all", "random"):
            raise ValueError(f"unknown mode {mode!r}: all or random")
        self.name = resolve(backbone) if isinstance(backbone, str) else None
        self.backbone = create(backbone, image_size=image_size)
        self.mode = mode
        self.maps = last_map(self.backbone, image_size)
        example, unused = try_features(self.backbone, self.maps, image_size)
        if head is None:
            head = nn.Linear(example.shape[1], 4, device=example.device, dtype=example.dtype)
        self.head = head
        # DistributedDataParallel reads this: a classifier that the backbone came with gets no gradient here.
        self._ddp_params_and_buffers_to_ignore = [f"backbone.{name}" for name in unused]

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Output:
        """The mean cross-entropy over all rotated copies.

        Args:
            images: (B, C, S, S), normalised, not yet rotated.
            generator: of the CPU, for mode "random"; mode "all" draws nothing.

        Returns:
            The loss. Logs: `rotation_accuracy`, the share of copies recognised; 0.25 is chance.
        """
        copies, labels = rotate4(images) if self.mode == "all" else rotate_random(images, generator)
        logits = self.logits(copies)
        # A network in half precision, with or without autocast, would give the loss to two digits.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        right = (logits.detach().argmax(1) == labels).float().mean()
        return Output(F.cross_entropy(logits, labels), {"rotation_accuracy": right})

    def logits(self, images: Tensor) -> Tensor:
        """(B, 4) for images (B, C, S, S) as they are."""
        logits: Tensor = self.head(pooled_features(self.backbone, images, self.maps))
        return logits

    def no_weight_decay(self) -> set[str]:
        """The names that timm's networks want without weight decay."""
        own: Any = getattr(self.backbone, "no_weight_decay", tuple)
        return {f"backbone.{name}" for name in own()}

    def export(self, path: str | os.PathLike[str], *, name: str | None = None, **metadata: Any) -> None:
        """Write the backbone's weights, with a note on the direction; see `leaven.backbones.save`."""
        notes = {"method": "RotNet", "rotation_direction": self.rotation_direction, **metadata}
        save(self.backbone, path, name=name or self.name, metadata=notes)


class Auxiliary(nn.Module):
    """Rotation prediction beside another objective on the same backbone: the sum of both losses.

    Source: Hendrycks et al., Using Self-Supervised Learning Can Improve Model Robustness and Uncertainty, NeurIPS
    2019, where it stands beside supervised classification with weight 0.5, and leaves the clean accuracy as it is.
    Two objectives on one module differ in where they read it: `Supervised` after the classifier, RotNet the pooled
    features before it. The trunk runs twice per step, on the images and on their copies: in training mode, batch norm
    takes the statistics of both.

    Args:
        objective: called on the images and whatever else the step has, such as `Supervised`.
        auxiliary: built on ``objective.backbone``.
        weight: of the rotation loss.

    Attributes:
        objective: as given; owns the backbone, which is in the state dict once.
        head: of the RotNet.

    Raises:
        ValueError: the RotNet has another backbone, or the weight is negative.
    """

    def __init__(self, objective: nn.Module, auxiliary: RotNet, weight: float = 0.5) -> None:
        super().__init__()
        if auxiliary.backbone is not getattr(objective, "backbone", None):
            raise ValueError("the objectives have different backbones; build RotNet(objective.backbone)")
        if not weight >= 0:
            raise ValueError(f"the weight of the rotation loss must not be negative, not {weight}")
        self.objective, self.head, self.weight = objective, auxiliary.head, weight
        self._rotnet = (auxiliary,)  # a tuple, or its backbone would be registered, and saved, a second time
        ignored: Any = getattr(objective, "_ddp_params_and_buffers_to_ignore", ())
        both = set(ignored) & set(auxiliary._ddp_params_and_buffers_to_ignore)
        self._ddp_params_and_buffers_to_ignore = [f"objective.{name}" for name in sorted(both)]

    @property
    def backbone(self) -> nn.Module:
        """The one that both train."""
        return self.rotnet.backbone

    @property
    def rotnet(self) -> RotNet:
        """For `rotation_ood_score`."""
        return self._rotnet[0]

    def forward(self, images: Tensor, *targets: Any, generator: torch.Generator | None = None) -> Output:
        """The objective's loss plus the weighted rotation loss.

        Args:
            images: (B, C, S, S), normalised.
            targets: for the objective.
            generator: see `RotNet`.

        Returns:
            The sum. Logs: the objective's own, `rotation_accuracy`, and `rotation_loss` without its weight.
        """
        main: Output = self.objective(images, *targets)
        rotation: Output = self.rotnet(images, generator)
        logs = {**main.logs, **rotation.logs, "rotation_loss": rotation.loss.detach()}
        return Output(main.loss + self.weight * rotation.loss, logs)

    def check_image_size(self, height: int, width: int) -> None:
        """Whether the objective takes images of this size; curricula ask when they are attached.

        Raises:
            ValueError: it does not.
        """
        check: Any = getattr(self.objective, "check_image_size", None)
        if check is not None:
            check(height, width)

    def no_weight_decay(self) -> set[str]:
        """The objective's own."""
        own: Any = getattr(self.objective, "no_weight_decay", tuple)
        return {f"objective.{name}" for name in own()}

    def export(self, path: str | os.PathLike[str], **metadata: Any) -> None:
        """Write the backbone's weights as the objective does."""
        objective: Any = self.objective
        objective.export(path, **metadata)


def rotation_ood_score(rotnet: RotNet, images: Tensor) -> Tensor:
    """How far from the training images? The higher, the more out of distribution.

    Minus the sum, over the four quarter turns, of the log-probability of the right answer: 0 for an image whose turns
    are all recognised for certain, 4 log 4 where the network cannot tell at all.
    Source: Hendrycks et al., NeurIPS 2019, section 4 (who add the classifier's own score to it).

    Args:
        rotnet: trained; run in eval mode, its modes come back. Of an `Auxiliary`, its ``.rotnet``.
        images: (B, C, S, S), normalised.

    Returns:
        (B,), without gradient.

    Raises:
        TypeError: no RotNet.
        ValueError: the images are not square.
    """
    if not isinstance(rotnet, RotNet):
        raise TypeError(
            f"rotation_ood_score needs a RotNet (of an Auxiliary, its .rotnet), not {type(rotnet).__name__}"
        )
    copies, labels = rotate4(images)
    with torch.no_grad(), eval_mode(rotnet):
        logits = rotnet.logits(copies)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = F.cross_entropy(logits, labels, reduction="none")
    return each.view(-1, 4).sum(1)


def clockwise_head(head: nn.Linear) -> nn.Linear:
    """A copy of a rotation head with classes 0, 3, 2, 1: for weights of a framework that counts clockwise.

    Quarter turns one way and the other change places, so the same permutation serves in both directions.
    """
    turned = copy.deepcopy(head)
    with torch.no_grad():
        for parameter in turned.parameters():
            parameter.copy_(parameter[[0, 3, 2, 1]])
    return turned


def _pixels(x: Tensor) -> tuple[Tensor, tuple[int, int], bool]:
    """The images as they lie in memory, their image plane, and whether that puts the channels last."""
    if x.ndim != 4 or x.shape[2] != x.shape[3]:
        raise ValueError(
            f"quarter turns need square images (B, C, S, S), not {tuple(x.shape)}; crop or resize them first"
        )
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x, (2, 3), False
    return x.permute(0, 2, 3, 1), (1, 2), True
