"""Draws from a posterior, their diagnostics and their file."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from leaven.bayes.functional_prior.diagnostics import effective_sample_size, rhat
from leaven.bayes.functional_prior.prior import FunctionalPrior, Params


@dataclass
class PosteriorSamples:
    """Parameters drawn from a posterior.

    Attributes:
        params: name -> (chains, draws, ...).
        functions: values at some inputs that mixing is judged by, (chains, draws, numbers).
        clamped_fraction: share of all steps and parameters whose injected noise was at its least: where that is not
            small, chains descend rather than sample, and the step should be smaller or larger; see `SGHMC`.
    """

    params: Params
    functions: Tensor
    clamped_fraction: float

    def rhat(self) -> Tensor:
        """Of every number in `functions`; near 1 where chains agree, and above 1.1 they do not."""
        return rhat(self.functions)

    def ess(self) -> Tensor:
        """Effective number of draws of every number in `functions`."""
        return effective_sample_size(self.functions)

    def after(self, first: int) -> "PosteriorSamples":
        """Without the first draws of every chain."""
        params = {name: value[:, first:] for name, value in self.params.items()}
        return PosteriorSamples(params, self.functions[:, first:], self.clamped_fraction)

    def flat(self) -> Params:
        """Parameters of all chains (chains * draws, ...)."""
        return {name: value.flatten(0, 1) for name, value in self.params.items()}

    def predict(self, prior: FunctionalPrior, x: Tensor, chunk_size: int | None = None) -> Tensor:
        """Values (chains * draws, B, ...), without gradient.

        Args:
            prior: that was sampled under.
            x: inputs (B, ...).
            chunk_size: see `FunctionalPrior.evaluate`.
        """
        with torch.no_grad():
            return prior.evaluate(self.flat(), x, chunk_size)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        tensors = {f"params.{name}": value.contiguous() for name, value in self.params.items()}
        tensors["functions"] = self.functions.contiguous()
        save_file(tensors, path, metadata={"clamped_fraction": repr(self.clamped_fraction)})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "PosteriorSamples":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"no posterior samples at {path}")
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                clamped = float(file.metadata()["clamped_fraction"])
            functions = tensors.pop("functions")
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} has no posterior samples in it ({error})") from error
        return PosteriorSamples(
            {name.removeprefix("params."): value for name, value in tensors.items()}, functions, clamped
        )
