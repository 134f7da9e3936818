"""The code of a block as a graph, without the activation behind one of its norms."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import fx, nn

from leaven.callbacks.evonorm.watch import Watch


class NoGraph(Exception):
    """Why there is none, to follow the name of the block."""


def graph_without(block: nn.Module, norm: nn.Module, activation: nn.Module | str, watch: Watch) -> fx.Graph:
    """The block as it ran under `watch`, but for the activation of the output of `norm`.

    Args:
        block: whose forward calls both; left as it is.
        norm: a BatchNorm of the block.
        activation: a module of the block, or the name of a function.
        watch: of a run of the network.

    Raises:
        NoGraph: its code cannot be traced, asks for the mode, or has no such call.
    """
    try:
        own_graph = isinstance(block, fx.GraphModule)
        graph = copy.deepcopy(block.graph) if own_graph else _traced(block, *watch.given[block])
    except (
        fx.proxy.TraceError,
        AttributeError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise NoGraph(f"cannot be traced ({' '.join(str(error).split())[:100]})") from error
    assert isinstance(graph, fx.Graph)
    own = dict(block.named_modules())
    modules = {node: own.get(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    for node in graph.nodes:
        function = getattr(node.target, "__name__", node.target)
        if function == activation if isinstance(activation, str) else modules.get(node) is activation:
            source = node.args[0]
            while isinstance(modules.get(source), nn.Identity):
                source = source.args[0]
            last = modules.get(source)
            while type(last) is nn.Sequential and len(last):  # a convolution and its norm, say
                last = last[-1]
            if last is norm:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
                return graph
    raise NoGraph("has no such call in its code")


def _traced(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Graph:
    """The code of a module as it runs when called like this: `x is None` is never true of what fx traces with.

    The graph refuses other values of what was no tensor.
    """
    bound = inspect.signature(block.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    fixed = {name: x for name, x in bound.arguments.items() if x is None or isinstance(x, bool | int | float)}
    graph, other = (_trace(block, fixed, training) for training in (block.training, not block.training))
    if str(graph) != str(other):
        raise NoGraph("asks whether it is training")
    for node in graph.nodes:
        name = str(node.target).rpartition("_")[0]
        if node.op == "placeholder" and name in fixed:  # fx numbers them, and callers use the names
            node.target = name
    return graph


def _trace(block: nn.Module, fixed: dict[str, Any], training: bool) -> fx.Graph:
    """In one mode, which becomes part of the graph wherever the code asks for it."""
    modes = [(module, module.training) for module in block.modules()]
    try:
        for module, _ in modes:
            module.training = training
        return _Shallow().trace(block, concrete_args=fixed)
    finally:
        for module, before in modes:
            module.training = before


class _Shallow(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True
