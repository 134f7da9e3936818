"""Attach callbacks to a training loop that somebody else owns, and take them off again.

Every loop calls `model(...)` and `optimizer.step()`. A callback binds to the hook points of these two, so
plain PyTorch, accelerate, Lightning, HF Trainer and timm's train.py all serve, each with one line:

    attached = attach(model, optimizer, EMA(), total_steps=updates(loader, epochs))

Attach after surgery by hand and before the first call of a compiled model; before or after
`accelerator.prepare` and DDP, as you like. Call the model itself: `model.forward(x)` and
`model.forward_features(x)` bypass all hooks.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.optim import Optimizer

from leaven.callbacks.callback import (
    Callback,
    Handle,
    NoEffectWarning,
    Progress,
    ResumeWarning,
    map_images,
    updates,
)
from leaven.callbacks.checks import (
    check_arguments,
    check_claims,
    check_elsewhere,
    check_free,
    check_objective,
    check_obstacles,
    check_plain,
    check_state,
    check_surgery,
    checked_handles,
)
from leaven.callbacks.hooks import Hook, Switch, watch
from leaven.callbacks.stepping import Unstepped, report_untrained
from leaven.callbacks.wrappers import AttachError, inside_another_step, unwrap_model, unwrap_optimizers

__all__ = [
    "AttachError",
    "Attached",
    "Callback",
    "Handle",
    "NoEffectWarning",
    "Progress",
    "ResumeWarning",
    "attach",
    "map_images",
    "updates",
]

# How many updates may pass before a hook that never fired, or an optimizer that never stepped, is reported.
_SILENT_UPDATES = 3
_SILENT_ROUND = 1000
# Who is attached to a model, as long as both live.
_ATTACHED: WeakKeyDictionary[nn.Module, "WeakSet[Attached]"] = WeakKeyDictionary()


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    *callbacks: Callback,
    total_steps: int,
) -> "Attached":
    """Bind callbacks to a model and its optimizer; the loop stays as it is.

    Args:
        model: a backbone or an objective, plain or wrapped (DDP, accelerate, torch.compile not yet called).
        optimizer: one or several, plain or wrapped; None where the loop itself calls `Attached.step`.
        callbacks: any number, in any order: their `order` decides.
        total_steps: optimizer updates of the whole run, see `updates`.

    Raises:
        TypeError: arguments in another order, or a callback's class in place of the callback.
        ValueError: total_steps is no number of updates.
        AttachError: two callbacks claim one slot or one name, one is attached already, the model or optimizer does
            not run hooks, or the objective refuses a callback.
    """
    return Attached(model, optimizer, callbacks, total_steps)


class Attached:
    """Callbacks at work: what `attach` returns, with its arguments. As a context manager it removes them at the end.

    Attributes:
        callbacks: in the order in which they act.
        progress: the count of applied updates.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        callbacks: Iterable[Callback],
        total_steps: int,
    ) -> None:
        callbacks = tuple(callbacks)
        check_arguments(model, optimizer, callbacks)
        self.callbacks = tuple(sorted(callbacks, key=lambda callback: callback.order))
        self.progress = Progress(total_steps)
        others = list(_ATTACHED.get(unwrap_model(model), ()))
        check_claims(self.callbacks)
        check_elsewhere(model, self.callbacks, [each for other in others for each in other.callbacks])
        check_obstacles(model, self.callbacks)
        check_surgery(model, self.callbacks)
        check_objective(model, self.callbacks)
        everywhere = [attached for each in _ATTACHED.values() for attached in each]
        check_free(self.callbacks, [callback for each in everywhere for callback in each.callbacks])
        self._optimizers = unwrap_optimizers(optimizer)
        self._round = [0] * len(self._optimizers)  # updates of each optimizer since the last count
        self._optimizers_report = False
        self._watched_updates = 0
        self._paused = False
        self._switch = Switch()
        self._hooks: list[Hook] = []

        self._whole = whole = unwrap_model(model)
        _ATTACHED.setdefault(whole, WeakSet()).add(self)
        backbone = getattr(whole, "backbone", None)
        parts = {"whole": whole, "backbone": backbone if isinstance(backbone, nn.Module) else whole}
        with ExitStack() as undo:  # in reverse order, also when a setup raises half-way
            undo.callback(self._switch.turn_off_for_good)
            undo.callback(_ATTACHED[whole].discard, self)
            with ExitStack() as silent:  # a pass that a setup makes to look at the model is nobody's training
                for switch in (self._switch, *(other._switch for other in others)):
                    silent.enter_context(switch.off())
                for callback in self.callbacks:
                    made = callback.setup(parts[callback.binds], self._optimizers, self.progress)
                    for handle in checked_handles(made, callback):
                        undo.callback(handle.remove)
                        if hook := watch(handle, whole, self._switch, callback.name):
                            self._hooks.append(hook)
            for each in self._optimizers:
                undo.callback(each.register_step_post_hook(self._after_step).remove)
            if self.callbacks:
                report_untrained(whole, self._optimizers, self._hooks)
            self._unstepped = Unstepped(whole, self._optimizers, self.callbacks)
            undo.callback(self._unstepped.remove)
            self._undo = undo.pop_all()

    def remove(self) -> None:
        """Take everything off again, last come first; the callbacks keep their results."""
        try:
            self._unstepped.report()
        finally:  # also where warnings are errors
            self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:
            self._unstepped.remove()  # which is cause enough for no update
        self.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, no hook runs and no `Callback.update` is called; updates still count.

        Code that torch.compile made of the hooks honours this too. What surgery changed stays changed.
        """
        before, self._paused = self._paused, True
        try:
            with self._switch.off():
                yield
        finally:
            self._paused = before

    def step(self) -> None:
        """Report one applied update, for engines that bypass torch's optimizer hooks (DeepSpeed).

        Does nothing once the optimizer's own hooks have reported a step, so a loop may call it after every step that
        was not skipped.
        """
        if not self._optimizers_report:
            self._count()

    def logs(self) -> dict[str, float]:
        """The newest values of all callbacks."""
        return {name: value for callback in self.callbacks for name, value in callback.logs().items()}

    def state_dict(self) -> dict[str, Any]:
        """Progress and the state of every callback by name: plain types and tensors.

        For `accelerator.register_for_checkpointing(attached)`, or a checkpoint of your own.
        """
        states = {callback.name: callback.state_dict() for callback in self.callbacks}
        for name, state in states.items():
            check_plain(state, name)
        progress = {"step": self.progress.step, "total_steps": self.progress.total_steps}
        return {"progress": {**progress, "round": list(self._round)}, "callbacks": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; nothing is changed when the names do not fit.

        Raises:
            ValueError: it is no state of callbacks, or the callbacks, or the number of optimizers, are not those that
                were saved.
        """
        check_state(state)
        progress, states = state["progress"], state["callbacks"]
        names = [callback.name for callback in self.callbacks]
        if missing := [name for name in names if name not in states]:
            raise ValueError(f"the checkpoint has no state for {', '.join(missing)}, only for {list(states)}")
        if unexpected := [name for name in states if name not in names]:
            raise ValueError(
                f"the checkpoint has state for {', '.join(unexpected)}, but attached are {', '.join(names)}"
            )
        if len(progress["round"]) != len(self._round):
            raise ValueError(
                f"the checkpoint was written with {len(progress['round'])} optimizers, not {len(self._round)}"
            )
        if progress["total_steps"] != self.progress.total_steps:
            warnings.warn(
                f"the checkpoint was written with total_steps={progress['total_steps']}, this run has "
                f"{self.progress.total_steps}: schedules differ from here on",
                ResumeWarning,
                stacklevel=2,
            )
        self.progress.step = progress["step"]
        self._round = list(progress["round"])
        for callback in self.callbacks:
            try:
                callback.load_state_dict(states[callback.name])
            except KeyError as error:
                raise ValueError(f"the checkpoint's state of {callback.name} has no {error}") from error

    def __repr__(self) -> str:
        return f"Attached({', '.join(map(repr, self.callbacks))}; {self.progress})"

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        if inside_another_step(optimizer):
            return
        self._optimizers_report = True
        self._unstepped.remove()
        # GradScaler calls a fused optimizer's step even when it found infinities: the kernel skips.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        which = self._optimizers.index(optimizer)
        self._round[which] += 1
        if all(self._round):
            self._count()
        elif self._round[which] == _SILENT_ROUND:
            silent = type(self._optimizers[self._round.index(0)]).__name__
            warnings.warn(
                f"progress stands still: one optimizer made {_SILENT_ROUND} updates, but {silent} none; "
                "attach only optimizers that take part in every round",
                NoEffectWarning,
                stacklevel=2,
            )

    def _count(self) -> None:
        self._unstepped.remove()
        self._round = [0] * len(self._optimizers)
        self.progress.step += 1
        if self.progress.step == self.progress.total_steps + 1:
            warnings.warn(
                f"update {self.progress.step} of total_steps={self.progress.total_steps}: schedules stand at "
                "their end from here on; give attach the updates of the whole run, see leaven.callbacks.updates",
                NoEffectWarning,
                stacklevel=2,
            )
        if self._paused:
            return
        if self._watched_updates == 0:  # FSDP may have sharded the model after attach; compiling it is fine
            check_obstacles(self._whole, self.callbacks, ignored="compiled")
            self._report_foreign_optimizers()
        with self._switch.off():  # observers see the plain model
            for callback in self.callbacks:
                callback.update()
        self._watched_updates += 1
        if self._watched_updates == _SILENT_UPDATES:
            self._report_silent_hooks()

    def _report_foreign_optimizers(self) -> None:
        # Not in attach, and no error: who shards the model afterwards gets other parameters in both.
        own = {id(parameter) for parameter in self._whole.parameters()}
        for each in self._optimizers:
            if own.isdisjoint(id(parameter) for group in each.param_groups for parameter in group["params"]):
                warnings.warn(
                    f"{type(each).__name__} updates no parameter of the {type(self._whole).__name__} that the "
                    "callbacks are attached to: attach the model and its own optimizer",
                    NoEffectWarning,
                    stacklevel=2,
                )

    def _report_silent_hooks(self) -> None:
        for name in dict.fromkeys(hook.owner for hook in self._hooks if not hook.fired):
            own = [hook for hook in self._hooks if hook.owner == name]
            silent = [hook for hook in own if not hook.fired]
            names = ", ".join(getattr(hook.function, "__name__", repr(hook.function)) for hook in silent)
            what = "none of its hooks ran" if len(silent) == len(own) else f"its hook {names} never ran"
            warnings.warn(
                f"{name} has no effect: {_SILENT_UPDATES} updates passed and {what}. Call model(...) itself, not "
                "model.forward or forward_features; attach again after a layer is replaced or unfrozen; attach before "
                "the first call of a compiled model, or call torch.compiler.reset() first",
                NoEffectWarning,
                stacklevel=2,
            )
