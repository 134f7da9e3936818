"""A layer as a small graph of primitives: written, read, compared and named."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

# Nodes that every graph begins with: the input, zeros, and two parameters per channel that start at 0 and at 1.
INITIAL = ("x", "0", "v0", "v1")
BINARY = ("add", "mul", "div", "max")
UNARY = ("neg", "sigmoid", "tanh", "exp", "log", "abs", "square", "sqrt")
MOMENTS = ("mean", "rms", "std")
AXES = ("bwh", "whc", "wh", "whg")  # whg: width, height and the channels of a group
AGGREGATIONS = tuple(f"{moment}_{axes}" for axes in AXES for moment in MOMENTS)
ARITY = {op: 2 for op in BINARY} | {op: 1 for op in (*UNARY, *AGGREGATIONS)}
_COMMUTATIVE = ("add", "mul", "max")
_MOST_NODES, _MOST_TEXT = 256, 100_000

Node = tuple[str, tuple[int, ...]]


class GenomeError(ValueError):
    """No genome: one line says why."""


@dataclass(frozen=True)
class Genome:
    """A graph whose nodes have the shape of an image batch; scale and shift per channel follow its output.

    Source: Liu et al., Evolving Normalization-Activation Layers, NeurIPS 2020, section 3.

    Args:
        nodes: (primitive, inputs): inputs count `INITIAL` from 0, then the nodes.
        output: the node that is the result.
        eps: inside every square root, and the least absolute value of a divisor.
        meta: notes, such as scores; they do not count when genomes are compared.

    Raises:
        GenomeError: an unknown primitive, a wrong number of inputs, or an input that is not before its node.
    """

    nodes: tuple[Node, ...]
    output: int
    eps: float = 1e-5
    meta: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def __post_init__(self) -> None:
        if len(self.nodes) > _MOST_NODES:
            raise GenomeError(f"{len(self.nodes)} nodes; {_MOST_NODES} are the most")
        for i, (op, inputs) in enumerate(self.nodes, len(INITIAL)):
            if op not in ARITY:
                raise GenomeError(f"node {i}: no primitive {op!r}")
            if len(inputs) != ARITY[op]:
                raise GenomeError(f"node {i}: {op} takes {ARITY[op]} inputs, not {len(inputs)}")
            if not all(type(each) is int and 0 <= each < i for each in inputs):
                raise GenomeError(f"node {i}: inputs {list(inputs)} must be nodes before it")
        if type(self.output) is not int or not 0 <= self.output < len(INITIAL) + len(self.nodes):
            raise GenomeError(f"the output {self.output!r} is no node")
        if not 0 < self.eps < 1:
            raise GenomeError(f"eps must be between 0 and 1, got {self.eps}")

    @cached_property
    def live(self) -> tuple[int, ...]:
        """The nodes that the output depends on, in order, `INITIAL` among them."""
        wanted = {self.output}
        for i in range(len(INITIAL) + len(self.nodes) - 1, len(INITIAL) - 1, -1):
            if i in wanted:
                wanted.update(self.nodes[i - len(INITIAL)][1])
        return tuple(sorted(wanted))

    @cached_property
    def key(self) -> str:
        """The same for graphs that compute the same in the same way: dead nodes, order and repetition do not count."""
        known = {i: name for i, name in enumerate(INITIAL)}
        for i, op, inputs in self.steps():
            parts = [known[each] for each in inputs]
            parts = sorted(parts) if op in _COMMUTATIVE else parts
            known[i] = blake2b(f"{op}({','.join(parts)})".encode(), digest_size=12).hexdigest()
        return known[self.output]

    def steps(self) -> Iterator[tuple[int, str, tuple[int, ...]]]:
        """The live nodes besides `INITIAL`: number, primitive, inputs."""
        for i in self.live:
            if i >= len(INITIAL):
                op, inputs = self.nodes[i - len(INITIAL)]
                yield i, op, inputs

    @property
    def uses_batch(self) -> bool:
        """Whether a statistic goes over the images of a batch."""
        return any(op.endswith("_bwh") for _, op, _ in self.steps())

    def formula(self, latex: bool = False) -> str:
        """In words of mathematics; statistics by name and axes."""
        write = _latex if latex else _plain
        known = {i: name for i, name in enumerate(_LATEX_INITIAL if latex else INITIAL)}
        for i, op, inputs in self.steps():
            known[i] = write(op, [known[each] for each in inputs])
            if len(known[i]) > _MOST_TEXT:
                raise GenomeError("the formula is too long to be written out")
        return _bare(known[self.output])

    def to_json(self) -> str:
        """One line, for `from_json`."""
        nodes = [[op, *inputs] for op, inputs in self.nodes]
        body: dict[str, Any] = {"version": 1, "nodes": nodes, "output": self.output, "eps": self.eps}
        return json.dumps(body | ({"meta": self.meta} if self.meta else {}))

    @classmethod
    def from_json(cls, text: str) -> "Genome":
        """Read what `to_json` wrote; nothing in it is executed.

        Raises:
            GenomeError: no JSON, or no genome.
        """
        if len(text) > _MOST_TEXT:
            raise GenomeError(f"{len(text)} characters are no genome")
        try:
            body = json.loads(text)
            if body["version"] != 1:
                raise GenomeError(f"version {body['version']!r} is not known here")
            nodes = tuple((str(op), tuple(inputs)) for op, *inputs in body["nodes"])
            meta = body.get("meta", {})
            if not isinstance(meta, dict):
                raise GenomeError("meta must be an object")
            return cls(nodes, body["output"], float(body["eps"]), meta)
        except GenomeError:
            raise
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise GenomeError(f"not a genome: {type(error).__name__} {error}") from error

    @classmethod
    def named(cls, name: str) -> "Genome":
        """One of the published layers, or BatchNorm and ReLU: `NAMED`.

        Raises:
            GenomeError: no such name.
        """
        if name not in NAMED:
            raise GenomeError(f"no genome {name!r}; there are: {', '.join(NAMED)}")
        return cls.of(NAMED[name], meta={"name": name})

    @classmethod
    def of(cls, steps: Sequence[tuple[Any, ...]], **how: Any) -> "Genome":
        """Of nodes (primitive, input, ...), the last being the output."""
        nodes = tuple((op, tuple(inputs)) for op, *inputs in steps)
        return cls(nodes, len(INITIAL) + len(nodes) - 1, **how)


# B1's one is exp of the zeros; BatchNorm's scale and shift come after the ReLU here.
NAMED: dict[str, list[tuple[Any, ...]]] = {
    "evonorm_b0": [
        ("std_bwh", 0), ("mul", 3, 0), ("std_wh", 0), ("add", 5, 6), ("max", 4, 7), ("div", 0, 8),
    ],
    "evonorm_b1": [
        ("std_bwh", 0), ("exp", 1), ("add", 0, 5), ("rms_wh", 0), ("mul", 6, 7), ("max", 4, 8), ("div", 0, 9),
    ],
    "evonorm_b2": [
        ("std_bwh", 0), ("rms_wh", 0), ("neg", 0), ("add", 5, 6), ("max", 4, 7), ("div", 0, 8),
    ],
    "evonorm_s0": [("mul", 3, 0), ("sigmoid", 4), ("mul", 0, 5), ("std_whg", 0), ("div", 6, 7)],
    "evonorm_s1": [("sigmoid", 0), ("mul", 0, 4), ("std_whg", 0), ("div", 5, 6)],
    "evonorm_s2": [("sigmoid", 0), ("mul", 0, 4), ("rms_whg", 0), ("div", 5, 6)],
    "bn_relu": [
        ("mean_bwh", 0), ("neg", 4), ("add", 0, 5), ("std_bwh", 0), ("div", 6, 7), ("max", 8, 1),
    ],
}  # fmt: skip

_LATEX_INITIAL = ("x", "0", "v_0", "v_1")
_LATEX_MOMENTS = {"mean": r"\mu", "rms": "r", "std": "s"}


def _bare(text: str) -> str:
    return text[1:-1] if text.startswith("(") and _closes(text) else text


def _closes(text: str) -> bool:
    """Whether the first bracket is closed by the last character."""
    depth = 0
    for i, each in enumerate(text):
        depth += {"(": 1, ")": -1}.get(each, 0)
        if depth == 0:
            return i == len(text) - 1
    return False


def _plain(op: str, parts: list[str]) -> str:
    signs = {"add": " + ", "mul": " * ", "div": " / "}
    if op in signs:
        return f"({signs[op].join(parts)})"
    if op == "neg":
        return f"(-{parts[0]})"
    return f"{op}({', '.join(_bare(part) for part in parts)})"


def _latex(op: str, parts: list[str]) -> str:
    if op == "div":
        return rf"\frac{{{_bare(parts[0])}}}{{{_bare(parts[1])}}}"
    if op in ("add", "mul"):
        return f"({parts[0]} + {parts[1]})" if op == "add" else rf"({parts[0]} \cdot {parts[1]})"
    if op == "neg":
        return f"(-{parts[0]})"
    if op == "square":
        bare = parts[0].endswith("^2") or parts[0].startswith(r"\frac")  # whose square needs brackets
        return f"({parts[0]})^2" if bare else f"{parts[0]}^2"
    if op == "abs":
        return rf"\left|{_bare(parts[0])}\right|"
    if op in AGGREGATIONS:
        moment, axes = op.split("_")
        return rf"{_LATEX_MOMENTS[moment]}_{{{axes}}}({_bare(parts[0])})"
    names = {"max": r"\max", "exp": r"\exp", "tanh": r"\tanh", "sigmoid": r"\sigma"}
    names |= {"log": r"\operatorname{slog}", "sqrt": r"\operatorname{ssqrt}"}
    return rf"{names[op]}({', '.join(_bare(part) for part in parts)})"
