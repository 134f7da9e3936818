"""Distributions over the weights of one group of parameters: what a functional prior learns the parameters of."""

import math
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaven.backbones.probe import seeded

__all__ = ["FAMILIES", "Family", "Flow", "Gaussian", "Hierarchical"]


def keyed_by(generator: torch.Generator | None) -> AbstractContextManager[None]:
    """Global random numbers from a generator, for what draws from them alone; None leaves them."""
    if generator is None:
        return nullcontext()
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    return seeded(seed, generator.device)


class Family(nn.Module):
    """A distribution over the n numbers of a group, in the units of weights times the square root of their fan-in.

    Its parameters are few and start where the authors' code starts.

    Args:
        n: numbers in the group.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    @abstractmethod
    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws (count, n), independent of each other, with gradient to the parameters."""

    @abstractmethod
    def log_prob(self, values: Tensor) -> Tensor:
        """Log density (...) of values (..., n), normalised."""

    def _normal(self, count: int, generator: torch.Generator | None) -> Tensor:
        like = next(self.parameters())
        return torch.randn(count, self.n, generator=generator, dtype=like.dtype, device=like.device)


class Gaussian(Family):
    """N(0, s^2) for each number, s = softplus(raw), which starts at 1.3133 (raw = 1)."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.raw = nn.Parameter(torch.tensor(1.0))

    @property
    def std(self) -> Tensor:
        """s, a scalar."""
        return F.softplus(self.raw)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return self.std * self._normal(count, generator)

    def log_prob(self, values: Tensor) -> Tensor:
        constant = self.n * (self.std.log() + 0.5 * math.log(2 * math.pi))
        return -0.5 * values.square().sum(-1) / self.std.square() - constant


class Hierarchical(Family):
    """N(0, v) for each number with one v ~ InverseGamma(shape, rate) for all of the group, anew for every draw.

    The density is that of the marginal, a multivariate Student t: sampling a posterior needs no v.
    """

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.raw_shape = nn.Parameter(torch.tensor(1.0))
        self.raw_rate = nn.Parameter(torch.tensor(1.0))

    @property
    def shape(self) -> Tensor:
        """Of the inverse Gamma distribution, a scalar."""
        return F.softplus(self.raw_shape)

    @property
    def rate(self) -> Tensor:
        """Of the inverse Gamma distribution, a scalar."""
        return F.softplus(self.raw_rate)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        # torch draws Gamma variables, with gradient, from the global generator alone.
        with keyed_by(generator):
            precision = torch.distributions.Gamma(self.shape, self.rate).rsample((count, 1))
        return precision.rsqrt() * self._normal(count, generator)

    def log_prob(self, values: Tensor) -> Tensor:
        shape, half = self.shape, self.n / 2
        constant = torch.lgamma(shape + half) - torch.lgamma(shape) + shape * self.rate.log()
        spread = (self.rate + values.square().sum(-1) / 2).log()
        return constant - (shape + half) * spread - half * math.log(2 * math.pi)


class Flow(Family):
    """scale * sinh(tail * (asinh(z) + skew)) of a standard normal z, a scale for each number, skew and tail for all.

    Any skewness and weight of the tails (Jones & Pewsey, Sinh-arcsinh distributions, Biometrika 2009), with an inverse
    and a density in closed form. The authors' planar flows have neither; their density is another distribution's.
    """

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.log_scale = nn.Parameter(torch.zeros(n))
        self.skew = nn.Parameter(torch.tensor(0.0))
        self.log_tail = nn.Parameter(torch.tensor(0.0))

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return self.forward_map(self._normal(count, generator))

    def forward_map(self, z: Tensor) -> Tensor:
        """Of standard normal numbers (..., n) to weights."""
        return self.log_scale.exp() * (self.log_tail.exp() * (z.asinh() + self.skew)).sinh()

    def inverse_map(self, values: Tensor) -> Tensor:
        """Of weights (..., n) to standard normal numbers."""
        return ((values / self.log_scale.exp()).asinh() / self.log_tail.exp() - self.skew).sinh()

    def log_prob(self, values: Tensor) -> Tensor:
        scaled = values / self.log_scale.exp()
        z = self.inverse_map(values)
        # log dz/dx: cosh of the inner argument over tail, scale, and the square root of 1 + scaled^2
        slope = (
            0.5 * torch.log1p(z.square())
            - 0.5 * torch.log1p(scaled.square())
            - self.log_tail
            - self.log_scale
        )
        return (slope - 0.5 * z.square() - 0.5 * math.log(2 * math.pi)).sum(-1)


FAMILIES: dict[str, type[Family]] = {"gaussian": Gaussian, "hierarchical": Hierarchical, "flow": Flow}
