"""Noise schedules: how much of an image is left at time t."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

AddNoise = Callable[[Tensor, Tensor, Tensor], Tensor]


class Schedule:
    """``x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise``, for t from 0 to T - 1.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, NeurIPS 2020, equation 4.

    Args:
        alphas_cumprod: abar (T,), falling from nearly 1 to nearly 0.

    Raises:
        ValueError: not such numbers.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        abar = alphas_cumprod.detach().double().cpu()
        if (
            abar.ndim != 1
            or len(abar) < 2
            or not ((abar[1:] < abar[:-1]).all() and 0 <= abar[-1] < abar[0] <= 1)
        ):
            raise ValueError("alphas_cumprod must be (T,), falling, and between 0 and 1")
        self.alphas_cumprod = abar

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Images x (B, ...) with standard normal noise (B, ...), at times t (B,): those of DDPM, equation 4."""
        abar = self.alphas_cumprod[t.cpu()].view(-1, *[1] * (x.ndim - 1))
        kept, added = (part.to(device=x.device, dtype=x.dtype) for part in (abar.sqrt(), (1 - abar).sqrt()))
        return kept * x + added * noise

    @classmethod
    def linear(cls, steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> "Schedule":
        """Betas in equal steps, as of DDPM and ADM."""
        return cls((1 - torch.linspace(start, end, steps, dtype=torch.float64)).cumprod(0))

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008) -> "Schedule":
        """Nichol & Dhariwal, Improved Denoising Diffusion Probabilistic Models, ICML 2021, equation 17."""
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        abar = ((times + offset) / (1 + offset) * math.pi / 2).cos().square()
        betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
        return cls((1 - betas).cumprod(0))

    @classmethod
    def of(cls, scheduler: Any) -> "Schedule":
        """Of a schedule, a tensor of alphas_cumprod, or a scheduler of diffusers.

        Raises:
            TypeError: none of them.
        """
        if isinstance(scheduler, cls):
            return scheduler
        abar = scheduler if isinstance(scheduler, Tensor) else getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(abar, Tensor):
            raise TypeError(
                f"{type(scheduler).__name__} has no alphas_cumprod: give a Schedule, a tensor (T,) or a scheduler "
                "of diffusers that has them"
            )
        return cls(abar)
