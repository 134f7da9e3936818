"""Kernels that are functions of a Gram matrix: each needs the inner product of two points and their squared norms."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["KERNELS", "GramKernel", "arccos_kernel", "linear_kernel", "norm_gauss_kernel", "rbf_kernel"]


class _ArcCosine(torch.autograd.Function):
    """(sin t + (pi - t) cos t) / pi of cos t. Its derivative is (pi - t) / pi, finite where that of acos is not."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine)  # and not the angle, which second derivatives would take as a constant
        cosine = cosine.clamp(-1, 1)
        total: Tensor = (1 - cosine.square()).sqrt() + (math.pi - cosine.acos()) * cosine
        return total / math.pi

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        cosine: Tensor = ctx.saved_tensors[0]
        inside = cosine.abs() < 1  # elsewhere acos has no finite derivative
        angle = torch.where(
            inside, torch.where(inside, cosine, 0.0).acos(), math.pi * (cosine < 0).to(cosine)
        )
        return gradients[0] * (1 - angle / math.pi)


def linear_kernel(gram: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The Gram matrix itself; arguments as in `arccos_kernel`."""
    return gram


def arccos_kernel(gram: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """What infinitely many ReLU features make of a Gram matrix, scaled so that squared norms stay.

    Source: Cho & Saul, Kernel methods for deep learning, NeurIPS 2009, order 1.

    Args:
        gram: inner products (P, T).
        rows, columns: squared norms (P,) and (T,).

    Returns:
        (P, T).
    """
    norms = _norms(rows, columns)
    kernel: Tensor = norms * _ArcCosine.apply(gram / norms)
    return kernel


def rbf_kernel(gram: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """exp(-|x - y|^2 / 2) of points with these inner products; arguments as in `arccos_kernel`."""
    distance = rows.unsqueeze(-1) + columns.unsqueeze(-2) - 2 * gram
    return (-distance.clamp_min(0) / 2).exp()


def norm_gauss_kernel(gram: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """|x||y| exp(cos - 1): a Gaussian of the directions, squared norms stay; arguments as in `arccos_kernel`.

    Source: Milsom, Anson & Aitchison, Stochastic kernel regularisation, NeurIPS 2024 (arXiv 2410.06171).
    """
    norms = _norms(rows, columns)
    return norms * (gram / norms - 1).exp()


def _norms(rows: Tensor, columns: Tensor) -> Tensor:
    least = torch.finfo(rows.dtype).tiny  # a point at the origin
    return rows.clamp_min(least).sqrt().unsqueeze(-1) * columns.clamp_min(least).sqrt().unsqueeze(-2)


@dataclass(frozen=True)
class GramKernel:
    """A kernel of a Gram matrix.

    Attributes:
        cross: of two sets of points, see `arccos_kernel`.
        diagonal: of points with themselves, from their squared norms.
        scaled: whether it is the same function at every scale, so that a lengthscale would be a second variance.
    """

    cross: Callable[[Tensor, Tensor, Tensor], Tensor]
    diagonal: Callable[[Tensor], Tensor]
    scaled: bool

    def square(self, gram: Tensor) -> Tensor:
        """Of a set with itself (P, P), its diagonal exact."""
        norms = gram.diagonal(dim1=-2, dim2=-1)
        return torch.diagonal_scatter(self.cross(gram, norms, norms), self.diagonal(norms), dim1=-2, dim2=-1)


def _same(norms: Tensor) -> Tensor:
    return norms


KERNELS = {
    "linear": GramKernel(linear_kernel, _same, True),
    "arccos": GramKernel(arccos_kernel, _same, True),
    "norm-gauss": GramKernel(norm_gauss_kernel, _same, True),
    "rbf": GramKernel(rbf_kernel, torch.ones_like, False),
}
