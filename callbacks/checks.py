"""What `attach` and its checkpoints refuse, each in one line."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from leaven.callbacks.callback import Callback, Handle
from leaven.callbacks.wrappers import AttachError, in_ddp, obstacles, unwrap_model

# Callbacks of a lower order change the model itself.
SURGERY = 20
# What a state may hold beside tensors and containers.
_PLAIN = (type(None), bool, int, float, str, bytes)


def check_arguments(model: object, optimizer: object, callbacks: Sequence[object]) -> None:
    """Mistakes of who writes the call: another order, classes, a list."""
    order = "attach takes model, optimizer, *callbacks and total_steps="
    if not isinstance(model, nn.Module):
        raise TypeError(f"{order}: the first is a module, not {_named(model)}")
    if isinstance(optimizer, nn.Module) or _is_callback(optimizer):
        raise TypeError(
            f"{order}: the second is the model's optimizer, or None where the loop calls attached.step(), not "
            f"{_named(optimizer)}"
        )
    check_callbacks(callbacks, "attach(model, optimizer, *callbacks, total_steps=)")


def check_callbacks(callbacks: Sequence[object], call: str) -> None:
    """What `call` was given as callbacks."""
    for callback in callbacks:
        if isinstance(callback, type) and issubclass(callback, Callback):
            raise TypeError(f"{call} takes callbacks, not their classes: {callback.__name__}(...)")
        if isinstance(callback, list | tuple):
            raise TypeError(f"{call} takes callbacks one by one, not a {type(callback).__name__}: *callbacks")
        if not isinstance(callback, Callback):
            raise TypeError(f"{call}: {_named(callback)} is no callback of leaven's")


def checked_handles(found: Iterable[Handle], callback: Callback) -> Iterator[Handle]:
    """What a `setup` returned, handle by handle. It is somebody's own code, so its type is not taken on trust."""
    how = f"{callback.name}.setup must yield a handle for each thing to undo, or return ()"
    given: object = found
    if not isinstance(given, Iterable):
        if callable(remove := getattr(given, "remove", None)):  # `return handle`: nobody else would undo it
            remove()
        raise TypeError(f"{how}: it returned {'None' if given is None else _named(given)}")
    for handle in given:
        if not callable(getattr(handle, "remove", None)):
            raise TypeError(
                f"{how}: it gave {'None' if handle is None else _named(handle)}, without .remove()"
            )
        yield handle


def check_objective(model: nn.Module, callbacks: Sequence[Callback]) -> None:
    """An objective that runs its backbone in a way of its own says which slots cannot work there, and why."""
    for module in model.modules():
        refused: dict[str, str] = getattr(module, "refused_slots", {})
        for callback in callbacks:
            if callback.slot in refused:
                raise AttachError(
                    f"cannot attach {callback.name} to {type(module).__name__}: {refused[callback.slot]}"
                )


def check_state(state: Any) -> None:
    """Another object's state, or none."""
    wanted = {"progress": {"step", "total_steps", "round"}, "callbacks": set()}
    for key, parts in wanted.items():
        part = state.get(key) if isinstance(state, dict) else None
        if not isinstance(part, dict) or not parts <= part.keys():
            raise ValueError(
                f"this is no state of attached callbacks, which has {key!r}: give what attached.state_dict() returned"
            )


def _is_callback(thing: object) -> bool:
    return isinstance(thing, Callback) or (isinstance(thing, type) and issubclass(thing, Callback))


def _named(thing: object) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else _a(type(thing).__name__)


def _a(name: str) -> str:
    """With its article: capitals are spelt, an SGD."""
    vowels = "AEFHILMNORSX" if name[:2].isupper() else "AEIOaeio"
    return f"{'an' if name[0] in vowels else 'a'} {name}"


def check_elsewhere(model: nn.Module, callbacks: Sequence[Callback], others: Sequence[Callback]) -> None:
    """Slots are claimed per model, not per call of `attach`; `others` are attached to it already."""
    taken = {each.slot: each.name for each in others if each.slot}
    for callback in callbacks:
        if callback.slot in taken:
            name = type(unwrap_model(model)).__name__
            raise AttachError(
                f"{taken[callback.slot]}, attached to this {name} already, and {callback.name} both "
                f"claim the slot {callback.slot!r}: remove the first one"
            )


def check_free(callbacks: Sequence[Callback], taken: Sequence[Callback]) -> None:
    """An instance serves one model at a time; surgery, which is done once it is attached, is free again."""
    for callback in callbacks:
        if callback.order >= SURGERY and any(callback is each for each in taken):
            raise AttachError(
                f"this {callback.name} is attached already: attach another one, or first call .remove() of what attach "
                "returned for it"
            )


def check_claims(callbacks: Sequence[Callback]) -> None:
    """Two of one name or slot."""
    names: set[str] = set()
    slots: dict[str, str] = {}
    for callback in callbacks:
        if callback.slot is not None and callback.slot in slots:
            raise AttachError(
                f"{slots[callback.slot]} and {callback.name} both claim the slot {callback.slot!r}: "
                "attach only one of them"
            )
        if callback.name in names:
            raise AttachError(
                f"two callbacks are named {callback.name!r}: give one another name, "
                f"for example callback.name = '{callback.name}_2'"
            )
        names.add(callback.name)
        if callback.slot is not None:
            slots[callback.slot] = callback.name


def check_obstacles(model: nn.Module, callbacks: Sequence[Callback], ignored: str = "") -> None:
    """A model that keeps hooks from working, unless the callbacks support it."""
    for kind, line in obstacles(model):
        refused = [callback.name for callback in callbacks if kind not in callback.supports]
        if refused and kind != ignored:
            raise AttachError(f"cannot attach {', '.join(refused)} to {type(model).__name__}: {line}")


def check_surgery(model: nn.Module, callbacks: Sequence[Callback]) -> None:
    """Changed parameters below DDP, which goes by those that it found."""
    surgery = [callback.name for callback in callbacks if callback.order < SURGERY]
    if surgery and in_ddp(model):
        raise AttachError(
            f"{', '.join(surgery)} changes the parameters of {type(unwrap_model(model)).__name__}: attach it "
            "before it is wrapped in DistributedDataParallel (before accelerator.prepare)"
        )


def check_plain(value: Any, owner: str) -> None:
    """Checkpoints are read by `torch.load(weights_only=True)` and by people: no pickled classes."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(key, owner)
            check_plain(item, owner)
    elif isinstance(value, list | tuple):
        for item in value:
            check_plain(item, owner)
    elif type(value) not in _PLAIN and not isinstance(value, Tensor):
        raise TypeError(
            f"the state of {owner} holds {_named(value)}: only plain types and tensors can be saved"
        )
