"""Hooks that can be switched off, know whether they ever fired, and are inert in copies of the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Switch:
    """Turns all hooks of one `Attached` off. Compiled code is guarded on `on`, not on hooks coming off."""

    def __init__(self) -> None:
        self.on = True
        self.removed = False

    def turn_off_for_good(self) -> None:
        """At the end, because compiled code may go on calling hooks that were removed."""
        self.on, self.removed = False, True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within, all hooks are off."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before and not self.removed


class Hook:
    """A callback's hook as torch sees it: does nothing while the switch is off, nor ever in copies."""

    # Without arguments: what copy.deepcopy and pickle make of a Hook.
    def __init__(
        self, function: Callable[..., Any] | None = None, switch: Switch | None = None, owner: str = ""
    ) -> None:
        self.function = function
        self.switch = switch
        self.owner = owner
        self.fired = False

    def __call__(self, *args: Any) -> Any:
        if self.function is None or self.switch is None or not self.switch.on:
            return None
        self.fired = True  # written, never read here: reading would recompile
        return self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, ()


def watch(handle: object, model: nn.Module, switch: Switch, owner: str) -> Hook | None:
    """Put a `Hook` around the hook that one of torch's handles stands for; None for other handles.

    Hooks that serve saving and loading are let be: they must work in pauses and copies too.
    """
    if not isinstance(handle, RemovableHandle):
        return None
    hooks = handle.hooks_dict_ref()
    if hooks is None or handle.id not in hooks or any(hooks is each for each in _state_dict_hooks(model)):
        return None
    hook = hooks[handle.id] = Hook(hooks[handle.id], switch, owner)
    return hook


def _state_dict_hooks(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield module._state_dict_hooks
        yield module._state_dict_pre_hooks
        yield module._load_state_dict_pre_hooks
        yield module._load_state_dict_post_hooks
