"""Deep kernel machines (Yang et al. 2023): Gram matrices that are learnt in place of features."""

from leaven.bayes.deep_kernel_machine.convolutional import (
    ConvolutionalDKM,
    mean_over_positions,
    mix,
    patch_grams,
    unit_norm,
)
from leaven.bayes.deep_kernel_machine.fit import fit
from leaven.bayes.deep_kernel_machine.grams import (
    Grams,
    gaussian_kl,
    gram_step,
    input_grams,
    kernel_step,
    taylor_kl,
    whitened_kl,
    wishart_root,
)
from leaven.bayes.deep_kernel_machine.head import DKMHead, normalised
from leaven.bayes.deep_kernel_machine.kernels import (
    KERNELS,
    GramKernel,
    arccos_kernel,
    linear_kernel,
    norm_gauss_kernel,
    rbf_kernel,
)
from leaven.bayes.deep_kernel_machine.machine import DeepKernelMachine
from leaven.bayes.deep_kernel_machine.prediction import Prediction

__all__ = [
    "KERNELS",
    "ConvolutionalDKM",
    "DKMHead",
    "DeepKernelMachine",
    "GramKernel",
    "Grams",
    "Prediction",
    "arccos_kernel",
    "fit",
    "gaussian_kl",
    "gram_step",
    "input_grams",
    "kernel_step",
    "linear_kernel",
    "mean_over_positions",
    "mix",
    "norm_gauss_kernel",
    "normalised",
    "patch_grams",
    "rbf_kernel",
    "taylor_kl",
    "unit_norm",
    "whitened_kl",
    "wishart_root",
]
