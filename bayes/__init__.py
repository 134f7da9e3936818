"""How sure the network is.

Deep kernel machines, on vectors and as a head on any backbone, and scores of calibration. GP-matched functional priors
with their posterior will live here.
"""

from leaven.bayes.calibration import Calibration, auroc, calibration, reliability_plot
from leaven.bayes.deep_kernel_machine import DeepKernelMachine, DKMHead

__all__ = ["Calibration", "DKMHead", "DeepKernelMachine", "auroc", "calibration", "reliability_plot"]
