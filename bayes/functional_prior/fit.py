"""Match a functional prior to a Gaussian process."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from leaven.backbones.probe import seeded
from leaven.bayes.functional_prior.distances import Critic, energy_distance, sliced_distance, train_critic
from leaven.bayes.functional_prior.prior import FunctionalPrior
from leaven.bayes.functional_prior.target import GPTarget

Measure = Callable[[torch.Generator], Tensor]
Distance = Literal["w1", "sliced", "energy"]


def fit_prior(
    prior: FunctionalPrior,
    target: GPTarget,
    measure: Measure,
    distance: Distance = "w1",
    *,
    steps: int = 200,
    critic_steps: int = 200,
    functions: int = 128,
    lr: float = 0.05,
    critic_lr: float = 0.02,
    threshold: float = 0.1,
    chunk_size: int | None = None,
    seed: int = 0,
    report: Callable[[int, float], object] | None = None,
) -> list[float]:
    """Move the prior's parameters until its functions are as the target's at random points. RMSprop.

    Source: Tran et al., JMLR 2022, algorithm 1, for "w1", whose defaults are those of the authors' UCI experiments.
    "energy" and "sliced" need no critic and are this package's addition. Draws are keyed by `seed`; the global random
    state is left as it was.

    Args:
        prior: changed in place.
        target: what to be like.
        measure: gives inputs (M, ...) for a generator; see `table_measure`.
        distance: between the functions' values at these inputs, summed over outputs.
        steps: updates.
        critic_steps: at most so many, before every update, of a critic that starts afresh.
        functions: of either kind, in every update.
        lr, critic_lr, threshold: see `train_critic`.
        chunk_size: see `FunctionalPrior.evaluate`.
        report: called with the number of updates done and the distance.

    Returns:
        The distance before every update.

    Raises:
        FloatingPointError: the distance is not finite.
        ValueError: see `FunctionalPrior.evaluate` and `GPTarget.sample`.
    """
    if distance not in ("w1", "sliced", "energy"):
        raise ValueError(f'distance must be "w1", "sliced" or "energy", not {distance!r}')
    if steps < 1 or functions < 2:
        raise ValueError(f"steps must be at least 1 and functions at least 2, got {steps} and {functions}")
    optimizer = torch.optim.RMSprop(prior.parameters(), lr=lr)
    device = next(prior.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    history: list[float] = []
    critic: Critic | None = None
    with seeded(seed, device):
        for step in range(1, steps + 1):
            x = measure(generator)
            draw = partial(_functions, prior, target, x, functions, generator, chunk_size)
            if distance == "w1":
                critic = critic or Critic(len(x)).to(device=device, dtype=next(prior.parameters()).dtype)
                critic.reset()
                with torch.no_grad():
                    f, g = (values.flatten(0, 1) for values in draw())
                train_critic(critic, f, g, critic_steps, critic_lr, threshold=threshold)
            found = _between(*draw(), distance, critic)
            if not torch.isfinite(found):
                raise FloatingPointError(f"the distance is {float(found)} at update {step}: lower lr")
            optimizer.zero_grad()
            found.backward(inputs=list(prior.parameters()))  # and none of the module's own
            optimizer.step()
            history.append(float(found.detach()))
            if report is not None:
                report(step, history[-1])
    return history


def _functions(
    prior: FunctionalPrior,
    target: GPTarget,
    x: Tensor,
    functions: int,
    generator: torch.Generator,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Values (functions, outputs, M) of the prior's functions and of the target's."""
    f = prior.functions(x, functions, generator, chunk_size)
    f = f.unsqueeze(-1) if f.ndim == 2 else f
    if f.shape[-1] != target.outputs:
        raise ValueError(f"the network has {f.shape[-1]} outputs and the target {target.outputs}")
    return f.mT, target.sample(x, functions, generator).to(f).mT


def _between(f: Tensor, g: Tensor, distance: Distance, critic: Critic | None) -> Tensor:
    """The distance of functions (functions, outputs, M), summed over outputs; "w1" by its trained critic."""
    outputs = f.shape[1]
    if critic is not None:
        means: Tensor = critic(f.flatten(0, 1)).mean() - critic(g.flatten(0, 1)).mean()
        return outputs * means
    way = energy_distance if distance == "energy" else sliced_distance
    return torch.stack([way(f[:, i], g[:, i]) for i in range(outputs)]).sum()


def table_measure(x: Tensor, points: int = 100, real: float = 0.7, margin: float = 0.1) -> Measure:
    """Inputs for tables: a share of real rows, the rest uniform over each column's range and a margin of it.

    Source: Tran et al., JMLR 2022; there the range is that of the test rows, too, which are none of our business.

    Args:
        x: training rows (N, D).
        points: M.
        real: share of real rows, without replacement; at most N.
        margin: share of a column's range that is added on both sides.

    Raises:
        ValueError: rows that are not finite, or a share out of range.
    """
    if not torch.isfinite(x).all():
        raise ValueError("there is a NaN or an infinity in the data: fill gaps first")
    if not 0 <= real <= 1 or points < 1:
        raise ValueError(f"points must be at least 1 and real between 0 and 1, got {points} and {real}")
    low, high = x.min(0).values, x.max(0).values
    low, high = low - margin * (high - low), high + margin * (high - low)
    count = min(round(real * points), len(x))

    def measure(generator: torch.Generator) -> Tensor:
        rows = torch.randperm(len(x), generator=generator, device=x.device)[:count]
        shape = (points - count, x.shape[1])
        between = torch.rand(shape, generator=generator, dtype=x.dtype, device=x.device)
        return torch.cat([x[rows], low + between * (high - low)])

    return measure


def image_measure(images: Tensor, points: int = 64) -> Measure:
    """Inputs for images: some of them, drawn without replacement.

    Args:
        images: (N, C, H, W), or whatever the prior's network takes (N, ...).
        points: M, at most N.
    """

    def measure(generator: torch.Generator) -> Tensor:
        return images[torch.randperm(len(images), generator=generator, device=images.device)[:points]]

    return measure
