"""How far two sets of functions are from each other, from their values at some points."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Critic", "energy_distance", "sliced_distance", "train_critic"]


def energy_distance(f: Tensor, g: Tensor) -> Tensor:
    """2 E|F - G| - E|F - F'| - E|G - G'| of two sets of functions: 0 if, and only if, they are alike.

    Unbiased, so that it can be negative; needs no critic. The paper of the functional prior does not have it.

    Source: Szekely & Rizzo, Energy statistics, 2013.

    Args:
        f, g: values (n, M) and (m, M) at M inputs, two functions or more of each.
    """
    n, m = len(f), len(g)
    within = torch.cdist(f, f).sum() / (n * (n - 1)) + torch.cdist(g, g).sum() / (m * (m - 1))
    return 2 * torch.cdist(f, g).mean() - within


def sliced_distance(
    f: Tensor, g: Tensor, slices: int = 200, generator: torch.Generator | None = None
) -> Tensor:
    """Wasserstein-1 distance of random projections, averaged, of two sets of functions.

    Scaled so that it gives the Wasserstein-1 distance itself for a shift by any vector, on average over directions.

    Source: Bonneel et al., Sliced and Radon Wasserstein barycenters of measures, 2015.

    Args:
        f, g: values (n, M) at M inputs, as many functions of each.
        slices: projections.
        generator: on the device of the values; None takes the global one.
    """
    points = f.shape[1]
    directions = torch.randn(points, slices, generator=generator, dtype=f.dtype, device=f.device)
    directions = directions / directions.norm(dim=0)
    scale = 1 / _mean_projection(points)
    ours, theirs = ((each @ directions).sort(0).values for each in (f, g))
    distance: Tensor = (ours - theirs).abs().mean()
    return scale * distance


def _mean_projection(points: int) -> float:
    """E|u_1| of a uniform direction u in so many dimensions."""
    return math.exp(math.lgamma(points / 2) - math.lgamma((points + 1) / 2)) / math.sqrt(math.pi)


class Critic(nn.Module):
    """The function whose difference of means is the Wasserstein-1 distance: M -> 200 -> 200 -> 1, softplus.

    Weights are Xavier's, biases standard normal, as in the authors' code.

    Args:
        points: M, at which functions are compared.
        width: of both hidden layers.
    """

    def __init__(self, points: int, width: int = 200) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(points, width), nn.Linear(width, width), nn.Linear(width, 1)])
        self.reset()

    def reset(self) -> None:
        """Draw all weights anew."""
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_normal_(layer.weight)
            nn.init.normal_(layer.bias)

    def forward(self, functions: Tensor) -> Tensor:
        """(n, 1) of functions (n, M)."""
        first, second, last = self.layers
        out: Tensor = last(F.softplus(second(F.softplus(first(functions)))))
        return out


def train_critic(
    critic: Critic,
    f: Tensor,
    g: Tensor,
    steps: int,
    lr: float = 0.02,
    penalty: float = 10.0,
    threshold: float = 0.1,
) -> int:
    """Make the difference of the critic's means on two sets of functions as large as its slope of 1 allows.

    Adagrad from a fresh accumulator: in the authors' code it outlives the critic's weights, and the rate shrinks from
    one fit to the next.

    The penalty gives way: of functions that are shifted by d the difference is d (1 + d / (2 penalty)), and not d.

    Source: Gulrajani et al., Improved training of Wasserstein GANs, 2017, for the two-sided penalty.

    Args:
        critic: trained in place.
        f, g: functions (n, M), without gradient.
        steps: at most so many.
        lr: of Adagrad.
        penalty: weight of (slope - 1)^2 between paired functions.
        threshold: stop when the norm of the gradient is below it.

    Returns:
        The number of steps done.
    """
    optimizer = torch.optim.Adagrad(critic.parameters(), lr=lr)
    for step in range(steps):
        mix = torch.rand(len(f), 1, dtype=f.dtype, device=f.device)
        between = (mix * f + (1 - mix) * g).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        loss = critic(g).mean() - critic(f).mean() + penalty * (slope.norm(dim=1) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        norms = [p.grad.square().sum() for p in critic.parameters() if p.grad is not None]
        if torch.stack(norms).sum().sqrt() < threshold:
            return step + 1
    return steps
