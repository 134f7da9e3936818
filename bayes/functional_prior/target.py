"""The functions that a prior is matched to: draws of a Gaussian process."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from leaven.bayes.functional_prior.families import keyed_by


class GPTarget:
    """A Gaussian process of gpytorch's parts, with its hyper-priors, to draw functions of.

    Source: Tran et al., All You Need is a Good Functional Prior for Bayesian Deep Learning, JMLR 2022.

    Args:
        kernel: a kernel of gpytorch's. If priors are registered in it, every function has hyper-parameters of its own.
        mean: a mean of gpytorch's; zero by default.
        outputs: independent processes.
        feature_map: what the kernel sees of the inputs; by default they are flattened.

    Raises:
        TypeError: no kernel.
        ValueError: no outputs.
    """

    def __init__(
        self,
        kernel: Any,
        mean: Any | None = None,
        outputs: int = 1,
        feature_map: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not hasattr(kernel, "named_priors"):
            raise TypeError(f"a kernel of gpytorch's is needed, not {type(kernel).__name__}")
        if outputs < 1:
            raise ValueError(f"outputs must be at least 1, got {outputs}")
        self.kernel, self.mean = copy.deepcopy(kernel).double(), copy.deepcopy(mean)
        if self.mean is not None:
            self.mean.double()
        self.outputs, self.feature_map = outputs, feature_map or (lambda x: x.flatten(1))

    @torch.no_grad()
    def sample(self, x: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Values (n, B, outputs) at inputs, without observation noise, computed in float64.

        Args:
            x: inputs (B, ...).
            n: functions.
            generator: on the device of the inputs; None takes the global one.

        Raises:
            ValueError: inputs that are not finite.
        """
        points = self.feature_map(x).double()
        if not torch.isfinite(points).all():
            raise ValueError(
                "inputs of a Gaussian process must be finite: there is a NaN or an infinity in the data"
            )
        mean = points.new_zeros(len(points)) if self.mean is None else self.mean(points)
        shape = (n, self.outputs, len(points))
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=points.device)
        priors = list(self.kernel.named_priors())
        if not priors:
            values = noise @ self._root(points).mT
        else:
            values = torch.empty_like(noise)
            for i in range(n):  # one Cholesky factor a function: on CPUs a batch of them is no faster
                self._draw(priors, generator)
                values[i] = noise[i] @ self._root(points).mT
        return (values + mean).mT.to(x.dtype if x.is_floating_point() else torch.float32)

    def _root(self, points: Tensor) -> Tensor:
        from linear_operator.utils.cholesky import psd_safe_cholesky

        covariance = self.kernel(points).to_dense()
        covariance = covariance + 1e-8 * covariance.diagonal().mean() * torch.eye(len(points)).to(covariance)
        root: Tensor = psd_safe_cholesky(covariance)
        return root

    @staticmethod
    def _draw(priors: list[Any], generator: torch.Generator | None) -> None:
        """Hyper-parameters from their priors. torch's distributions draw from the global generator alone."""
        with keyed_by(generator):
            for _, module, prior, closure, setting in priors:
                shape: Any = closure(module).shape
                scalar = not prior.batch_shape and not prior.event_shape
                drawn = prior.sample(shape if scalar else torch.Size())
                setting(module, drawn.reshape(shape))
