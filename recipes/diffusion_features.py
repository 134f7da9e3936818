"""Classify with what a diffusion model sees: train a small one, or read one that there is (Mukhopadhyay et al. 2023).

    accelerate launch recipes/diffusion_features.py
    accelerate launch recipes/diffusion_features.py --data PATH/OF/IMAGES --image-size 32 --epochs 100
    python recipes/diffusion_features.py --model FOLDER --data PATH/OF/IMAGES --image-size 256 --blocks 19,24,30

Without --model a U-Net learns to take noise out of the training images, without labels. Then every timestep, block and
pooling is probed by a linear classifier; the best is chosen on a fifth of the labelled training images, taken again on
all of them, and told on the held-out ones, beside pixels and an untrained network under the same rule. Without --data:
scikit-learn's digits, a smoke test and no evidence.
"""

import inspect
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from leaven.backbones import resolve
from leaven.callbacks import EMA, AttachError, attach
from leaven.pretext import Output
from leaven.pretext.diffusion import (
    Cell,
    Denoiser,
    DiffusionFeatures,
    FeatureCache,
    Opened,
    Scored,
    fit_heads,
    fresh_like,
    make_head,
    open_model,
    ridge_grid,
    write_features,
)
from leaven.recipes.common.batches import Images, Part, build_backbone, find_data, user_errors
from leaven.recipes.common.card import command, write_card
from leaven.recipes.common.data import Data
from leaven.recipes.common.dry_run import dry_run
from leaven.recipes.common.few_labels import few_labels
from leaven.recipes.common.flags import UserError, flag, run_main
from leaven.recipes.common.launcher import set_threads
from leaven.recipes.common.loop import fit, keyed_generator
from leaven.recipes.common.optimizer import make_optimizer
from leaven.recipes.common.plots import heatmap, image_table, loss_curve
from leaven.recipes.common.run_folder import RunFolder, open_run, writing
from leaven.recipes.common.schedule import Plan
from leaven.recipes.common.start import LoopSettings, leave_group, read_settings, start

# At which noise the features of small images are worth a look; the paper's t = 90 is of 256 pixels.
_TIMES = (10, 20, 40, 90, 150, 300)


