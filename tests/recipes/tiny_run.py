"""A recipe in small, for tests that start processes: a stand-in objective with BatchNorm, dropout and a mask."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from leaven.callbacks import EMA, attach
from leaven.pretext import Output
from leaven.recipes.common.augment import TrainTransform
from leaven.recipes.common.data import KeyedDataset, make_loader, open_data
from leaven.recipes.common.flags import flag, run_main
from leaven.recipes.common.loop import fit
from leaven.recipes.common.optimizer import make_optimizer
from leaven.recipes.common.sampler import KeyedBatchSampler
from leaven.recipes.common.schedule import Plan
from leaven.recipes.common.start import LoopSettings, read_settings, start


@dataclass
class TinySettings(LoopSettings):
    """A stand-in for a recipe."""

    nan_at: int = flag(0, "the loss is NaN from this update on; 0: never")
    kill_at: int = flag(0, "send --kill-signal to this process in this update")
    kill_signal: str = flag("SIGTERM", "name of a signal")
    inf_gradient_at: int = flag(0, "the gradient is infinite in this update, the loss is not")
    crash_at: int = flag(0, "raise an unexpected error in this update")
    hang_at: int = flag(0, "wait in this update until there is a file `go`")

    FREE = LoopSettings.FREE | {"kill_at", "kill_signal", "crash_at", "hang_at", "nan_at", "inf_gradient_at"}


class Tiny(nn.Module):
    """Predicts hidden pixels; updates are counted to misbehave at a chosen one."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(8, 3, 3, padding=1),
        )

    def forward(self, images: Tensor, mask: Tensor, target: Tensor | None = None) -> Output:
        error = (self.backbone(images * mask) - images).square()
        return Output((error * ~mask).mean(), {"hidden": (~mask).float().mean()})


def main(argv: list[str] | None = None) -> None:
    settings = read_settings(TinySettings, argv)
    accelerator, run, settings = start(settings, "tiny")
    data = open_data(settings.data, seed=settings.seed)
    transform = TrainTransform((16, 16), (0.67, 1.0), 0.5, data.mean, data.std)
    sampler = KeyedBatchSampler(
        len(data.train),
        settings.batch_size,
        settings.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    loader = make_loader(KeyedDataset(data.train, transform), sampler, settings.workers)
    objective = Tiny()
    optimizer = make_optimizer(objective, settings)
    plan = Plan.of(sampler, settings)
    attached = attach(objective, optimizer, EMA(decay=0.9), total_steps=plan.total)

    def forward(model: nn.Module, batch: list[Tensor], generator: torch.Generator) -> Output:
        misbehave(settings, attached.progress.step + 1)
        mask = torch.rand(len(batch[0]), 1, 16, 16, generator=generator) > 0.5
        output: Output = model(batch[0], mask=mask.to(batch[0].device))
        if settings.nan_at and attached.progress.step + 1 >= settings.nan_at:
            output = Output(output.loss * float("nan"), output.logs)
        if attached.progress.step + 1 == settings.inf_gradient_at:
            zero = next(objective.parameters()).sum() * 0
            output = Output(output.loss + torch.sqrt(zero), output.logs)
        return output

    fit(accelerator, objective, optimizer, loader, forward, plan, settings, run, attached)
    if accelerator.is_main_process:
        torch.save(
            {"model": objective.state_dict(), "callbacks": attached.state_dict()}, run.path / "final.pt"
        )
    accelerator.end_training()
    print(f"rank {accelerator.process_index} finished", flush=True)


def misbehave(settings: TinySettings, update: int) -> None:
    if update == settings.kill_at and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), getattr(signal, settings.kill_signal))
    if update == settings.crash_at:
        raise ZeroDivisionError("an error that nobody expects")
    if update == settings.hang_at:
        print("waiting", flush=True)
        while not Path("go").exists():  # not signal.pause(): the signal may be there before it
            time.sleep(0.02)


if __name__ == "__main__":
    run_main(main)
    sys.exit(0)
