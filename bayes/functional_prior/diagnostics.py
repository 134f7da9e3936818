"""Have the chains mixed?"""

import torch
from torch import Tensor


def rhat(draws: Tensor) -> Tensor:
    """Split R-hat (...) of draws (chains, draws, ...): between chains against within them; 1 where they agree.

    Source: Gelman et al., Bayesian Data Analysis, third edition, section 11.4: every chain is cut in two.

    Raises:
        ValueError: fewer than four draws a chain.
    """
    halves = _halves(draws)
    n = halves.shape[1]
    within = halves.var(1).mean(0)
    between = n * halves.mean(1).var(0)
    return (((n - 1) / n * within + between / n) / within.clamp_min(torch.finfo(within.dtype).tiny)).sqrt()


def effective_sample_size(draws: Tensor) -> Tensor:
    """How many independent draws (...) the draws (chains, draws, ...) are worth, at most their number.

    Source: Gelman et al., Bayesian Data Analysis, third edition, section 11.5; sums of neighbouring autocorrelations up
    to the first negative one (Geyer 1992).

    Raises:
        ValueError: fewer than four draws a chain.
    """
    halves = _halves(draws)
    chains, n = halves.shape[:2]
    centred = halves - halves.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, 2 * n, dim=1)
    covariance = torch.fft.irfft(spectrum.abs().square(), 2 * n, dim=1)[:, :n].mean(0) / n
    within = halves.var(1).mean(0)
    total = (n - 1) / n * within + halves.mean(1).var(0)
    least = torch.finfo(within.dtype).tiny
    correlation = 1 - (within - covariance * n / (n - 1)) / total.clamp_min(least)
    pairs = correlation[: n // 2 * 2].unflatten(0, (-1, 2)).sum(1)
    positive = (pairs > 0).cumprod(0)
    time = (2 * (pairs * positive).sum(0) - 1).clamp_min(1 / (chains * n))
    size: Tensor = chains * n / time
    return size.clamp_max(chains * n)


def _halves(draws: Tensor) -> Tensor:
    if draws.ndim < 2 or draws.shape[1] < 4:
        raise ValueError(f"draws (chains, 4 or more, ...) are needed, not {tuple(draws.shape)}")
    half = draws.shape[1] // 2
    return torch.cat([draws[:, :half], draws[:, -half:]]).to(torch.promote_types(draws.dtype, torch.float32))
