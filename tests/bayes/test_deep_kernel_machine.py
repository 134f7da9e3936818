"""Deep kernel machines against closed forms, gpytorch, scipy and torch's distributions."""

import copy
import math
import warnings
from itertools import pairwise
from typing import Any

import gpytorch
import numpy as np
import pytest
import torch
from scipy.linalg import fractional_matrix_power
from scipy.optimize import brentq
from sklearn.cluster import KMeans
from torch import Tensor

from leaven.bayes.deep_kernel_machine import (
    KERNELS,
    DeepKernelMachine,
    arccos_kernel,
    fit,
    gaussian_kl,
    gram_step,
    input_grams,
    kernel_step,
    taylor_kl,
    whitened_kl,
    wishart_root,
)
from leaven.bayes.deep_kernel_machine.machine import _triangular


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def lower(n: int, seed: int = 0) -> Tensor:
    return _triangular(0.4 * randn(n, n, seed=seed))


def machine(points: Tensor, outputs: int = 2, plain: bool = True, **how: Any) -> DeepKernelMachine:
    """In float64, with these inducing points; plain: kernels without variance and bias of their own."""
    made = DeepKernelMachine(points.shape[1], outputs, n_inducing=len(points), **how).double()
    with torch.no_grad():
        made.inducing.copy_(points)
        made.initialised.fill_(True)
        if plain:
            made.log_bias.requires_grad_(False).fill_(-math.inf)
            made.log_variance.requires_grad_(False)
            if made.log_lengthscale is not None:
                made.log_lengthscale.requires_grad_(False)
    return made


