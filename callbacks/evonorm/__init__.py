"""EvoNorm: one layer that normalises and activates, found by evolution (Liu et al., NeurIPS 2020); and the search."""

from leaven.callbacks.evonorm.evonorm import EvoNorm, evo_norm, evolved_norm
from leaven.callbacks.evonorm.genome import NAMED, Genome, GenomeError
from leaven.callbacks.evonorm.replace import Report, Site, replace_norm_act
from leaven.callbacks.evonorm.space import SearchSpace

__all__ = [
    "NAMED",
    "EvoNorm",
    "Genome",
    "GenomeError",
    "Report",
    "SearchSpace",
    "Site",
    "evo_norm",
    "evolved_norm",
    "replace_norm_act",
]
