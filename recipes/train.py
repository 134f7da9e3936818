"""Supervised training, from scratch or fine-tuning, of any backbone with its library's own classifier.

    accelerate launch recipes/train.py --backbone resnet18
    accelerate launch recipes/train.py --backbone convnext_s --init runs/spark/backbone.safetensors \\
        --data PATH/OF/IMAGES --preset convnext_s-spark-finetune --labels 10%

Without --data it trains on scikit-learn's digits: a smoke test that takes minutes on a laptop, and no evidence.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from leaven.backbones import layer_groups, resolve
from leaven.backbones.probe import UNSUITABLE, reason_of, untouched
from leaven.callbacks import AttachError, EvoNorm, TrAct, attach
from leaven.pretext import Output, Supervised
from leaven.recipes.common.batches import Images, build_backbone, find_data, user_errors
from leaven.recipes.common.card import write_card
from leaven.recipes.common.curriculum import CurriculumSettings, follow
from leaven.recipes.common.data import Data, KeyedLoader
from leaven.recipes.common.dry_run import dry_run
from leaven.recipes.common.few_labels import keep_few
from leaven.recipes.common.flags import UserError, flag, run_main
from leaven.recipes.common.loop import fit
from leaven.recipes.common.optimizer import layer_scales, make_optimizer
from leaven.recipes.common.plots import loss_curve
from leaven.recipes.common.policies import mixing
from leaven.recipes.common.run_folder import RunFolder
from leaven.recipes.common.schedule import Plan
from leaven.recipes.common.start import leave_group, read_settings, start, synchronised
from leaven.recipes.common.validation import Validation


@dataclass(frozen=True)
class Method:
    """What differs between recipes that train a classifier.

    Attributes:
        recipe: its name, of run folders.
        title, paper: for the model card.
        objective: makes the objective around a network from settings, network, images and device, and lines to print.
    """

    recipe: str
    title: str
    paper: str
    objective: Callable[[Any, nn.Module, Images, torch.device], tuple[Any, list[str]]]


EVONORMS = tuple(f"evonorm_{kind}" for kind in ("b0", "b1", "b2", "s0", "s1", "s2"))


@dataclass
class TrainSettings(CurriculumSettings):
    """Supervised training and fine-tuning. Defaults suit small data; see --preset."""

    epochs: int = 20
    weight_decay: float = 0.05
    labels: str | None = flag(None, "train on N images of each class, or on P% of each; none: on all")
    labels_seed: int = flag(0, "which images --labels keeps; those of fewer are among those of more")
    layer_decay: float = flag(1.0, "learning rate's factor per group of blocks, from the classifier down")
    drop_path: float | None = flag(None, "stochastic depth of the backbone")
    smoothing: float = flag(0.1, "label smoothing")
    bce_loss: bool = flag(False, "one binary cross-entropy per class in place of softmax")
    crop_scale: tuple[float, float] = flag((0.35, 1.0), "share of the area that a random crop takes")
    hflip: float = flag(0.5, "probability of mirroring; the default data, digits, want 0")
    aa: Literal["none", "trivial", "randaugment"] = flag("none", "automatic augmentation, by torchvision")
    reprob: float = flag(0.0, "probability of random erasing")
    mixup: float = flag(0.0, "mixup's alpha; 0: without")
    cutmix: float = flag(0.0, "CutMix's alpha; 0: without. With both, each batch gets one of them")
    aug_repeats: int = flag(1, "repeated augmentation: views of an image in an epoch, of fewer images")
    tract_lam: float = flag(0.1, "damping of the callback tract")
    eval_every: int = flag(1, "epochs between measurements on the held-out images")
    crop_pct: float = flag(0.95, "share of the resized held-out image that the centre crop keeps, per side")

    FREE = CurriculumSettings.FREE | {"eval_every", "crop_pct"}
    CALLBACKS = ("efficienttrain", "ema", "tract", *EVONORMS)

    @property
    def evonorms(self) -> list[str]:
        """Kinds of EvoNorm among the callbacks."""
        return [name.removeprefix("evonorm_") for name in self.callbacks if name in EVONORMS]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tract_lam > 0:
            raise UserError(f"--tract-lam must be greater than 0, got {self.tract_lam}")
        if self.tract_lam != 0.1 and "tract" not in self.callbacks:
            raise UserError("--tract-lam is of a callback: add --callbacks tract")
        if self.labels_seed and self.labels is None:
            raise UserError("--labels-seed chooses among labelled images: add --labels")
        if len(self.evonorms) > 1:
            raise UserError(
                f"--callbacks {','.join(self.callbacks)}: one EvoNorm takes the place of all others"
            )
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                flag_name = name.replace("_", "-")
                raise UserError(f"--{flag_name} must be between {least:g} and {most:g}, got {value}")


_RANGES = {name: (0.0, 1.0) for name in ("hflip", "reprob", "smoothing", "layer_decay")}
_RANGES |= {"crop_pct": (0.1, 1.0), "mixup": (0.0, math.inf), "cutmix": (0.0, math.inf)}
_RANGES |= {"eval_every": (1, math.inf), "aug_repeats": (1, math.inf), "labels_seed": (0, math.inf)}

# SparK's fine-tuning on ImageNet (keyu-tian/SparK, downstream_imagenet). Its LAMB also scales steps of parameters
# without weight decay and leaves Adam's bias correction out; timm's defaults are kept here. At 384 px it uses
# AutoAugment's ImageNet policy and squeezes whole images; here TrivialAugment and no crop.
_PAPER: dict[str, Any] = {
    "image_size": (224, 224), "clip_grad": None, "layer_decay": 0.7, "weight_decay": 0.01, "smoothing": 0.1,
    "cutmix": 1.0, "crop_scale": (0.08, 1.0), "aa": "trivial", "reprob": 0.25, "crop_pct": 0.95,
    "model_ema_decay": 0.9999,
}  # fmt: skip
_RESNET = _PAPER | {
    "opt": "lamb",
    "global_batch_size": 2048,
    "epochs": 300,
    "warmup_epochs": 5.0,
    "bce_loss": True,
}
_RESNET |= {"lr_base": 1e-3, "layer_decay": 0.8, "weight_decay": 0.02, "mixup": 0.1, "drop_path": 0.2}
_CONVNEXT = _PAPER | {"opt": "adamw", "global_batch_size": 4096, "epochs": 400, "warmup_epochs": 20.0}
_CONVNEXT |= {"lr_base": 1e-4, "mixup": 0.8, "aug_repeats": 3}
_LARGE = _CONVNEXT | {"backbone": "convnext_l", "drop_path": 0.5, "epochs": 200}
PRESETS: dict[str, dict[str, Any]] = {
    "resnet50-spark-finetune": _RESNET
    | {"backbone": "resnet50", "lr_base": 2e-3, "layer_decay": 0.7, "drop_path": 0.05},
    "resnet101-spark-finetune": _RESNET | {"backbone": "resnet101"},
    "resnet152-spark-finetune": _RESNET | {"backbone": "resnet152"},
    "resnet200-spark-finetune": _RESNET | {"backbone": "resnet200"},
    "convnext_s-spark-finetune": _CONVNEXT | {"backbone": "convnext_s", "lr_base": 2e-4, "drop_path": 0.3},
    "convnext_b-spark-finetune": _CONVNEXT | {"backbone": "convnext_b", "drop_path": 0.4},
    "convnext_l-spark-finetune": _LARGE | {"warmup_epochs": 10.0, "weight_decay": 0.02},
    "convnext_l-384-spark-finetune": _LARGE
    | {"image_size": (384, 384), "global_batch_size": 1024, "lr_base": 6e-5}
    | {"crop_pct": 1.0, "model_ema_decay": 0.99995},
}


def main(argv: list[str] | None = None) -> None:
    """Read the flags and train."""
    settings = read_settings(TrainSettings, argv, PRESETS, recipe="train")
    if settings.dry_run:
        return dry_run(train, replace(settings, labels=None, labels_seed=0), classes=10)
    train(settings, find_data(settings))


def supervised(
    settings: TrainSettings, backbone: nn.Module, images: Images, device: torch.device
) -> tuple[Supervised, list[str]]:
    """Cross-entropy of the network's own classifier."""
    kind = "binary" if settings.bce_loss else "softmax"
    line = f"loss: {kind} cross-entropy over {len(images.data.classes)} classes, label smoothing {settings.smoothing:g}"
    return Supervised(backbone, settings.smoothing, settings.bce_loss).to(device), [line]


