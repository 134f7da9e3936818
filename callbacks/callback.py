"""What a callback is: the base class, the progress it reads and the warnings it gives."""

from collections.abc import Callable, Iterable, Sized
from numbers import Real
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class NoEffectWarning(UserWarning):
    """A callback found nothing to act on, or updates passed and a hook of its never fired."""


class ResumeWarning(UserWarning):
    """A run goes on from a checkpoint under another schedule."""


class Handle(Protocol):
    """Whatever undoes something, like the handles that torch returns for hooks."""

    def remove(self) -> None: ...


class Progress:
    """How far training is, counted in optimizer updates that were applied.

    A step that GradScaler skipped and a micro-batch of gradient accumulation do not count. With several
    optimizers a round counts once: as soon as each of them has made an update since the last count.
    """

    def __init__(self, total_steps: int) -> None:
        given: object = total_steps
        if (
            not isinstance(given, Real)
            or not 1 <= total_steps < float("inf")
            or total_steps != int(total_steps)
        ):
            raise ValueError(
                f"total_steps must be the number of optimizer updates, at least 1, not {total_steps!r}"
            )
        self.step = 0
        self.total_steps = int(total_steps)

    @property
    def fraction(self) -> float:
        """`step / total_steps`, in [0, 1]."""
        return min(1.0, self.step / self.total_steps)

    def __repr__(self) -> str:
        return f"Progress({self.step}/{self.total_steps})"


class Callback:
    """Base class. Override `setup`, which hooks into the model, or `update`, which follows every update.

    Rules: do nothing in `eval()` unless asked. Compute every scheduled quantity from `progress` alone, so
    that resume needs no more. Change gradients in gradient hooks (`parameter.register_hook`), never in an
    optimizer's step pre-hook: that one runs before backward under `step(closure)` and after the user's
    clipping otherwise. A hook on a module below the whole one becomes part of what torch.compile compiles,
    and a changing Python number in it recompiles at every update: keep it in a tensor that `update` fills.

    Attributes:
        name: key of the state and name in messages; the class's name unless set, unique within one attach.
        order: who is set up, hooked and updated first: surgery below 20, hooks 50, observers above 80.
        slot: something only one callback can have ("input", "first-layer-gradient", "norm", ...), or None.
        binds: what `setup` gets: the "whole" model, or an objective's `.backbone` (a plain backbone is both).
        supports: which obstacles it works in spite of: "compiled" (already called through torch.compile),
            "sharded" (FSDP, DTensor parameters), "deepspeed".
    """

    name: str = "Callback"
    order: int = 50
    slot: str | None = None
    binds: Literal["whole", "backbone"] = "whole"
    supports: frozenset[str] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterable[Handle]:
        """Hook into the model; return, or better yield, a handle for each thing to undo at the end.

        What was yielded is undone even if a later line of `setup` raises. Handles of torch's forward,
        backward, tensor and optimizer hooks are taken care of: such a hook can be paused, is reported when it
        never fires, and does nothing in deep or pickled copies of the model. Of other handles only
        `.remove()` is called.

        Args:
            model: the module named by `binds`, free of wrappers.
            optimizers: the torch optimizers, free of wrappers; empty where the loop calls `Attached.step`.
            progress: live; keep it.
        """
        return ()

    def update(self) -> None:
        """Called after every counted update, with `progress` advanced and all hooks paused."""

    def logs(self) -> dict[str, float]:
        """The newest values worth logging, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What resume needs beyond progress: plain types and tensors only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; progress has already been restored."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def updates(loader: Sized, epochs: int, accumulation: int = 1, world_size: int = 1) -> int:
    """Optimizer updates in `epochs` passes over a loader, counted as accelerate counts them.

    Args:
        loader: the loader as built, before `accelerator.prepare` shards it. One that already gives each
            process its own share (DistributedSampler, a prepared loader) goes with `world_size=1`.
        epochs: passes over the data.
        accumulation: micro-batches per update; a shorter rest at the end of an epoch makes an update too.
        world_size: number of processes that share the loader's batches.

    Raises:
        ValueError: the loader has no length, or gives a process no batch at all; no accumulation, or no process.
    """
    if min(accumulation, world_size) < 1:
        raise ValueError(
            f"accumulation and world_size must be at least 1, not accumulation={accumulation}, world_size={world_size}"
        )
    try:
        batches = len(loader)
    except TypeError as error:
        raise ValueError("the loader has no length: give total_steps yourself") from error
    sampler = getattr(loader, "batch_sampler", None) or loader
    # accelerate fills the last round up from the start, unless the loader drops incomplete batches.
    drop_last = getattr(sampler, "drop_last", False)
    share = batches // world_size if drop_last else -(-batches // world_size)
    if share < 1 or epochs < 1:
        raise ValueError(
            f"{batches} batches for {world_size} processes in {epochs} epochs: there would be no update"
        )
    return epochs * -(-share // accumulation)


def map_images(
    function: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply `function` to the images (B, C, H, W) among the arguments of a forward call.

    For forward pre-hooks, which should be registered `with_kwargs=True`: HF models are called with
    `model(pixel_values=images)`. The images are the first floating-point tensor with four dimensions.

    Args:
        function: images to images.
        args, kwargs: of the forward call.

    Returns:
        Both, with the images replaced: what such a hook has to return.

    Raises:
        TypeError: there is none.
    """
    for position, value in enumerate(args):
        if _is_images(value):
            return (*args[:position], function(value), *args[position + 1 :]), kwargs
    for name, value in kwargs.items():
        if _is_images(value):
            return args, {**kwargs, name: function(value)}
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim == 4 and value.dtype == torch.uint8:
            raise TypeError(
                "the model was called with images of torch.uint8: normalise them before the model"
            )
    raise TypeError(
        "the model was called without images: expected a floating-point tensor (B, C, H, W) as an argument of its own. "
        "Where they come in a dict or a list, attach to the part of the model that is called with them"
    )


def _is_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()
