"""What can be told of a genome without training: most are no layers at all."""

import torch
from torch import Tensor

from leaven.callbacks.evonorm.evolved import interpret
from leaven.callbacks.evonorm.genome import Genome

_SHAPE, _GROUPS = (4, 8, 5, 5), 4
_LEAST = 1e-6


class FreeChecks:
    """Why a genome cannot be a layer, found by its graph and by one small batch.

    A layer depends on its input; is no constant over space; is not linear; is finite, and so is its gradient, which is
    not zero.

    Args:
        seed: of the batch.
    """

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x, self.other = (torch.randn(_SHAPE, generator=generator) for _ in range(2))
        self.v0, self.v1 = torch.zeros(_SHAPE[1]), torch.ones(_SHAPE[1])

    def __call__(self, genome: Genome) -> str:
        """The reason in a few words; empty for a genome that passes."""
        if 0 not in genome.live:
            return "does not depend on x"
        if all(op == "neg" for _, op, _ in genome.steps()):
            return "linear"
        if not _reaches(genome):
            return "constant over space"
        x = self.x.clone().requires_grad_()
        y = self._value(genome, x)
        if not torch.isfinite(y).all():
            return "not finite"
        if float((y.amax((2, 3)) - y.amin((2, 3))).detach().max()) < _LEAST:
            return "constant over space"
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        if not torch.isfinite(gradient).all():
            return "gradient not finite"
        if float(gradient.abs().max()) < _LEAST:
            return "no gradient"
        if self._linear(genome, y.detach()):
            return "linear"
        return ""

    def _value(self, genome: Genome, x: Tensor) -> Tensor:
        return interpret(genome, x, self.v0, self.v1, _GROUPS)

    @torch.no_grad()
    def _linear(self, genome: Genome, y: Tensor) -> bool:
        together, other = self._value(genome, self.x + self.other), self._value(genome, self.other)
        nothing = self._value(genome, torch.zeros_like(self.x))
        apart = (together - y - other + nothing).abs().max()
        return float(apart) < 1e-4 * max(1.0, float(y.abs().max()))


def _reaches(genome: Genome) -> bool:
    """Whether there is a way from the input to the output that meets no statistic."""
    varies = {0}
    for i, op, inputs in genome.steps():
        if "_" not in op and varies.intersection(inputs):
            varies.add(i)
    return genome.output in varies