@dataclass
class DiffusionSettings(LoopSettings):
    """Diffusion features: train a denoiser, or read one by --model, and classify with its activations."""

    backbone: str = flag(
        "leaven.pretext.diffusion:small_unet", "package.module:factory of a network called as net(x_t, t)"
    )
    epochs: int = 30
    lr: float = 2e-3
    weight_decay: float = 0.0
    warmup_epochs: float = 1.0
    model: str | None = flag(
        None, "read this model and train none: a run folder, a folder of diffusers, ADM's .pt"
    )
    ema_decay: float = flag(0.999, "weights are averaged for features and pictures; 0: they are not")
    crop_scale: tuple[float, float] = flag((0.9, 1.0), "share of the area that a random crop takes")
    hflip: float = flag(0.0, "probability of mirroring")
    grid: bool = flag(True, "probe timesteps, blocks and pools after training")
    timesteps: tuple[int, ...] = flag(_TIMES, "noise levels, from 0 to 999")
    blocks: tuple[str, ...] | None = flag(None, "names, or numbers from 1; none: all that are known")
    pool: tuple[int, ...] = flag((1, 2, 4), "sides that maps are averaged to")
    draws: int = flag(1, "draws of noise that features are averaged over")
    include_clean: bool = flag(True, "features of images without noise, too")
    labels: str | None = flag(None, "labels that probes get: N images of each class or P%; none: all")
    head: Literal["none", "linear", "mlp", "conv", "attention"] = flag("none", "train this on the best cell")
    head_steps: int = flag(2000, "updates of the head")
    probe_images: int = flag(20000, "images at most, of each part, to measure on")

    FREE = LoopSettings.FREE | {
        "grid", "timesteps", "blocks", "pool", "draws", "include_clean", "labels", "head", "head_steps",
        "probe_images",
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"--ema-decay must be at least 0 and below 1, got {self.ema_decay}")
        for name in ("draws", "head_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.model is not None:
            if not self.grid or self.dry_run:
                raise UserError(
                    "--model trains nothing and reads features: leave --no-grid and --dry-run out"
                )
            mine = {f.name: f.default for f in fields(DiffusionSettings)}
            for name in (
                "backbone",
                "epochs",
                "lr",
                "weight_decay",
                "warmup_epochs",
                "ema_decay",
                "hflip",
                "init",
            ):
                if getattr(self, name) != mine[name]:
                    raise UserError(f"--{name.replace('_', '-')} is of training: leave it out with --model")
        if self.image_size is None and self.data == "digits":
            self.image_size = (16, 16)


def main(argv: list[str] | None = None) -> None:
    """Read the flags; train, or open a model, and classify."""
    settings = read_settings(DiffusionSettings, argv, recipe="diffusion_features")
    if settings.model is not None:
        return read(settings)
    if settings.dry_run:
        return dry_run(train, settings, classes=2)
    train(settings, find_data(settings))


def read(settings: DiffusionSettings) -> None:
    """Features of a model that there is."""
    assert settings.model is not None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--model trains nothing and is for one process: leave the launcher out")
    with user_errors(ValueError, FileNotFoundError, ImportError):
        opened = open_model(settings.model)
    data = find_data(settings)
    images = scaled(data, settings)
    check(opened, images, settings)
    run = open_run(
        "diffusion_features",
        Path(settings.model).name,
        output_dir=settings.output_dir,
        resume=settings.resume,
    )
    print(set_threads(1))
    print("\n".join([*data.notes, str(images)]))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    opened.model.to(device or "cpu")
    results, lines, _ = judge(opened, images, settings, run)
    run.write(run.path / "results.json", json.dumps({"command": command(), "results": results}, indent=1))
    print("\n".join(lines))
    print(f"run folder: {run.path} (results.json, plots, features)")


def train(settings: DiffusionSettings, data: Data) -> None:
    """One run: data, U-Net, optimizer, loop, and what its features are worth."""
    accelerator, run, settings = start(settings, "diffusion_features")
    images = scaled(data, settings)
    denoiser = Denoiser(build_backbone(settings, images.size)).to(accelerator.device)
    check(Opened(denoiser.backbone, denoiser.schedule), images, settings)
    millions = sum(p.numel() for p in denoiser.parameters()) / 1e6
    about, how = [*data.notes, str(images)], [f"denoiser: {millions:.2f} M parameters, noise in 1000 steps"]
    optimizer = make_optimizer(denoiser, settings)
    loader, to_pixels = images.train(settings.crop_scale, accelerator, hflip=settings.hflip)
    plan = Plan.of(loader.batch_sampler, settings)
    accelerator.print("\n".join(about + how))

    def forward(model: nn.Module, batch: Any, generator: torch.Generator) -> Output:
        output: Output = model(to_pixels(batch[0]), generator)
        return output

    ema = EMA(settings.ema_decay, warmup=True) if settings.ema_decay else None
    with user_errors(AttachError):
        callbacks = attach(denoiser, optimizer, *([ema] if ema else []), total_steps=plan.total)
    with callbacks:
        fit(accelerator, denoiser, optimizer, loader, forward, plan, settings, run, callbacks)
    if not leave_group(accelerator):
        return

    averaged: Any = denoiser if ema is None else ema.module
    with user_errors(OSError):
        averaged.export(run.backbone, name=settings.backbone, **images.notes)
    loss_curve(
        run.rows(), run.plots / "loss.png", f"denoising {data.name}", (1.0, "no noise is found at all")
    )
    averaged.eval()
    draw_samples(averaged, images, run.plots / "samples.png")
    results, lines, scores = judge(Opened(averaged.backbone, denoiser.schedule), images, settings, run)
    print("\n".join(lines))
    run.write(run.path / "results.json", json.dumps({"command": command(), "results": results}, indent=1))
    paper = "Mukhopadhyay et al., Diffusion Models Beat GANs on Image Classification, 2023"
    name, chans = resolve(settings.backbone), settings.in_chans
    write_card(run, name, "DDPM", paper, data=about, how=how + lines, results=scores, in_chans=chans)
    print(f"run folder: {run.path} (weights, model card, log, plots)")
    accelerator.end_training()


def check(opened: Opened, images: Images, settings: DiffusionSettings) -> None:
    """What would be found wrong after the training only: can the network take these images, are the probes possible?"""
    try:
        inspect.signature(opened.model.forward).bind(None, None)
    except TypeError:
        raise UserError(
            f"--backbone {settings.backbone} is no denoiser: it must be a network called as net(x_t, t), such as "
            "leaven.pretext.diffusion:small_unet"
        ) from None
    device = next(opened.model.parameters()).device
    with user_errors(ValueError):
        blank = torch.zeros(1, settings.in_chans, *images.size, device=device)
        extractor(opened, settings, settings.seed)(blank)
    if settings.grid and settings.labels is not None and images.data.classes:
        labels = Part(images.data.train, settings.probe_images).labels
        few_labels(labels, settings.labels, settings.seed, images.data.classes)


def extractor(opened: Opened, settings: DiffusionSettings, seed: int) -> DiffusionFeatures:
    """Of all cells of the grid; the seed is that of the noise."""
    numbers = [int(each) if each.isdigit() else each for each in settings.blocks or ()]
    return DiffusionFeatures(
        opened.model, opened.schedule, numbers or "auto", settings.timesteps, settings.pool,
        settings.draws, settings.include_clean, seed=seed, encode=opened.encode,
    )  # fmt: skip


def scaled(data: Data, settings: DiffusionSettings) -> Images:
    """Images in [-1, 1], as diffusion models have them."""
    half = (0.5,) * settings.in_chans
    return Images(data, settings, settings.image_size or data.image_size, half, half)


def draw_samples(denoiser: Denoiser, images: Images, path: Path) -> None:
    """Held-out images beside what the model draws."""
    real = torch.cat([batch for batch, _ in images.whole(images.data.val, 8)])
    generator = keyed_generator(images.settings.seed, 0, 0, "samples")
    drawn = [denoiser.sample((len(real), *real.shape[1:]), 50, generator).cpu() for _ in range(3)]
    columns = {"held-out images": real} | {f"drawn{' ' * i}": each for i, each in enumerate(drawn)}
    image_table(columns, path, mean=images.mean, std=images.std, caption="drawn in 50 steps without noise")


Parts = dict[str, tuple[Any, Tensor]]


def judge(
    opened: Opened, images: Images, settings: DiffusionSettings, run: RunFolder
) -> tuple[list[dict[str, Any]], list[str], list[tuple[str, str]]]:
    """What the features are worth: results, lines to print, and (what, percent)."""
    data, most = images.data, settings.probe_images
    if not settings.grid:
        return [], [], []
    if not data.classes:
        return [], ["no labels: features are not probed"], []
    labels = Part(data.train, most).labels
    chosen = torch.arange(len(labels))
    if settings.labels is not None:
        chosen = torch.from_numpy(np.sort(few_labels(labels, settings.labels, settings.seed, data.classes)))
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(settings.seed))
    kept, validation = chosen[order[len(order) // 5 :].sort().values], chosen[order[: len(order) // 5]]
    if not len(validation) or len(torch.unique(torch.from_numpy(labels)[kept])) < 2:
        return [], [f"{len(chosen)} labels are too few to learn from"], []
    rivals = {
        "trained network": opened,
        "untrained network": Opened(fresh_like(opened.model, settings.seed), opened.schedule, opened.encode),
    }
    lines = [
        f"probes: {len(kept)} labels, the cell chosen on {len(validation)} more, told on the held-out part"
    ]
    results, scores = [], []
    for who, parts in {"pixels": pixels(images, most), **cached(rivals, images, settings, run)}.items():
        with user_errors(ValueError):
            result, best = told(parts, kept, validation, chosen)
        results.append({"who": who, **result})
        scores.append((f"{who}, top-1", f"{result['top1']:.2%}"))
        lines.append(
            f"{who}: top-1 {result['top1']:.2%} ({best.cell}, L2 {best.l2:g}; chosen at {best.accuracy[0]:.2%})"
        )
        if who == "trained network":
            draw_grid(result["grid"], run.plots / "grid.png")
            if settings.head != "none":
                kept_in = run.path / "head.pt"
                top1 = head(settings, parts, best.cell, chosen, len(data.classes), kept_in)
                results.append({"who": who, "head": settings.head, "cell": list(best.cell), "top1": top1})
                scores.append((f"{who}, {settings.head} head, top-1", f"{top1:.2%}"))
                lines.append(f"{who}, {settings.head} head on {best.cell}: top-1 {top1:.2%}")
    if data.kind == "digits":
        lines.append("digits are a smoke test of the recipe and no evidence that the method helps")
    return results, lines, scores


def pixels(images: Images, most: int) -> Parts:
    """The images themselves, at their size, as if a block gave them."""
    found = {}
    for name, part in (("train", images.data.train), ("val", images.data.val)):
        batches = list(images.whole(part, most))
        maps = torch.cat([x for x, _ in batches])
        found[name] = ({Cell("clean", "pixels", None): maps}, torch.cat([y for _, y in batches]))
    return found


def cached(
    rivals: dict[str, Opened], images: Images, settings: DiffusionSettings, run: RunFolder
) -> dict[str, Parts]:
    """Features of all images, written below the run folder and read from there."""
    found: dict[str, Parts] = {}
    # Held-out images have noise of their own: both parts mostly lie class by class, and the noise that a training image
    # at the same place was learnt with would tell the class.
    seeds = {"train": settings.seed, "val": -1 - settings.seed}
    for who, opened in rivals.items():
        found[who] = {}
        for name, part in (("train", images.data.train), ("val", images.data.val)):
            extract = extractor(opened, settings, seeds[name])
            n = min(settings.probe_images, len(part))
            folder = run.path / "features" / f"{who.split()[0]}-{name}"
            with user_errors(ValueError, OSError):
                write_features(folder, extract, images.whole(part, n), n)
                cache = FeatureCache(folder, extract)
            found[who][name] = (cache, cache.labels)
    return found


def told(parts: Parts, kept: Tensor, validation: Tensor, chosen: Tensor) -> tuple[dict[str, Any], Scored]:
    """The best cell and penalty on validation images; its score on held-out ones, learnt from all labels."""
    (train, y), (val, y_val) = parts["train"], parts["val"]
    grid: list[Scored] = []
    for cell in train:  # one at a time: a cache is read from the disk
        maps = train[cell]
        grid += ridge_grid({cell: maps[kept]}, y[kept], ({cell: maps[validation]}, y[validation]))
    best = max(grid, key=lambda each: each.accuracy[0])
    again = {best.cell: train[best.cell][chosen]}
    (final,) = ridge_grid(again, y[chosen], ({best.cell: val[best.cell]}, y_val), l2=(best.l2,))
    cells: dict[Cell, float] = {}
    for each in grid:
        cells[each.cell] = max(each.accuracy[0], cells.get(each.cell, 0.0))
    table = [[*cell, score] for cell, score in cells.items()]
    return {"top1": final.accuracy[0], "cell": list(best.cell), "l2": best.l2, "grid": table}, best


def head(
    settings: DiffusionSettings, parts: Parts, cell: Cell, chosen: Tensor, classes: int, path: Path
) -> float:
    """Top-1 of a head that is trained on the standardised maps of a cell, and written to `path`."""
    (train, y), (val, y_val) = parts["train"], parts["val"]
    maps = train[cell][chosen]
    mean, std = maps.mean(0), maps.std(0)
    std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)  # as the probes: constant ones are not scaled up
    torch.manual_seed(settings.seed)
    made_with: dict[str, Any] = {"kind": settings.head, "channels": maps.shape[1], "side": maps.shape[2]}
    made_with["classes"] = classes
    made = make_head(**made_with)
    with user_errors(FloatingPointError):
        fit_heads(
            {cell: made},
            {cell: (maps - mean) / std},
            y[chosen],
            steps=settings.head_steps,
            seed=settings.seed,
        )
    with writing(path):
        state = {"arguments": made_with, "state_dict": made.state_dict()}
        torch.save(state | {"cell": list(cell), "mean": mean, "std": std}, path)
    with torch.no_grad():
        logits = torch.cat([made((part - mean) / std) for part in val[cell].split(512)])
    return float((logits.argmax(1) == y_val).double().mean())


def draw_grid(grid: list[list[Any]], path: Path) -> None:
    """The best pooling of every timestep and block."""
    rows: dict[str, dict[str, float]] = {}
    for t, block, _, score in grid:
        row = rows.setdefault(f"t = {t}", {})
        row[block] = max(score, row.get(block, 0.0))
    heatmap(rows, path, "validation accuracy, % (best pooling and penalty)")


if __name__ == "__main__":
    run_main(main)
