"""Callbacks under Lightning's Trainer. Needs `pip install "leaven[lightning]"`."""

import sys
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from leaven.callbacks.callback import Callback
from leaven.callbacks.checks import SURGERY, check_callbacks
from leaven.callbacks.core import Attached, attach

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise ImportError('AsLightning needs Lightning: pip install "leaven[lightning]"') from error

# Surgery follows no schedule.
_UNCOUNTED = sys.maxsize
# What was done to a network: another Trainer may fit it on, or test it.
_OPERATED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class AsLightning(pl.Callback):
    """leaven's callbacks as one of Lightning's: ``Trainer(callbacks=[AsLightning(EMA(), model="net")])``.

    They are attached when training starts and come off when it ends; surgery happens in Lightning's `setup` of fit,
    validate, test and predict, before optimizers are made and checkpoints loaded, and stays. Their state is in
    Lightning's checkpoints.

    Args:
        *callbacks: see `leaven.callbacks.attach`.
        model: name of the LightningModule's attribute that `training_step` calls, with dots if need be. Not the
            LightningModule itself, whose hooks Lightning goes around.

    Raises:
        TypeError: no callbacks, or something else.
    """

    def __init__(self, *callbacks: Callback, model: str = "model") -> None:
        check_callbacks(callbacks, "AsLightning(*callbacks)")
        if not callbacks:
            raise TypeError("AsLightning takes one callback at least, such as AsLightning(EMA())")
        self.surgery = tuple(callback for callback in callbacks if callback.order < SURGERY)
        self.others = tuple(callback for callback in callbacks if callback.order >= SURGERY)
        self.model = model
        self.attached: Attached | None = None
        self._operated: Attached | None = None
        self._pending: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._pending = None  # what a validation has loaded is not for this run
        if self.surgery and _OPERATED.get(net := self._find(pl_module)) != (what := repr(self.surgery)):
            self._operated = attach(net, None, *self.surgery, total_steps=_UNCOUNTED)
            _OPERATED[net] = what

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Infinite where the Trainer has no end: attach refuses that in one line.
        total: Any = trainer.estimated_stepping_batches
        self.attached = attach(self._find(pl_module), trainer.optimizers, *self.others, total_steps=total)
        if self._pending is not None:
            self.attached.load_state_dict(self._pending)
            self._pending = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.attached is not None:
            self.attached.remove()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.attached is None else self.attached.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = state_dict or None

    def _find(self, pl_module: pl.LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.model)
        except AttributeError as error:
            raise ValueError(
                f"AsLightning: {type(pl_module).__name__} has no module {self.model!r}; give AsLightning(..., model=) "
                "the name of the network that training_step calls"
            ) from error
