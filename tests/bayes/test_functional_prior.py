"""Functional priors against scipy, torch's distributions, closed forms and exact posteriors."""

import math
from pathlib import Path
from typing import Any

import gpytorch
import pytest
import timm
import torch
from scipy import special, stats
from torch import Tensor, nn
from torch.func import functional_call

from leaven.bayes.functional_prior import (
    SGHMC,
    Critic,
    Flow,
    FunctionalPrior,
    Gaussian,
    GPTarget,
    Hierarchical,
    PosteriorSamples,
    effective_sample_size,
    energy_distance,
    fit_prior,
    gaussian_loglik,
    image_measure,
    map_estimate,
    rhat,
    sliced_distance,
    softmax_loglik,
    table_measure,
    train_critic,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def mlp(inputs: int = 3, width: int = 20) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 1))


def shifted(prior: FunctionalPrior) -> FunctionalPrior:
    """Away from where its parameters start."""
    with torch.no_grad():
        for i, p in enumerate(prior.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=generator(i)).to(p))
    return prior


# families


def test_gaussian() -> None:
    family = Gaussian(5).double()
    assert float(family.std.detach()) == pytest.approx(1.3132617)
    values = randn(7, 5)
    expected = torch.distributions.Normal(0, family.std).log_prob(values).sum(1)
    torch.testing.assert_close(family.log_prob(values), expected)
    assert torch.autograd.gradcheck(lambda raw: _with(family, raw=raw).log_prob(values), (family.raw,))


def _with(family: nn.Module, **values: Tensor) -> Any:
    class Bound:
        def log_prob(self, x: Tensor) -> Tensor:
            module = _Call(family)
            found: Tensor = functional_call(module, {f"family.{k}": v for k, v in values.items()}, (x,))
            return found

    return Bound()


class _Call(nn.Module):
    def __init__(self, family: Any) -> None:
        super().__init__()
        self.family = family

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.family.log_prob(x)
        return out


def test_hierarchical_is_a_student_t_with_a_variance_for_each_draw() -> None:
    family = Hierarchical(2).double()
    with torch.no_grad():
        family.raw_shape.fill_(1.7)
        family.raw_rate.fill_(0.4)
        shape, rate = float(family.shape), float(family.rate)
        draws = family.sample(20_000, generator())
    marginal = stats.t(2 * shape, scale=math.sqrt(rate / shape))
    assert stats.kstest(draws[:, 0].numpy(), marginal.cdf).pvalue > 1e-3
    joint = stats.multivariate_t(loc=[0, 0], shape=(rate / shape), df=2 * shape)
    values = randn(6, 2)
    torch.testing.assert_close(
        family.log_prob(values).detach(), torch.tensor(joint.logpdf(values.numpy())), rtol=1e-8, atol=1e-8
    )
    sizes = draws.square().sum(1).log()  # one variance for both numbers of a draw, another for the next draw
    shared = special.polygamma(1, shape) / 4  # variance of half the logarithm of v, beside that of log |z|
    expected = shared / (shared + math.pi**2 / 8)
    assert float(torch.corrcoef(draws.abs().log().T)[0, 1]) == pytest.approx(float(expected), abs=0.03)
    assert abs(float(torch.corrcoef(torch.stack([sizes[:-1], sizes[1:]]))[0, 1])) < 0.03


def test_the_flows_density_is_that_of_its_draws() -> None:
    family = Flow(1).double()
    with torch.no_grad():
        family.log_scale.fill_(0.3)
        family.skew.fill_(0.6)
        family.log_tail.fill_(0.25)
        grid = torch.linspace(-60, 200, 400_001, dtype=torch.float64)
        density = family.log_prob(grid.unsqueeze(1)).exp()
        draws = family.sample(400_000, generator())[:, 0]
    step = float(grid[1] - grid[0])
    assert float(density.sum() * step) == pytest.approx(1, abs=1e-5)
    mean = float((density * grid).sum() * step)
    variance = float((density * (grid - mean).square()).sum() * step)
    assert float(draws.mean()) == pytest.approx(mean, rel=0.02)
    assert float(draws.var()) == pytest.approx(variance, rel=0.05)
    cdf = (density.cumsum(0) * step).numpy()
    assert stats.kstest(draws[:20_000].numpy(), lambda v: _interpolated(v, grid.numpy(), cdf)).pvalue > 1e-3


