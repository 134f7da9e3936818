"""EvoNorm in place of a network's BatchNorm and activation, as a function and as a callback."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from leaven.callbacks.callback import Callback, Handle, Progress
from leaven.callbacks.evonorm.replace import Report, replace_norm_act
from leaven.callbacks.wrappers import AttachError


def evo_norm(
    kind: str, num_features: int, *, apply_act: bool = True, groups: int = 32, **kwargs: Any
) -> nn.Module:
    """An EvoNorm layer for images (B, C, H, W): timm's, with two of its faults mended.

    The B series keeps a running variance over batches, of each process's own images; the S series needs no batch.
    Statistics are taken in float32, of float64 images too. float16 images are computed in float32 throughout.

    Source: Liu et al., Evolving Normalization-Activation Layers, NeurIPS 2020 (arXiv 2004.02967).

    Args:
        kind: "b0", "b1", "b2", "s0", "s1", "s2", or timm's "s0a", "s1a", "s2a".
        num_features: C.
        apply_act: False for a place without activation: scale and shift alone are left, except by the "a" kinds.
        groups: at most so many, of the S series: the largest number that divides C.
        **kwargs: timm's, such as `eps` or `momentum`.

    Raises:
        ValueError: an unknown kind, or no groups. On calling, images that are not 4-D; in training, a B layer that
            gets one value per channel.
    """
    from leaven.callbacks.evonorm.layers import build  # imports timm

    return build(kind, num_features, groups, apply_act, **kwargs)


class EvoNorm(Callback):
    """Puts EvoNorm layers where a network has BatchNorm and its activation.

    Done once, when it is attached. Weights and biases stay those of the BatchNorm, so that the optimizer stays valid;
    it gets the new parameters, too. What was replaced is the network from then on: `Attached.remove` takes it back
    only before the first update. A checkpoint holds EvoNorm's layers: attach before you load one.

    Args:
        kind, groups: see `evo_norm`.
        example: images that the model takes, if it is not a usual image model.
        **kwargs: see `evo_norm`.

    Attributes:
        report: after attaching, what was replaced and what was not, and why.

    Raises:
        ValueError: see `evo_norm`.
        AttachError: on attaching, the model does not run.
    """

    order = 10
    slot = "norm"
    binds = "backbone"

    def __init__(
        self, kind: str = "s0", *, groups: int = 32, example: Tensor | None = None, **kwargs: Any
    ) -> None:
        evo_norm(kind, 1, groups=groups, **kwargs)  # says what is wrong now and not in the middle of surgery
        self.kind, self.groups, self.example, self.kwargs = kind, groups, example, kwargs
        self.report = Report()

    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterable[Handle]:
        factory = partial(evo_norm, self.kind, groups=self.groups, **self.kwargs)
        try:
            self.report = replace_norm_act(model, factory, example=self.example, optimizers=optimizers)
        except ValueError as error:
            raise AttachError(f"EvoNorm: {error}") from error
        yield _UntilTrained(self.report, progress)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["kind"] != self.kind:
            raise ValueError(f"the checkpoint has EvoNorm-{state['kind']} layers, not {self.kind}")

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def __repr__(self) -> str:
        return f"EvoNorm({self.kind!r}, groups={self.groups})"


class _UntilTrained:
    """Undoes the surgery of an attach that failed or came to nothing; a network that has learnt keeps its layers."""

    def __init__(self, report: Report, progress: Progress) -> None:
        self.report, self.progress = report, progress

    def remove(self) -> None:
        if self.progress.step == 0:
            self.report.undo()
