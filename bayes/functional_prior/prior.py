"""A prior over the weights of any network, seen as a prior over its functions."""

import fnmatch
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from leaven.bayes.functional_prior.families import FAMILIES, Family, Gaussian

Params = dict[str, Tensor]
Scope = Literal["head", "last_block", "all"]


class FunctionalPrior(nn.Module):
    """Independent distributions over groups of a module's parameters; everything else stays as it is.

    A weight's standard deviation is that of its group over the square root of its fan-in; a bias has that of its group.

    Source: Tran et al., All You Need is a Good Functional Prior for Bayesian Deep Learning, JMLR 2022.

    Args:
        module: any network. Its own parameters are neither trained nor changed.
        groups: name -> glob over parameter names; by default each parameter of a linear or convolutional layer is a
            group of its own. Norm layers, class tokens and position embeddings keep their values unless a glob names
            them.
        family: of every group: "gaussian", "hierarchical" (one variance for each function and group), "flow".
        scope: of the default groups: "all", "head" (the last linear layer), or "last_block" (the last child module that
            has parameters besides the head's, and the head).

    Raises:
        ValueError: no parameters, a glob that matches none, or a name that two globs match.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Mapping[str, str] | None = None,
        family: Literal["gaussian", "hierarchical", "flow"] = "gaussian",
        scope: Scope = "all",
    ) -> None:
        super().__init__()
        if family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}")
        self._module = (module,)  # in a tuple: its parameters are not this module's
        names = _by_glob(module, groups) if groups is not None else _default_groups(module, scope)
        if not names:
            raise ValueError(
                f"{type(module).__name__} has no linear or convolutional parameters in scope {scope!r}"
            )
        own = dict(module.named_parameters(remove_duplicate=False))
        self.groups = {group: {name: own[name].shape for name in members} for group, members in names.items()}
        sizes = {group: sum(map(math.prod, members.values())) for group, members in self.groups.items()}
        self.families = nn.ModuleDict({_key(group): FAMILIES[family](n) for group, n in sizes.items()})
        self.to(next(iter(own.values())))

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self._module[0]

    def family(self, group: str) -> Family:
        """The distribution of a group."""
        found = self.families[_key(group)]
        assert isinstance(found, Family)
        return found

    def _shapes(self) -> list[tuple[str, torch.Size]]:
        return [(name, shape) for members in self.groups.values() for name, shape in members.items()]

    @torch.no_grad()
    def standardise(self) -> None:
        """Make every group N(0, 1): the usual prior, to compare with.

        Raises:
            TypeError: the family is not Gaussian.
        """
        for group in self.groups:
            family = self.family(group)
            if not isinstance(family, Gaussian):
                raise TypeError(
                    f"group {group!r} is {type(family).__name__}, and only Gaussian ones can be N(0, 1)"
                )
            family.raw.fill_(math.log(math.expm1(1.0)))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Params:
        """Parameters (n, ...) of n functions, by name, with gradient to the prior's own parameters.

        Args:
            n: functions.
            generator: on the prior's device; None takes the global one.
        """
        found: Params = {}
        for group, members in self.groups.items():
            values = self.family(group).sample(n, generator)
            parts = values.split([math.prod(shape) for shape in members.values()], dim=1)
            for part, (name, shape) in zip(parts, members.items(), strict=True):
                found[name] = part.view(n, *shape) / _root_fan_in(shape)
        return found

    def log_prob(self, params: Mapping[str, Tensor]) -> Tensor:
        """Log density of parameters by name, as `sample` gives them without the first dimension; normalised.

        A pure function: add its negative, over the number of data, to a loss for a MAP estimate.

        Raises:
            ValueError: parameters of several functions at once, or of other shapes; use `torch.func.vmap`.
        """
        for name, shape in self._shapes():
            if params[name].shape != shape:
                raise ValueError(f"{name} is {tuple(params[name].shape)}, and of one function {tuple(shape)}")
        total: Tensor | int = 0
        for group, members in self.groups.items():
            roots = [(name, _root_fan_in(shape)) for name, shape in members.items()]
            values = torch.cat([(params[name] * root).flatten() for name, root in roots])
            stretch = sum(math.prod(shape) * math.log(_root_fan_in(shape)) for shape in members.values())
            total = total + self.family(group).log_prob(values) + stretch
        assert isinstance(total, Tensor)
        return total

    def functions(
        self, x: Tensor, n: int, generator: torch.Generator | None = None, chunk_size: int | None = None
    ) -> Tensor:
        """Values (n, B, ...) of n functions, with gradient to the prior's parameters.

        Args:
            x: inputs (B, ...).
            n: functions.
            generator: see `sample`.
            chunk_size: see `evaluate`.
        """
        return self.evaluate(self.sample(n, generator), x, chunk_size)

    def evaluate(self, params: Params, x: Tensor, chunk_size: int | None = None) -> Tensor:
        """Values (n, B, ...) of the functions with parameters (n, ...) at inputs (B, ...).

        Args:
            params: as `sample` gives them.
            x: inputs.
            chunk_size: functions at a time; smaller ones need less memory, and on CPUs are often faster.

        Raises:
            ValueError: the network has BatchNorm or Dropout in training mode, see `check_mode`; or the parameters are
                of another network.
        """
        check_mode(self.module)
        for name, shape in self._shapes():
            if params[name].shape[1:] != shape:
                raise ValueError(f"{name} is {tuple(params[name].shape)}, and n of {tuple(shape)} are needed")

        def one(params: Params) -> Tensor:
            out: Tensor = functional_call(self.module, params, (x,))
            return out

        found: Tensor = vmap(one, chunk_size=chunk_size, randomness="different")(params)
        return found


def check_mode(module: nn.Module) -> None:
    """Refuse BatchNorm in training mode, which would mix functions' statistics, and Dropout, which is no function.

    Raises:
        ValueError: there is some.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
            raise ValueError(
                f"{name or 'the module'} is BatchNorm in training mode, which functions cannot share: call .eval(), or "
                "replace it by GroupNorm"
            )
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.training and layer.p > 0:
            raise ValueError(
                f"{name or 'the module'} is {type(layer).__name__} in training mode: functions have one value; "
                "call .eval()"
            )


