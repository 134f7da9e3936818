"""A convolutional deep kernel machine: Gram matrices of patches, learnt layer by layer, on images themselves."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaven.bayes.deep_kernel_machine.grams import Grams
from leaven.bayes.deep_kernel_machine.machine import DeepKernelMachine, _cholesky

__all__ = ["ConvolutionalDKM", "mean_over_positions", "mix", "patch_grams", "unit_norm"]

PATCHES = 20_000  # that the first inducing patches are chosen from
IMAGES = 256  # whose features later inducing points are chosen from
CANDIDATES = 8  # of these patches, for each one that is chosen


def patch_grams(inducing: Tensor, images: Tensor, side: int) -> Grams:
    """Inner products, over their length, of patches and of all positions' patches.

    What lies outside of an image is 0, here as in a convolution with padding.

    Args:
        inducing: patches (P, C * side * side), in the order of `torch.nn.functional.unfold`.
        images: (B, C, H, W).
        side: of a patch, odd.

    Returns:
        `ii` (P, P), `ti` (B, H, W, P), `t` (B, H, W).
    """
    length = inducing.shape[1]
    filters = inducing.unflatten(1, (-1, side, side))
    ti = F.conv2d(images, filters, padding=side // 2) / length
    squares = images.square().mean(1, keepdim=True)
    t = F.avg_pool2d(squares, side, 1, side // 2).squeeze(1)
    return Grams(inducing @ inducing.mT / length, ti.permute(0, 2, 3, 1), t)


def mix(grams: Grams, mixing: Tensor, stride: int = 1) -> Grams:
    """The Gram matrices of patches of features, from those of the features.

    A new inducing point is a patch, too: at each place of it, a mixture of the old inducing points. So all three parts
    are inner products of the same kind of thing, divided by the number of places, and 0 lies outside of an image.

    Source: Milsom, Anson & Aitchison, Convolutional deep kernel machines, ICLR 2024 (arXiv 2309.09814). Their code
    leaves the border out of `t` alone; here it counts in both.

    Args:
        grams: `ii` (P, P), `ti` (B, H, W, P), `t` (B, H, W).
        mixing: (Q, P, side, side).
        stride: from patch to patch.

    Returns:
        `ii` (Q, Q), `ti` (B, H', W', Q), `t` (B, H', W').
    """
    side = mixing.shape[-1]
    places = side * side
    ii = torch.einsum("apuv,pr,bruv->ab", mixing, grams.ii, mixing) / places
    ti = F.conv2d(grams.ti.permute(0, 3, 1, 2), mixing, stride=stride, padding=side // 2) / places
    t = F.avg_pool2d(grams.t.unsqueeze(1), side, stride, side // 2).squeeze(1)
    return Grams(ii, ti.permute(0, 2, 3, 1), t)


def mean_over_positions(grams: Grams, chol: Tensor) -> Grams:
    """The Gram matrices of features that are averaged over an image.

    The average's own entry needs the inner products of all positions with one another. What the inducing points span
    of them is known exactly; the remainders of two positions are taken as unrelated (Nystrom, with the exact diagonal).

    Args:
        grams: `ii` (P, P), `ti` (B, H, W, P), `t` (B, H, W).
        chol: lower Cholesky factor of `ii`.

    Returns:
        `ii` (P, P), `ti` (B, P), `t` (B,).
    """
    ti = grams.ti.flatten(1, 2)  # (B, positions, P)
    positions = ti.shape[1]
    spanned = torch.linalg.solve_triangular(chol, ti.flatten(0, 1).mT, upper=False).mT.view_as(ti)
    rest = (grams.t.flatten(1) - spanned.square().sum(2)).clamp_min(0).sum(1) / positions**2
    return Grams(grams.ii, ti.mean(1), spanned.mean(1).square().sum(1) + rest)


def unit_norm(grams: Grams) -> Grams:
    """Every point's features divided by their norm, as LayerNorm does in a network of infinite width.

    A point at the origin, such as a patch of a black border, stays there.

    Args:
        grams: `ii` (P, P), `ti` (..., P), `t` (...).
    """
    least = torch.finfo(grams.t.dtype).tiny
    # Of a point at the origin 1 and no tiny number: its gradient would be infinite in float32.
    own, norms = (torch.where(d > least, d, 1.0).sqrt() for d in (grams.ii.diagonal(), grams.t))
    return Grams(
        grams.ii / own / own.unsqueeze(1), grams.ti / own / norms.unsqueeze(-1), grams.t / norms.square()
    )


class ConvolutionalDKM(DeepKernelMachine):
    """Deep kernel machine on images (B, C, H, W): the infinitely wide limit of a convolutional network, that learns.

    A layer is a kernel, a convolution and a Gram matrix that is learnt over inducing patches and held to what came out
    of the convolution. At the end features are averaged over positions. With nu = inf it is the Gaussian process of
    an infinitely wide convolutional network, as far as the inducing points see it. A step costs
    O(P^3 + B H W P^2), summed over layers. Training, losses and predictions are those of `DeepKernelMachine`; `fit`
    takes images for it.

        machine = ConvolutionalDKM(3, 10, inducing=(64, 128, 256), strides=(2, 2), likelihood="categorical", nu=1.0)
        fit(machine, images, labels, batch_size=64)
        machine(images).probs()

    Source: Milsom, Anson & Aitchison, Convolutional deep kernel machines, ICLR 2024 (arXiv 2309.09814). Theirs have
    residual branches, too; learnt matrices are whitened here, as in `DeepKernelMachine`.

    Args:
        in_channels: C.
        out_features: outputs, or classes.
        inducing: inducing patches of the input, and inducing points after each convolution.
        strides: of these convolutions, one fewer.
        side: of a patch, odd.
        norm: `unit_norm` after each learnt Gram matrix.
        nu, kernel, likelihood, **machine: see `DeepKernelMachine`; not ard.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_features: int,
        inducing: Sequence[int] = (64, 128, 256),
        strides: Sequence[int] | None = None,
        *,
        side: int = 3,
        norm: bool = True,
        kernel: Literal["rbf", "arccos", "norm-gauss", "linear"] = "norm-gauss",
        **machine: Any,
    ) -> None:
        for name, given in (("inducing", inducing), ("strides", strides)):
            if isinstance(given, int):
                raise ValueError(f"{name} must be one number for each layer, such as (64, 128), not {given}")
        strides = (2,) * (len(inducing) - 1) if strides is None else tuple(strides)
        if not inducing or len(strides) != len(inducing) - 1 or min((*inducing, *strides)) < 1:
            raise ValueError(
                "inducing and strides must be at least 1, and one fewer of the strides, "
                f"got {tuple(inducing)} and {strides}"
            )
        if side < 1 or side % 2 == 0:
            raise ValueError(f"side must be odd, got {side}")
        for old, new in pairwise(inducing):
            if new > old * side**2:
                raise ValueError(
                    f"{new} inducing points behind {old}: at most {old * side**2} are independent"
                )
        if machine.get("ard"):
            raise ValueError("ard is for vectors, not for patches")
        length = in_channels * side**2
        super().__init__(length, out_features, len(inducing), inducing[-1], kernel=kernel, **machine)
        self.strides, self.side, self.norm = strides, side, norm
        self.inducing = nn.Parameter(torch.zeros(inducing[0], length))
        self.roots = nn.ParameterList(
            nn.Parameter(torch.zeros(points, points), requires_grad=root.requires_grad)
            for points, root in zip(inducing[1:], self.roots, strict=True)
        )
        self.mixing = nn.ParameterList(
            nn.Parameter(torch.randn(new, old, side, side) / old**0.5) for old, new in pairwise(inducing)
        )

    @torch.no_grad()
    def init_inducing(self, x: Tensor, how: Literal["kmeans", "random"] = "kmeans", seed: int = 0) -> None:
        """Take inducing patches from images (N, C, H, W), layer after layer; then set the outputs' scale.

        Patches of the input as `how` says. After each convolution those patches of features, as the inducing points
        before them see them, that differ most: the first pivots of a QR decomposition. Then the outputs' variance is
        set to the inverse of that of the averaged features, which most of a kernel's value, being common to all images,
        hides; functions vary by about 1 between images.

        Raises:
            ValueError: see `DeepKernelMachine.init_inducing`; images of another shape, or too few of them.
        """
        self._check(x)
        generator = torch.Generator().manual_seed(seed)
        super().init_inducing(_drawn_patches(x.detach().cpu(), self.side, generator), how, seed)
        self.initialised.fill_(False)  # until all layers are
        some = x[torch.randperm(len(x), generator=generator)[:IMAGES]].to(self.inducing.device)
        for layer, (mixing, stride) in enumerate(zip(self.mixing, self.strides, strict=True)):
            kernel = self._kernel(self._layers(some)[layer], layer)
            chol = _cholesky(kernel.ii)
            seen = torch.linalg.solve_triangular(chol, kernel.ti.flatten(0, 2).mT, upper=False)
            maps = seen.view(-1, *kernel.t.shape).transpose(0, 1)  # (N, P, H, W)
            patches = F.unfold(maps, self.side, padding=self.side // 2, stride=stride).mT.flatten(0, 1)
            order = torch.randperm(len(patches), generator=generator)[: CANDIDATES * len(mixing)]
            chosen = _most_different(patches[order], len(mixing)).view_as(mixing).transpose(0, 1)
            weights = torch.linalg.solve_triangular(chol.mT, chosen.flatten(1), upper=True)
            mixing.copy_(weights.view_as(chosen).transpose(0, 1))
        pooled = self._readout(self._layers(some)[-1])
        seen = torch.linalg.solve_triangular(_cholesky(pooled.ii), pooled.ti.mT, upper=False)
        self.log_variance[-1] -= seen.var(1, correction=0).sum().clamp_min(1e-6).log()
        self.initialised.fill_(True)

    def _check(self, x: Tensor) -> None:
        channels = self.inducing.shape[1] // self.side**2
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"images (B, {channels}, H, W) are needed, not {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"images must be normalised floats (B, {channels}, H, W), got {x.dtype}")

    def _nothing(self) -> Tensor:
        return self.inducing.new_zeros(0, self.inducing.shape[1] // self.side**2, self.side, self.side)

    def _layers(self, x: Tensor) -> list[Grams]:
        layers = [self._normed(patch_grams(self.inducing.double(), x.double(), self.side))]
        for layer, (mixing, stride) in enumerate(zip(self.mixing, self.strides, strict=True)):
            kernel = mix(self._kernel(layers[-1], layer), mixing.double(), stride)
            positions = kernel.t.shape
            flat = Grams(kernel.ii, kernel.ti.flatten(0, 2), kernel.t.flatten())
            ii, ti, t = self._learnt(flat, layer)
            layers.append(self._normed(Grams(ii, ti.unflatten(0, positions), t.view(positions))))
        return layers

    def _normed(self, grams: Grams) -> Grams:
        return unit_norm(grams) if self.norm else grams

    def _readout(self, grams: Grams) -> Grams:
        kernel = super()._readout(grams)
        return mean_over_positions(kernel, _cholesky(kernel.ii))


def _drawn_patches(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Patches (K, C * side * side) of images (N, C, H, W) at positions drawn without repetition."""
    count, channels, height, width = images.shape
    drawn = torch.randperm(count * height * width, generator=generator)[:PATCHES].view(-1, 1, 1, 1)
    which, row, column = drawn // (height * width), drawn // width % height, drawn % width
    padded = F.pad(images, (side // 2,) * 4)
    offsets = torch.arange(side)
    channel = torch.arange(channels).view(-1, 1, 1)
    return padded[which, channel, row + offsets.view(-1, 1), column + offsets].flatten(1)


def _most_different(points: Tensor, count: int) -> Tensor:
    """The rows (count, D) of points (N, D) that each leave least of the others unexplained, one after another."""
    from scipy.linalg import qr

    if len(points) < count:
        raise ValueError(
            f"{count} inducing points of {len(points)} patches: lower inducing, or give more images"
        )
    pivots = qr(points.mT.cpu().numpy(), mode="r", pivoting=True)[1]
    return points[torch.from_numpy(pivots[:count]).long().to(points.device)]
