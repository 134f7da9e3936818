"""What the network sees, and when: the Fourier crop, EfficientTrain's schedules, and the search for a schedule."""

from leaven.curricula.efficient_train import EfficientTrain
from leaven.curricula.fourier import FourierCrop, fourier_crop, fourier_matrix, fourier_pad
from leaven.curricula.resize import resize
from leaven.curricula.schedule import ET, ET_PP, ET_PP_DEIT, Schedule, Stage
from leaven.curricula.search import SearchResult, Tried, compute_search, greedy_search

__all__ = [
    "ET",
    "ET_PP",
    "ET_PP_DEIT",
    "EfficientTrain",
    "FourierCrop",
    "Schedule",
    "SearchResult",
    "Stage",
    "Tried",
    "compute_search",
    "fourier_crop",
    "fourier_matrix",
    "fourier_pad",
    "greedy_search",
    "resize",
]