def _interpolated(values: Any, grid: Any, cdf: Any) -> Any:
    import numpy as np

    return np.interp(values, grid, cdf)


def test_the_flow_goes_both_ways() -> None:
    family = Flow(4).double()
    with torch.no_grad():
        for p in family.parameters():
            p.add_(0.4 * torch.randn(p.shape, generator=generator(1), dtype=p.dtype))
    z = randn(4)
    values = family.forward_map(z)
    torch.testing.assert_close(family.inverse_map(values), z)
    jacobian = torch.autograd.functional.jacobian(family.forward_map, z)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum()
    torch.testing.assert_close(family.log_prob(values), normal - torch.linalg.slogdet(jacobian).logabsdet)


# the prior over a module


def test_standard_deviations_go_with_the_fan_in() -> None:
    prior = FunctionalPrior(nn.Sequential(nn.Conv2d(2, 40, 3), nn.Flatten(), nn.Linear(40, 30)).double())
    drawn = prior.sample(200, generator())
    expected = {"0.weight": 18, "0.bias": 1, "2.weight": 40, "2.bias": 1}
    assert {name: value.shape[1:] for name, value in drawn.items()} == {
        name: p.shape for name, p in prior.module.named_parameters()
    }
    for name, fan_in in expected.items():
        assert float(drawn[name].std().detach()) == pytest.approx(1.3133 / math.sqrt(fan_in), rel=0.05)


@pytest.mark.parametrize("family", ["gaussian", "hierarchical", "flow"])
def test_the_log_density_is_the_groups_own_with_the_change_of_units(family: Any) -> None:
    net = mlp().double()
    prior = shifted(FunctionalPrior(net, {"weights": "*.weight", "last bias": "2.bias"}, family))
    drawn = {name: value[0] for name, value in prior.sample(1, generator()).items()}
    assert set(drawn) == {"0.weight", "2.weight", "2.bias"}
    values = torch.cat([(drawn["0.weight"] * 3**0.5).flatten(), (drawn["2.weight"] * 20**0.5).flatten()])
    stretch = 60 * math.log(3**0.5) + 20 * math.log(20**0.5)
    expected = prior.family("weights").log_prob(values) + stretch
    expected = expected + prior.family("last bias").log_prob(drawn["2.bias"])
    torch.testing.assert_close(prior.log_prob(drawn), expected)


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    lenet = nn.Sequential(
        nn.Conv2d(1, 4, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 10),
    )
    return {
        "mlp": (mlp(), torch.randn(5, 3)),
        "lenet": (lenet, torch.randn(3, 1, 12, 12)),
        "group norm resnet": (
            timm.create_model("test_resnet", num_classes=4, norm_layer="groupnorm1").eval(),
            torch.randn(2, 3, 32, 32),
        ),
        "vit": (timm.create_model("test_vit", img_size=32, num_classes=4).eval(), torch.randn(2, 3, 32, 32)),
        "frozen batch norm": (
            timm.create_model("test_resnet", num_classes=4).eval(),
            torch.randn(2, 3, 32, 32),
        ),
    }


LARGE = ("group norm resnet", "vit", "frozen batch norm")
CASES = [
    pytest.param(name, scope, marks=[pytest.mark.slow] if name in LARGE and scope != "all" else [])
    for name in ("mlp", "lenet", *LARGE)
    for scope in ("all", "last_block", "head")
]


