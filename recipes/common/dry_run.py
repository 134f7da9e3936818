"""``--dry-run``: does a recipe work here, with this backbone and these flags? No data, two updates."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from leaven.backbones import create, load, metadata, resolve
from leaven.recipes.common.batches import rebuild
from leaven.recipes.common.checkpoint import listing
from leaven.recipes.common.checkpoint import load as load_checkpoint
from leaven.recipes.common.data import Data
from leaven.recipes.common.flags import UserError, to_yaml
from leaven.recipes.common.run_folder import RunFolder
from leaven.recipes.common.sources import ArraySource
from leaven.recipes.common.start import LoopSettings
from leaven.recipes.common.start import resolve as final_settings

S = TypeVar("S", bound=LoopSettings)


def dry_run(
    train: Callable[[S, Data], None],
    settings: S,
    classes: int = 0,
) -> None:
    """Train two updates on noise, again from the checkpoint between them, and load what was exported.

    Args:
        train: the recipe; it prints and writes its run folder as always.
        settings: of a real run; what makes it long or needs data is replaced.
        classes: label the noise with so many classes, for a recipe that needs labels.

    Raises:
        UserError: more than one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--dry-run is for one process: leave the launcher out, or give it --num_processes 1")
    print(to_yaml(settings))
    settings = final_settings(settings, 1, os.environ)  # or what a real run would refuse
    size = settings.image_size or (64, 64)
    batch = min(settings.batch_size, 4)
    with tempfile.TemporaryDirectory(prefix="leaven-dry-run-") as folder:
        run = RunFolder(Path(folder) / "run")
        small = replace(
            settings,
            epochs=2,
            warmup_epochs=min(settings.warmup_epochs, 1.0),
            batch_size=batch,
            limit_batches=settings.grad_accum_steps,
            workers=0,
            save_every=1,
            keep=2,
            resume=None,
            log_with=None,
            output_dir=str(run.path),
        )
        data = noise(2 * batch * settings.grad_accum_steps, size, settings.in_chans, classes)
        if kept := getattr(small, "replay_buffer", 0):  # no more than there are images
            buffer: dict[str, Any] = {"replay_buffer": min(kept, len(data.train))}
            small = replace(small, **buffer)
        train(small, data)
        second, first = listing(run.checkpoints)
        before = load_checkpoint(second)["model"]
        second.unlink()
        train(replace(small, resume="auto"), data)
        after = load_checkpoint(listing(run.checkpoints)[0])["model"]
        apart = max(float((before[key].double() - after[key].double()).abs().max()) for key in before)
        notes = metadata(run.backbone)
        after = " after its surgery" if "evonorm" in notes else ""
        if "evonorm" not in notes:
            load(resolve(settings.backbone), run.backbone, image_size=size)
        else:
            head = int(notes.get("num_classes", 0))
            plain = create(settings.backbone, in_chans=settings.in_chans, num_classes=head, image_size=size)
            rebuild(plain, str(run.backbone))
            load(plain, run.backbone)
        print(
            f"dry run: resumed from {first.name}; weights differ by at most {apart:g} from those without the break"
        )
        print(
            f"dry run: exported weights load into the plain backbone{after}; all "
            "works here (on noise in place of the data)"
        )


def noise(n: int, size: tuple[int, int], in_chans: int, classes: int = 0) -> Data:
    """Images of noise, unlabelled or with labels in turn."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, in_chans, *size), generator=generator, dtype=torch.uint8)
    source = ArraySource(images, [i % classes for i in range(n)] if classes else None)
    half = (0.5,) * in_chans
    names = tuple(str(label) for label in range(classes))
    return Data("noise", "noise", source, source, names, half, half, size, ["noise, for a dry run"])
