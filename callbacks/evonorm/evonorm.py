"""EvoNorm in place of a network's BatchNorm and activation, as a function and as a callback."""

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from leaven.callbacks.callback import Callback, Handle, Progress
from leaven.callbacks.evonorm.genome import Genome
from leaven.callbacks.evonorm.replace import Report, replace_norm_act
from leaven.callbacks.evonorm.watch import Example
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
        **kwargs: timm's: `eps`; of the B series `momentum`, the weight of the newest batch in the running variance.

    Raises:
        TypeError: an argument that the kind does not have.
        ValueError: an unknown kind, no groups, or no channels. On calling, images that are not 4-D; in training, a B
            layer that gets one value per channel.
    """
    from leaven.callbacks.evonorm.layers import build  # imports timm

    return build(kind, num_features, groups, apply_act, **kwargs)


def evolved_norm(genome: Genome, num_features: int, **kwargs: Any) -> nn.Module:
    """A genome as a layer for images (B, num_features, H, W).

    Args:
        genome: what a search found, or `Genome.named`.
        num_features: C.
        **kwargs: see `leaven.callbacks.evonorm.evolved.EvolvedNormAct2d`.

    Raises:
        ValueError: no groups; on calling, images of another shape.
    """
    from leaven.callbacks.evonorm.evolved import EvolvedNormAct2d  # imports torch.fx

    return EvolvedNormAct2d(genome, num_features, **kwargs)


class EvoNorm(Callback):
    """Puts EvoNorm layers where a network has BatchNorm and its activation.

    Where no activation follows a BatchNorm directly, scale and shift alone are left of it. A network that has no other
    places is refused, and one that has few is warned of, see `replace_norm_act`.
    Done once, when it is attached. Weights and biases stay those of the BatchNorm, so that the optimizer stays valid;
    it gets the new parameters, too. What was replaced is the network from then on: `Attached.remove` takes it back
    only before the first update. A checkpoint holds EvoNorm's layers: attach before you load one.

    Source: Liu et al., Evolving Normalization-Activation Layers, NeurIPS 2020 (arXiv 2004.02967).

    Args:
        kind, groups: see `evo_norm`.
        genome: a layer that a search found, or the path of its JSON, in place of a kind; see `EvolvedNormAct2d`.
        example: images that the model takes, if it is not a usual image model, or a dict of the keyword arguments of a
            call.
        **kwargs: see `evo_norm`.

    Attributes:
        report: after attaching, what was replaced and what was not, and why.

    Raises:
        TypeError, ValueError: see `evo_norm`.
        AttachError: on attaching, the model does not run, or nothing of it would be normalised.
    """

    order = 10
    slot = "norm"
    binds = "backbone"

    def __init__(
        self,
        kind: str = "s0",
        *,
        genome: Genome | str | os.PathLike[str] | None = None,
        groups: int = 32,
        example: Example | None = None,
        **kwargs: Any,
    ) -> None:
        if genome is None:
            self.factory: Any = partial(evo_norm, kind, groups=groups, **kwargs)
        else:
            if not isinstance(genome, Genome):
                genome = Genome.from_json(Path(genome).read_text(encoding="utf-8"))
            self.factory = partial(evolved_norm, genome, groups=groups, **kwargs)
        self.factory(1)  # says what is wrong now and not in the middle of surgery
        self.kind = kind if genome is None else f"genome {genome.key}"
        self.groups, self.example = groups, example
        self.report = Report()

    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterable[Handle]:
        try:
            self.report = replace_norm_act(model, self.factory, example=self.example, optimizers=optimizers)
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