@pytest.mark.parametrize(("name", "scope"), CASES)
def test_functions_are_those_of_a_loop(name: str, scope: Any) -> None:
    net, x = networks()[name]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    prior = FunctionalPrior(net, scope=scope)
    drawn = prior.sample(3, generator())
    found = prior.evaluate(drawn, x, chunk_size=2)
    for i in range(3):
        expected = functional_call(net, {key: value[i] for key, value in drawn.items()}, (x,))
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found[0], found[1])
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(key.startswith("families.") for key in prior.state_dict())
    if name == "vit":
        assert not any("pos_embed" in key or "norm" in key or "cls" in key for key in drawn)


def test_scopes() -> None:
    net = timm.create_model("resnet10t", num_classes=4).eval()
    names = {scope: set(FunctionalPrior(net, scope=scope).groups) for scope in ("head", "last_block", "all")}
    assert names["head"] == {"fc.weight", "fc.bias"}
    assert names["head"] < names["last_block"] < names["all"]
    assert {name.split(".")[0] for name in names["last_block"]} == {"layer4", "fc"}


def test_a_parameter_that_layers_share_is_one_group() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    net, x = nn.Sequential(first, nn.Tanh(), second), torch.randn(4, 3)
    prior = FunctionalPrior(net)
    assert set(prior.groups) == {"0.weight", "0.bias", "2.bias"}
    drawn = prior.sample(2, generator())
    weight, bias, last = (drawn[name][1] for name in ("0.weight", "0.bias", "2.bias"))
    expected = (x @ weight.T + bias).tanh() @ weight.T + last
    torch.testing.assert_close(prior.evaluate(drawn, x)[1], expected)


# targets


def test_a_targets_functions_have_the_kernels_covariance() -> None:
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
    kernel.outputscale, kernel.base_kernel.lengthscale = 1.7, 0.8
    mean = gpytorch.means.ConstantMean()
    mean.constant.data.fill_(0.5)
    x = randn(5, 2)
    draws = GPTarget(kernel, mean, outputs=2).sample(x, 20_000, generator())
    assert draws.shape == (20_000, 5, 2)
    expected = kernel.double()(x).to_dense().detach()
    error = ((expected.diagonal().outer(expected.diagonal()) + expected.square()) / 20_000).sqrt()
    for output in (0, 1):
        assert ((draws[..., output].T.cov() - expected).abs() < 5 * error).all()
        assert ((draws[..., output].mean(0) - 0.5).abs() < 0.05).all()
    assert torch.corrcoef(draws[:, 0].T)[0, 1].abs() < 0.03


def test_hyper_parameters_are_drawn_for_every_function() -> None:
    kernel = gpytorch.kernels.ScaleKernel(
        gpytorch.kernels.RBFKernel(), outputscale_prior=gpytorch.priors.LogNormalPrior(0.2, 0.5)
    )
    x = torch.zeros(1, 1, dtype=torch.float64)
    target = GPTarget(kernel)
    draws = target.sample(x, 2000, generator())[:, 0, 0]
    # A scale mixture of normals: variance E s, fourth moment 3 E s^2.
    assert float(draws.var()) == pytest.approx(math.exp(0.2 + 0.125), rel=0.15)
    assert float(draws.pow(4).mean()) == pytest.approx(3 * math.exp(0.4 + 0.5), rel=0.4)
    state = torch.random.get_rng_state()
    assert torch.equal(target.sample(x, 3, generator()), target.sample(x, 3, generator()))
    assert torch.equal(torch.random.get_rng_state(), state)


# distances


def test_distances_of_equal_and_of_shifted_functions() -> None:
    f, g = randn(2000, 10), randn(2000, 10, seed=1)
    for way in (energy_distance, sliced_distance):
        assert abs(float(way(f, g))) < 0.2
        assert float(way(f, g + 1)) > 1
    f, g = f[:60], g[:50]
    assert float(energy_distance(f, g)) == pytest.approx(_energy_by_hand(f, g))
    assert float(sliced_distance(f, f + 0.7, 4000)) == pytest.approx(0.7 * 10**0.5, rel=0.03)


def _energy_by_hand(f: Tensor, g: Tensor) -> float:
    def mean(a: Tensor, b: Tensor, skip: bool) -> float:
        pairs = [(a - row).norm(dim=1) for row in b]
        total = sum(float(each.sum()) for each in pairs)
        return total / (len(a) * (len(b) - skip))

    return 2 * mean(f, g, False) - mean(f, f, True) - mean(g, g, True)


