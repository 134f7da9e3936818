"""Classify with the intermediate activations of a diffusion model (Mukhopadhyay et al. 2023)."""

from leaven.pretext.diffusion.blocks import UnknownBlock, block_names
from leaven.pretext.diffusion.cache import FeatureCache, write_features
from leaven.pretext.diffusion.denoiser import Denoiser
from leaven.pretext.diffusion.diffeed import DifFeed
from leaven.pretext.diffusion.features import Cell, DiffusionFeatures
from leaven.pretext.diffusion.grid import Scored, linear_cka, ridge, ridge_grid
from leaven.pretext.diffusion.heads import AttentionHead, DifFormerHead, fit_heads, make_head
from leaven.pretext.diffusion.opening import Opened, fresh_like, open_model
from leaven.pretext.diffusion.schedule import Schedule
from leaven.pretext.diffusion.unet import UNet, adm, load_adm, small_unet

__all__ = [
    "AttentionHead",
    "Cell",
    "Denoiser",
    "DifFeed",
    "DifFormerHead",
    "DiffusionFeatures",
    "FeatureCache",
    "Opened",
    "Schedule",
    "Scored",
    "UNet",
    "UnknownBlock",
    "adm",
    "block_names",
    "fit_heads",
    "fresh_like",
    "linear_cka",
    "load_adm",
    "make_head",
    "open_model",
    "ridge",
    "ridge_grid",
    "small_unet",
    "write_features",
]
