"""EvoNorm: one layer that normalises and activates, found by evolution (Liu et al., NeurIPS 2020)."""

from leaven.callbacks.evonorm.evonorm import EvoNorm, evo_norm
from leaven.callbacks.evonorm.replace import Report, Site, replace_norm_act

__all__ = ["EvoNorm", "Report", "Site", "evo_norm", "replace_norm_act"]
