"""Find where a network normalises and then activates, and put one layer there instead."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from leaven.callbacks.callback import NoEffectWarning
from leaven.callbacks.evonorm.graphs import NoGraph, graph_without
from leaven.callbacks.evonorm.watch import FUNCTIONS, NORMS, Example, Watch, is_activation, watch_run
from leaven.callbacks.wrappers import in_ddp, obstacles, unwrap_model

# One in so many layers with an activation is few. ResNet-18, an ordinary case, has it in 9 of 20.
_FEW = 3


class NormActFactory(Protocol):
    """Makes a layer for so many channels, with its activation or without."""

    def __call__(self, num_features: int, *, apply_act: bool) -> nn.Module: ...


@dataclass(frozen=True)
class Site:
    """One BatchNorm of the network.

    Attributes:
        name: of the BatchNorm.
        activation: the name of the activation that went with it, "inside" where it was part of the same layer, or
            "none".
        skipped: why it was left as it is; empty where it was replaced.
        bare: whether scale and shift alone are left, for no activation follows.
    """

    name: str
    activation: str
    skipped: str = ""
    bare: bool = False


@dataclass
class Report:
    """What `replace_norm_act` did, in the order of the network's modules; str() shows it as a table.

    Attributes:
        sites: every BatchNorm.
    """

    sites: list[Site] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def replaced(self) -> list[Site]:
        """Where the new layer is now."""
        return [site for site in self.sites if not site.skipped]

    @property
    def bare(self) -> list[Site]:
        """Where the new layer does not normalise."""
        return [site for site in self.sites if site.bare]

    @property
    def skipped(self) -> list[Site]:
        """What was left, with reasons."""
        return [site for site in self.sites if site.skipped]

    def undo(self) -> None:
        """Put the network's own layers back, and take added parameters out of the optimizers.

        Weight and bias are shared, and keep what they have learnt; parameters and statistics of the new layers go.
        """
        while self._undo:
            self._undo.pop()()

    def summary(self) -> list[str]:
        """How many were replaced, how many of them do not normalise, and a line for each that was left."""
        skipped = [f"{site.name} is left: {site.skipped}" for site in self.skipped]
        bare = f", {len(self.bare)} by scale and shift alone, for no activation follows" if self.bare else ""
        return [f"{len(self.replaced)} of {len(self.sites)} BatchNorm layers replaced{bare}", *skipped]

    def __str__(self) -> str:
        wide = max((len(site.name) for site in self.sites), default=0)
        lines = [
            f"{site.name:{wide}}  {site.skipped or 'replaced, activation: ' + site.activation}"
            for site in self.sites
        ]
        return "\n".join([*lines, self.summary()[0]])


def replace_norm_act(
    model: nn.Module,
    factory: NormActFactory,
    *,
    example: Example | None = None,
    optimizers: Sequence[Optimizer] = (),
) -> Report:
    """Replace each BatchNorm2d and the activation behind it by one layer, in place.

    The network is run once on an image to see what follows each BatchNorm, whatever its names and classes are. timm's
    fused layers are replaced one for one. A BatchNorm that no activation follows at once, but an addition, pooling,
    dropout, a gate or nothing, is replaced by the layer without its activation: of EvoNorm's, scale and shift alone are
    left there. If that is so everywhere, the network is refused; if less than a third of the new layers normalise, a
    `NoEffectWarning` says so. Where a block calls a function (``F.relu``), or a module that it calls elsewhere too
    (torchvision's ResNets), it becomes a ``torch.fx.GraphModule`` without that call, with the same names.

    Weight and bias stay the BatchNorm's own parameters, so an optimizer goes on with them; parameters that are new
    (EvoNorm's v) join the group of the weight beside them. Running statistics are copied by name.

    Args:
        model: not called through torch.compile yet, nor in DDP or FSDP.
        factory: ``factory(num_features, apply_act=...)``, such as ``partial(evo_norm, "s0")`` with its channels second.
        example: images (B, C, H, W) that the model takes, or a dict of the keyword arguments of a call; some images
            are tried where it is missing.
        optimizers: those of the model, where they exist already.

    Returns:
        What was replaced and what was skipped; ``.undo()`` takes it all back.

    Raises:
        ValueError: the model runs on no image, before or after, is wrapped or compiled already, or nothing of it would
            be normalised; nothing is left half done.
    """
    _check_unwrapped(model)
    watch = watch_run(model, example)
    report = Report()
    try:
        _replace(model, watch, factory, optimizers, report)
        _check_normalises(model, report)
        if report.replaced:
            watch_run(model, example)
    except BaseException:
        report.undo()
        raise
    if not report.replaced:
        why = "it has no BatchNorm2d" if not report.sites else f"all was skipped:\n{report}"
        warnings.warn(
            f"no layer of {type(model).__name__} was replaced: {why}", NoEffectWarning, stacklevel=2
        )
    return report


def _check_unwrapped(model: nn.Module) -> None:
    name = type(unwrap_model(model)).__name__
    if in_ddp(model):
        raise ValueError(
            f"the parameters of {name} would change: replace its layers before it is wrapped in "
            "DistributedDataParallel (before accelerator.prepare)"
        )
    for _, line in obstacles(model):
        raise ValueError(f"cannot replace layers of {name}: {line}")


def _check_normalises(model: nn.Module, report: Report) -> None:
    """Refuse a network that would lose its normalisation, and warn where it would lose most."""
    all_, bare, name = len(report.replaced), len(report.bare), type(model).__name__
    if bare and bare == all_:
        raise ValueError(
            f"none of the {all_} BatchNorm layers of {name} that could be replaced has its activation directly behind "
            "it: scale and shift alone would be left of them, and nothing would be normalised. Leave it as it is, or "
            "take a kind that divides without its activation too: s0a, s1a, s2a"
        )
    if (all_ - bare) * _FEW < all_:
        warnings.warn(
            f"{bare} of the {all_} BatchNorm layers of {name} that were replaced have no activation directly behind "
            "them: scale and shift alone are left of them, and little of the network is normalised",
            NoEffectWarning,
            stacklevel=3,
        )


@torch.no_grad()
def _only_scales(layer: nn.Module, channels: int) -> bool:
    """Whether a new layer is linear, as one that normalises never is."""
    layer, x = copy.deepcopy(layer), torch.linspace(-1, 2, 18 * channels).view(2, channels, 3, 3)
    return torch.equal(layer(2 * x), 2 * layer(x))


@dataclass
class _Plan:
    """What is to be done about one BatchNorm: its activation as a module or a function, and whose code calls that."""

    name: str
    activation: str = "none"
    skipped: str = ""
    act: nn.Module | None = None
    owner: nn.Module | None = None


def _replace(
    model: nn.Module, watch: Watch, factory: NormActFactory, optimizers: Sequence[Optimizer], report: Report
) -> None:
    names = {module: name for name, module in model.named_modules()}
    plans = {norm: _plan(norm, watch, names) for norm in names if isinstance(norm, NORMS)}
    pairs = Counter(plan.act for plan in plans.values())
    for norm, plan in plans.items():
        alone = plan.act is not None and watch.act_calls[plan.act] == pairs[plan.act]
        if plan.owner is not None and not alone:
            plan.skipped = _without_call(model, norm, plan, names, watch, report)
        if plan.skipped:
            report.sites.append(Site(plan.name, plan.activation, plan.skipped))
            continue
        layer = factory(norm.num_features, apply_act=plan.activation != "none")
        bare = plan.activation == "none" and _only_scales(layer, norm.num_features)
        report.sites.append(Site(plan.name, plan.activation, bare=bare))
        _take_over(plan.name, norm, layer, optimizers, report)
        _put(model, norm, layer, report)
        if alone and plan.act is not None:
            _put(model, plan.act, nn.Identity(), report)


def _plan(norm: nn.Module, watch: Watch, names: dict[nn.Module, str]) -> _Plan:
    name, calls = names[norm], watch.calls.get(norm, [])
    if len(calls) != 1:
        return _Plan(name, skipped="it is used more than once" if calls else "it was not used")
    if hasattr(norm, "act"):  # timm's BatchNormAct2d
        if not isinstance(getattr(norm, "drop", nn.Identity()), nn.Identity):
            return _Plan(name, "inside", "it drops activations inside")
        return _Plan(name, "none" if isinstance(norm.act, nn.Identity) else "inside")
    uses = calls[0].uses
    for function, within, caller in uses:
        is_module = is_activation(within)
        if is_module or function in FUNCTIONS:
            activation = names.get(within, "?") if is_module else function
            if len(uses) > 1:
                return _Plan(name, activation, "its output is used beside the activation too")
            return _Plan(name, activation, "", *((within, caller) if is_module else (None, within)))
    return _Plan(name)


def _without_call(
    model: nn.Module, norm: nn.Module, plan: _Plan, names: dict[nn.Module, str], watch: Watch, report: Report
) -> str:
    """Make the code of `plan.owner` leave out the activation behind `norm`; or say why that cannot be."""
    assert plan.owner is not None
    here = names[plan.owner]
    what = "is a function" if plan.act is None else "serves other places too"
    because = f"its activation {plan.activation} {what}"
    if not here:
        return f"{because}, in the code of the model itself"
    owner = model.get_submodule(here)  # a graph by now, if it had another such pair
    if owner._forward_hooks or owner._forward_pre_hooks:
        return f"{because}, and {here} has hooks"
    try:
        graph = graph_without(owner, norm, plan.activation if plan.act is None else plan.act, watch)
    except NoGraph as error:
        return f"{because}, and {here} {error}"
    shallow = fx.GraphModule(owner, graph, type(plan.owner).__name__)
    if lost := owner.state_dict().keys() - shallow.state_dict().keys():
        return f"{because}, and {here} has what its code did not use ({min(lost)})"
    for name, module in shallow.named_modules():  # whatever is frozen in eval mode stays so
        module.training = owner.get_submodule(name).training
    _put(model, owner, shallow, report)
    return ""


def _take_over(
    name: str, norm: nn.Module, layer: nn.Module, optimizers: Sequence[Optimizer], report: Report
) -> None:
    """Parameters of the same name and shape stay the same objects; new ones join the optimizers."""
    like = norm.weight if isinstance(norm.weight, Tensor) else norm.running_mean
    if isinstance(like, Tensor):
        layer.to(device=like.device, dtype=like.dtype)
    layer.train(norm.training)
    for key, parameter in list(layer.named_parameters(recurse=False)):
        old = norm._parameters.get(key)
        if old is not None and old.shape == parameter.shape:
            layer._parameters[key] = old
    for key, buffer in layer.named_buffers(recurse=False):
        old_buffer = norm._buffers.get(key)
        if old_buffer is not None and old_buffer.shape == buffer.shape:
            buffer.data.copy_(old_buffer)
    known = {id(p) for p in norm.parameters()}
    added = {key: p for key, p in layer.named_parameters() if id(p) not in known}
    if known and not any(p.requires_grad for p in norm.parameters()):
        for parameter in added.values():  # what was frozen stays so
            parameter.requires_grad_(False)
    for group in _groups(norm, optimizers) if added else ():
        if "param_names" in group:  # of an optimizer that was given named parameters
            beside = [
                n for n, p in zip(group["param_names"], group["params"], strict=True) if p is norm.weight
            ]
            prefix = beside[0].removesuffix("weight") if beside else f"{name}."
            group["param_names"].extend(prefix + key for key in added)
        group["params"].extend(added.values())
        report._undo.append(partial(_take_out, group, list(added.values())))


def _groups(norm: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[dict[str, Any]]:
    """The group that holds the BatchNorm's weight; one without a weight adds to the first group of all."""
    weight = norm.weight
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if weight is None or any(p is weight for p in group["params"]):
                yield group
                return


def _take_out(group: dict[str, Any], added: list[nn.Parameter]) -> None:
    gone = {id(p) for p in added}
    kept = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
    for key in ("params", "param_names"):
        if key in group:
            group[key][:] = [group[key][i] for i in kept]


def _put(model: nn.Module, old: nn.Module, new: nn.Module, report: Report) -> None:
    """In all places where the model holds `old`."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new
                report._undo.append(partial(parent._modules.__setitem__, key, old))
