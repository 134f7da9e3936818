"""Points in place of samples: the likeliest parameters under a prior, and ensembles of them."""

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from leaven.bayes.functional_prior.likelihoods import LogLik
from leaven.bayes.functional_prior.prior import FunctionalPrior, Params, check_mode


def map_estimate(
    prior: FunctionalPrior,
    loglik: LogLik,
    x: Tensor,
    targets: Tensor,
    *,
    members: int = 1,
    steps: int = 2000,
    batch_size: int = 32,
    lr: float = 0.01,
    seed: int = 0,
) -> Params:
    """Parameters (members, ...) that maximise likelihood times prior, each from a draw of the prior. Adam, cosine.

    One member is the MAP estimate, several are a deep ensemble (Lakshminarayanan et al., NeurIPS 2017): give them to
    `FunctionalPrior.evaluate` and average what they predict. A member has starts and batches of its own, keyed by the
    seed and its number: members trained together are the members trained one by one.

    Args:
        prior: of the parameters; its own are left as they are.
        loglik: see `SGHMC`.
        x, targets: training data (N, ...).
        members: at once.
        steps: updates.
        batch_size: rows, drawn with replacement.
        lr: learning rate at the start; it falls to 0.
        seed: of starts and batches.

    Raises:
        ValueError: numbers out of range, or a network with BatchNorm or Dropout in training mode.
        FloatingPointError: the loss is not finite.
    """
    if min(members, steps, batch_size) < 1 or not lr > 0:
        raise ValueError("members, steps and batch_size must be at least 1, lr greater than 0")
    if len(x) != len(targets):
        raise ValueError(f"{len(x)} rows of x and {len(targets)} targets")
    if not (torch.isfinite(x).all() and torch.isfinite(targets).all()):
        raise ValueError("there is a NaN or an infinity in the data: fill gaps first")
    check_mode(prior.module)
    generators = [torch.Generator(x.device).manual_seed(seed * 1000 + i) for i in range(members)]
    with torch.no_grad():
        starts = [prior.sample(1, generator) for generator in generators]
        params = {name: torch.cat([start[name] for start in starts]).requires_grad_() for name in starts[0]}

    def energy(params: Params, x: Tensor, targets: Tensor) -> Tensor:
        out = functional_call(prior.module, params, (x,))
        return -(loglik(out, targets).mean() + prior.log_prob(params) / len(data))

    data, leaves = x, list(params.values())
    optimizer = torch.optim.Adam(leaves, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        rows = torch.stack(
            [torch.randint(len(x), (batch_size,), generator=g, device=x.device) for g in generators]
        )
        # The sum over members: each has the gradient that it has alone.
        loss = vmap(energy, randomness="different")(params, x[rows], targets[rows]).sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {float(loss)} at update {step + 1}: lower lr")
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
            leaf.grad = gradient
        optimizer.step()
        schedule.step()
    return {name: value.detach() for name, value in params.items()}
