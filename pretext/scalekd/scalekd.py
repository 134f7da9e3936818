"""ScaleKD: distil a vision transformer into any network, as an objective."""

import os
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leaven.backbones import Stage, create, data_config, save
from leaven.backbones.probe import UNSUITABLE, ImageSize, candidate_images, first_that_runs
from leaven.pretext.output import Output
from leaven.pretext.scalekd.projector import CrossAttentionProjector
from leaven.pretext.scalekd.tail import Targets, TeacherTail
from leaven.pretext.scalekd.taps import find_taps, tapped, two_stages
from leaven.pretext.scalekd.views import Reduction, frequency_view_loss, spatial_view_loss
from leaven.pretext.supervised import logits_of, targets_of

# torch's cross-entropy leaves these labels out, and so does its mean.
_NO_LABEL = -100
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


class ScaleKD(nn.Module):
    """Distillation of a transformer into a student of any kind, by features and logits.

    The student's last two maps are turned into tokens by cross attention projectors, two for each: one for the
    features as they are, one for them without their mean over space. The tokens of the first map go through the frozen
    last stage of the teacher, and what comes out are the queries for those of the second. All are compared with the
    teacher's last, normed map. Only student and projectors have parameters here; the teacher is outside.

    Source: Fan et al., ScaleKD, NeurIPS 2024 (arXiv 2411.06786). As there, but for this: of a plain vision transformer
    the last quarter of its blocks is the last stage, with the teacher's own class and register tokens in front.

    Args:
        student: gives logits (B, N): a module, or a name for `create`, then with the teacher's classes.
        teacher: a trained network of timm's in the teacher's families, see `TeacherTail.of`; any other with `tail`.
        stages: "auto" or the two maps of the student, see `leaven.backbones.stages`.
        heads: of the attention, at either map; they must divide the teacher's widths there. None: 64 channels each.
        tau: sharpness of the attention.
        alpha_spatial, alpha_freq: weights of the two views, at both maps; (at the first, at the second) if they differ.
        kd_weight: of the teacher's logits, in [0, 1]; the labels have the rest. 0: features alone.
        kd_temperature: of both sides' logits.
        tail: the teacher's last part where it is not known.
        reduction: see `spatial_view_loss`.
        smoothing: label smoothing of class indices.
        image_size: of the training images, where the student insists on one; the projectors are made for its grids.
        student_statistics, teacher_statistics: (mean, std) that images are normalised with for either; by default what
            each was made for. Images come in the student's and are converted for the teacher.
        teacher_size: (H, W) that images are resized to for a teacher of one size.
        detach_query: keep the second map's losses from reaching the first.
        checkpoint_tail: compute the teacher's last stage again in the backward pass instead of keeping its activations.

    Attributes:
        backbone: the student.

    Raises:
        NoTail: the teacher's last stage is not known, or does not run by itself.
        NoStages: the student gives fewer than two maps.
        TypeError: a teacher that is no module, such as a name.
        ValueError: heads that do not divide a width, weights out of range, other classes than the teacher's.
    """

    def __init__(
        self,
        student: nn.Module | str,
        teacher: nn.Module,
        stages: Literal["auto"] | tuple[Stage, Stage] = "auto",
        heads: int | tuple[int, int] | None = None,
        tau: float = 5.0,
        alpha_spatial: float | tuple[float, float] = 0.08,
        alpha_freq: float | tuple[float, float] = 0.06,
        kd_weight: float = 0.5,
        kd_temperature: float = 1.0,
        tail: TeacherTail | None = None,
        reduction: Reduction = "sum",
        *,
        smoothing: float = 0.0,
        image_size: ImageSize = None,
        student_statistics: Statistics | None = None,
        teacher_statistics: Statistics | None = None,
        teacher_size: tuple[int, int] | None = None,
        detach_query: bool = False,
        checkpoint_tail: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= kd_weight <= 1:
            raise ValueError(f"kd_weight must be between 0 and 1, got {kd_weight}")
        if not kd_temperature > 0:
            raise ValueError(f"kd_temperature must be greater than 0, got {kd_temperature}")
        if not isinstance(teacher, nn.Module):
            raise TypeError(
                "the teacher must be a module with its trained weights loaded, as from timm.create_model(name, "
                f"pretrained=True), not {teacher!r}"
            )
        self.tail = tail or TeacherTail.of(teacher)
        classes = getattr(teacher, "num_classes", None)
        if isinstance(student, str):
            student = create(student, num_classes=classes or 0)
        own = getattr(student, "num_classes", classes)
        if kd_weight and classes is not None and own != classes:
            raise ValueError(
                f"the student has {own} classes and the teacher {classes}: give the student as many, or kd_weight=0"
            )
        self.backbone = student
        self.alphas = tuple(zip(_pair(alpha_spatial), _pair(alpha_freq), strict=True))
        self.kd_weight, self.kd_temperature, self.reduction = kd_weight, kd_temperature, reduction
        self.smoothing, self.detach_query, self.checkpoint_tail = smoothing, detach_query, checkpoint_tail
        self.teacher_size = teacher_size
        mine, theirs = (
            given or _statistics(model)
            for given, model in ((student_statistics, student), (teacher_statistics, teacher))
        )
        self._convert = None if mine == theirs else (mine, theirs)

        self.taps = find_taps(
            student, two_stages(student, image_size) if stages == "auto" else stages, image_size
        )
        probe = self._probe(teacher_size)
        entry, exit_ = probe.as_map(self.tail), probe.map
        norm: Literal["batch", "layer"] = "batch" if _has_batch_norm(student) else "layer"
        widths = entry.shape[1], exit_.shape[1]
        if heads is None:
            heads = _heads(widths[0]), _heads(widths[1])
        third, fourth = self.taps
        (h3, h4), grid = _pair(heads), (int(entry.shape[2]), int(entry.shape[3]))

        def projector(
            channels: int, width: int, heads: int, keys: Any, queries: Any
        ) -> CrossAttentionProjector:
            return CrossAttentionProjector(channels, width, heads, keys, queries, tau, norm)

        self.spatial3 = projector(third.channels, widths[0], h3, third.grid, grid)
        self.frequency3 = projector(third.channels, widths[0], h3, third.grid, grid)
        self.spatial4 = projector(fourth.channels, widths[1], h4, fourth.grid, None)
        self.frequency4 = projector(fourth.channels, widths[1], h4, fourth.grid, None)

    def forward(
        self, images: Tensor, targets: Tensor | None = None, teacher: Targets | None = None
    ) -> Output:
        """The loss of a batch.

        Args:
            images: (B, C, H, W), normalised for the student.
            targets: class indices (B,), or soft labels (B, N). An image with index -100 has no label: it distils, and
                has no part in ce and top1, which are 0 where no image has one. Where all weight is on the teacher's
                logits, kd_weight=1, there need be no targets.
            teacher: of `CachedTargets`, in place of a pass of the teacher.

        Returns:
            The loss, and as logs its parts, weighted: ce, kd, spatial3, frequency3, spatial4, frequency4; and top1.

        Raises:
            ValueError: the student gives no logits, or the teacher's are not of its classes; no targets where the
                labels have weight, or targets that do not fit the logits.
        """
        logits, (third, fourth) = tapped(self.backbone, self.taps, images)
        if teacher is None:
            teacher = self.tail.targets(self.for_teacher(images))
        logits = logits_of(self.backbone, logits)
        parts = self._of_logits(logits, teacher.logits, targets)
        parts |= self._of_features(third, fourth, teacher)
        logs = {name: part.detach() for name, part in parts.items()}
        if targets is not None and targets.ndim == 1:
            logs["top1"] = (logits.detach().argmax(1) == targets).sum() / _labelled(targets)
        return Output(torch.stack(list(parts.values())).sum(), logs)

    def check_image_size(self, height: int, width: int) -> None:
        """Whether the teacher takes images of this size.

        Raises:
            ValueError: it does not.
        """
        if self.teacher_size is None:
            try:
                self._probe((height, width))
            except UNSUITABLE as error:
                raise ValueError(f"the teacher does not: {' '.join(str(error).split())[:100]}") from error

    def export(self, path: str | os.PathLike[str], *, name: str | None = None, **metadata: Any) -> None:
        """Write the student's weights alone, classifier included; see `leaven.backbones.save`."""
        save(self.backbone, path, name=name, metadata=metadata)

    def no_weight_decay(self) -> set[str]:
        """The names that timm's networks want without weight decay, and the projectors' learned maps."""
        own: Any = getattr(self.backbone, "no_weight_decay", tuple)
        tables = {name for name, _ in self.named_parameters() if name.endswith((".queries", ".key_position"))}
        return {f"backbone.{name}" for name in own()} | tables

    def _of_logits(self, logits: Tensor, teachers: Any, targets: Tensor | None) -> dict[str, Tensor]:
        parts = {}
        if targets is not None:
            targets = targets_of(logits, targets, _NO_LABEL)
            if targets.ndim == 1:  # a mean would be 0 / 0 where no image has a label
                how: dict[str, Any] = {"label_smoothing": self.smoothing, "ignore_index": _NO_LABEL}
                ce = F.cross_entropy(logits, targets, reduction="sum", **how) / _labelled(targets)
            else:
                ce = F.cross_entropy(logits, targets)
            parts["ce"] = (1 - self.kd_weight) * ce
        elif self.kd_weight != 1:
            raise ValueError(
                f"targets are needed at kd_weight={self.kd_weight:g}; without labels give kd_weight=1"
            )
        if self.kd_weight:
            if not isinstance(teachers, Tensor) or teachers.shape != logits.shape:
                raise ValueError(
                    f"the teacher gives {tuple(getattr(teachers, 'shape', ()))} and the student {tuple(logits.shape)}: "
                    "logits of the same classes are needed, or kd_weight=0"
                )
            soft = (teachers.to(logits.dtype) / self.kd_temperature).softmax(1)
            kd = F.cross_entropy(logits / self.kd_temperature, soft)
            parts["kd"] = self.kd_weight * self.kd_temperature**2 * kd
        return parts

    def _of_features(self, third: Tensor, fourth: Tensor, teacher: Targets) -> dict[str, Tensor]:
        # The tail has no layer that mixes images, so both views go through it at once.
        tokens = torch.cat([cap(third, grid=teacher.grid) for cap in (self.spatial3, self.frequency3)])
        if self.checkpoint_tail:
            seen = checkpoint(self.tail, tokens, teacher, use_reentrant=False)
        else:
            seen = self.tail(tokens, teacher)
        queries = (seen.detach() if self.detach_query else seen).chunk(2)
        views = (spatial_view_loss, frequency_view_loss)
        caps = (self.spatial4, self.frequency4)
        parts = {}
        for view, loss in enumerate(views):
            name, last = ("spatial", "frequency")[view], caps[view](fourth, queries[view])
            for stage, tokens_of, alphas in (
                ("3", seen.chunk(2)[view], self.alphas[0]),
                ("4", last, self.alphas[1]),
            ):
                parts[name + stage] = alphas[view] * loss(tokens_of, teacher.map, self.reduction)
        return parts

    def for_teacher(self, images: Tensor) -> Tensor:
        """The student's images as the teacher has them: its mean and standard deviation, its size."""
        if self._convert is not None:
            (mean, std), (other_mean, other_std) = (
                (
                    torch.tensor(each, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
                    for each in pair
                )
                for pair in self._convert
            )
            images = (images * std + mean - other_mean) / other_std
        if self.teacher_size is not None and images.shape[-2:] != self.teacher_size:
            images = F.interpolate(images, self.teacher_size, mode="bicubic", antialias=True)
        return images

    def _probe(self, size: ImageSize) -> Targets:
        """What the teacher makes of an image of this size, or of its own."""
        found: Targets
        _, found = first_that_runs(self.tail.targets, candidate_images(self.tail.teacher, size))
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> "ScaleKD":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tail.teacher._apply(fn)  # it goes where the student goes
        return self


def _pair(value: Any) -> tuple[Any, Any]:
    return (value[0], value[1]) if isinstance(value, tuple) else (value, value)


def _labelled(targets: Tensor) -> Tensor:
    """How many images have a label, at least 1."""
    return (targets != _NO_LABEL).sum().clamp_min(1)


def _heads(width: int) -> int:
    """The most that divide the width, of 64 channels or more."""
    return max(heads for heads in range(1, max(1, width // 64) + 1) if width % heads == 0)


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _statistics(model: nn.Module) -> Statistics:
    config = data_config(model)
    return tuple(config["mean"]), tuple(config["std"])
