"""Train a deep kernel machine on vectors: tables, or features that were extracted once."""

import math
from collections.abc import Callable

import torch

from leaven.backbones.probe import seeded
from leaven.bayes.deep_kernel_machine.machine import DeepKernelMachine
from leaven.pretext.evaluation import Values


def fit(
    machine: DeepKernelMachine,
    x: Values,
    targets: Values,
    *,
    steps: int = 1000,
    batch_size: int = 256,
    lr: float = 0.01,
    seed: int = 0,
    report: Callable[[int, float], object] | None = None,
) -> DeepKernelMachine:
    """Adam with minibatches of a shuffled pass after another, the learning rate falling to 0 as half a cosine.

    Takes the inducing points from `x` if the machine has none. What is drawn depends on `seed` alone; the global random
    state is left as it was.

    Args:
        machine: trained in place, and left in eval mode.
        x: (N, D), standardised; a tensor, an array or lists. Images (N, C, H, W) for a `ConvolutionalDKM`.
        targets: (N, C) or (N,), see `likelihood` of `DeepKernelMachine`.
        steps: updates.
        batch_size: at most N points are taken.
        lr: where it starts.
        seed: of the order, the inducing points and the draws of the loss.
        report: called with the number of updates done and the loss, after each.

    Raises:
        FloatingPointError: the loss is not finite; the machine has the parameters that gave it.
        ValueError: numbers that do not fit, or are not finite; see `DeepKernelMachine.init_inducing` and `.loss`.
    """
    x, targets = torch.as_tensor(x), torch.as_tensor(targets)
    if len(x) != len(targets):
        raise ValueError(f"{len(x)} rows of x and {len(targets)} targets")
    for name, values in (("x", x), ("the targets", targets)):
        if not torch.isfinite(values).all():
            raise ValueError(f"there is a NaN or an infinity in {name}: fill gaps first")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    if not machine.initialised:
        machine.init_inducing(x, seed=seed)
    n, batch_size = len(x), min(batch_size, len(x))
    optimizer = torch.optim.Adam(
        (p for p in machine.parameters() if p.requires_grad), lr=lr, betas=(0.9, 0.9)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + math.cos(math.pi * i / steps)) / 2)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    machine.train()
    with seeded(seed, x.device):
        for step in range(1, steps + 1):
            if len(order) < batch_size:
                order = torch.cat([order, torch.randperm(n, generator=generator)])
            batch, order = order[:batch_size], order[batch_size:]
            optimizer.zero_grad()
            loss = machine.loss(x[batch], targets[batch], n)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {float(loss.detach())} at update {step} of {steps}: lower lr or raise nu"
                )
            loss.backward()
            optimizer.step()
            schedule.step()
            if report is not None:
                report(step, float(loss.detach()))
    return machine.eval()
