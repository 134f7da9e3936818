# %% [markdown]
# # Priors over functions
#
# A Bayesian network needs a prior over its weights. Nobody knows what a weight should be. But one often knows
# what the function should look like: how smooth, how large. A Gaussian process says that in two numbers. So draw
# functions from the network and from the process, and move the prior of the weights until they look alike. Then
# sample the posterior.

# %%
import os

import gpytorch
import matplotlib.pyplot as plt
import torch
from torch import nn

from leaven.bayes import SGHMC, FunctionalPrior, GPTarget, fit_prior
from leaven.bayes.functional_prior import gaussian_loglik, table_measure

smoke = bool(os.environ.get("SMOKE"))  # a short run that only shows that everything works
torch.manual_seed(0)
plt.style.use("seaborn-v0_8-colorblind")
plt.rcParams["figure.dpi"] = 90

# %% [markdown]
# ## Before: the usual prior
#
# A network with two hidden layers, and N(0, 1) over all weights (scaled by fan-in) and biases. Beside it what we
# would like functions to look like: a Gaussian process of lengthscale 0.5 and variance 1.

# %%
network = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
usual = FunctionalPrior(network)
usual.standardise()

kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
kernel.base_kernel.lengthscale, kernel.outputscale = 0.5, 1.0
target = GPTarget(kernel)
grid = torch.linspace(-2, 2, 101).unsqueeze(1)

# %% [markdown]
# ## Matching
#
# `fit_prior` compares draws at random points and moves the standard deviation of each group of weights. There are
# six groups here, a weight and a bias of every layer. The energy distance needs no critic; "w1" is the paper's
# distance.

# %%
matched = FunctionalPrior(network)
points = table_measure(grid, points=40, real=0.0, margin=0.0)
distances = fit_prior(matched, target, points, "energy", steps=4 if smoke else 300, functions=64, lr=0.05)
for group in matched.groups:
    print(f"{group:>9}: standard deviation 1.00 usual, {matched.family(group).std.item():.2f} matched")

# %%
generator = torch.Generator().manual_seed(1)
with torch.no_grad():
    draws = {
        "usual prior": usual.functions(grid, 12, generator),
        "matched prior": matched.functions(grid, 12, generator),
        "Gaussian process": target.sample(grid, 12, generator),
    }
figure, panels = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True, layout="constrained")
for axes, (name, functions) in zip(panels, draws.items(), strict=True):
    axes.plot(grid, functions.squeeze(2).T, linewidth=1, color="#0072B2", alpha=0.7)
    axes.set_title(name, fontsize=10)
    axes.set_xlabel("x")
    axes.grid(alpha=0.3)
panels[0].set_ylabel("f(x)")
figure.savefig("prior_draws.png")

# %% [markdown]
# Draws of the usual prior are nearly straight. Those of the matched prior bend about as often and as far as those
# of the process.
#
# ## After: posteriors
#
# A few noisy points with a gap in the middle. Four chains of SGHMC sample the posterior of the weights, under
# either prior. The noise is taken as known. For the Gaussian process the posterior is a formula.

# %%
x = torch.cat([torch.linspace(-1.6, -0.6, 10), torch.linspace(0.6, 1.4, 8)]).unsqueeze(1)
noise = 0.01
y = torch.sin(3 * x) + noise**0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))


def posterior(prior: FunctionalPrior) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean and standard deviation on the grid, and how far the chains are from agreeing."""
    sampler = SGHMC(
        prior, gaussian_loglik(noise), x, y, batch_size=18, step_size=0.01, friction=0.05,
        burn_in=20 if smoke else 2000, thin=2 if smoke else 20,
    )  # fmt: skip
    samples = sampler.run(4 if smoke else 100)
    functions = samples.predict(prior, grid).squeeze(2)
    return functions.mean(0), functions.std(0), samples.rhat().max().item()


@torch.no_grad()
def gaussian_process() -> tuple[torch.Tensor, torch.Tensor]:
    inner = kernel(x).to_dense() + noise * torch.eye(len(x))
    across = kernel(grid, x).to_dense()
    mean = across @ torch.linalg.solve(inner, y)
    variance = kernel(grid).to_dense() - across @ torch.linalg.solve(inner, across.T)
    return mean.squeeze(1), variance.diagonal().clamp_min(0).sqrt()


bands = {}
for name, prior in (("usual prior", usual), ("matched prior", matched)):
    mean, std, rhat = posterior(prior)
    bands[name] = mean, std
    print(f"{name}: largest R-hat {rhat:.2f}")
bands["Gaussian process"] = gaussian_process()

# %%
figure, panels = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True, layout="constrained")
for axes, (name, (mean, std)) in zip(panels, bands.items(), strict=True):
    axes.fill_between(grid[:, 0], mean - 2 * std, mean + 2 * std, alpha=0.3, label="two standard deviations")
    axes.plot(grid, mean, label="mean")
    axes.plot(x, y, "o", color="black", markersize=3, label="data")
    axes.set_title(name, fontsize=10)
    axes.set(xlabel="x", ylim=(-4, 4))
    axes.grid(alpha=0.3)
panels[0].set_ylabel("f(x)")
panels[0].legend(fontsize=7, loc="upper left")
figure.savefig("posteriors.png")

# %% [markdown]
# Right of the data the usual prior is surer than the process, and the matched prior is nearer to it. In the gap
# the matched prior is less sure than the process: six standard deviations can be matched only so far.
#
# R-hat compares chains with each other. Near 1 they agree; above 1.1 let them run longer before you believe the
# bands.
#
# ## In your own work
#
# - Any `nn.Module` will do: a head on a backbone's features, or with `scope="last_block"` a part of the backbone,
#   too. Norm layers keep their weights. For images take `image_measure` and `softmax_loglik`.
# - `recipes/functional_prior.py` does it for tables and images, with hyper-priors over the kernel.
# - Tran et al., *All You Need is a Good Functional Prior for Bayesian Deep Learning*, JMLR 2022, is the paper.
