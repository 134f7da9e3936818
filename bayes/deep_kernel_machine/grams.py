"""The steps of a sparse deep kernel machine: kernels, learnt Gram matrices, and what these cost."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from leaven.bayes.deep_kernel_machine.kernels import GramKernel

__all__ = [
    "Grams",
    "gaussian_kl",
    "gram_step",
    "input_grams",
    "kernel_step",
    "taylor_kl",
    "whitened_kl",
    "wishart_root",
]


class Grams(NamedTuple):
    """Inner products, or kernels, of P inducing points and T others.

    Attributes:
        ii: (P, P).
        ti: (T, P).
        t: (T,), the diagonal of (T, T), all that is needed of it.
    """

    ii: Tensor
    ti: Tensor
    t: Tensor


def input_grams(inducing: Tensor, x: Tensor) -> Grams:
    """X X^T / D of inducing points (P, D) and inputs `x` (T, D)."""
    width = x.shape[-1]
    return Grams(inducing @ inducing.mT / width, x @ inducing.mT / width, x.square().sum(-1) / width)


def kernel_step(
    grams: Grams, kernel: GramKernel, variance: Tensor, bias: Tensor, jitter: float = 0.0
) -> Grams:
    """variance * k(G) + bias, for all three parts.

    Args:
        grams: of the layer before.
        kernel: one of `KERNELS`.
        variance, bias: scalars.
        jitter: share of the inducing points' mean diagonal that every point's own variance gets, cross terms do not.
    """
    norms = grams.ii.diagonal()
    ii = variance * kernel.square(grams.ii) + bias
    ti = variance * kernel.cross(grams.ti, grams.t, norms) + bias
    t = variance * kernel.diagonal(grams.t) + bias
    extra = jitter * ii.diagonal().mean()
    return Grams(ii + extra * torch.eye(len(ii), dtype=ii.dtype, device=ii.device), ti, t + extra)


def gram_step(kernel: Grams, chol: Tensor, root: Tensor, floor: float = 0.0) -> Grams:
    """The Gram matrices of a layer whose inducing points' own one is learnt: G_ii = L R R^T L^T (+ floor I).

    Then G_ti = K_ti K_ii^-1 G_ii and G_t = K_t - K_ti K_ii^-1 K_it + K_ti K_ii^-1 G_ii K_ii^-1 K_it. With R = I and no
    floor the kernel comes back: a network of infinite width.

    Source: Yang et al., A theory of representation learning gives a deep generalisation of kernel methods, ICML 2023
    (arXiv 2108.13097), appendix on inducing points.

    Args:
        kernel: K.
        chol: L, the lower Cholesky factor of K_ii.
        root: R (P, K).
        floor: see `wishart_root`.
    """
    a = torch.linalg.solve_triangular(chol, kernel.ti.mT, upper=False)  # L^-1 K_it
    learnt = chol @ root
    seen = root.mT @ a
    ii, ti = learnt @ learnt.mT, seen.mT @ learnt.mT
    t = kernel.t - a.square().sum(0) + seen.square().sum(0)
    if floor:
        b = torch.linalg.solve_triangular(chol.mT, a, upper=True)  # K_ii^-1 K_it
        ii = ii + floor * torch.eye(len(ii), dtype=ii.dtype, device=ii.device)
        ti, t = ti + floor * b.mT, t + floor * b.square().sum(0)
    return Grams(ii, ti, t)


def whitened_kl(root: Tensor) -> Tensor:
    """KL(N(0, L R R^T L^T) || N(0, L L^T)) for lower triangular R (P, P), whatever L is: never negative, 0 at R = I."""
    return 0.5 * (root.square().sum() - 2 * root.diagonal().log().sum() - len(root))


def taylor_kl(root: Tensor) -> Tensor:
    """The second-order form of `whitened_kl` around R = I, in the eigenvalues of G^-1 K.

    A strong wall where G gets small; bounded where G grows. It is |R^-1 R^-T - I|_F^2 / 4, symmetric unlike in the
    authors' code, which is larger.

    Source: Milsom, Anson & Aitchison, Stochastic kernel regularisation, NeurIPS 2024 (arXiv 2410.06171).
    """
    eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
    inverse = torch.linalg.solve_triangular(root, eye, upper=False)
    total: Tensor = (inverse @ inverse.mT - eye).square().sum() / 4
    return total


def gaussian_kl(gram: Tensor, kernel: Tensor) -> Tensor:
    """KL(N(0, G) || N(0, K)) of positive definite matrices (P, P)."""
    chol = torch.linalg.cholesky(kernel)
    root = torch.linalg.solve_triangular(chol, torch.linalg.cholesky(gram), upper=False)
    return whitened_kl(root)


def wishart_root(root: Tensor, gamma: float, noise: Tensor | None = None) -> Tensor:
    """A root (P, k) of a random matrix with mean R R^T: that of a Wishart distribution, k = ceil(P / gamma).

    With `gram_step` and a floor (0.1 in the paper), it makes learnt Gram matrices noisy in training.

    Source: Milsom, Anson & Aitchison, Stochastic kernel regularisation, NeurIPS 2024 (arXiv 2410.06171).

    Args:
        root: R (P, P).
        gamma: how many inducing points share a degree of freedom; larger is noisier.
        noise: standard normal (P, k); drawn from the global generator by default.
    """
    k = math.ceil(len(root) / gamma)
    if noise is None:
        noise = torch.randn(len(root), k, dtype=root.dtype, device=root.device)
    drawn: Tensor = root @ noise / k**0.5
    return drawn
