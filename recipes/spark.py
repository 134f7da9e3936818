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

from leaven.backbones import resolve, save
from leaven.callbacks import attach
from leaven.pretext import Output, recalibrate_batchnorm
from leaven.pretext.spark import SparK, sample_mask
from leaven.recipes.common.batches import build_backbone, eval_batches, statistics, train_batches, user_errors
from leaven.recipes.common.card import write_card
from leaven.recipes.common.data import Data, open_data
from leaven.recipes.common.dry_run import dry_run
from leaven.recipes.common.flags import flag, run_main
from leaven.recipes.common.loop import fit
from leaven.recipes.common.masked import draw_reconstructions, held_out_loss, judge
from leaven.recipes.common.optimizer import make_optimizer
from leaven.recipes.common.plots import loss_curve
from leaven.recipes.common.probes import probe, table
from leaven.recipes.common.schedule import Plan
from leaven.recipes.common.start import LoopSettings, leave_group, read_settings, start, synchronised


@dataclass
class SparkSettings(LoopSettings):
    """SparK: masked pre-training of a convolutional backbone. Defaults suit small data; see --preset."""

    epochs: int = flag(18, "passes over the training images")
    opt: str = "lamb"
    lr: float = 1e-3
    clip_grad: float | None = 5.0
    weight_decay: float = 0.04
    weight_decay_end: float | None = 0.2
    mask_ratio: float = flag(0.6, "share of cells hidden, rounded to whole cells")
    mask_cell: int | None = flag(None, "side of a mask cell in pixels; none: the largest reduction used")
    stages: tuple[int, ...] | None = flag(None, "reductions of the maps used, as 4,8,16; none: the last four")
    decoder_width: int = flag(256, "decoder channels at the smallest map; the paper's is 768")
    densify_norm: Literal["auto", "bn", "ln", "none"] = flag("auto", "norm before the mask tokens")
    backend: Literal["auto", "packed", "dense"] = flag("auto", "how the sparse encoder computes")
    drop_path: float | None = flag(None, "stochastic depth of the backbone")
    crop_scale: tuple[float, float] = flag((0.67, 1.0), "share of the area that a random crop takes")
    probe_images: int = flag(5000, "labelled images at most, of each part, for kNN and linear probe")

    FREE = LoopSettings.FREE | {"probe_images"}


# spark.md section 2: upstream's settings, the same for every network but for drop path and betas.
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
    settings = read_settings(SparkSettings, argv, PRESETS)
    if settings.dry_run:
        return dry_run(train, settings)
    options: dict[str, Any] = {"max_bad_images": settings.max_bad_images, "in_chans": settings.in_chans}
    train(settings, open_data(settings.data, seed=settings.seed, **options))


def train(settings: SparkSettings, data: Data) -> None:
    """One run: data, SparK, optimizer, loop, and what came out of it."""
    accelerator, run, settings = start(settings, "spark")
    say, device, size = accelerator.print, accelerator.device, settings.image_size or data.image_size
    backbone = build_backbone(settings, size, settings.drop_path)
    mean, std, normalised = statistics(data, backbone, settings)
    with user_errors(ValueError):
        spark = SparK(
            backbone,
            settings.mask_ratio,
            settings.decoder_width,
            settings.densify_norm,
            settings.backend,
            settings.stages,
            settings.mask_cell,
        )
        grid = spark.mask_grid(*size)
        hidden = 1 - sample_mask(1, grid, settings.mask_ratio).float().mean().item()
    about = [*data.notes, f"images {size[0]}x{size[1]}, {normalised}"]
    how = [
        f"SparK backend: {spark.backend} ({spark.backend_reason})",
        f"mask: {grid[0]}x{grid[1]} cells of {spark.mask_cell} px, {hidden:.3f} hidden ({settings.mask_ratio} asked)",
        f"parameters: backbone {count(spark.backbone):.2f} M, with decoder {count(spark):.2f} M",
    ]
    say("\n".join(about + how))

    spark.to(device)
    untrained, before = copy.deepcopy(spark.backbone), 0.0
    calibration = eval_batches(data.train, size, mean, std, settings, 8 * settings.batch_size)
    held_out = eval_batches(data.val, size, mean, std, settings, settings.probe_images)
    if accelerator.is_main_process:
        before = held_out_loss(judge(spark, calibration, settings.seed), held_out, settings.seed)
        say(f"held-out masked loss before training: {before:.4f}")
    spark = synchronised(spark, accelerator)
    optimizer = make_optimizer(spark, settings)
    loader, images = train_batches(data, size, settings.crop_scale, mean, std, settings, accelerator)
    plan = Plan.of(loader.batch_sampler, settings)

    def forward(model: nn.Module, batch: Any, generator: torch.Generator) -> Output:
        x = images(batch[0])
        mask = sample_mask(len(x), grid, settings.mask_ratio, generator)
        output: Output = model(x, mask=mask.to(x.device))
        return output

    with attach(spark, optimizer, total_steps=plan.total) as callbacks:
        fit(accelerator, spark, optimizer, loader, forward, plan, settings, run, callbacks)
    if not leave_group(accelerator):
        return

    judged = judge(spark, calibration, settings.seed)
    after = held_out_loss(judged, held_out, settings.seed)
    say(f"held-out masked loss: {before:.4f} before training, {after:.4f} after")
    results = [
        ("held-out masked loss, untrained", f"{before:.4f}"),
        ("held-out masked loss, trained", f"{after:.4f}"),
    ]
    loss_curve(run.rows(), run.plots / "loss.png", f"SparK, {settings.backbone} on {data.name}")
    few = torch.cat([batch for batch, _ in eval_batches(data.val, size, mean, std, settings, 8)])
    draw_reconstructions(judged, few, settings.seed, run.plots / "reconstructions.png", mean=mean, std=std)

    backbones = {"untrained backbone": untrained, "trained backbone": spark.backbone}
    for who, backbone in backbones.items():
        if layers := recalibrate_batchnorm(backbone, calibration):
            how.append(
                f"{who}: statistics of {layers} BatchNorm layers taken anew from whole training images"
            )
            say(how[-1])
    if data.classes:
        scores, protocol = probe(backbones, data, size, mean, std, settings, most=settings.probe_images)
        say("\n".join(protocol + table(scores)))
        results += [
            (f"{who}, {what}, top-1", f"{v:.2%}") for who, row in scores.items() for what, v in row.items()
        ]
        how += protocol
    else:
        say("kNN and linear probe are skipped: the images have no labels")
    if data.kind == "digits":
        about.append("these digits are a smoke test of the recipe and no evidence for the method")
        say(about[-1])
    save(
        spark.backbone, run.backbone, name=settings.backbone, metadata={"method": "SparK", "data": data.name}
    )
    paper = "Tian et al., Designing BERT for Convolutional Networks, ICLR 2023"
    write_card(run, resolve(settings.backbone), "SparK", paper, data=about, how=how, results=results)
    say(f"run folder: {run.path} (weights, model card, log, plots/reconstructions.png)")
    accelerator.end_training()


def count(module: nn.Module) -> float:
    """Parameters in millions."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


if __name__ == "__main__":
    run_main(main)
