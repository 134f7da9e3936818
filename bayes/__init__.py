"""How sure the network is.

Deep kernel machines, on vectors and as a head on any backbone; priors over the weights of any module, matched to a
Gaussian process, and their posterior; scores of calibration.
"""

from leaven.bayes.calibration import Calibration, auroc, calibration, reliability_plot
from leaven.bayes.deep_kernel_machine import ConvolutionalDKM, DeepKernelMachine, DKMHead
from leaven.bayes.functional_prior import SGHMC, FunctionalPrior, GPTarget, PosteriorSamples, fit_prior

__all__ = [
    "SGHMC",
    "Calibration",
    "ConvolutionalDKM",
    "DKMHead",
    "DeepKernelMachine",
    "FunctionalPrior",
    "GPTarget",
    "PosteriorSamples",
    "auroc",
    "calibration",
    "fit_prior",
    "reliability_plot",
]
