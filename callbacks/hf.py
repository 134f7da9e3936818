"""Callbacks under Hugging Face's Trainer. Needs `pip install "leaven[hf]"`."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leaven.callbacks.callback import Callback
from leaven.callbacks.checks import SURGERY, check_callbacks
from leaven.callbacks.core import Attached, attach

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError('AsTrainerCallback needs transformers: pip install "leaven[hf]"') from error

# Surgery follows no schedule.
_UNCOUNTED = sys.maxsize
# In each of the Trainer's checkpoint folders.
_FILE = "leaven_callbacks.pt"


class AsTrainerCallback(TrainerCallback):
    """leaven's callbacks as one of the Trainer's: ``Trainer(..., callbacks=[AsTrainerCallback(EMA())])``.

    They are attached when training begins and come off when it ends; surgery happens when the Trainer is made, and
    stays. Their state is saved in each of the Trainer's checkpoints, as leaven_callbacks.pt.

    Args:
        *callbacks: see `leaven.callbacks.attach`.
        model: name of a part of the model to attach to, such as "backbone"; all of it by default.
        resume: the checkpoint folder, where it is not one of the Trainer's output_dir.

    Raises:
        TypeError: no callbacks, or something else.
    """

    def __init__(self, *callbacks: Callback, model: str = "", resume: str | Path | None = None) -> None:
        check_callbacks(callbacks, "AsTrainerCallback(*callbacks)")
        if not callbacks:
            raise TypeError("AsTrainerCallback takes one callback at least, such as AsTrainerCallback(EMA())")
        self.surgery = tuple(callback for callback in callbacks if callback.order < SURGERY)
        self.others = tuple(callback for callback in callbacks if callback.order >= SURGERY)
        self.model, self.resume = model, resume
        self.attached: Attached | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.surgery:
            attach(
                self._find(kwargs["model"]), kwargs.get("optimizer"), *self.surgery, total_steps=_UNCOUNTED
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.attached is not None:  # to a training that broke off, which the Trainer does not tell
            self.attached.remove()
        model, optimizer = self._find(kwargs["model"]), kwargs["optimizer"]
        self.attached = attach(model, optimizer, *self.others, total_steps=state.max_steps)
        if state.global_step:
            folder = Path(self.resume or _checkpoint(args, state))
            if not (folder / _FILE).is_file():
                self.attached.remove()
                raise FileNotFoundError(
                    f"training goes on at update {state.global_step}, but {folder / _FILE} is not there: give "
                    "AsTrainerCallback(..., resume=) the checkpoint's folder"
                )
            self.attached.load_state_dict(torch.load(folder / _FILE, weights_only=True))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.attached is not None and state.is_world_process_zero:
            torch.save(self.attached.state_dict(), _checkpoint(args, state) / _FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.attached is not None:
            self.attached.remove()

    def _find(self, model: nn.Module) -> nn.Module:
        try:
            return model.get_submodule(self.model)
        except AttributeError as error:
            raise ValueError(
                f"AsTrainerCallback: {type(model).__name__} has no part {self.model!r}"
            ) from error


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