def test_the_critic_finds_the_wasserstein_distance_of_a_shift() -> None:
    torch.manual_seed(0)
    f, g = torch.randn(256, 4), torch.randn(256, 4)
    critic = Critic(4)
    for shift, penalty in ((2.0, 10.0), (2.0, 50.0)):
        critic.reset()
        train_critic(critic, f + shift, f, 400, penalty=penalty, threshold=0.0)
        found = critic(f + shift).mean() - critic(f).mean()
        distance = shift * 4**0.5
        assert float(found.detach()) == pytest.approx(distance * (1 + distance / (2 * penalty)), rel=0.05)
    critic.reset()
    assert train_critic(critic, f, g, 50, threshold=1e9) == 1


def test_a_wide_relu_network_has_the_arccosine_covariance() -> None:
    """Ties this to the deep kernel machines."""
    from leaven.bayes.deep_kernel_machine import arccos_kernel

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4096, bias=False), nn.ReLU(), nn.Linear(4096, 1, bias=False)).double()
    prior = FunctionalPrior(net)
    with torch.no_grad():
        for group in prior.groups:
            family = prior.family(group)
            assert isinstance(family, Gaussian)
            family.raw.fill_(math.log(math.expm1(1.0)))  # standard deviation 1
        x = randn(4, 3)
        draws = prior.functions(x, 3000, generator(), chunk_size=64)[:, :, 0]
    gram = x @ x.T / 3
    expected = arccos_kernel(gram, gram.diagonal(), gram.diagonal()) / 2
    error = ((expected.diagonal().outer(expected.diagonal()) + expected.square()) / 3000).sqrt()
    assert ((draws.T.cov() - expected).abs() < 5 * error).all()


# matching


@pytest.mark.parametrize("distance", [pytest.param("w1", marks=pytest.mark.slow), "energy", "sliced"])
def test_a_linear_model_recovers_the_variance_of_a_linear_process(distance: Any) -> None:
    net = nn.Linear(2, 1, bias=False).double()
    kernel = gpytorch.kernels.LinearKernel()
    kernel.variance = 4.0
    prior = FunctionalPrior(net)
    x = randn(40, 2)
    how: dict[str, Any] = {"steps": 120, "functions": 128, "lr": 0.03, "critic_steps": 10}
    before = torch.random.get_rng_state()
    history = fit_prior(prior, GPTarget(kernel), table_measure(x, 20), distance, **how)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(history) == 120
    family = prior.family("weight")
    assert isinstance(family, Gaussian)
    variance = float(family.std.detach()) ** 2 / 2  # per weight: over the fan-in of 2
    assert variance == pytest.approx(4.0, rel=0.12)
    again = FunctionalPrior(net)
    assert (
        fit_prior(again, GPTarget(kernel), table_measure(x, 20), distance, **how | {"steps": 3})
        == history[:3]
    )


def test_classes_are_outputs_of_their_own() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    target = GPTarget(gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()), outputs=3)
    images = torch.randn(30, 1, 4, 4)
    prior = FunctionalPrior(net)
    for distance in ("w1", "energy"):
        history = fit_prior(
            prior, target, image_measure(images, 8), distance, steps=3, functions=16, critic_steps=5
        )
        assert all(map(math.isfinite, history))


def test_matching_leaves_no_gradient_in_the_module() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    target = GPTarget(gpytorch.kernels.RBFKernel())
    for distance in ("w1", "energy"):
        fit_prior(
            FunctionalPrior(net, scope="head"),
            target,
            table_measure(torch.rand(9, 3), 4),
            distance,
            steps=2,
            functions=4,
            critic_steps=2,
        )
    assert all(p.grad is None for p in net.parameters())


