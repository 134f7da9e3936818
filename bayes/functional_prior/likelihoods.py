"""Log likelihoods that a posterior is sampled, or its mode found, with."""

import math
from collections.abc import Callable

from torch import Tensor

LogLik = Callable[[Tensor, Tensor], Tensor]


def gaussian_loglik(noise: float) -> LogLik:
    """Log likelihood (B,) of real targets (B, K) with independent noise, in nats, as a function of outputs and targets.

    Args:
        noise: variance.

    Raises:
        ValueError: it is not greater than 0; on calling, targets of another shape than the outputs.
    """

    if not noise > 0:
        raise ValueError(f"noise must be greater than 0, got {noise}")

    def loglik(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape != targets.shape:
            raise ValueError(f"targets {tuple(targets.shape)} for outputs {tuple(outputs.shape)}")
        each = (targets - outputs).square() / noise + math.log(2 * math.pi * noise)
        return -0.5 * each.flatten(1).sum(1)

    return loglik


def softmax_loglik(outputs: Tensor, targets: Tensor) -> Tensor:
    """Log likelihood (B,) of class indices given logits, in nats.

    Args:
        outputs: logits (B, K).
        targets: class indices (B,).

    Raises:
        ValueError: targets that are no integers (B,).
    """
    if targets.is_floating_point() or targets.shape != outputs.shape[:1]:
        raise ValueError(
            f"targets {tuple(targets.shape)} of {targets.dtype} for logits {tuple(outputs.shape)}: class indices (B,) "
            "are needed"
        )
    return outputs.log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)
