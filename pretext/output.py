"""What every objective returns."""

from typing import Any, NamedTuple

from torch import Tensor


class Output(NamedTuple):
    """The result of calling an objective on a batch.

    A NamedTuple because accelerate converts tuples (not dataclasses) back to fp32 under mixed precision, and trainers
    that read ``output[0]`` find the loss there.

    Attributes:
        loss: scalar tensor to call ``.backward()`` on, never scaled by accumulation.
        logs: detached scalars by name, for the log.
    """

    loss: Tensor
    logs: dict[str, Any]
