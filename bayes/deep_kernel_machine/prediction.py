"""What a deep kernel machine says of a batch."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """The latent functions at some points.

    Attributes:
        mean: (B, C).
        variance: (B, 1), of the function, the same for all outputs.
        noise: variance of the observations around it; None for a categorical likelihood.
    """

    mean: Tensor
    variance: Tensor
    noise: Tensor | None

    def probs(self, draws: int = 200) -> Tensor:
        """Class probabilities (B, C): softmax averaged over draws of the functions, the same draws for every point."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(draws, 1, self.mean.shape[1], generator=generator, dtype=torch.float64)
        functions = self.mean + self.variance.sqrt() * noise.to(self.mean)
        return functions.softmax(-1).mean(0)

    def entropy(self, draws: int = 200) -> Tensor:
        """Entropy (B,) of the class probabilities, in nats."""
        entropy: Tensor = torch.special.entr(self.probs(draws)).sum(1)
        return entropy

    def log_prob(self, targets: Tensor) -> Tensor:
        """Log density (B,) of real targets (B, C) under a Gaussian likelihood, in nats.

        Raises:
            ValueError: the likelihood is categorical, or targets of another shape.
        """
        if self.noise is None:
            raise ValueError("log_prob is of real targets; take probs() for classes")
        if targets.shape != self.mean.shape:
            raise ValueError(f"targets {tuple(targets.shape)} for outputs {tuple(self.mean.shape)}")
        spread = self.variance + self.noise
        each = -0.5 * ((targets - self.mean).square() / spread + spread.log() + math.log(2 * math.pi))
        return each.sum(1)
