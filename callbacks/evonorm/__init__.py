"""EvoNorm: one layer that normalises and activates, found by evolution (Liu et al., NeurIPS 2020); and the search."""

from leaven.callbacks.evonorm.checks import FreeChecks
from leaven.callbacks.evonorm.evolution import AgeingEvolution
from leaven.callbacks.evonorm.evonorm import EvoNorm, evo_norm, evolved_norm
from leaven.callbacks.evonorm.genome import NAMED, Genome, GenomeError
from leaven.callbacks.evonorm.judging import Budget, Task, judge
from leaven.callbacks.evonorm.nsga2 import NSGA2
from leaven.callbacks.evonorm.replace import Report, Site, replace_norm_act
from leaven.callbacks.evonorm.search import search
from leaven.callbacks.evonorm.space import SearchSpace

__all__ = [
    "NAMED",
    "NSGA2",
    "AgeingEvolution",
    "Budget",
    "EvoNorm",
    "FreeChecks",
    "Genome",
    "GenomeError",
    "Report",
    "SearchSpace",
    "Site",
    "Task",
    "evo_norm",
    "evolved_norm",
    "judge",
    "replace_norm_act",
    "search",
]