SUPERVISED = Method("train", "supervised training", "timm's losses and mixing", supervised)


def train(settings: TrainSettings, data: Data, method: Method = SUPERVISED) -> None:
    """One run: data, network, objective, optimizer, loop, and what came out of it."""
    data = keep_few(data, settings.labels, settings.labels_seed)
    accelerator, run, settings = start(settings, method.recipe)
    size, classes = settings.image_size or data.image_size, len(data.classes)
    backbone = build_backbone(settings, size, settings.drop_path, classes)
    images = Images.of(data, settings, size, backbone)
    with user_errors(ValueError):
        objective, how = method.objective(settings, backbone, images, accelerator.device)
        mix = mixing(settings.mixup, settings.cutmix, settings.smoothing, classes)
    if mix is not None and settings.batch_size % 2:
        raise UserError(f"--mixup and --cutmix pair images: --batch-size {settings.batch_size} must be even")
    check_size(settings, backbone, size)
    scales, lines = layer_decay(settings, backbone, size)
    optimizer = make_optimizer(objective, settings, scales)
    loader, to_pixels = crops(settings, images, accelerator)
    plan = Plan.of(loader.batch_sampler, settings)
    plan, curriculum, more = follow(settings, plan, loader, size, multiple=16)
    about, how = [*data.notes, str(images)], how + lines + more + settings.about_average(plan.total)
    accelerator.print("\n".join(about + how))
    objective = synchronised(objective, accelerator)  # its parameters stay the optimizer's

    def forward(model: nn.Module, batch: Any, generator: torch.Generator) -> Output:
        pixels, targets = to_pixels(batch[0]), batch[1]
        if mix is not None:
            pixels, targets = mix(pixels, targets, generator)
        output: Output = model(pixels, targets)
        return output

    share = accelerator.process_index, accelerator.num_processes
    held_out = images.whole(data.val, len(data.val), crop_pct=settings.crop_pct, share=share)
    ema = settings.average()
    validation = Validation(held_out, settings.eval_every * plan.updates_per_epoch, accelerator, ema)
    there = images.notes.get("evonorm")  # from --init
    if there and settings.evonorms not in ([], [there]):
        raise UserError(
            f"--init {settings.init} has EvoNorm-{there}: leave --callbacks evonorm_{settings.evonorms[0]} out"
        )
    evonorms = [EvoNorm(kind) for kind in settings.evonorms if not there]
    # Whole updates: what is learnt does not depend on --grad-accum-steps.
    tract = TrAct(settings.tract_lam, when="step") if "tract" in settings.callbacks else None
    observers = [each for each in (tract, curriculum, ema, validation) if each is not None]
    with user_errors(AttachError):
        callbacks = attach(objective, optimizer, *evonorms, *observers, total_steps=plan.total)
    for each in evonorms:
        if not each.report.replaced:
            raise UserError(f"--callbacks evonorm_{each.kind}: {each.report.summary()[0]}; leave it out")
    lines = [repr(tract)] if tract is not None else []
    lines += [f"EvoNorm-{each.kind}: {line}" for each in evonorms for line in each.report.summary()]
    for line in lines:
        accelerator.print(line)
    with callbacks:
        fit(accelerator, objective, optimizer, loader, forward, plan, settings, run, callbacks)
        with callbacks.paused():
            validation.finish()
    if leave_group(accelerator):
        conclude(settings, method, run, images, objective, validation, about, how + lines)
        accelerator.end_training()