def scrambled(made: DeepKernelMachine, seed: int = 3, scale: float = 0.3) -> DeepKernelMachine:
    """All parameters away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name != "inducing" and p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return made


# 1


def test_one_layer_at_its_optimum_is_the_exact_gaussian_process() -> None:
    x, y = randn(24, 3), randn(24, seed=1)
    new = randn(7, 3, seed=2)
    noise = 0.3
    made = machine(x, 1, depth=1, jitter=1e-10)
    kernel = KERNELS["rbf"].square(x @ x.T / 3) + 1e-10 * torch.eye(24)
    chol = torch.linalg.cholesky(kernel)
    spread = torch.linalg.inv(torch.eye(24) + chol.T @ chol / noise)
    root = torch.linalg.cholesky(spread)
    with torch.no_grad():
        assert made.log_noise is not None
        made.log_noise.fill_(math.log(noise))
        made.root.copy_(root.tril(-1) + root.diagonal().log().diag())
        made.mean.copy_((spread @ chol.T @ y / noise).unsqueeze(1))

    class Exact(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
            likelihood.noise = noise
            super().__init__(x, y, likelihood)
            self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), gpytorch.kernels.RBFKernel()
            self.covar_module.lengthscale = 3**0.5
            self.double()

        def forward(self, x: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    theirs = Exact()
    marginal = gpytorch.mlls.ExactMarginalLogLikelihood(theirs.likelihood, theirs)
    theirs.train()
    evidence = marginal(theirs(x), y) * 24
    torch.testing.assert_close(-made.loss(x, y, 24) * 24, evidence, rtol=0, atol=1e-5)
    theirs.eval()
    with torch.no_grad():
        found, expected = made(new), theirs(new)
    torch.testing.assert_close(found.mean[:, 0], expected.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.variance[:, 0], expected.variance, rtol=0, atol=1e-6)


def test_the_expected_log_likelihood_is_gpytorchs() -> None:
    made = scrambled(machine(randn(5, 3), 1, depth=2))
    x, y = randn(6, 3, seed=4), randn(6, seed=5)
    prediction = made(x)
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    assert prediction.noise is not None
    likelihood.noise = float(prediction.noise.detach())
    theirs = gpytorch.distributions.MultivariateNormal(
        prediction.mean[:, 0], prediction.variance[:, 0].diag()
    )
    torch.testing.assert_close(made.expected_log_prob(prediction, y), likelihood.expected_log_prob(y, theirs))
    torch.testing.assert_close(prediction.log_prob(y.unsqueeze(1)), likelihood.log_marginal(y, theirs))


def test_the_categorical_likelihood_is_the_integral() -> None:
    """Two classes: against quadrature over the difference of the functions."""
    made = scrambled(machine(randn(5, 3), 2, depth=2, likelihood="categorical", draws=400_000))
    x, y = randn(3, 3, seed=4), torch.tensor([0, 1, 1])
    prediction = made(x)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    sign = torch.where(y == 0, 1.0, -1.0).unsqueeze(1)
    difference = sign * (prediction.mean[:, :1] - prediction.mean[:, 1:])
    values = difference + (2 * prediction.variance).sqrt() * torch.tensor(nodes)
    weights = torch.tensor(weights / weights.sum())
    expected = (torch.nn.functional.logsigmoid(values) * weights).sum(1)
    torch.testing.assert_close(made.expected_log_prob(prediction, y), expected, rtol=0, atol=5e-3)
    probability = (values.sigmoid() * weights).sum(1)
    found = prediction.probs(200_000).gather(1, y.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found, probability, rtol=0, atol=5e-3)


# 2 and 3


@pytest.mark.parametrize("kernel", KERNELS)
def test_pinned_grams_are_the_kernel_recursion(kernel: str) -> None:
    points, x = randn(6, 4), randn(5, 4, seed=1)
    free = machine(points, depth=4, kernel=kernel, jitter=1e-9)
    pinned = machine(points, depth=4, kernel=kernel, nu=math.inf, jitter=1e-9)
    both = torch.cat([points, x])
    gram = both @ both.T / 4
    for layer in range(1, 4):
        gram = KERNELS[kernel].square(gram)
        for made, tolerance in ((free, 1e-6), (pinned, 1e-7)):
            found = made._layers(x)[layer]
            torch.testing.assert_close(found.ii, gram[:6, :6], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(found.ti, gram[6:, :6], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(found.t, gram[6:, 6:].diagonal(), rtol=tolerance, atol=tolerance)


def test_a_large_nu_is_the_infinitely_wide_network() -> None:
    """Where training leads from the infinitely wide network, once it is let go of at nu = 1e8, and at nu = 1e-2."""
    x, y = randn(40, 3), randn(40, 1, seed=1)
    pinned = machine(x[:8], 1, plain=False, depth=3, nu=math.inf)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(
        (p for p in pinned.parameters() if p.requires_grad), lr=1e-2
    )
    for _ in range(60):
        optimizer.zero_grad()
        pinned.loss(x, y, 40).backward()
        optimizer.step()
    moved = {}
    for nu in (1e8, 1e-2):
        held = machine(x[:8], 1, plain=False, depth=3, nu=nu)
        held.load_state_dict(pinned.state_dict())
        optimizer = torch.optim.LBFGS(
            held.roots, max_iter=50, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
        )

        def closure(held: DeepKernelMachine = held, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = held.loss(x, y, 40)
            loss.backward()
            return loss

        optimizer.step(closure)
        moved[nu] = float((held(x).mean - pinned(x).mean).abs().max().detach())
    assert moved[1e8] < 1e-3
    assert moved[1e-2] > 1e-2


def test_the_divergences_are_those_of_normal_distributions() -> None:
    from torch.distributions import MultivariateNormal, kl_divergence

    base = randn(5, 5, seed=7)
    kernel = base @ base.T + torch.eye(5)
    chol = torch.linalg.cholesky(kernel)
    zero = torch.zeros(5, dtype=torch.float64)
    for seed in range(3):
        root = lower(5, seed)
        gram = chol @ root @ root.T @ chol.T
        expected = kl_divergence(MultivariateNormal(zero, gram), MultivariateNormal(zero, kernel))
        torch.testing.assert_close(whitened_kl(root), expected)
        torch.testing.assert_close(gaussian_kl(gram, kernel), expected)
        assert expected > 0
    assert whitened_kl(torch.eye(5, dtype=torch.float64)) == 0
    made = scrambled(machine(randn(5, 3), 2, depth=1))
    root = _triangular(made.root)
    inducing = MultivariateNormal(zero, torch.eye(5, dtype=torch.float64))
    expected = sum(
        kl_divergence(MultivariateNormal(made.mean[:, c], root @ root.T), inducing) for c in (0, 1)
    )
    torch.testing.assert_close(made.output_kl(), expected)
    torch.testing.assert_close(made.kl(), expected)


def test_the_taylor_form_is_that_of_the_eigenvalues() -> None:
    root = lower(5)
    kernel_in_gram = torch.linalg.inv(root @ root.T)
    values = torch.linalg.eigvalsh(kernel_in_gram)
    torch.testing.assert_close(taylor_kl(root), ((values - 1) ** 2).sum() / 4)
    near = torch.eye(5, dtype=torch.float64) + 1e-3 * lower(5).tril(-1)
    torch.testing.assert_close(taylor_kl(near), whitened_kl(near), rtol=1e-2, atol=0)


# 4 and 5


def test_deep_linear_grams_lie_on_the_geodesic() -> None:
    base, end = randn(3, 3), randn(3, 3, seed=1)
    first, last = base @ base.T + torch.eye(3), end @ end.T + torch.eye(3)
    raw = [torch.zeros(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    optimizer = torch.optim.LBFGS(
        raw, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def grams() -> list[Tensor]:
        roots = [_triangular(each) for each in raw]
        return [first, *(root @ root.T for root in roots), last]

    def closure() -> Tensor:
        optimizer.zero_grad()
        chain = grams()
        total = torch.stack([gaussian_kl(b, a) for a, b in pairwise(chain)]).sum()
        total.backward()
        return total

    optimizer.step(closure)
    for layer, gram in enumerate(grams()):
        power = fractional_matrix_power(np.linalg.solve(first.numpy(), last.numpy()), layer / 4)
        torch.testing.assert_close(gram.detach(), torch.tensor(first.numpy() @ power), rtol=0, atol=1e-6)


def test_one_point_has_a_closed_form() -> None:
    k, s, nu, yy, n = 1.3, 0.2, 2.0, 4.0, 3

    def stationary(g: float) -> float:
        return -n / (2 * (g + s)) + yy / (2 * (g + s) ** 2) - nu / 2 * (1 / k - 1 / g)

    expected = brentq(stationary, 0.1, 10.0, xtol=1e-14)
    assert expected == pytest.approx(1.2095364437, abs=1e-9)
    x = torch.tensor([[k**0.5]], dtype=torch.float64)
    made = machine(x, n, depth=2, nu=nu, kernel="linear", jitter=0.0)
    made.inducing.requires_grad_(False)
    assert made.log_noise is not None
    with torch.no_grad():
        made.log_noise.requires_grad_(False).fill_(math.log(s))
    y = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64)
    free = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(
        free, max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = made.loss(x, y, 1)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(made.gram(1)) == pytest.approx(expected, abs=1e-6)


# 6


def test_the_arccos_kernel_is_that_of_relu_features() -> None:
    x, m = randn(4, 3), 1_000_000
    features = (randn(m, 3, seed=5) @ x.T).relu()
    products = 2 * features.unsqueeze(2) * features.unsqueeze(1)
    error = products.std(0) / m**0.5
    norms = x.square().sum(1)
    found = arccos_kernel(x @ x.T, norms, norms)
    assert ((found - products.mean(0)).abs() < 4 * error).all()
    torch.testing.assert_close(found.diagonal(), norms, rtol=0, atol=1e-12)


def test_second_derivatives_of_kernels() -> None:
    x, other = randn(3, 4).requires_grad_(), randn(2, 4, seed=1)

    def product(x: Tensor) -> Tensor:
        return kernel.cross(x @ other.T, x.square().sum(1), other.square().sum(1))

    for kernel in KERNELS.values():
        assert torch.autograd.gradgradcheck(product, (x,))
        (slope,) = torch.autograd.grad(kernel.square(x @ x.T).square().sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x)
        assert torch.isfinite(curvature).all()


def test_kernels_of_a_point_at_the_origin_and_of_twins_are_finite() -> None:
    x = torch.stack([torch.zeros(3), torch.ones(3), torch.ones(3)]).double().requires_grad_()
    for kernel in KERNELS.values():
        found = kernel.square(x @ x.T)
        assert torch.isfinite(found).all()
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert torch.isfinite(gradient).all()


# 7


def test_the_wishart_noise_has_the_right_moments() -> None:
    root = lower(5)
    gram = root @ root.T
    k, n = 2, 40_000
    noise = randn(n, 5, k, seed=9)
    draws = torch.stack([w @ w.T for w in (wishart_root(root, 3.0, each) for each in noise)])
    spread = (gram.square() + gram.diagonal().outer(gram.diagonal())) / k
    assert ((draws.mean(0) - gram).abs() < 5 * (spread / n).sqrt()).all()
    torch.testing.assert_close(draws.var(0), spread, rtol=0.1, atol=0)


def test_regularisation_is_noise_in_training_and_none_in_evaluation() -> None:
    made = scrambled(machine(randn(6, 3), depth=3, skr=4.0))
    x = randn(4, 3, seed=1)
    made.train()
    assert not torch.equal(made(x).mean, made(x).mean)
    made.eval()
    assert torch.equal(made(x).mean, made(x).mean)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_a_point_that_is_an_inducing_one_has_its_row(kernel: str, floor: float) -> None:
    """Through two layers with the same draws for all three parts."""
    points = randn(5, 6)
    grams, one = input_grams(points, points[[2]]), torch.tensor(1.0, dtype=torch.float64)
    for layer in range(2):
        step = kernel_step(grams, KERNELS[kernel], one, 0.1 * one)
        jitter = 1e-9 * torch.eye(5)
        chol = torch.linalg.cholesky(step.ii + jitter)
        root = wishart_root(lower(5, layer), 1.0, randn(5, 5, seed=layer)) if floor else lower(5, layer)
        grams = gram_step(step, chol, root, floor)
        torch.testing.assert_close(grams.ti[0], grams.ii[2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grams.t[0], grams.ii[2, 2], rtol=1e-5, atol=1e-5)


# 8, 9, 10


def test_the_order_of_inducing_points_does_not_matter() -> None:
    points, x = randn(6, 3), randn(5, 3, seed=1)
    made = scrambled(machine(points, depth=2, jitter=1e-10))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    other = machine(points[order], depth=2, jitter=1e-10)

    def whitened(values: Tensor, kernel: Tensor) -> Tensor:
        """L'^-1 P L v: what the parameters of the other order are."""
        ours = torch.linalg.cholesky(kernel)
        theirs = torch.linalg.cholesky(kernel[order][:, order])
        return torch.linalg.solve_triangular(theirs, (ours @ values)[order], upper=False)

    def raw(root: Tensor, kernel: Tensor) -> Tensor:
        moved = whitened(_triangular(root), kernel)
        chol = torch.linalg.cholesky(moved @ moved.T)
        return chol.tril(-1) + chol.diagonal().log().diag()

    with torch.no_grad():
        layers = made._layers(points[:0])
        first, last = (made._kernel(layers[layer], layer).ii for layer in (0, 1))
        other.roots[0].copy_(raw(made.roots[0], first))
        other.root.copy_(raw(made.root, last))
        other.mean.copy_(whitened(made.mean, last))
        assert made.log_noise is not None
        assert other.log_noise is not None
        other.log_noise.copy_(made.log_noise)
        for a, b in zip(made(x)[:2], other(x)[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(made.kl(), other.kl(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", [{}, {"skr": 2.0}, {"kernel": "arccos"}, {"likelihood": "categorical"}])
def test_points_of_a_batch_do_not_see_each_other(how: dict[str, Any]) -> None:
    made = scrambled(machine(randn(6, 3), depth=3, **how)).eval()
    x = randn(5, 3, seed=1)
    together = made(x)
    for i in (4, 0, 2):
        alone = made(x[[i]])
        torch.testing.assert_close(alone.mean[0], together.mean[i], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.variance[0], together.variance[i], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.probs()[0], together.probs()[i], rtol=0, atol=1e-12)


def test_the_mean_over_batches_is_the_loss_of_all() -> None:
    made = scrambled(machine(randn(6, 3), depth=3))
    x, y = randn(12, 3, seed=1), randn(12, 2, seed=2)
    parts = torch.stack([made.loss(a, b, 12) for a, b in zip(x.split(3), y.split(3), strict=True)])
    torch.testing.assert_close(parts.mean(), made.loss(x, y, 12))


# 11 and 12


def test_gradients() -> None:
    x = randn(4, 3).requires_grad_()
    points = randn(3, 3, seed=1).requires_grad_()

    def through(kernel: str) -> Any:
        def call(points: Tensor, x: Tensor) -> Tensor:
            grams = input_grams(points, x)
            return KERNELS[kernel].cross(grams.ti, grams.t, grams.ii.diagonal())

        return call

    for kernel in KERNELS:
        assert torch.autograd.gradcheck(through(kernel), (points, x))
        assert torch.autograd.gradcheck(lambda z, k=kernel: KERNELS[k].square(z @ z.T), (points,))

    def step(points: Tensor, x: Tensor, raw: Tensor) -> Any:
        one = torch.tensor(1.0, dtype=torch.float64)
        kernel = kernel_step(input_grams(points, x), KERNELS["rbf"], one, one, 1e-3)
        return gram_step(kernel, torch.linalg.cholesky(kernel.ii), _triangular(raw), 0.1)

    raw = (0.3 * randn(3, 3, seed=2)).requires_grad_()
    assert torch.autograd.gradcheck(step, (points, x, raw))
    for divergence in (whitened_kl, taylor_kl):
        assert torch.autograd.gradcheck(lambda r, d=divergence: d(_triangular(r)), (raw,))


@pytest.mark.parametrize("used", [False, True])
def test_weights_come_back(used: bool) -> None:
    x, y = randn(30, 3), randn(30, 2, seed=1)
    made = DeepKernelMachine(3, 2, n_inducing=6, depth=3, ard=True)
    made.init_inducing(x)
    scrambled(made)
    if used:
        made.loss(x, y, 30).backward()
    other = DeepKernelMachine(3, 2, n_inducing=6, depth=3, ard=True)
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    assert torch.equal(other(x).mean, made(x).mean)
    assert torch.equal(other(x).variance, made(x).variance)


# and what users meet


@pytest.mark.parametrize(("rows", "looked_at"), [(30, 30), (5000, 6 * 256)])
def test_a_cluster_is_of_so_many_points_at_most(
    rows: int, looked_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a million rows would take minutes. The same seed takes the same ones."""
    seen, fit_clusters = [], KMeans.fit

    def fitted(self: KMeans, points: Any) -> KMeans:
        seen.append(points)
        return fit_clusters(self, points)

    monkeypatch.setattr(KMeans, "fit", fitted)
    x = randn(rows, 2)
    taken = []
    for seed in (0, 0, 1):
        made = DeepKernelMachine(2, 1, n_inducing=6)
        made.init_inducing(x, seed=seed)
        taken.append(made.inducing.detach())
    assert [len(points) for points in seen] == [looked_at] * 3
    assert {tuple(point) for point in seen[0]} <= {tuple(point) for point in x.double().tolist()}
    assert torch.equal(taken[0], taken[1])
    assert not torch.equal(taken[0], taken[2])


def test_it_learns_where_the_prior_does_not_fit() -> None:
    """A function of one direction among five: the learnt Gram matrix beats the fixed kernel."""
    x = randn(200, 5)
    y = (3 * x[:, :1]).sin()
    errors = {}
    for nu in (1e-2, math.inf):
        torch.manual_seed(0)
        made = DeepKernelMachine(5, 1, depth=2, n_inducing=40, nu=nu)
        made.init_inducing(x[:150])
        optimizer = torch.optim.Adam((p for p in made.parameters() if p.requires_grad), lr=2e-2)
        for _ in range(300):
            optimizer.zero_grad()
            made.loss(x[:150], y[:150], 150).backward()
            optimizer.step()
        with torch.no_grad():
            errors[nu] = float((made(x[150:]).mean - y[150:]).square().mean().sqrt())
    assert errors[1e-2] < 0.8 * errors[math.inf]


def test_bf16_autocast_changes_nothing() -> None:
    made = scrambled(machine(randn(6, 3), depth=3))
    x, y = randn(5, 3, seed=1), randn(5, 2, seed=2)
    expected = made.loss(x, y, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.loss(x, y, 5), expected)


def test_inducing_points_are_of_the_data() -> None:
    x = torch.cat([randn(40, 3), randn(40, 3) + 20])
    made = DeepKernelMachine(3, 1, n_inducing=2)
    with pytest.raises(RuntimeError, match="call init_inducing first"):
        made(x)
    made.init_inducing(x)
    centres = torch.stack([x[:40].mean(0), x[40:].mean(0)]).float()
    found = made.inducing.detach()
    torch.testing.assert_close(found[found[:, 0].argsort()], centres)
    made.init_inducing(x, "random")
    assert all((x.float() == point).all(1).any() for point in made.inducing.detach())
    for bad, message in (
        (x[:1].expand(10, 3), "2 inducing points of 1 different ones"),
        (x * math.nan, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            made.init_inducing(bad)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"depth": 0}, "must be at least 1"),
        ({"nu": 0.0}, "nu must be one number greater than 0"),
        ({"nu": (1.0, 1.0)}, r"or a sequence of depth - 1 = 1 of them, got \(1.0, 1.0\)"),
        ({"kernel": "matern"}, "kernel must be one of linear, arccos"),
        ({"likelihood": "poisson"}, "no likelihood 'poisson'"),
        ({"skr": 0.5}, "skr must be at least 1"),
        ({"draws": 0}, "draws must be at least 1"),
    ],
)
def test_wrong_arguments(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepKernelMachine(3, 1, **how)


def test_fit_takes_arrays_and_lists_too() -> None:
    x, y = randn(6, 3).float(), torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32)
    made = [
        fit(DeepKernelMachine(3, 3, n_inducing=4, likelihood="categorical"), *data, steps=2)  # type: ignore[arg-type]
        for data in ((x, y), (x.numpy(), y.numpy()), (x.tolist(), y.tolist()))
    ]
    for other in made[1:]:
        assert torch.equal(made[0].mean, other.mean)


def test_wrong_targets() -> None:
    made = machine(randn(5, 3), 2)
    with pytest.raises(ValueError, match=r"targets \(4, 3\) for outputs \(4, 2\)"):
        made.loss(randn(4, 3), randn(4, 3), 4)
    classes = machine(randn(5, 3), 2, likelihood="categorical")
    with pytest.raises(
        ValueError, match=r"class indices \(4,\) of an integer type .* \(4, 2\) of torch.float64"
    ):
        classes.loss(randn(4, 3), randn(4, 2), 4)
    for labels in ([0, 1, 2, 1], [0, 1, -1, 1]):
        with pytest.raises(ValueError, match=r"class indices must be from 0 to 1, got (0 to 2|-1 to 1)"):
            classes.loss(randn(4, 3), torch.tensor(labels), 4)
    line = r"targets \(4,\) for outputs \(4, 2\); of class indices the likelihood is \"categorical\""
    with pytest.raises(ValueError, match=line):
        fit(DeepKernelMachine(3, 2, n_inducing=2), randn(4, 3), torch.tensor([0, 1, 0, 1]), steps=1)
    with pytest.raises(ValueError, match="a NaN or an infinity in the targets"):
        fit(DeepKernelMachine(3, 1, n_inducing=2), randn(4, 3), torch.full((4,), math.nan), steps=1)
    with pytest.raises(ValueError, match=r"targets \(4,\) for outputs \(4, 2\)"):
        made(randn(4, 3)).log_prob(randn(4))
    with pytest.raises(ValueError, match=r"inputs \(B, 3\) are needed, not \(5, 2, 3\)"):
        made(randn(5, 2, 3))
    with pytest.raises(ValueError, match="how must be"):
        made.init_inducing(randn(9, 3), "kmean")  # type: ignore[arg-type]
    for x, y, steps, message in (
        (randn(4, 3), randn(5, 2), 1, "4 rows of x and 5 targets"),
        (randn(4, 3), randn(4, 2), 0, "steps and batch_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(made, x, y, steps=steps)
    with pytest.raises(ValueError, match="log_prob is of real targets"):
        classes(randn(4, 3)).log_prob(randn(4, 2))


def test_a_singular_kernel_is_met_with_a_warning() -> None:
    points = randn(1, 3).expand(6, 3)
    made = machine(points, jitter=0.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.isfinite(made(randn(4, 3)).mean).all()
    assert any("added jitter" in str(each.message) for each in said)
    assert made.condition_number(0) > 1e12


def test_half_precision_is_refused() -> None:
    machine = fit(DeepKernelMachine(2, 1, 2, 5), torch.randn(20, 2), torch.randn(20, 1), steps=1)
    with pytest.raises(ValueError, match=r"call \.float\(\)"):
        machine.half()(torch.randn(3, 2).half())