def test_other_devices_random_numbers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here there are none, but torch would seed them all."""
    from leaven.bayes.deep_kernel_machine import DeepKernelMachine, fit
    from leaven.pretext.diffusion import fresh_like

    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    kernel = gpytorch.kernels.RBFKernel(lengthscale_prior=gpytorch.priors.LogNormalPrior(0.0, 1.0))
    prior = FunctionalPrior(mlp(), family="hierarchical")
    seeded.clear()  # mlp() seeds what there is
    x = torch.rand(9, 3)
    fit_prior(prior, GPTarget(kernel), table_measure(x, 4), "energy", steps=1, functions=4)
    fit(DeepKernelMachine(3, 1, n_inducing=2), x, x[:, :1], steps=1)
    fresh_like(nn.Linear(2, 2))
    assert not seeded


def test_measures() -> None:
    x = torch.rand(50, 2) + torch.tensor([0.0, 10.0])
    points = table_measure(x, 40, real=0.5, margin=0.1)(generator())
    assert points.shape == (40, 2)
    assert all((x == row).all(1).any() for row in points[:20])
    assert len(torch.unique(points[:20], dim=0)) == 20
    low, high = x.min(0).values, x.max(0).values
    assert ((points >= low - 0.11) & (points <= high + 0.11)).all()
    assert table_measure(x[:5], 40, real=1.0)(generator()).shape == (40, 2)
    assert not torch.equal(table_measure(x)(generator()), table_measure(x)(generator(1)))


# posteriors


def conjugate(n: int = 200) -> tuple[FunctionalPrior, Tensor, Tensor, Tensor, Tensor]:
    """Linear regression with its exact posterior mean and covariance."""
    x, noise = randn(n, 3), 0.25
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64) + noise**0.5 * randn(n, 1, seed=1)
    prior = FunctionalPrior(nn.Linear(3, 1, bias=False).double())
    family = prior.family("weight")
    assert isinstance(family, Gaussian)
    variance = float(family.std.detach()) ** 2 / 3
    precision = x.T @ x / noise + torch.eye(3) / variance
    covariance = torch.linalg.inv(precision)
    return prior, x, y, (covariance @ x.T @ y / noise)[:, 0], covariance


def sampler(**how: Any) -> tuple[SGHMC, Tensor, Tensor]:
    prior, x, y, mean, covariance = conjugate()
    settings: dict[str, Any] = {"burn_in": 1500, "thin": 20} | how
    return SGHMC(prior, gaussian_loglik(0.25), x, y, **settings), mean, covariance


@pytest.mark.slow
def test_sghmc_samples_the_exact_posterior_of_linear_regression() -> None:
    chains, mean, covariance = sampler()
    found = chains.run(250)
    draws = found.flat()["weight"][:, 0]
    deviation = covariance.diagonal().sqrt()
    assert ((draws.mean(0) - mean).abs() < 0.25 * deviation).all()
    ratio = draws.var(0) / deviation.square()
    assert ((ratio > 0.6) & (ratio < 1.4)).all()
    assert float(found.rhat().max()) < 1.2
    assert found.clamped_fraction < 0.5


def test_chains_together_are_chains_alone_and_resume_exactly() -> None:
    whole, _, _ = sampler(chains=3, burn_in=50, thin=5)
    expected = whole.run(10)
    for state in ([2, 7], [5]):  # interrupted after so many draws
        first, _, _ = sampler(chains=3, burn_in=50, thin=5)
        first.run(state[0])
        saved = first.state_dict()
        first.run(9)  # what was saved stays what it was
        for more in [*state[1:], 10]:
            second, _, _ = sampler(chains=3, burn_in=50, thin=5)
            second.load_state_dict(saved)
            found = second.run(more)
            saved = second.state_dict()
        assert torch.equal(found.params["weight"], expected.params["weight"])
    alone, _, _ = sampler(chains=1, burn_in=50, thin=5)
    torch.testing.assert_close(
        alone.run(10).params["weight"][0], expected.params["weight"][0], rtol=1e-9, atol=1e-9
    )
    other, _, _ = sampler(chains=1, burn_in=50, thin=5, seed=1)
    assert not torch.equal(other.run(10).params["weight"][0], expected.params["weight"][0])


def test_scales_are_adapted_during_burn_in_alone() -> None:
    chains, _, _ = sampler(burn_in=30, thin=1)
    chains.run(1)
    before = [value.clone() for value in (chains.state.v, chains.state.tau, chains.state.g)]
    chains.run(20)
    after = (chains.state.v, chains.state.tau, chains.state.g)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_one_step_by_hand() -> None:
    """The update of the paper, written out, in burn-in and after it."""
    chains, _, _ = sampler(chains=1, batch_size=200, burn_in=1, thin=1)
    prior, x, y = chains.prior, chains.x, chains.targets
    h, a = 0.01, 0.01
    w, tau, g, v, m = (getattr(chains.state, k).clone() for k in ("w", "tau", "g", "v", "momentum"))
    twin = torch.Generator().manual_seed(0)
    twin.set_state(chains.generators[0].get_state())
    for burning in (True, False):
        rows = torch.randint(200, (200,), generator=twin)
        params = {"weight": w.view(1, 3).clone().requires_grad_()}
        energy = (
            -gaussian_loglik(0.25)(x[rows] @ params["weight"].T, y[rows]).mean()
            - prior.log_prob(params) / 200
        )
        (gradient,) = torch.autograd.grad(energy, params["weight"])
        gradient = 200 * gradient
        if burning:
            old = tau
            tau = tau + 1 - old * g**2 / (v + 1e-16)
            g = g + (gradient - g) / (old + 1)
            v = v + (gradient**2 - v) / (old + 1)
        inverse = 1 / (v.sqrt() + 1e-16)
        spread = (2 * h**2 * a * inverse - h**4).clamp_min(1e-16)
        m = (
            m
            - h**2 * inverse * gradient
            - a * m
            + spread.sqrt() * torch.randn(3, dtype=w.dtype, generator=twin)
        )
        w = w + m
        chains._step()
        torch.testing.assert_close(chains.state.w, w)
        torch.testing.assert_close(chains.state.v, v)


def test_temperatures() -> None:
    """Of both: as many data at once. Of the likelihood alone: as its noise is that much larger."""
    cold, _, _ = sampler(chains=1, burn_in=20, thin=1, temperature=0.5)
    assert cold.scale == 400
    prior, x, y, _, _ = conjugate()
    made = [
        SGHMC(prior, lambda out, y: gaussian_loglik(0.25)(out, y) / 2, x, y, burn_in=20, thin=1),
        SGHMC(prior, gaussian_loglik(0.25), x, y, burn_in=20, thin=1, likelihood_temperature=2.0),
    ]
    first, second = (each.run(5).params["weight"] for each in made)
    torch.testing.assert_close(first, second)


def test_map_is_the_ridge_solution_and_members_are_alone() -> None:
    prior, x, y, mean, _ = conjugate()
    how: dict[str, Any] = {"steps": 1000, "batch_size": 400, "lr": 0.05}
    found = map_estimate(prior, gaussian_loglik(0.25), x, y, members=3, **how)["weight"]
    torch.testing.assert_close(found, mean.expand_as(found), atol=0.02, rtol=0)
    assert not torch.equal(found[0], found[1])
    alone = map_estimate(prior, gaussian_loglik(0.25), x, y, **how)["weight"]
    torch.testing.assert_close(alone[0], found[0], rtol=1e-9, atol=1e-9)


def test_standard_normal() -> None:
    prior = FunctionalPrior(mlp())
    prior.standardise()
    drawn = prior.sample(2000, generator())
    assert float(drawn["0.weight"].detach().std()) == pytest.approx(1 / math.sqrt(3), rel=0.02)
    assert float(drawn["2.bias"].detach().std()) == pytest.approx(1, rel=0.05)
    with pytest.raises(TypeError, match="only Gaussian ones"):
        FunctionalPrior(mlp(), family="flow").standardise()


def test_samples_come_back(tmp_path: Path) -> None:
    chains, _, _ = sampler(burn_in=20, thin=1)
    found = chains.run(6)
    found.save(tmp_path / "samples.safetensors")
    loaded = PosteriorSamples.load(tmp_path / "samples.safetensors")
    assert torch.equal(loaded.params["weight"], found.params["weight"])
    assert loaded.clamped_fraction == found.clamped_fraction
    x = randn(5, 3)
    assert torch.equal(loaded.predict(chains.prior, x), found.predict(chains.prior, x))
    assert loaded.predict(chains.prior, x).shape == (24, 5, 1)
    (tmp_path / "junk").write_bytes(b"junk and more junk")
    with pytest.raises(ValueError, match="has no posterior samples in it"):
        PosteriorSamples.load(tmp_path / "junk")
    with pytest.raises(TypeError, match="a kernel of gpytorch's is needed, not NoneType"):
        GPTarget(None)
    with pytest.raises(TypeError, match="a glob over parameter names is needed, not list"):
        FunctionalPrior(mlp(), {"a": ["0.weight"]})  # type: ignore[dict-item]
    with pytest.raises(FileNotFoundError, match="no posterior samples at"):
        PosteriorSamples.load(tmp_path / "nothing")


def test_classes_and_clipping() -> None:
    logits, labels = randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = -nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(softmax_loglik(logits, labels), expected)
    prior = FunctionalPrior(nn.Linear(3, 3).double())
    how: dict[str, Any] = {"burn_in": 5, "thin": 1, "clip_grad": 1e-3}
    found = SGHMC(prior, softmax_loglik, randn(6, 3), labels, **how).run(4)
    assert torch.isfinite(found.functions).all()


def test_rhat_and_ess() -> None:
    draws = randn(4, 500, 3)
    assert ((rhat(draws) - 1).abs() < 0.02).all()
    assert (effective_sample_size(draws) > 1200).all()
    apart = draws + torch.arange(4.0).view(4, 1, 1)
    assert (rhat(apart) > 1.2).all()
    slow = torch.zeros(4, 2000, dtype=torch.float64)
    noise = randn(4, 2000, seed=3)
    for i in range(1, 2000):
        slow[:, i] = 0.9 * slow[:, i - 1] + noise[:, i]
    # An autoregression of 0.9: the effective number is (1 - 0.9) / (1 + 0.9) of the draws.
    assert float(effective_sample_size(slow)) == pytest.approx(8000 / 19, rel=0.3)
    with pytest.raises(ValueError, match="4 or more"):
        rhat(draws[:, :3])


# bad input


def test_what_cannot_be_is_one_line() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    net(torch.randn(2, 3, 5, 5))
    prior = FunctionalPrior(net.train())
    with pytest.raises(ValueError, match="1 is BatchNorm in training mode"):
        prior.functions(torch.randn(2, 3, 5, 5), 2)
    with pytest.raises(ValueError, match="BatchNorm in training mode"):
        SGHMC(prior, softmax_loglik, torch.randn(4, 3, 5, 5), torch.zeros(4, dtype=torch.int64))
    net = nn.Sequential(nn.Linear(3, 9), nn.Dropout(0.5), nn.Linear(9, 1))
    with pytest.raises(ValueError, match="1 is Dropout in training mode"):
        FunctionalPrior(net).functions(torch.randn(2, 3), 2)
    assert FunctionalPrior(net.eval()).functions(torch.randn(2, 3), 2).shape == (2, 2, 1)
    chains, _, _ = sampler(chains=2, burn_in=5, thin=1)
    state = chains.state_dict()
    bad: list[tuple[Any, str]] = [
        (lambda: chains.run(0), "draws must be at least 1"),
        (lambda: GPTarget(gpytorch.kernels.RBFKernel(), outputs=0), "outputs must be at least 1"),
        (
            lambda: SGHMC(chains.prior, gaussian_loglik(1.0), chains.x, chains.targets * torch.nan),
            "a NaN or an infinity in the targets",
        ),
        (
            lambda: map_estimate(chains.prior, gaussian_loglik(1.0), chains.x, chains.targets * torch.nan),
            "a NaN or an infinity in the data",
        ),
        (lambda: softmax_loglik(torch.ones(4, 3), torch.ones(4)), "class indices"),
        (
            lambda: chains.prior.evaluate({"weight": torch.ones(2, 1, 4)}, torch.ones(5, 3)),
            "weight is",
        ),
        (lambda: sampler(chains=3)[0].load_state_dict(state), "the state is of 2 x 3 chains and parameters"),
        (lambda: chains.prior.log_prob({"weight": torch.ones(4, 1, 3)}), "weight is"),
        (
            lambda: SGHMC(
                FunctionalPrior(mlp()), lambda out, y: (out - y).square(), torch.ones(4, 3), torch.ones(4, 1)
            ).run(4),
            "one number each is needed",
        ),
        (
            lambda: map_estimate(chains.prior, softmax_loglik, torch.ones(4, 3), torch.ones(4), lr=0),
            "lr greater",
        ),
        (
            lambda: map_estimate(chains.prior, softmax_loglik, torch.ones(4, 3), torch.ones(3)),
            "4 rows of x and 3 targets",
        ),
        (lambda: FunctionalPrior(nn.ReLU()), "ReLU has no linear or convolutional parameters"),
        (lambda: FunctionalPrior(nn.Sequential(nn.Conv2d(3, 4, 3)), scope="head"), "in scope 'head'"),
        (lambda: FunctionalPrior(mlp(), {"a": "5.*"}), "'5.*' matches no parameter"),
        (
            lambda: FunctionalPrior(mlp(), {"a": "*", "b": "0.*"}),
            "is in group 'a' and in group 'b'".replace("in group 'b'", "in 'b'"),
        ),
        (lambda: FunctionalPrior(mlp(), family="cauchy"), "family must be one of"),
        (lambda: table_measure(torch.tensor([[math.nan]])), "a NaN or an infinity in the data"),
        (lambda: table_measure(torch.ones(3, 1), real=2.0), "real between 0 and 1"),
        (
            lambda: GPTarget(gpytorch.kernels.RBFKernel()).sample(torch.tensor([[math.inf]]), 2),
            "must be finite",
        ),
        (lambda: sampler(friction=0.0), "friction between 0 and 1"),
        (lambda: sampler(chains=0), "must be at least 1"),
        (lambda: sampler(clip_grad=-1.0), "clip_grad must be greater than 0"),
        (lambda: gaussian_loglik(0.0), "noise must be greater than 0"),
        (lambda: gaussian_loglik(1.0)(torch.ones(4, 1), torch.ones(4)), "for outputs"),
        (
            lambda: SGHMC(FunctionalPrior(mlp()), gaussian_loglik(1.0), torch.ones(4, 3), torch.ones(3, 1)),
            "4 rows of x and 3 targets",
        ),
        (
            lambda: fit_prior(
                FunctionalPrior(mlp()),
                GPTarget(gpytorch.kernels.RBFKernel(), outputs=2),
                table_measure(torch.rand(9, 3), 4),
                "energy",
            ),
            "the network has 1 outputs and the target 2",
        ),
        (
            lambda: SGHMC(
                FunctionalPrior(mlp()), gaussian_loglik(1.0), torch.full((4, 3), math.nan), torch.ones(4, 1)
            ),
            "a NaN",
        ),
        (
            lambda: fit_prior(
                FunctionalPrior(mlp()),
                GPTarget(gpytorch.kernels.RBFKernel()),
                lambda g: torch.ones(2, 3),
                "l2",
            ),
            'distance must be "w1"',
        ),  # type: ignore[arg-type]
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message.replace("*", r"\*")) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_constant_column_is_no_trouble() -> None:
    x = torch.cat([torch.randn(30, 2), torch.ones(30, 1)], 1)
    target = GPTarget(gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=3)))
    history = fit_prior(FunctionalPrior(mlp()), target, table_measure(x, 20), "energy", steps=3, functions=16)
    assert all(map(math.isfinite, history))