def check_size(settings: TrainSettings, backbone: nn.Module, size: tuple[int, int]) -> None:
    """Whether the network takes images of this size.

    Raises:
        UserError: it does not.
    """
    blank = torch.zeros(1, settings.in_chans, *size, device=next(backbone.parameters()).device)
    try:
        with untouched(backbone), torch.no_grad():
            backbone(blank)
    except UNSUITABLE as error:
        raise UserError(
            f"--image-size {size[0]}x{size[1]} does not suit --backbone {settings.backbone}: {reason_of(error)}"
        ) from error


def layer_decay(
    settings: TrainSettings, backbone: nn.Module, size: tuple[int, int]
) -> tuple[dict[str, float], list[str]]:
    """The learning rate's factor of each parameter of the objective, and lines to print."""
    depths = layer_groups(backbone, size)
    scales = layer_scales(depths, settings.layer_decay, "backbone.")
    if settings.layer_decay == 1:
        return scales, []
    layers = max(depths.values()) - 1
    return scales, [
        f"layer-wise decay {settings.layer_decay:g} over {layers} groups of blocks: the stem learns at "
        f"{settings.layer_decay ** (layers + 1):.3g} of the learning rate"
    ]


def crops(
    settings: TrainSettings, images: Images, accelerator: Accelerator
) -> tuple[KeyedLoader, Callable[[Any], Tensor]]:
    """The training images under the flags' augmentation; see `Images.train`."""
    return images.train(
        settings.crop_scale,
        accelerator,
        hflip=settings.hflip,
        aa=settings.aa,
        reprob=settings.reprob,
        repeats=settings.aug_repeats,
        interpolation=settings.loader_op or "bicubic",
    )