def _key(group: str) -> str:
    return group.replace(".", "/")  # a ModuleDict allows no dots


def _root_fan_in(shape: torch.Size) -> float:
    return math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 1.0


def _default_groups(module: nn.Module, scope: Scope) -> dict[str, list[str]]:
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)
    }
    if scope in ("head", "last_block"):
        linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
        kept = set(linear[-1:])
        if scope == "last_block":
            rest = [name for name in layers if name not in kept]
            block = _block_of(rest[-1]) if rest else ""
            kept |= {name for name in rest if _block_of(name) == block}
        layers = {name: layer for name, layer in layers.items() if name in kept}
    elif scope != "all":
        raise ValueError(f'scope must be "head", "last_block" or "all", not {scope!r}')
    found, seen = {}, set[int]()
    for name, layer in layers.items():
        for part, parameter in layer.named_parameters(recurse=False):
            full = f"{name}.{part}" if name else part
            if id(parameter) not in seen:  # shared by two layers
                found[full] = [full]
            seen.add(id(parameter))
    return found


def _block_of(name: str) -> str:
    """``layer4.1`` of ``layer4.1.conv2``: the path to the last number in it, or the first part of a path without."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else parts[0]


def _by_glob(module: nn.Module, groups: Mapping[str, str]) -> dict[str, list[str]]:
    names = [name for name, _ in module.named_parameters()]
    found: dict[str, list[str]] = {}
    taken: dict[str, str] = {}
    for group, glob in groups.items():
        if not isinstance(glob, str):
            raise TypeError(
                f"group {group!r}: a glob over parameter names is needed, not {type(glob).__name__}"
            )
        found[group] = fnmatch.filter(names, glob)
        if not found[group]:
            raise ValueError(f"group {group!r}: {glob!r} matches no parameter of {type(module).__name__}")
        for name in found[group]:
            if name in taken:
                raise ValueError(f"{name} is in group {taken[name]!r} and in {group!r}")
            taken[name] = group
    return found
