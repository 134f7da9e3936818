"""Diffusion models on disk: ours, guided-diffusion's checkpoints, folders of diffusers."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leaven.backbones import load, metadata
from leaven.backbones.probe import seeded
from leaven.pretext.diffusion.schedule import Schedule
from leaven.pretext.diffusion.unet import load_adm
from leaven.pretext.features import device_of


@dataclass(frozen=True)
class Opened:
    """A model, and what `DiffusionFeatures` needs besides.

    Attributes:
        model: in eval mode.
        schedule: of its noise.
        encode: images to latents; None: it sees images.
    """

    model: nn.Module
    schedule: Schedule
    encode: Callable[[Tensor], Tensor] | None = None


def open_model(path: str | os.PathLike[str]) -> Opened:
    """A diffusion model from disk; nothing is downloaded.

    Args:
        path: a run folder of recipes/diffusion_features.py or its backbone.safetensors; a folder of diffusers, of a
            pipeline or of one model; a checkpoint of guided-diffusion's 256 x 256 network without classes (.pt).

    Raises:
        FileNotFoundError: nothing of that kind there.
        ImportError: a folder of diffusers without diffusers.
        ValueError: weights that do not fit.
    """
    path = Path(path)
    if (path / "model_index.json").is_file() or (path / "config.json").is_file():
        return _diffusers(path)
    if path.suffix == ".pt":
        return Opened(load_adm(path), Schedule.linear())
    file = path / "backbone.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"no diffusion model at {path}: a run folder with backbone.safetensors, a folder of diffusers with "
            "model_index.json or config.json, or a .pt of guided-diffusion"
        )
    notes = metadata(file)
    if "backbone" not in notes:
        raise ValueError(f"{file} does not say what network it is of")
    return Opened(load(notes["backbone"], file).eval(), Schedule.linear())


def _diffusers(path: Path) -> Opened:
    try:
        import diffusers

        library: Any = diffusers
    except ImportError as error:
        raise ImportError(f'{path} is of diffusers: pip install "leaven[diffusion]"') from error
    try:
        if (path / "model_index.json").is_file():
            pipe = library.DiffusionPipeline.from_pretrained(path, local_files_only=True)
            parts: dict[str, Any] = pipe.components
            model = parts.get("unet") or parts.get("transformer")
            if model is None:
                raise ValueError(f"{path} has neither a unet nor a transformer")
            schedule = Schedule.of(parts["scheduler"])
            vae = parts.get("vae")
            return Opened(model.eval(), schedule, None if vae is None else _encoder(vae.eval()))
        kind = json.loads((path / "config.json").read_text(encoding="utf-8"))["_class_name"]
        model = getattr(library, kind).from_pretrained(path, local_files_only=True)
    except (OSError, KeyError, AttributeError) as error:
        raise ValueError(f"cannot open {path}: {str(error).splitlines()[0]}") from error
    return Opened(model.eval(), Schedule.linear())


def _encoder(vae: Any) -> Callable[[Tensor], Tensor]:
    def encode(images: Tensor) -> Tensor:
        latents: Tensor = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
        return latents

    return encode


def fresh_like(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same network with fresh weights, none of them zero by design: a fair rival for features without training.

    Networks as ADM begin every residual branch with zeros, so that fresh ones do next to nothing; here every layer is
    drawn by its own default, and parameters that belong to no such layer from N(0, 0.02^2).

    Args:
        model: left as it is.
        seed: of the weights; the global random state is left as it was.
    """
    twin = copy.deepcopy(model)
    with seeded(seed, device_of(twin)):
        for layer in twin.modules():
            reset: Any = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
            else:
                for bare in layer.parameters(recurse=False):
                    nn.init.normal_(bare, std=0.02)
    return twin.eval()
