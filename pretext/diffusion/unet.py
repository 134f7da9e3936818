"""The U-Net of ADM (Dhariwal & Nichol, Diffusion Models Beat GANs on Image Synthesis, NeurIPS 2021), of any size.

Parameters have the names of OpenAI's guided-diffusion, so that its checkpoints load as they are; `UNet()` is small
enough for a laptop.
"""

import math
import os
import struct
from collections.abc import Sequence
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What torch.load raises for files that are none of its own.
_NO_CHECKPOINT = (UnpicklingError, RuntimeError, EOFError, struct.error, KeyError, IndexError)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Cosines and sines (B, width) of times (B,), of periods from 2 pi to 20,000 pi."""
    half = width // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float().unsqueeze(1) * rates
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


class _Norm(nn.GroupNorm):
    """Group norm in float32, of 32 groups where the channels allow it."""

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(32, channels), channels)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def _zero(layer: nn.Conv1d | nn.Conv2d) -> nn.Module:
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class _Blocks(nn.Sequential):
    """Layers one after another; those that want the time embedding get it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, _ResBlock) else layer(x)
        return x


class _ResBlock(nn.Module):
    def __init__(self, width: int, out: int, emb: int, dropout: float, resize: float = 1.0) -> None:
        super().__init__()
        self.resize = resize
        self.in_layers = nn.Sequential(_Norm(width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out))
        last = _zero(nn.Conv2d(out, out, 3, padding=1))
        self.out_layers = nn.Sequential(_Norm(out), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[:-1](x)
        if self.resize != 1:
            h, x = _resized(h, self.resize), _resized(x, self.resize)
        h = self.in_layers[-1](h)
        scale, shift = self.emb_layers(emb).to(h.dtype)[..., None, None].chunk(2, dim=1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        found: Tensor = self.skip_connection(x) + h
        return found


def _resized(x: Tensor, factor: float) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if factor > 1 else F.avg_pool2d(x, 2)


class _Attention(nn.Module):
    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.heads = max(1, width // head_width)
        if width % self.heads:
            raise ValueError(
                f"attention on {width} channels: head_width must divide them, or be more, got {head_width}"
            )
        self.norm = _Norm(width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = _zero(nn.Conv1d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        flat = x.flatten(2)
        # Heads first, then queries, keys and values in each: the order of guided-diffusion's checkpoints.
        parts = self.qkv(self.norm(flat)).view(b, self.heads, 3, c // self.heads, height * width)
        q, k, v = parts.transpose(3, 4).unbind(2)
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c, height * width)
        found: Tensor = (flat + self.proj_out(h)).view_as(x)
        return found


class UNet(nn.Module):
    """Predicts the noise of images (B, C, H, W) at times (B,).

    The blocks of the paper on diffusion features are counted from 1: input_blocks, middle_block, output_blocks.

    Args:
        in_chans, out_chans: of images and of the prediction; None: as many as the images have.
        width: channels at full size.
        multipliers: of the width, for each size on the way down, halved from one to the next.
        depth: residual blocks of each size.
        attention: at which reductions of the image there is attention.
        head_width: channels of a head.
        dropout: in every block.

    Raises:
        ValueError: numbers below 1, or a head_width that does not suit the channels; images that cannot be halved so
            often, see `forward`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        out_chans: int | None = None,
        *,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        depth: int = 1,
        attention: Sequence[int] = (4,),
        head_width: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(in_chans, width, depth, head_width) < 1 or not multipliers:
            raise ValueError(
                "channels, width, depth and head_width must be at least 1, and one multiplier is needed"
            )
        self.in_chans, self.out_chans, self.width = in_chans, out_chans or in_chans, width
        self.reduction = 2 ** (len(multipliers) - 1)
        emb = 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))

        def block(ins: int, out: int, resize: float = 1.0) -> _ResBlock:
            return _ResBlock(ins, out, emb, dropout, resize)

        def attend(channels: int, reduction: int) -> list[nn.Module]:
            return [_Attention(channels, head_width)] if reduction in attention else []

        now, reduction = multipliers[0] * width, 1
        self.input_blocks = nn.ModuleList([_Blocks(nn.Conv2d(in_chans, now, 3, padding=1))])
        kept = [now]
        for level, multiplier in enumerate(multipliers):
            for _ in range(depth):
                self.input_blocks.append(
                    _Blocks(block(now, multiplier * width), *attend(multiplier * width, reduction))
                )
                now = multiplier * width
                kept.append(now)
            if level < len(multipliers) - 1:
                self.input_blocks.append(_Blocks(block(now, now, 0.5)))
                kept.append(now)
                reduction *= 2
        self.middle_block = _Blocks(block(now, now), _Attention(now, head_width), block(now, now))
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for i in range(depth + 1):
                layers: list[nn.Module] = [block(now + kept.pop(), multiplier * width)]
                now = multiplier * width
                layers += attend(now, reduction)
                if level and i == depth:
                    layers.append(block(now, now, 2.0))
                    reduction //= 2
                self.output_blocks.append(_Blocks(*layers))
        self.out = nn.Sequential(_Norm(now), nn.SiLU(), _zero(nn.Conv2d(now, self.out_chans, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise (B, out_chans, H, W) in images at times t (B,), or one time for all."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"images (B, {self.in_chans}, H, W) are needed, not {tuple(x.shape)}")
        if x.shape[2] % self.reduction or x.shape[3] % self.reduction:
            sides = "x".join(map(str, x.shape[2:]))
            raise ValueError(f"images of {sides} pixels: both sides must be multiples of {self.reduction}")
        emb = self.time_embed(timestep_embedding(t.expand(len(x)), self.width).to(x.dtype))
        h, skips = x, []
        for blocks in self.input_blocks:
            h = blocks(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for blocks in self.output_blocks:
            h = blocks(torch.cat([h, skips.pop()], dim=1), emb)
        found: Tensor = self.out(h)
        return found


def small_unet(in_chans: int = 3) -> UNet:
    """1.4 million parameters: what recipes/diffusion_features.py trains by default, ``--backbone`` by this name."""
    return UNet(in_chans)


def adm() -> UNet:
    """ADM for 256 x 256 images without classes: 552.8 million parameters, freshly initialised; see `load_adm`."""
    return UNet(
        3, 6, width=256, multipliers=(1, 1, 2, 2, 4, 4), depth=2, attention=(8, 16, 32), head_width=64
    )


def load_adm(path: str | os.PathLike[str], model: UNet | None = None) -> UNet:
    """A checkpoint of guided-diffusion (a plain state dict, .pt or .safetensors) in a U-Net, in eval mode.

    Args:
        path: the file.
        model: what it is of; None: `adm()`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it does not fit; the first difference is named.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except _NO_CHECKPOINT as error:
            raise ValueError(f"{path} is no checkpoint of weights alone ({type(error).__name__})") from error
        if not isinstance(state, dict):
            raise ValueError(f"{path} holds {type(state).__name__}, no weights by name")
    fresh = model is None
    if model is None:
        with torch.device("meta"):  # two gigabytes need not be drawn to be overwritten
            model = adm()
    own = model.state_dict()
    for name in own:
        if name not in state:
            raise ValueError(f"{path} has no {name}: it is of another network")
        if state[name].shape != own[name].shape:
            shapes = f"{tuple(state[name].shape)}, and {tuple(own[name].shape)} is needed"
            raise ValueError(f"{path}: {name} is {shapes}")
    if more := sorted(set(state) - set(own)):
        raise ValueError(f"{path} has {more[0]}, which the network has not: it is of another network")
    model.load_state_dict(state, assign=fresh)
    return model.eval()
