"""A deep kernel machine: a deep Gaussian process of infinite width that still learns its representation."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaven.bayes.deep_kernel_machine.grams import (
    Grams,
    gram_step,
    input_grams,
    kernel_step,
    taylor_kl,
    whitened_kl,
    wishart_root,
)
from leaven.bayes.deep_kernel_machine.kernels import KERNELS
from leaven.bayes.deep_kernel_machine.prediction import Prediction

Kernel = Literal["rbf", "arccos", "norm-gauss", "linear"]
FLOOR = 0.1  # of stochastic kernel regularisation, as in the paper
CANDIDATES = 256  # points per cluster that k-means looks at, at most: more hardly move its centres


class DeepKernelMachine(nn.Module):
    """Sparse, whitened deep kernel machine on vectors.

    `depth` kernels follow one another; between them lie depth - 1 Gram matrices that are learnt over inducing points,
    each held to the kernel before it by nu times a divergence. nu = inf pins them: a Gaussian process whose kernel is
    that of an infinitely wide network. Depth 1 is an ordinary sparse variational Gaussian process. A step costs
    O(depth (P^3 + B P^2)), whatever the number of data is.

    Parameters are kept in the module's dtype and computed with in float64, also under autocast.

    Source: Yang et al., ICML 2023 (arXiv 2108.13097). The learnt matrices are written L R R^T L^T, L the Cholesky
    factor of the kernel before: R = I, the start, is the infinitely wide network, and the divergence needs no solve.

    Args:
        in_features: D.
        out_features: outputs, or classes.
        depth: kernels.
        n_inducing: P.
        nu: how strongly each learnt Gram matrix is held; one, or one for each.
        kernel: of a Gram matrix, see `KERNELS`.
        likelihood: "gaussian", of real targets (B, C), or "categorical", of class indices (B,).
        kl: "exact", or "taylor", see `taylor_kl`.
        skr: noise in the learnt matrices during training, see `wishart_root`; gamma of the paper, which takes 4.
        tempering: weight of the outputs' divergence; the authors take 1 / classes, 1 is the variational bound.
        ard: a learnt scale for each input.
        draws: of the functions in the categorical loss.
        jitter: see `kernel_step`.

    Raises:
        ValueError: an argument out of range.
    """

    initialised: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        depth: int = 2,
        n_inducing: int = 128,
        nu: float | Sequence[float] = 1.0,
        kernel: Kernel = "rbf",
        likelihood: Literal["gaussian", "categorical"] = "gaussian",
        *,
        kl: Literal["exact", "taylor"] = "exact",
        skr: float | None = None,
        tempering: float = 1.0,
        ard: bool = False,
        draws: int = 16,
        jitter: float = 1e-6,
    ) -> None:
        super().__init__()
        self.nu = [float(nu)] * (depth - 1) if isinstance(nu, int | float) else [float(each) for each in nu]
        if depth < 1 or n_inducing < 1 or in_features < 1 or out_features < 1:
            raise ValueError("in_features, out_features, depth and n_inducing must be at least 1")
        if len(self.nu) != depth - 1 or not all(each > 0 for each in self.nu):
            raise ValueError(
                f"nu must be one number greater than 0, or a sequence of depth - 1 = {depth - 1} of them, got {nu}"
            )
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
        if likelihood not in ("gaussian", "categorical") or kl not in ("exact", "taylor"):
            raise ValueError(f"no likelihood {likelihood!r} or divergence {kl!r}")
        if skr is not None and not skr >= 1:
            raise ValueError(f"skr must be at least 1, got {skr}")
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        self.kernel, self.likelihood, self.kl_form = KERNELS[kernel], likelihood, kl
        self.depth, self.out_features, self.skr, self.tempering = depth, out_features, skr, tempering
        self.draws, self.jitter = draws, jitter
        self.inducing = nn.Parameter(torch.zeros(n_inducing, in_features))
        self.roots = nn.ParameterList(
            nn.Parameter(torch.zeros(n_inducing, n_inducing), requires_grad=math.isfinite(each))
            for each in self.nu
        )
        self.mean = nn.Parameter(torch.zeros(n_inducing, out_features))
        self.root = nn.Parameter(torch.zeros(n_inducing, n_inducing))
        self.log_variance = nn.Parameter(torch.zeros(depth))
        self.log_bias = nn.Parameter(torch.full((depth,), -2.3))  # 0.1
        self.log_lengthscale = None if self.kernel.scaled else nn.Parameter(torch.zeros(depth))
        self.log_input_scale = nn.Parameter(torch.zeros(in_features)) if ard else None
        self.log_noise = nn.Parameter(torch.tensor(-2.3)) if likelihood == "gaussian" else None
        self.register_buffer("initialised", torch.tensor(False))

    def init_inducing(self, x: Tensor, how: Literal["kmeans", "random"] = "kmeans", seed: int = 0) -> None:
        """Take inducing points from data: centres of clusters (of up to 256 points each, drawn), or points drawn.

        Args:
            x: (N, D).
            how: "kmeans" or "random".
            seed: of the clusters, or of the draw.

        Raises:
            ValueError: fewer different points than inducing ones, or points that are not finite.
        """
        from sklearn.cluster import KMeans

        if how not in ("kmeans", "random"):
            raise ValueError(f'how must be "kmeans" or "random", not {how!r}')
        count = len(self.inducing)
        points = torch.unique(x.detach().cpu().double(), dim=0)
        if not torch.isfinite(points).all():
            raise ValueError("inducing points cannot be taken from values that are not finite")
        if len(points) < count:
            raise ValueError(f"{count} inducing points of {len(points)} different ones: lower n_inducing")
        most = CANDIDATES * count if how == "kmeans" else count
        if len(points) > most:
            points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:most]]
        if len(points) > count:
            found = KMeans(count, n_init=1, random_state=seed).fit(points.numpy())
            points = torch.from_numpy(found.cluster_centers_)
        with torch.no_grad():
            self.inducing.copy_(points)
            self.initialised.fill_(True)

    def forward(self, x: Tensor) -> Prediction:
        """The outputs' functions at points (B, D).

        Raises:
            RuntimeError: there are no inducing points yet.
            ValueError: inputs of another shape, or the machine in half precision.
        """
        if self.inducing.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"a deep kernel machine in {self.inducing.dtype} is no use: call .float()")
        if not self.initialised:
            raise RuntimeError("no inducing points yet: call init_inducing first, or load weights")
        self._check(x)
        with torch.autocast(x.device.type, enabled=False):
            kernel = self._readout(self._layers(x)[-1])
            chol = _cholesky(kernel.ii)
            a = torch.linalg.solve_triangular(chol, kernel.ti.mT, upper=False)
            seen = _triangular(self.root.double()).mT @ a
            variance = kernel.t - a.square().sum(0) + seen.square().sum(0)
            noise = None if self.log_noise is None else self.log_noise.double().exp()
            return Prediction(a.mT @ self.mean.double(), variance.unsqueeze(1), noise)

    def loss(self, x: Tensor, targets: Tensor, n_data: int) -> Tensor:
        """Minus the objective over n_data: mean over the batch of the expected log likelihood, minus `kl` / n_data.

        Args:
            x: (B, D).
            targets: (B, C) or (B,), see `likelihood`.
            n_data: in the whole training set, over all processes.

        Raises:
            ValueError: targets that do not fit.
        """
        return self.loss_of(self(x), targets, n_data)

    def loss_of(self, prediction: Prediction, targets: Tensor, n_data: int) -> Tensor:
        """`loss` of functions that are there already: the `prediction` of a call; other arguments as in `loss`."""
        loss = self.kl() / n_data - self.expected_log_prob(prediction, targets).mean()
        return loss.to(self.inducing.dtype)

    def expected_log_prob(self, prediction: Prediction, targets: Tensor) -> Tensor:
        """E log p(y | f) of each point (B,), in nats: exact for real targets, by draws for classes.

        Raises:
            ValueError: targets of another shape or type than the likelihood's, or labels that are no classes.
        """
        mean, variance, noise = prediction
        if noise is not None:
            real = (targets.unsqueeze(1) if targets.ndim == 1 else targets).double()
            if real.shape != mean.shape:
                hint = (
                    ""
                    if targets.is_floating_point()
                    else '; of class indices the likelihood is "categorical"'
                )
                raise ValueError(f"targets {tuple(targets.shape)} for outputs {tuple(mean.shape)}{hint}")
            each = ((real - mean).square() + variance) / noise + noise.log() + math.log(2 * math.pi)
            return -0.5 * each.sum(1)
        if targets.shape != mean.shape[:1] or targets.is_floating_point():
            raise ValueError(
                f"class indices ({len(mean)},) of an integer type are needed, not {tuple(targets.shape)} of "
                f"{targets.dtype}"
            )
        if ((targets < 0) | (targets >= self.out_features)).any():
            raise ValueError(
                f"class indices must be from 0 to {self.out_features - 1}, got {int(targets.min())} to "
                f"{int(targets.max())}"
            )
        noise = torch.randn(self.draws, *mean.shape, dtype=mean.dtype, device=mean.device)
        functions = mean + variance.sqrt() * noise
        log_probs = F.log_softmax(functions, -1).mean(0)
        return log_probs.gather(1, targets.long().unsqueeze(1)).squeeze(1)

    def kl(self) -> Tensor:
        """All divergences, weighted: nu times that of each learnt Gram matrix, tempering times the outputs'."""
        divergence = whitened_kl if self.kl_form == "exact" else taylor_kl
        total: Tensor = self.tempering * self.output_kl()
        for nu, root in zip(self.nu, self.roots, strict=True):
            if math.isfinite(nu):
                total = total + nu * divergence(_triangular(root.double()))
        return total

    def output_kl(self) -> Tensor:
        """KL of the outputs' inducing values, summed over outputs, which share their covariance."""
        root = _triangular(self.root.double())
        of_means: Tensor = 0.5 * self.mean.double().square().sum()
        return self.out_features * whitened_kl(root) + of_means

    @torch.no_grad()
    def gram(self, layer: int) -> Tensor:
        """The Gram matrix (P, P) of the inducing points after so many layers; 0: of the inputs."""
        return self._layers(self._nothing())[layer].ii

    @torch.no_grad()
    def condition_number(self, layer: int) -> float:
        """Of the kernel that follows `gram(layer)`, jitter included; beyond 1e12 nothing can be trusted."""
        return float(torch.linalg.cond(self._kernel(self._layers(self._nothing())[layer], layer).ii))

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.inducing.shape[1]:
            raise ValueError(f"inputs (B, {self.inducing.shape[1]}) are needed, not {tuple(x.shape)}")

    def _nothing(self) -> Tensor:
        """A batch without points."""
        return self.inducing[:0]

    def _layers(self, x: Tensor) -> list[Grams]:
        """Gram matrices of the inputs, and after each learnt layer."""
        inducing, x = self.inducing.double(), x.double()
        if self.log_input_scale is not None:
            scale = self.log_input_scale.double().exp()
            inducing, x = inducing * scale, x * scale
        layers = [input_grams(inducing, x)]
        for layer in range(len(self.nu)):
            layers.append(self._learnt(self._kernel(layers[-1], layer), layer))
        return layers

    def _learnt(self, kernel: Grams, layer: int) -> Grams:
        """The learnt Gram matrices of a layer, from the kernel that it is held to."""
        if math.isinf(self.nu[layer]) and self.skr is None:
            return kernel
        root, floor = _triangular(self.roots[layer].double()), 0.0
        if self.skr is not None:
            floor = FLOOR
            if self.training:
                root = wishart_root(root, self.skr)
        return gram_step(kernel, _cholesky(kernel.ii), root, floor)

    def _readout(self, grams: Grams) -> Grams:
        """The kernel of the outputs, from the last Gram matrices."""
        return self._kernel(grams, self.depth - 1)

    def _kernel(self, grams: Grams, layer: int) -> Grams:
        if self.log_lengthscale is not None:
            shrink = (-2 * self.log_lengthscale[layer].double()).exp()
            grams = Grams(grams.ii * shrink, grams.ti * shrink, grams.t * shrink)
        variance, bias = (values[layer].double().exp() for values in (self.log_variance, self.log_bias))
        return kernel_step(grams, self.kernel, variance, bias, self.jitter)


def _triangular(raw: Tensor) -> Tensor:
    """Lower triangular with a positive diagonal; the identity at 0."""
    return raw.tril(-1) + raw.diagonal().exp().diag()


def _cholesky(matrix: Tensor) -> Tensor:
    """The lower factor; where rounding has made the matrix indefinite, with more jitter and a warning of gpytorch's."""
    from linear_operator.utils.cholesky import psd_safe_cholesky

    factor: Tensor = psd_safe_cholesky(matrix)
    return factor
