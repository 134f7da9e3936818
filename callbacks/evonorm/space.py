"""The graphs that a search may visit: at random, and one change away from another."""

from random import Random
from typing import Literal

from leaven.callbacks.evonorm.genome import AGGREGATIONS, ARITY, BINARY, INITIAL, UNARY, Genome, Node


class SearchSpace:
    """Graphs of so many nodes, the last one the output.

    Source: Liu et al. 2020, section 3. Primitives are drawn from all alike; of statistics, each kind and each set of
    axes is one of them.

    Args:
        series: "B", statistics over the batch, too; or "S", without them, so that images do not see each other.
        nodes: besides `INITIAL`; the paper's 10.
        eps: of the genomes.

    Raises:
        ValueError: an unknown series, or no node.
    """

    def __init__(self, series: Literal["S", "B"] = "B", nodes: int = 10, eps: float = 1e-5) -> None:
        if series not in ("S", "B"):
            raise ValueError(f'series must be "S" or "B", not {series!r}')
        if nodes < 1:
            raise ValueError(f"nodes must be at least 1, got {nodes}")
        self.series, self.nodes, self.eps = series, nodes, eps
        statistics = [op for op in AGGREGATIONS if series == "B" or not op.endswith("_bwh")]
        self.primitives = (*BINARY, *UNARY, *statistics)

    def random(self, rng: Random) -> Genome:
        """Every node a primitive at random, its inputs at random among the nodes before it."""
        nodes = tuple(self._node(rng, len(INITIAL) + i) for i in range(self.nodes))
        return Genome(nodes, len(INITIAL) + self.nodes - 1, self.eps)

    def mutate(self, genome: Genome, rng: Random) -> Genome:
        """A copy of `genome` in which one node, drawn by `rng`, has another primitive and other inputs at random.

        They may happen to be the same.
        """
        nodes = list(self.padded(genome).nodes)
        at = rng.randrange(len(nodes))
        nodes[at] = self._node(rng, len(INITIAL) + at)
        return Genome(tuple(nodes), len(INITIAL) + len(nodes) - 1, genome.eps)

    def padded(self, genome: Genome) -> Genome:
        """The same function as a graph of this space: dead nodes in front, the output last.

        Raises:
            ValueError: it has more live nodes, or primitives that are not of this space.
        """
        steps = list(genome.steps())
        if len(steps) > self.nodes:
            raise ValueError(f"the genome has {len(steps)} live nodes, and the space {self.nodes}")
        if foreign := {op for _, op, _ in steps} - set(self.primitives):
            raise ValueError(f"{min(foreign)} is not in the {self.series} series")
        if len(genome.nodes) == self.nodes and genome.output == len(INITIAL) + self.nodes - 1:
            return genome
        if not steps:
            raise ValueError("the genome has no live node")
        dead = self.nodes - len(steps)
        place = {i: i for i in range(len(INITIAL))}
        place |= {i: len(INITIAL) + dead + n for n, (i, _, _) in enumerate(steps)}
        nodes: list[Node] = [("neg", (0,))] * dead
        nodes += [(op, tuple(place[each] for each in inputs)) for _, op, inputs in steps]
        return Genome(tuple(nodes), len(INITIAL) + self.nodes - 1, genome.eps, genome.meta)

    def _node(self, rng: Random, at: int) -> Node:
        op = rng.choice(self.primitives)
        return op, tuple(rng.randrange(at) for _ in range(ARITY[op]))
