"""Whether the attached optimizers train the model: warnings where they do not."""

import warnings
from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from leaven.callbacks.callback import Callback, NoEffectWarning
from leaven.callbacks.checks import SURGERY
from leaven.callbacks.hooks import Hook
from leaven.callbacks.wrappers import obstacles

# Backward passes without one update: gradient accumulation rarely makes so many; at the end fewer are enough.
_SILENT_BACKWARDS = 64
_SILENT_AT_END = 8


class Unstepped:
    """Counts backward passes until the first update, and warns where none comes.

    It listens to the gradients of the first and the last parameter that is trained: unlike a forward hook that costs a
    compiled model nothing. Surgery alone follows no progress and is not watched.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], callbacks: Sequence[Callback]
    ) -> None:
        self.names = ", ".join(callback.name for callback in callbacks)
        self.optimizers = ", ".join(type(each).__name__ for each in optimizers)
        self.backwards: dict[int, int] = {}
        trained = [p for p in model.parameters() if p.requires_grad and p.is_leaf]
        watched = {id(p): p for p in (*trained[:1], *trained[-1:])} if _follow_progress(callbacks) else {}
        self._handles = [p.register_post_accumulate_grad_hook(self._count) for p in watched.values()]

    def remove(self) -> None:
        """Stop listening: there was an update, or nobody waits for one."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def report(self, least: int = _SILENT_AT_END) -> None:
        """Warn, once, where there have been so many backward passes."""
        passes = max(self.backwards.values(), default=0)
        if not self._handles or passes < least:
            return
        self.remove()
        cause = (
            f"the attached {self.optimizers} made no step: attach the optimizer that the loop steps"
            if self.optimizers
            else "attached.step() was not called: with optimizer=None the loop calls it after every update"
        )
        warnings.warn(
            f"{self.names}: not one update was counted in {passes} backward passes: {cause}",
            NoEffectWarning,
            stacklevel=3,
        )

    def _count(self, parameter: Tensor) -> None:
        self.backwards[id(parameter)] = self.backwards.get(id(parameter), 0) + 1
        self.report(_SILENT_BACKWARDS)


def report_untrained(model: nn.Module, optimizers: Sequence[Optimizer], hooks: Sequence[Hook]) -> None:
    """Warn of parameters that ask for gradients and are in no parameter group."""
    held = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    unused = getattr(model, "_ddp_params_and_buffers_to_ignore", ())  # which get no gradient
    own = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in unused}
    missing = {name: p for name, p in own.items() if id(p) not in held}
    # One of another model is reported at the first update. Who shards the model gets other parameters.
    if not missing or len(missing) == len(own) or any(kind != "compiled" for kind, _ in obstacles(model)):
        return
    first = ", ".join([*missing][:2]) + (", ..." if len(missing) > 2 else "")
    acting = {
        f"{name}, on which {hook.owner} acts"
        for name, p in missing.items()
        for hook in hooks
        if any(hook is each for each in (p._backward_hooks or {}).values())
    }
    among = f"; among them {', '.join(sorted(acting))}: it has no effect there" if acting else ""
    warnings.warn(
        f"{len(missing)} of the {len(own)} parameters of {type(model).__name__} that require a gradient are in no "
        f"parameter group of the attached optimizer ({first}) and stay as they are{among}. Give the optimizer all of "
        "the model's parameters, attach all optimizers, or freeze these",
        NoEffectWarning,
        stacklevel=4,
    )


def _follow_progress(callbacks: Sequence[Callback]) -> bool:
    return any(callback.order >= SURGERY for callback in callbacks)
