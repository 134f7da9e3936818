"""A genome as a layer: interpreted node by node, or compiled into a module."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from leaven.callbacks.evonorm.genome import AGGREGATIONS, INITIAL, Genome

_LARGEST_EXPONENT = 30.0  # 1e13: what is larger overflows in the next product


def primitive(op: str, inputs: list[Tensor], groups: int, channels: int, eps: float) -> Tensor:
    """The value of a node.

    Values keep axes of length 1 where they are constant. Everything is finite, with finite gradients: divisors are kept
    away from 0, square roots and logarithms take ``|x| + eps`` and the sign of x, exponents end at 30.

    Args:
        op: see `leaven.callbacks.evonorm.genome`.
        inputs: (B, C, H, W), each axis of its own length or 1.
        groups: of channels, a divisor of C.
        channels: C.
        eps: see `Genome`.
    """
    x = inputs[0]
    if op in AGGREGATIONS:
        name, axes = op.split("_")
        return moment(name, axes, x, groups, channels, eps)
    if op == "add":
        return x + inputs[1]
    if op == "mul":
        return x * inputs[1]
    if op == "max":
        return torch.maximum(x, inputs[1])
    if op == "div":
        y = inputs[1]
        return x / torch.where(y < 0, y.clamp(max=-eps), y.clamp(min=eps))
    if op == "log":
        return x.sign() * (x.abs() + eps).log()
    if op == "sqrt":
        return x.sign() * (x.abs() + eps).sqrt()
    if op == "exp":
        return x.clamp(max=_LARGEST_EXPONENT).exp()
    simple: dict[str, Callable[[Tensor], Tensor]] = {
        "neg": torch.neg, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "abs": torch.abs, "square": torch.square,
    }  # fmt: skip
    return simple[op](x)


def moment(name: str, axes: str, x: Tensor, groups: int, channels: int, eps: float) -> Tensor:
    """A statistic of the values themselves, spread out again over axes of length 1."""
    if axes == "whg" and x.shape[1] == channels > 1:
        grouped = x.unflatten(1, (groups, channels // groups))
        found = _moment(name, grouped, (2, 3, 4), eps).expand(-1, -1, channels // groups, -1, -1)
        return found.flatten(1, 2)
    dims = {"bwh": (0, 2, 3), "wh": (2, 3), "whc": (1, 2, 3), "whg": (2, 3)}[axes]
    return _moment(name, x, dims, eps)


def _moment(name: str, x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    if name == "mean":
        return x.mean(dims, keepdim=True)
    if name == "rms":
        return (x.square().mean(dims, keepdim=True) + eps).sqrt()
    return (x.var(dims, correction=0, keepdim=True) + eps).sqrt()


def interpret(genome: Genome, x: Tensor, v0: Tensor, v1: Tensor, groups: int) -> Tensor:
    """The graph's output (B, C, H, W) in training mode, node by node.

    Args:
        genome: the graph.
        x: images (B, C, H, W).
        v0, v1: parameters (C,).
        groups: of channels, a divisor of C.
    """
    values: dict[int, Tensor] = {0: x, 1: x.new_zeros(1, 1, 1, 1)}
    values |= {2: v0.view(1, -1, 1, 1), 3: v1.view(1, -1, 1, 1)}
    for i, op, inputs in genome.steps():
        values[i] = primitive(op, [values[each] for each in inputs], groups, x.shape[1], genome.eps)
    return values[genome.output].expand_as(x)


class BatchMoment(nn.Module):
    """A statistic over batch and space: of this batch in training, of a running average otherwise.

    Args:
        name: "mean", "rms" or "std".
        channels: C.
        eps: inside the square root.
        momentum: weight of the newest batch in the average.
        sync: over all processes of the default group.
    """

    running: Tensor

    def __init__(self, name: str, channels: int, eps: float, momentum: float, sync: bool) -> None:
        super().__init__()
        self.name, self.channels, self.eps, self.momentum, self.sync = name, channels, eps, momentum, sync
        self.register_buffer("running", torch.zeros(channels) if name == "mean" else torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raw = self.running.to(x.dtype).view(1, -1, 1, 1)
            return raw if self.name == "mean" else (raw + self.eps).sqrt()
        if self.name == "rms":
            raw, n = self._mean(x.square())
        else:
            raw, n = self._mean(x)
        if self.name == "std":
            raw, n = self._mean((x - raw).square())
        with torch.no_grad():
            unbiased = raw * (n / (n - 1)) if self.name == "std" and n > 1 else raw
            kept = unbiased.detach().flatten().expand(self.channels).to(self.running.dtype)
            self.running.lerp_(kept, self.momentum)
        return raw if self.name == "mean" else (raw + self.eps).sqrt()

    def _mean(self, x: Tensor) -> tuple[Tensor, int]:
        """Over batch and space, and if asked over the batches of all processes; and of how many numbers."""
        n = x.shape[0] * x.shape[2] * x.shape[3]
        mean = x.mean((0, 2, 3), keepdim=True)
        if not (self.sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return mean, n
        from torch.distributed.nn.functional import all_reduce

        # Batches may differ in size.
        sums: Tensor = all_reduce(torch.cat([(mean * n).flatten(), mean.new_full((1,), float(n))]))
        return (sums[:-1] / sums[-1]).view_as(mean), int(sums[-1].detach())

    def extra_repr(self) -> str:
        return f"{self.name}, {self.channels}, eps={self.eps}, momentum={self.momentum}, sync={self.sync}"


class EvolvedNormAct2d(nn.Module):
    """A genome as a layer for images (B, C, H, W), with timm's arguments for layers that normalise and activate.

    The graph is compiled into one `torch.fx.GraphModule`; what it repeats is computed once. It is computed in float32
    at least; a statistic over the batch has a running average of its own, for evaluation.

    Args:
        genome: what to compute.
        num_features: C.
        apply_act: False for a place without activation: scale and shift alone are left, as in the paper.
        groups: at most so many: the largest number that divides C.
        momentum: weight of the newest batch in running averages.
        sync: statistics over the batch are those of all processes.

    Raises:
        ValueError: no groups, or no channels.
    """

    def __init__(
        self,
        genome: Genome,
        num_features: int,
        *,
        apply_act: bool = True,
        groups: int = 32,
        momentum: float = 0.1,
        sync: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("groups", groups), ("num_features", num_features)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.genome, self.num_features, self.apply_act = genome, num_features, apply_act
        self.groups = max(d for d in range(1, min(groups, num_features) + 1) if num_features % d == 0)
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.v0: nn.Parameter | None = None
        self.v1: nn.Parameter | None = None
        self.body: fx.GraphModule | None = None
        if apply_act:
            live = genome.live
            self.v0 = nn.Parameter(torch.zeros(num_features)) if 2 in live else None
            self.v1 = nn.Parameter(torch.ones(num_features)) if 3 in live else None
            self.body = compiled(genome, num_features, self.groups, momentum, sync)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.num_features:
            raise ValueError(f"images (B, {self.num_features}, H, W) are needed, not {tuple(x.shape)}")
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.body is not None:
            y = self.body(y, _spread(self.v0, y), _spread(self.v1, y)).expand_as(y)
        y = y * _spread(self.weight, y) + _spread(self.bias, y)
        found: Tensor = y.to(x.dtype)
        return found

    def extra_repr(self) -> str:
        act = "" if self.apply_act else ", apply_act=False"
        return f"{self.num_features}, {self.genome.formula()}, groups={self.groups}{act}"


def _spread(parameter: Tensor | None, like: Tensor) -> Any:
    return None if parameter is None else parameter.to(like.dtype).view(1, -1, 1, 1)


def compiled(genome: Genome, channels: int, groups: int, momentum: float, sync: bool) -> fx.GraphModule:
    """The live part of a genome as a module of (x, v0, v1), equal expressions once."""
    root, graph = nn.Module(), fx.Graph()
    x, v0, v1 = (graph.placeholder(name) for name in ("x", "v0", "v1"))
    values: dict[int, fx.Node] = {0: x, 2: v0, 3: v1}
    if 1 in genome.live:
        values[1] = graph.call_method("new_zeros", (x, (1, 1, 1, 1)))
    known: dict[tuple[Any, ...], fx.Node] = {}
    for i, op, inputs in genome.steps():
        arguments = [values[each] for each in inputs]
        if op in ("add", "mul", "max"):
            arguments.sort(key=lambda node: node.name)
        sign = (op, *arguments)
        if sign not in known:
            if op.endswith("_bwh"):
                name = f"batch{i - len(INITIAL)}"
                root.add_module(name, BatchMoment(op.split("_")[0], channels, genome.eps, momentum, sync))
                known[sign] = graph.call_module(name, (arguments[0],))
            else:
                known[sign] = graph.call_function(primitive, (op, arguments, groups, channels, genome.eps))
        values[i] = known[sign]
    graph.output(values[genome.output])
    return fx.GraphModule(root, graph, class_name="EvolvedLayer")
