"""SparK: masked pre-training of any convolutional backbone (Tian et al., ICLR 2023).

    accelerate launch recipes/spark.py --backbone convnext_t
    accelerate launch recipes/spark.py --backbone resnet50 --data PATH/OF/IMAGES --preset resnet50-paper

Without --data it trains on scikit-learn's digits: a smoke test that takes minutes on a laptop, and no evidence.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from leaven.backbones import resolve
from leaven.callbacks import AttachError, attach
from leaven.pretext import Output
from leaven.pretext.spark import SparK, sample_mask
from leaven.recipes.common.batches import Images, build_backbone, find_data, user_errors
from leaven.recipes.common.card import write_card
from leaven.recipes.common.curriculum import follow
from leaven.recipes.common.data import Data
from leaven.recipes.common.dry_run import dry_run
from leaven.recipes.common.flags import UserError, flag, run_main
from leaven.recipes.common.loop import fit
from leaven.recipes.common.masked import describe, draw_reconstructions, held_out_loss, judge
from leaven.recipes.common.optimizer import make_optimizer
from leaven.recipes.common.plots import loss_curve
from leaven.recipes.common.pretraining import PretrainSettings, check_labels, observers, save_all
from leaven.recipes.common.probes import probe, recalibrate
from leaven.recipes.common.schedule import Plan
from leaven.recipes.common.start import leave_group, read_settings, start, synchronised


@dataclass
class SparkSettings(PretrainSettings):
    """SparK: masked pre-training of a convolutional backbone. Defaults suit small data; see --preset."""

    epochs: int = 10
    opt: str = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] | None = (0.9, 0.95)
    clip_grad: float | None = 5.0
    weight_decay: float = 0.04
    weight_decay_end: float | None = 0.2
    mask_ratio: float = flag(0.6, "share of cells hidden, rounded to whole cells")
    mask_cell: int | None = flag(None, "side of a mask cell in pixels; none: the largest reduction used")
    stages: tuple[int, ...] | None = flag(None, "reductions of the maps used, as 4,8,16; none: the last four")
    decoder_width: int = flag(256, "decoder channels at the smallest map; the paper's is 768")
    densify_norm: Literal["auto", "bn", "ln", "none"] = flag("auto", "norm before the mask tokens")
    backend: Literal["auto", "packed", "dense", "spconv"] = flag("auto", "how the sparse encoder computes")
    drop_path: float | None = flag(None, "stochastic depth of the backbone")
    crop_scale: tuple[float, float] = flag((0.67, 1.0), "share of the area that a random crop takes")


# The settings of the authors' code (keyu-tian/SparK), the same for every network but for drop path and betas.
_PAPER: dict[str, Any] = {
    "image_size": (224, 224), "epochs": 1600, "warmup_epochs": 40.0, "global_batch_size": 4096, "lr_base": 2e-4,
    "opt": "lamb", "clip_grad": 5.0, "weight_decay": 0.04, "weight_decay_end": 0.2, "mask_ratio": 0.6,
    "decoder_width": 768, "crop_scale": (0.67, 1.0), "mixed_precision": "no",
}  # fmt: skip
_RESNET, _CONVNEXT = _PAPER | {"betas": (0.9, 0.95)}, _PAPER | {"betas": (0.9, 0.999)}
PRESETS: dict[str, dict[str, Any]] = {
    "resnet50-paper": _RESNET | {"backbone": "resnet50", "drop_path": 0.05},
    "resnet101-paper": _RESNET | {"backbone": "resnet101", "drop_path": 0.08},
    "resnet152-paper": _RESNET | {"backbone": "resnet152", "drop_path": 0.10},
    "resnet200-paper": _RESNET | {"backbone": "resnet200", "drop_path": 0.15},
    "convnext_s-paper": _CONVNEXT | {"backbone": "convnext_s", "drop_path": 0.2},
    "convnext_b-paper": _CONVNEXT | {"backbone": "convnext_b", "drop_path": 0.3},
    "convnext_l-paper": _CONVNEXT | {"backbone": "convnext_l", "drop_path": 0.4},
    "convnext_l-384-paper": _CONVNEXT
    | {"backbone": "convnext_l", "drop_path": 0.4, "image_size": (384, 384), "mask_ratio": 0.75}
    | {"global_batch_size": 2048, "lr_base": 4e-4},
}


def main(argv: list[str] | None = None) -> None:
    """Read the flags and train."""
    settings = read_settings(SparkSettings, argv, PRESETS, recipe="spark")
    if settings.dry_run:
        return dry_run(train, settings, classes=2 if "knn" in settings.callbacks else 0)
    train(settings, find_data(settings))


def train(settings: SparkSettings, data: Data) -> None:
    """One run: data, SparK, optimizer, loop, and what came out of it."""
    check_labels(settings, data)
    accelerator, run, settings = start(settings, "spark")
    size = settings.image_size or data.image_size
    backbone = build_backbone(settings, size, settings.drop_path)
    images = Images.of(data, settings, size, backbone)
    names = ("mask_ratio", "decoder_width", "densify_norm", "backend", "stages", "mask_cell")
    with user_errors(ValueError):
        spark = SparK(backbone, **{name: getattr(settings, name) for name in names}).to(accelerator.device)
        how = describe(spark, size)
    about = [*data.notes, str(images)]
    untrained, before = copy.deepcopy(spark.backbone), 0.0
    optimizer = make_optimizer(spark, settings)
    loader, to_pixels = images.train(
        settings.crop_scale, accelerator, interpolation=settings.loader_op or "bicubic"
    )
    plan = Plan.of(loader.batch_sampler, settings)
    plan, curriculum, lines = follow(settings, plan, loader, size, multiple=spark.mask_cell)
    how += lines + settings.about_average(plan.total)
    accelerator.print("\n".join(about + how))
    for side in curriculum.shapes() if curriculum else [size]:
        try:
            spark.check_image_size(*side)
        except ValueError as error:
            more = "; choose a larger --image-size, other sizes of --curriculum, or smaller cells by --stages 4,8,16"
            raise UserError(f"{error}{more if curriculum else ''}") from error
    if accelerator.is_main_process:
        before = held_out_loss(judge(spark, images), images, settings.probe_images)
        print(f"held-out masked loss before training: {before:.4f}")
    spark = synchronised(spark, accelerator)  # its parameters stay the optimizer's

    def forward(model: nn.Module, batch: Any, generator: torch.Generator) -> Output:
        pixels = to_pixels(batch[0])
        if curriculum is not None:
            pixels = curriculum(pixels)  # here already, for the mask to fit
        grid = spark.mask_grid(*pixels.shape[-2:])
        mask = sample_mask(len(pixels), grid, settings.mask_ratio, generator)
        output: Output = model(pixels, mask=mask.to(pixels.device))
        return output

    average, watching = observers(settings, images, plan)
    with user_errors(AttachError):
        acting = [] if curriculum is None else [curriculum]
        callbacks = attach(spark, optimizer, *acting, *watching, total_steps=plan.total)
    with callbacks:
        fit(accelerator, spark, optimizer, loader, forward, plan, settings, run, callbacks)
    if not leave_group(accelerator):
        return

    judged = judge(spark, images)  # a copy, under masks as in training
    backbones: dict[str, Any] = {"untrained backbone": untrained, "trained backbone": spark.backbone}
    if average is not None:
        backbones["averaged backbone"] = average.module.backbone
    lines = recalibrate(backbones, images)
    save_all(backbones, run, settings.backbone, {"method": "SparK", **images.notes})
    after = held_out_loss(judged, images, settings.probe_images)
    print(f"held-out masked loss: {before:.4f} before training, {after:.4f} after")
    level = 1.0, "each patch predicted as its mean"  # the target has variance one
    loss_curve(run.rows(), run.plots / "loss.png", f"SparK, {settings.backbone} on {data.name}", level)
    draw_reconstructions(judged, images, run.plots / "reconstructions.png")
    scores, table = probe(backbones, images, settings.probe_images)
    lines += table
    if data.kind == "digits":
        lines.append("digits are a smoke test of the recipe and no evidence that the method helps")
    print("\n".join(lines))
    results = [
        ("held-out masked loss before training", f"{before:.4f}"),
        ("and after", f"{after:.4f}"),
        *scores,
    ]
    paper = "Tian et al., Designing BERT for Convolutional Networks, ICLR 2023"
    how, chans = how + lines, settings.in_chans
    write_card(
        run, resolve(settings.backbone), "SparK", paper, data=about, how=how, results=results, in_chans=chans
    )
    print(f"run folder: {run.path} (weights, model card, log, plots/reconstructions.png)")
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
