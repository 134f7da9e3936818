"""ScaleKD: distil a vision transformer into any network that has two feature maps (Fan et al., NeurIPS 2024).

    accelerate launch recipes/scalekd.py --backbone resnet50 --teacher swin_l --teacher-weights pretrained --data PATH
    accelerate launch recipes/scalekd.py --backbone resnet18 --teacher vit_tiny_patch16_224 \\
        --teacher-weights runs/train-.../backbone.safetensors --data PATH

The teacher's weights come from the model hub, or from a file of recipes/train.py. Its own accuracy is printed first: a
teacher that is not better than its student has little to teach. Everything else is as in recipes/train.py.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from leaven.backbones import WeightsMismatch, create, data_config, load, metadata, resolve
from leaven.pretext import NoTail, ScaleKD, count_correct
from leaven.recipes.common.batches import Images, find_data, rebuild, user_errors
from leaven.recipes.common.dry_run import dry_run
from leaven.recipes.common.flags import UserError, flag, run_main
from leaven.recipes.common.start import read_settings
from leaven.recipes.train import Method, TrainSettings, train


@dataclass
class ScaleKDSettings(TrainSettings):
    """ScaleKD: supervised training beside a frozen transformer. Defaults suit small data; see --preset."""

    teacher: str = flag("swin_l", "timm's Swin, ViT, DeiT, BEiT, EVA, DINO or ConvNeXt")
    teacher_weights: str | None = flag(None, "FILE of recipes/train.py, or pretrained")
    tau: float = flag(5.0, "sharpness of the projectors' attention")
    alpha_spatial: float = flag(0.08, "weight of the features")
    alpha_freq: float = flag(0.06, "weight of the features without their mean over space")
    kd_weight: float = flag(0.5, "weight of the teacher's logits, in [0, 1]; the labels have the rest")
    kd_temperature: float = flag(1.0, "of both sides' logits")
    reduction: Literal["sum", "per_49"] = flag(
        "sum", "per_49: weights as for the 7x7 maps that they are made for"
    )
    checkpoint_tail: bool = flag(False, "compute the teacher's last stage twice to save memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bce_loss:
            raise UserError("--bce-loss is not of ScaleKD, whose labels' loss is softmax cross-entropy")
        if not 0 <= self.kd_weight <= 1 or not self.kd_temperature > 0:
            raise UserError("--kd-weight must be between 0 and 1, --kd-temperature greater than 0")


# The settings of the authors' code (deep-optimization/ScaleKD).
_ADVANCED: dict[str, Any] = {
    "image_size": (224, 224), "epochs": 300, "crop_scale": (0.08, 1.0), "aa": "randaugment", "reprob": 0.25,
    "clip_grad": 5.0,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "resnet50-traditional": {
        "backbone": "resnet50", "image_size": (224, 224), "epochs": 100, "opt": "sgd", "lr": 0.1, "weight_decay": 1e-4,
        "global_batch_size": 256, "crop_scale": (0.08, 1.0), "warmup_epochs": 0.0,
    },
    "resnet50-advanced": _ADVANCED
    | {"backbone": "resnet50", "opt": "lamb", "lr": 5e-3, "weight_decay": 0.02, "global_batch_size": 2048}
    | {"warmup_epochs": 5.0},
    "convnext_t-advanced": _ADVANCED
    | {"backbone": "convnext_t", "opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "global_batch_size": 1024}
    | {"warmup_epochs": 20.0},
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Read the flags and train."""
    settings = read_settings(ScaleKDSettings, argv, PRESETS, recipe="scalekd")
    distil = partial(train, method=METHOD)
    if settings.dry_run:
        return dry_run(
            distil, replace(settings, labels=None, labels_seed=0), classes=classes_of_teacher(settings)
        )
    if settings.teacher_weights is None:
        raise UserError(
            "--teacher-weights: give FILE or pretrained; a teacher that has learnt nothing teaches nothing"
        )
    distil(settings, find_data(settings))


def distilled(
    settings: ScaleKDSettings, student: nn.Module, images: Images, device: torch.device
) -> tuple[ScaleKD, list[str]]:
    """The objective, with the teacher's own accuracy."""
    teacher, (mean, std) = load_teacher(settings, images)
    names = ("tau", "alpha_spatial", "alpha_freq", "kd_weight", "kd_temperature", "reduction", "smoothing")
    try:
        objective = ScaleKD(
            student,
            teacher,
            **{name: getattr(settings, name) for name in names},
            checkpoint_tail=settings.checkpoint_tail,
            image_size=images.size,
            student_statistics=(tuple(images.mean), tuple(images.std)),
            teacher_statistics=(tuple(mean), tuple(std)),
        ).to(device)
    except NoTail as error:  # what else it names can be given in Python alone
        raise UserError(f"--teacher {settings.teacher}: {str(error).partition(', or give')[0]}") from error
    try:
        objective.check_image_size(*images.size)
    except ValueError as error:
        size = "x".join(map(str, images.size))
        raise UserError(f"--image-size {size} does not suit --teacher {settings.teacher}: {error}") from error
    lines = [f"teacher: {resolve(settings.teacher)}, {settings.teacher_weights}, frozen"]
    if images.data.classes and getattr(teacher, "num_classes", 0) == len(images.data.classes):
        held_out = images.whole(images.data.val, 2000, crop_pct=settings.crop_pct)
        converted = ((objective.for_teacher(x.to(device)), y) for x, y in held_out)
        top1, _, n = count_correct(teacher, converted).tolist()
        lines.append(f"the teacher's own accuracy on {n} held-out images: {top1 / n:.2%}")
    return objective, lines


def load_teacher(settings: ScaleKDSettings, images: Images) -> tuple[nn.Module, tuple[Any, Any]]:
    """The teacher, and what its images are normalised with.

    Raises:
        UserError: its weights cannot be had.
    """
    weights, classes = settings.teacher_weights, len(images.data.classes)
    pretrained = weights == "pretrained"
    how: dict[str, Any] = {"in_chans": settings.in_chans} | ({} if pretrained else {"num_classes": classes})
    try:
        with user_errors(ValueError):
            teacher = create(settings.teacher, pretrained=pretrained, image_size=images.size, **how)
    except (OSError, RuntimeError) as error:
        line = str(error).split("\n")[0]
        raise UserError(
            f"--teacher-weights pretrained: none for {settings.teacher} could be had ({line})"
        ) from error
    config = data_config(teacher)
    moments = config["mean"], config["std"]
    if len(config["mean"]) != settings.in_chans:
        moments = tuple(images.mean), tuple(images.std)
    if weights is not None and not pretrained:
        with user_errors(FileNotFoundError, WeightsMismatch):
            rebuild(teacher, weights)
            load(teacher, weights)
            notes = metadata(weights)
        if "mean" in notes:
            moments = json.loads(notes["mean"]), json.loads(notes["std"])
    return teacher, moments


def classes_of_teacher(settings: ScaleKDSettings, otherwise: int = 10) -> int:
    """How many classes the file of ``--teacher-weights`` is for, where there is one and it says so."""
    if settings.teacher_weights in (None, "pretrained"):
        return otherwise
    with user_errors(FileNotFoundError, WeightsMismatch):
        return int(metadata(str(settings.teacher_weights)).get("num_classes", otherwise))


METHOD = Method("scalekd", "ScaleKD", "Fan et al., ScaleKD, NeurIPS 2024", distilled)


if __name__ == "__main__":
    run_main(main)
