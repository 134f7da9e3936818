"""RotNet: self-supervised training by telling quarter turns apart, for any backbone (Gidaris et al., ICLR 2018).

    accelerate launch recipes/rotnet.py --backbone resnet18
    accelerate launch recipes/rotnet.py --backbone resnet50 --data PATH/OF/IMAGES --image-size 224 --epochs 100

Without --data it trains on scikit-learn's digits: a smoke test that takes minutes on a laptop, and no evidence; some
digits look the same upside down, too.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from leaven.backbones import NoStages, resolve
from leaven.callbacks import AttachError, attach
from leaven.pretext import Output, RotNet, cue_audit, probe_stages, recalibrate_batchnorm, rotate4
from leaven.pretext.features import device_of, eval_mode
from leaven.recipes.common.batches import Images, build_backbone, find_data, user_errors
from leaven.recipes.common.card import write_card
from leaven.recipes.common.curriculum import follow
from leaven.recipes.common.data import Data
from leaven.recipes.common.dry_run import dry_run
from leaven.recipes.common.flags import UserError, flag, run_main
from leaven.recipes.common.loop import fit
from leaven.recipes.common.optimizer import make_optimizer
from leaven.recipes.common.plots import bars, loss_curve
from leaven.recipes.common.pretraining import PretrainSettings, check_labels, observers, save_all
from leaven.recipes.common.probes import labelled, probe, recalibrate, unfit
from leaven.recipes.common.schedule import Plan
from leaven.recipes.common.start import leave_group, read_settings, start, synchronised


@dataclass
class RotNetSettings(PretrainSettings):
    """RotNet: predict by which quarter turn an image was rotated. A batch is turned in all four ways."""

    epochs: int = 10
    weight_decay: float = 0.05
    mode: Literal["all", "random"] = flag(
        "all", "all: each image in four copies; random: in one, with more epochs"
    )
    drop_path: float | None = flag(None, "stochastic depth of the backbone")
    crop_scale: tuple[float, float] = flag((0.35, 1.0), "share of the area that a random crop takes")
    hflip: float = flag(0.5, "probability of mirroring, before the rotation")
    probe_images: int = flag(2000, "images at most, of each part, to measure on")
    probe_width: int = flag(1024, "numbers per image that the probe of each stage reads")

    FREE = PretrainSettings.FREE | {"probe_width"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None and self.image_size[0] != self.image_size[1]:
            raise UserError(
                f"--image-size {'x'.join(map(str, self.image_size))}: quarter turns need square images"
            )
        if not 0 <= self.hflip <= 1:
            raise UserError(f"--hflip must be between 0 and 1, got {self.hflip}")


def main(argv: list[str] | None = None) -> None:
    """Read the flags and train."""
    settings = read_settings(RotNetSettings, argv, recipe="rotnet")
    if settings.dry_run:
        return dry_run(train, settings, classes=2 if "knn" in settings.callbacks else 0)
    train(settings, find_data(settings))


def train(settings: RotNetSettings, data: Data) -> None:
    """One run: data, RotNet, optimizer, loop, and what came out of it."""
    check_labels(settings, data)
    accelerator, run, settings = start(settings, "rotnet")
    size = settings.image_size or data.image_size
    backbone = build_backbone(settings, size, settings.drop_path)
    images = Images.of(data, settings, size, backbone)
    with user_errors(ValueError):
        rotnet = RotNet(backbone, mode=settings.mode, image_size=size).to(accelerator.device)
    untrained = copy.deepcopy(rotnet.backbone)
    optimizer = make_optimizer(rotnet, settings)
    loader, to_pixels = images.train(
        settings.crop_scale, accelerator, hflip=settings.hflip, interpolation=settings.loader_op or "bicubic"
    )
    plan = Plan.of(loader.batch_sampler, settings)
    plan, curriculum, how = follow(settings, plan, loader, size, multiple=16)
    how += settings.about_average(plan.total)
    about = [*data.notes, str(images)]
    if accelerator.is_main_process:
        how += audit(images)
    accelerator.print("\n".join(about + how))
    objective = synchronised(rotnet, accelerator)  # its parameters stay the optimizer's

    def forward(model: nn.Module, batch: Any, generator: torch.Generator) -> Output:
        output: Output = model(to_pixels(batch[0]), generator)
        return output

    average, watching = observers(settings, images, plan)
    with user_errors(AttachError):
        acting = [] if curriculum is None else [curriculum]
        callbacks = attach(objective, optimizer, *acting, *watching, total_steps=plan.total)
    with callbacks:
        fit(accelerator, objective, optimizer, loader, forward, plan, settings, run, callbacks)
    if not leave_group(accelerator):
        return

    accuracy = held_out_accuracy(rotnet, images, settings.probe_images)
    backbones: dict[str, Any] = {"untrained backbone": untrained, "trained backbone": rotnet.backbone}
    if average is not None:
        backbones["averaged backbone"] = average.module.backbone
    lines = recalibrate(backbones, images)  # on upright images, as a user of the weights has them
    save_all(backbones, run, settings.backbone, {"method": "RotNet", **images.notes})
    lines.append(f"held-out rotation accuracy: {accuracy:.2%} of all four turns (chance 25.00%)")
    if accuracy < 0.3:
        lines.append(
            "near chance: do these images have a right way up? Textures, aerial and microscope images do not"
        )
    level = 1.3863, "chance: log 4"
    loss_curve(run.rows(), run.plots / "loss.png", f"RotNet, {settings.backbone} on {data.name}", level)
    scores, table = probe(backbones, images, settings.probe_images)
    stages, more = stage_curve(backbones, images, settings, run.plots / "stages.png")
    lines += table + more
    if data.kind == "digits":
        lines.append("digits are a smoke test of the recipe and no evidence that the method helps")
    print("\n".join(lines))
    results = [("held-out rotation accuracy", f"{accuracy:.2%}"), *scores, *stages]
    paper = "Gidaris et al., Unsupervised Representation Learning by Predicting Image Rotations, ICLR 2018"
    name, chans = resolve(settings.backbone), settings.in_chans
    write_card(run, name, "RotNet", paper, data=about, how=how + lines, results=results, in_chans=chans)
    picture = "stages" if stages else "loss"
    print(f"run folder: {run.path} (weights, model card, log, plots/{picture}.png)")
    accelerator.end_training()


def audit(images: Images) -> list[str]:
    """What trivial statistics can tell of the rotation, in words; nothing where the images are too small for it."""
    if min(images.size) < 24 or len(images.data.train) < 8:
        return []
    found = cue_audit(images.whole(images.data.train, 96), seed=images.settings.seed)
    shares = [", ".join(f"{k} {v:.1%}" for k, v in d.items()) for d in (found.as_given, found.pipeline)]
    return [
        f"cue audit: rotation told by trivial statistics of the images: {shares[0]} (chance 25.0%)",
        f"cue audit: by traces of the pipeline alone: {shares[1]} (must be near 25.0%)",
    ]


def held_out_accuracy(rotnet: RotNet, images: Images, most: int) -> float:
    """Share of right answers over all four turns of held-out images, at most so many.

    By a copy whose BatchNorm statistics are taken anew, from turned training images: after a short training those of
    the network lag behind its weights.
    """
    rotnet, right = copy.deepcopy(rotnet), []
    recalibrate_batchnorm(rotnet.backbone, (rotate4(batch)[0] for batch, _ in images.calibration()))
    with torch.no_grad(), eval_mode(rotnet):
        for batch, _ in images.whole(images.data.val, most):
            copies, labels = rotate4(batch.to(device_of(rotnet)))
            right.append(rotnet.logits(copies).argmax(1) == labels)
    return float(torch.cat(right).float().mean())


def stage_curve(
    backbones: dict[str, nn.Module], images: Images, settings: RotNetSettings, path: Any
) -> tuple[list[tuple[str, str]], list[str]]:
    """Linear probes of every stage: results and lines to print, and a picture of them."""
    if unfit(images.data, settings.probe_images):
        return [], []
    parts = labelled(images, settings.probe_images)
    curves: dict[str, dict[str, float]] = {}
    for who, backbone in backbones.items():
        try:
            with user_errors(ValueError):
                curves[who] = probe_stages(backbone, *parts, pool_to=settings.probe_width, seed=settings.seed)
        except NoStages as error:
            return [], [f"no probe of stages: {error}"]
    bars(curves, path, f"linear probe of each stage, {settings.backbone} on {images.data.name}", "top-1")
    results = [
        (f"{who}, linear probe of {stage}", f"{v:.2%}")
        for who, row in curves.items()
        for stage, v in row.items()
    ]
    lines = [
        f"{who}, stage by stage: {', '.join(f'{v:.2%}' for v in row.values())}" for who, row in curves.items()
    ]
    return results, lines


if __name__ == "__main__":
    run_main(main)
