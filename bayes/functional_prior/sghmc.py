"""Sample a posterior by stochastic gradients: Hamiltonian Monte Carlo with friction, adapted during burn-in."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from leaven.bayes.functional_prior.likelihoods import LogLik, gaussian_loglik, softmax_loglik
from leaven.bayes.functional_prior.prior import FunctionalPrior, Params, check_mode
from leaven.bayes.functional_prior.samples import PosteriorSamples

__all__ = ["SGHMC", "LogLik", "PosteriorSamples", "gaussian_loglik", "softmax_loglik"]

_LEAST_NOISE = 1e-16


@dataclass
class _State:
    """All that a chain's future depends on; tensors (chains, numbers)."""

    w: Tensor
    tau: Tensor
    g: Tensor
    v: Tensor
    momentum: Tensor
    step: int = 0
    clamped: float = 0.0
    kept: list[Tensor] = field(default_factory=list)


class SGHMC:
    """Scale-adapted stochastic gradient Hamiltonian Monte Carlo, all chains at once.

    Source: Springenberg et al., Bayesian optimization with robust Bayesian neural networks, NeurIPS 2016, with the
    constants of the functional prior's authors. Every chain has a random stream of its own, keyed by the seed and its
    number: chains run together are the chains run one by one.

    Args:
        prior: of the parameters; its own are left as they are.
        loglik: log likelihood (B,) of outputs (B, ...) and targets (B, ...).
        x, targets: training data (N, ...).
        chains: at once.
        batch_size: rows, drawn with replacement.
        step_size: h.
        friction: a, of the momentum.
        burn_in: steps during which the scales are adapted; after them they stay.
        thin: steps between draws.
        temperature: of prior and likelihood alike; below 1 the posterior is colder.
        likelihood_temperature: of the likelihood alone.
        clip_grad: norm that gradients over N are clipped to; None: they are not. It changes what is sampled.
        seed: of starts, batches and noise.
        judge: inputs at which `PosteriorSamples.functions` are taken; by default the first 50 of `x`.

    Raises:
        ValueError: numbers out of range, or a network with BatchNorm or Dropout in training mode.
    """

    def __init__(
        self,
        prior: FunctionalPrior,
        loglik: LogLik,
        x: Tensor,
        targets: Tensor,
        *,
        chains: int = 4,
        batch_size: int = 32,
        step_size: float = 0.01,
        friction: float = 0.01,
        burn_in: int = 2000,
        thin: int = 200,
        temperature: float = 1.0,
        likelihood_temperature: float = 1.0,
        clip_grad: float | None = None,
        seed: int = 0,
        judge: Tensor | None = None,
    ) -> None:
        if min(chains, batch_size, thin) < 1 or burn_in < 0:
            raise ValueError("chains, batch_size and thin must be at least 1, burn_in at least 0")
        if min(step_size, friction, temperature, likelihood_temperature) <= 0 or friction >= 1:
            raise ValueError("step_size and temperatures must be greater than 0, friction between 0 and 1")
        if clip_grad is not None and not clip_grad > 0:
            raise ValueError(f"clip_grad must be greater than 0, got {clip_grad}; None is for no clipping")
        if len(x) != len(targets):
            raise ValueError(f"{len(x)} rows of x and {len(targets)} targets")
        if not torch.isfinite(x).all():
            raise ValueError("there is a NaN or an infinity in the data: fill gaps first")
        if not torch.isfinite(targets).all():
            raise ValueError("there is a NaN or an infinity in the targets")
        check_mode(prior.module)
        self.prior, self.loglik, self.x, self.targets = prior, loglik, x, targets
        self.chains, self.batch_size, self.thin, self.burn_in = chains, batch_size, thin, burn_in
        self.h, self.a = step_size, friction
        self.scale = len(x) / temperature
        self.likelihood_temperature, self.clip_grad = likelihood_temperature, clip_grad
        self.judge = x[:50] if judge is None else judge
        self.generators = [torch.Generator(x.device).manual_seed(seed * 1_000_003 + c) for c in range(chains)]
        starts = []
        with torch.no_grad():
            for generator in self.generators:
                drawn = prior.sample(1, generator)
                starts.append(torch.cat([value.flatten() for value in drawn.values()]))
        self.shapes = {name: value.shape[1:] for name, value in drawn.items()}
        w = torch.stack(starts)
        one = torch.ones_like(w)
        self.state = _State(w, one.clone(), one.clone(), one.clone(), torch.zeros_like(w))
        # The gradient of -(mean log likelihood + log prior / N) of one chain on its own batch.
        self._gradient = vmap(grad(self._energy), randomness="different")

    def run(self, draws: int, report: Callable[[int], object] | None = None) -> PosteriorSamples:
        """Go on until every chain has so many draws in all.

        Args:
            draws: per chain, after burn-in.
            report: called with the number of steps done.

        Raises:
            FloatingPointError: a parameter is not finite.
            ValueError: no draws, or a log likelihood that is not (B,).
        """
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        state = self.state
        while len(state.kept) < draws:
            self._step()
            if report is not None:
                report(state.step)
            after = state.step - self.burn_in
            if after > 0 and after % self.thin == 0:
                if not torch.isfinite(state.w).all():
                    raise FloatingPointError(f"a chain diverged by step {state.step}: lower step_size")
                state.kept.append(state.w.clone())
        return self.samples()

    def samples(self) -> PosteriorSamples:
        """What has been drawn so far."""
        kept = torch.stack(self.state.kept, 1)
        params = {
            name: value.unflatten(0, kept.shape[:2])
            for name, value in self._named(kept.flatten(0, 1)).items()
        }
        with torch.no_grad():
            values = self.prior.evaluate(self._named(kept.flatten(0, 1)), self.judge, chunk_size=16)
        functions = values.flatten(1).unflatten(0, kept.shape[:2])
        return PosteriorSamples(params, functions, self.state.clamped / max(self.state.step, 1))

    def state_dict(self) -> dict[str, Any]:
        """All that the chains' future depends on, for `torch.save`; arguments and data aside."""
        kept = list(self.state.kept)  # these chains go on adding to theirs
        return vars(self.state) | {
            "kept": kept,
            "generators": [generator.get_state() for generator in self.generators],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, bit for bit, with the same arguments and data.

        Raises:
            ValueError: other chains, or of another network.
        """
        state = dict(state)
        if state["w"].shape != self.state.w.shape:
            theirs, ours = (" x ".join(map(str, w.shape)) for w in (state["w"], self.state.w))
            raise ValueError(f"the state is of {theirs} chains and parameters, and these are {ours}")
        for generator, saved in zip(self.generators, state.pop("generators"), strict=True):
            generator.set_state(saved)
        copied: dict[str, Any] = {
            key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()
        }
        copied["kept"] = list(state["kept"])
        self.state = _State(**copied)

    def _step(self) -> None:
        state, h, a = self.state, self.h, self.a
        # With replacement: shuffled passes would cancel the gradients' noise, which the injected noise allows for.
        size, n = (self.batch_size,), len(self.x)
        rows = torch.stack(
            [torch.randint(n, size, generator=g, device=self.x.device) for g in self.generators]
        )
        with torch.no_grad():  # the prior's own parameters need no gradient; that of `w` is taken inside
            gradient = self._gradient(state.w, self.x[rows], self.targets[rows])
        if self.clip_grad is not None:
            norm = gradient.norm(dim=1, keepdim=True)
            gradient = gradient * (self.clip_grad / norm.clamp_min(self.clip_grad))
        gradient = gradient * self.scale
        if state.step < self.burn_in:
            inverse = 1 / (state.tau + 1)
            state.tau = state.tau + 1 - state.tau * state.g.square() / (state.v + _LEAST_NOISE)
            state.g = state.g + inverse * (gradient - state.g)
            state.v = state.v + inverse * (gradient.square() - state.v)
        scaled = 1 / (state.v.sqrt() + _LEAST_NOISE)
        spread = 2 * h**2 * a * scaled - h**4
        state.clamped += float((spread < _LEAST_NOISE).float().mean())
        noise = torch.stack(
            [
                torch.randn(w.shape, generator=g, dtype=w.dtype, device=w.device)
                for w, g in zip(state.w, self.generators, strict=True)
            ]
        )
        pushed = -(h**2) * scaled * gradient - a * state.momentum
        state.momentum = state.momentum + pushed + spread.clamp_min(_LEAST_NOISE).sqrt() * noise
        state.w = state.w + state.momentum
        state.step += 1

    def _named(self, flat: Tensor) -> Params:
        """Parameters by name of vectors (..., numbers)."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = flat.split(sizes, dim=-1)
        return {
            name: part.unflatten(-1, shape) if shape else part.squeeze(-1)
            for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }

    def _energy(self, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        params = self._named(w)
        out = functional_call(self.prior.module, params, (x,))
        each = self.loglik(out, y)
        if each.shape != y.shape[:1]:
            raise ValueError(f"loglik gives {tuple(each.shape)} for {len(y)} rows: one number each is needed")
        likelihood = each.mean() / self.likelihood_temperature
        return -(likelihood + self.prior.log_prob(params) / len(self.x))