def conclude(
    settings: TrainSettings,
    method: Method,
    run: RunFolder,
    images: Images,
    objective: Any,
    validation: Validation,
    about: list[str],
    how: list[str],
) -> None:
    """Weights, plot, results and model card of a finished run."""
    data, size, classes = images.data, images.size, len(images.data.classes)
    loss_curve(run.rows(), run.plots / "loss.png", f"{settings.backbone} on {data.name}")
    notes = {"method": method.title, **images.notes, "num_classes": classes}
    notes |= {"classes": json.dumps(list(data.classes), ensure_ascii=False)}
    notes |= {"evonorm": settings.evonorms[0]} if settings.evonorms else {}
    with user_errors(OSError):
        objective.export(run.backbone, name=settings.backbone, **notes)
        if validation.ema is not None:
            averaged: Any = validation.ema.module
            averaged.export(run.path / "backbone-ema.safetensors", name=settings.backbone, **notes)
    protocol = f"resized to {size[0]}x{size[1]} / {settings.crop_pct:g}, centre crop, after the last update"
    lines = [f"{len(data.val)} held-out images, {protocol}"]
    results = [
        (f"held-out {name.replace('_', ' ')}", f"{score:.2%}")
        for name, score in validation.scores.items()
        if classes > 5 or not name.endswith("top5")  # of five classes, five guesses are always right
    ]
    if data.kind == "digits":
        lines.append("digits are a smoke test of the recipe and no evidence")
    print("\n".join([*lines, *(f"{what}: {value}" for what, value in results)]))
    write_card(
        run,
        resolve(settings.backbone),
        method.title,
        method.paper if settings.init is None else f"from {settings.init}",
        data=[*about, named(data.classes)],
        how=how + lines,
        results=results,
        in_chans=settings.in_chans,
        num_classes=classes,
    )
    print(f"run folder: {run.path} (weights, model card, log, plots/loss.png)")


def named(classes: Sequence[str], most: int = 20) -> str:
    """Which class has which number, for the model card."""
    more = ", ..." if len(classes) > most else ""
    listed = ", ".join(f"{number} {name}" for number, name in enumerate(classes[:most]))
    return f"classes: {listed}{more} (all are in the weights' metadata, as `classes`)"


if __name__ == "__main__":
    run_main(main)
