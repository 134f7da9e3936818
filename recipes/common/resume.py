"""What a checkpoint of a run holds, and how a run goes on from one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer

from leaven.callbacks import Attached
from leaven.recipes.common import checkpoint
from leaven.recipes.common.checkpoint import CheckpointError, random_state, set_random_state
from leaven.recipes.common.flags import UserError
from leaven.recipes.common.run_folder import RunFolder
from leaven.recipes.common.sampler import KeyedBatchSampler
from leaven.recipes.common.schedule import Plan
from leaven.recipes.common.start import LoopSettings, differences, not_exactly, on_main

# What the flags decide about a group of parameters once; its learning rate and decay are set for every update.
_CHOSEN = ("betas", "lr_scale")


@dataclass
class Training:
    """Everything that changes during training; learning rate, decay and masks follow from the update."""

    accelerator: Accelerator
    objective: nn.Module
    optimizer: Optimizer
    sampler: KeyedBatchSampler
    callbacks: Attached | None
    plan: Plan
    settings: LoopSettings
    run: RunFolder

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it continues."""
        return self.settings.trajectory() | {
            "processes": self.accelerator.num_processes,
            "images": self.sampler.n,
            "device": self.accelerator.device.type,
        }

    def save(self, update: int) -> None:
        """Write the checkpoint of the state after ``update`` updates; to be called by all processes.

        Raises:
            CheckpointError: on all processes, if the main one could not write it.
        """
        scaler = self.accelerator.scaler
        # One per process: dropout and drop path differ between them. Everything else is equal on all.
        random = gather_object([random_state(self.accelerator.device)])
        state = {
            "update": update,
            "updates_per_epoch": self.plan.updates_per_epoch,
            "identity": self.identity(),
            "model": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "callbacks": None if self.callbacks is None else self.callbacks.state_dict(),
            "random": random,
        }
        on_main(lambda: checkpoint.save(self.run.checkpoints, update, state, self.settings.keep))

    def resume(self) -> int:
        """Load the newest checkpoint if ``--resume`` was given; returns the updates done, 0 at the start.

        Raises:
            CheckpointError: damaged, or of another model.
            UserError: of other settings, data or processes, and ``--resume-changed`` was not given.
        """
        if self.settings.resume is None:
            return 0
        read: dict[Any, dict[str, Any]] = {}

        def newest() -> tuple[Any, list[str]] | None:
            found = checkpoint.load_newest(self.run.checkpoints, fall_back=self.settings.resume == "auto")
            if found is None:
                return None
            read[found[0]] = found[1]
            return found[0], found[2]

        found = on_main(newest)
        if found is None:
            self.accelerator.print(f"no checkpoint in {self.run.path} yet, starting from the beginning")
            return 0
        path, notes = found
        for note in notes:
            self.accelerator.print(f"warning: {note}")
        state = read.pop(path, None) or checkpoint.load(path)
        changed, update = self._changes(state), int(state["update"])
        if changed:
            update = round(update / state["updates_per_epoch"] * self.plan.updates_per_epoch)
        try:
            self._load(state, update, changed=bool(changed))
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"checkpoint {path} does not fit this model or optimizer: {reason}"
            ) from error
        if changed:
            self.sampler.epoch, within = divmod(update, self.plan.updates_per_epoch)
            taken = range(update - within, update)
            self.sampler.position = sum(map(self.plan.micro_steps, taken))  # fewer under a curriculum
        self.accelerator.print(f"resumed from {path}: {update} of {self.plan.total} updates done")
        return update

    def _changes(self, state: Mapping[str, Any]) -> list[str]:
        """What differs from the run that wrote `state`, in words."""
        before, now = state["identity"], self.identity()
        changed = differences(before, now)
        if not changed:
            return []
        if before.get("opt") != now.get("opt"):
            raise UserError(f"cannot resume {self.run.path} with another optimizer: {', '.join(changed)}")
        if not self.settings.resume_changed:
            raise not_exactly(self.run, changed)
        self.accelerator.print(f"warning: resuming with changes, not bit-equal: {', '.join(changed)}")
        return changed

    def _load(self, state: Mapping[str, Any], update: int, *, changed: bool) -> None:
        self.objective.load_state_dict(state["model"])
        chosen = [{k: group[k] for k in _CHOSEN if k in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        if changed:  # a group comes with the old run's
            for group, own in zip(self.optimizer.param_groups, chosen, strict=True):
                group.update(own)
        self.sampler.load_state_dict(state["sampler"], strict=not changed)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.callbacks is not None and (callbacks := state["callbacks"]) is not None:
            if changed:  # they go by it from the first update on
                callbacks = callbacks | {"progress": callbacks["progress"] | {"step": update}}
            self.callbacks.load_state_dict(callbacks)
        rank = self.accelerator.process_index
        if rank < len(state["random"]):
            set_random_state(state["random"][rank], self.accelerator.device)
