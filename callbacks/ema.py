"""The exponential moving average of a model's weights, by timm's ModelEmaV3."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leaven.callbacks.core import AttachError, Callback, Handle, Progress


class EMA(Callback):
    """Keeps averaged weights beside the model, updated once per applied optimizer update.

    As in timm's train.py, the whole model that trains is averaged, buffers too, and the first update copies.
    For an objective's backbone alone, set `ema.binds = "backbone"` before attaching. Every process keeps the
    average. Keys are those of the plain model, whatever DDP or torch.compile put in front.

    Args:
        decay: weight of the old average at each update, in [0, 1].
        warmup: let the decay grow as `1 - (1 + step) ** (-2/3)` until it reaches `decay` (timm's
            `--model-ema-warmup`); for runs that are short against `1 / (1 - decay)` updates.
        device: where to keep the average; the model's device by default.
        name: for a second average beside the first.

    Raises:
        ValueError: a decay out of range.
        AttachError: on attaching, the model cannot be deep-copied.
        RuntimeError: at an update, the model has other parameters than when it was attached.
    """

    order = 90
    supports = frozenset({"compiled"})

    def __init__(
        self,
        decay: float = 0.9999,
        warmup: bool = False,
        device: torch.device | str | None = None,
        name: str = "EMA",
    ) -> None:
        given: object = decay
        if not isinstance(given, Real) or not 0 <= decay <= 1:
            raise ValueError(f"decay must be between 0 and 1, not {decay!r}")
        self.decay = decay
        self.warmup = warmup
        self.device = None if device is None else torch.device(device)
        self.name = name
        self._model: nn.Module
        self._ema: Any = None  # timm's ModelEmaV3

    @property
    def module(self) -> nn.Module:
        """The averaged model, in eval mode; still there after `Attached.remove`."""
        if self._ema is None:
            raise RuntimeError(f"{self.name} has no weights yet: attach it to a model first")
        module: nn.Module = self._ema.module
        return module

    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterable[Handle]:
        self._model, self._progress = model, progress
        self._followed = list(model.parameters())
        try:
            self._ema = self._average_of(model)
        except (TypeError, RuntimeError) as error:  # what copy.deepcopy raises
            raise AttachError(
                f"{self.name} averages a copy of {type(model).__name__}, which cannot be deep-copied ({error}): keep "
                "such an object out of the module, or give the module a __getstate__ that leaves it out"
            ) from error
        return ()

    def update(self) -> None:
        live = list(self._model.parameters())
        same = len(live) == len(self._followed) and all(map(is_, live, self._followed))
        # timm pairs parameters by their order
        if not same or [p.shape for p in live] != [p.shape for p in self.module.parameters()]:
            raise RuntimeError(
                f"{self.name} cannot go on averaging {type(self._model).__name__}, whose parameters are not those "
                "that it was attached to (was its head replaced?): remove it, and attach again after the change"
            )
        here, there = _device(self.module), _device(self._model)
        if self.device is None and here != there:  # the model was moved after attach, by accelerator.prepare
            self._ema = self._average_of(self.module.to(there))
        self._ema.update(self._model, step=self._progress.step)

    @contextmanager
    def swapped(self) -> Iterator[nn.Module]:
        """Within, the model itself has the averaged weights; afterwards its own again, bit for bit."""
        average = _plain_state(self.module)
        live = _plain_state(self._model)
        own = {key: value.clone() for key, value in live.items()}
        _copy(average, live)
        try:
            yield self._model
        finally:
            _copy(own, live)

    def state_dict(self) -> dict[str, Any]:
        return {"module": _plain_state(self.module), "rounding": self._rounding()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own, saved = _plain_state(self.module), state["module"]
        shapes = [{key: value.shape for key, value in each.items()} for each in (own, saved)]
        if odd := sorted(key for key, _ in shapes[0].items() ^ shapes[1].items()):
            raise ValueError(f"the checkpoint's {self.name} is of another model: {odd[0]} does not fit")
        _copy(saved, own)
        if state["rounding"] is not None:
            self._ema._sr_generator.set_state(state["rounding"])

    def __repr__(self) -> str:
        return f"EMA(decay={self.decay}, warmup={self.warmup})"

    def _average_of(self, model: nn.Module) -> Any:
        from timm.utils.model_ema import ModelEmaV3

        return ModelEmaV3(model, decay=self.decay, use_warmup=self.warmup, device=self.device)

    def _rounding(self) -> Tensor | None:
        """State of the generator that rounds bfloat16 averages at random; without it resume is not exact."""
        generator = getattr(self._ema, "_sr_generator", None)  # older versions of timm round to the nearest
        if generator is None or all(v.dtype != torch.bfloat16 for v in self.module.state_dict().values()):
            return None
        state: Tensor = generator.get_state()
        return state


def _plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, its tensors shared, without the key parts of compiled submodules."""
    return {
        ".".join(part for part in key.split(".") if part != "_orig_mod"): value
        for key, value in module.state_dict().items()
    }


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for key, value in target.items():
        value.copy_(source[key])


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
