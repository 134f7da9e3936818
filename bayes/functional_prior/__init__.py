"""GP-matched functional priors (Tran et al. 2022) and their posterior, for any module."""

from leaven.bayes.functional_prior.diagnostics import effective_sample_size, rhat
from leaven.bayes.functional_prior.distances import Critic, energy_distance, sliced_distance, train_critic
from leaven.bayes.functional_prior.families import FAMILIES, Family, Flow, Gaussian, Hierarchical
from leaven.bayes.functional_prior.fit import fit_prior, image_measure, table_measure
from leaven.bayes.functional_prior.likelihoods import gaussian_loglik, softmax_loglik
from leaven.bayes.functional_prior.map import map_estimate
from leaven.bayes.functional_prior.prior import FunctionalPrior
from leaven.bayes.functional_prior.samples import PosteriorSamples
from leaven.bayes.functional_prior.sghmc import SGHMC
from leaven.bayes.functional_prior.target import GPTarget

__all__ = [
    "FAMILIES",
    "SGHMC",
    "Critic",
    "Family",
    "Flow",
    "FunctionalPrior",
    "GPTarget",
    "Gaussian",
    "Hierarchical",
    "PosteriorSamples",
    "effective_sample_size",
    "energy_distance",
    "fit_prior",
    "gaussian_loglik",
    "image_measure",
    "map_estimate",
    "rhat",
    "sliced_distance",
    "softmax_loglik",
    "table_measure",
    "train_critic",
]
