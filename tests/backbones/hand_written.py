"""Networks that neither timm nor torchvision has, as a user might write them: "your own module", of six shapes.

Each is the idea of a paper at a tiny width, in this file's own words, with none of the names that timm's networks
share (no ``forward_features``, no ``feature_info``). Called on images (B, 3, H, W) they give
logits (B, num_classes). Three of them take one image size only, and say so by ``image_size``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def conv_mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, hidden, 1), nn.GELU(), nn.Conv2d(hidden, width, 1))


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class Pyramid(nn.Module):
    """A stem of stride 4, stages of blocks with a halving between them, a pooled classifier."""

    def __init__(self, stages: Sequence[Sequence[nn.Module]], widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0]))
        self.stages = nn.ModuleList()
        for i, blocks in enumerate(stages):
            halve = (
                [ChannelNorm(widths[i - 1]), nn.Conv2d(widths[i - 1], widths[i], 2, stride=2)] if i else []
            )
            self.stages.append(nn.Sequential(*halve, *blocks))
        self.norm = nn.LayerNorm(widths[-1])
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(self.norm(x.mean((2, 3))))


# Gated recursive convolution: HorNet (Rao et al. 2022, arXiv 2207.14284).


class RecursiveGate(nn.Module):
    """Interactions of growing order: gates of one wide depthwise convolution, multiplied in one after another."""

    def __init__(self, width: int, order: int = 3) -> None:
        super().__init__()
        self.widths = [width >> i for i in reversed(range(order))]
        self.enter = nn.Conv2d(width, self.widths[0] + sum(self.widths), 1)
        self.wide = nn.Conv2d(sum(self.widths), sum(self.widths), 7, padding=3, groups=sum(self.widths))
        pairs = zip(self.widths, self.widths[1:], strict=False)
        self.widen = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairs)
        self.leave = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, gates = self.enter(x).split([self.widths[0], sum(self.widths)], dim=1)
        first, *others = self.wide(gates).split(self.widths, dim=1)
        x = x * first
        for widen, gate in zip(self.widen, others, strict=True):
            x = widen(x) * gate
        return self.leave(x)


class HorBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.gate = ChannelNorm(width), RecursiveGate(width)
        self.norm2, self.mlp = ChannelNorm(width), conv_mlp(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gate(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def gated_recursive(num_classes: int = 10, widths: Sequence[int] = (8, 16, 32, 64)) -> nn.Module:
    return Pyramid([[HorBlock(width)] for width in widths], widths, num_classes)


# Re-parameterised large kernels: UniRepLKNet (Ding et al. 2024, arXiv 2311.15599).


class DilatedReparam(nn.Module):
    """A large depthwise kernel beside small dilated ones, each with its BatchNorm; `merge` makes them one kernel."""

    def __init__(
        self, width: int, kernel: int = 13, small: Sequence[tuple[int, int]] = ((5, 1), (3, 3), (3, 5))
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for k, dilation in ((kernel, 1), *small):
            padding = dilation * (k - 1) // 2
            how = {"padding": padding, "dilation": dilation, "groups": width, "bias": False}
            self.convs.append(nn.Conv2d(width, width, k, **how))
            self.norms.append(nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = [norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=True)]
        for other in others:
            first = first + other
        return first

    @torch.no_grad()
    def merge(self) -> nn.Conv2d:
        """One convolution that computes the same in eval mode."""
        width = self.convs[0].in_channels
        merged = nn.Conv2d(width, width, self.kernel, padding=self.kernel // 2, groups=width)
        merged.weight.zero_(), merged.bias.zero_()
        for conv, norm in zip(self.convs, self.norms, strict=True):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            dilation, k = conv.dilation[0], conv.kernel_size[0]
            start = (self.kernel - 1 - dilation * (k - 1)) // 2
            merged.weight[:, :, start::dilation, start::dilation][:, :, :k, :k] += conv.weight * scale.view(
                -1, 1, 1, 1
            )
            merged.bias += norm.bias - norm.running_mean * scale
        return merged


class LargeKernelBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.norm = DilatedReparam(width), nn.BatchNorm2d(width)
        self.squeeze, self.excite = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)
        self.act = nn.GELU()
        self.expand, self.reduce = nn.Conv2d(width, 4 * width, 1), conv_norm(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.wide(x))
        y = y * self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return x + self.reduce(self.act(self.expand(y)))


def large_kernel(num_classes: int = 10, widths: Sequence[int] = (8, 16, 32, 64)) -> nn.Module:
    return Pyramid([[LargeKernelBlock(width)] for width in widths], widths, num_classes)


# Translation variant convolution: TVConv (Chen et al. 2022, arXiv 2203.10489).


class TranslationVariant(nn.Module):
    """A depthwise kernel of its own for each position, computed from a learnt affinity map of one size."""

    def __init__(self, width: int, side: int, kernel: int = 3, affinities: int = 4) -> None:
        super().__init__()
        self.kernel = kernel
        self.affinity = nn.Parameter(torch.randn(1, affinities, side, side))
        self.weights = nn.Sequential(
            nn.Conv2d(affinities, 16, 3, padding=1),
            nn.GroupNorm(1, 16),
            nn.ReLU(),
            nn.Conv2d(16, width * kernel**2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        kernels = self.weights(self.affinity).view(1, c, self.kernel**2, h, w)
        patches = F.unfold(x, self.kernel, padding=self.kernel // 2).view(b, c, self.kernel**2, h, w)
        return (patches * kernels).sum(2)


class VariantBlock(nn.Module):
    """An inverted residual with the kernel in its middle that depends on the position."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.expand, self.reduce = conv_norm(width, 2 * width, 1), conv_norm(2 * width, width, 1)
        self.variant, self.norm = TranslationVariant(2 * width, side), nn.BatchNorm2d(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.expand(x))
        return x + self.reduce(F.relu6(self.norm(self.variant(y))))


def translation_variant(
    num_classes: int = 10, image_size: int = 64, widths: Sequence[int] = (8, 16, 32)
) -> nn.Module:
    stages = [[VariantBlock(width, image_size // (4 << i))] for i, width in enumerate(widths)]
    model = Pyramid(stages, widths, num_classes)
    model.image_size = image_size
    return model


# Convolution and attention in one block: MOAT (Yang et al. 2023, arXiv 2210.01820).


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return self.leave(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class MoatBlock(nn.Module):
    """An inverted bottleneck of convolutions, which takes the place of the MLP too, and then attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.BatchNorm2d(width)
        self.expand, self.depthwise = (
            conv_norm(width, 4 * width, 1),
            conv_norm(4 * width, 4 * width, 3, groups=4 * width),
        )
        self.reduce = nn.Conv2d(4 * width, width, 1)
        self.norm, self.attention = nn.LayerNorm(width), Attention(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.reduce(F.gelu(self.depthwise(F.gelu(self.expand(self.enter(x))))))
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(self.norm(tokens))
        return tokens.transpose(1, 2).reshape(x.shape)


def moat(num_classes: int = 10, widths: Sequence[int] = (8, 16, 32, 64)) -> nn.Module:
    return Pyramid([[MoatBlock(width)] for width in widths], widths, num_classes)


# A network in the network as a gate: NiNformer (Abdullah et al. 2024, arXiv 2403.02411).


class MixerBlock(nn.Module):
    """Over tokens, then over channels (MLP-Mixer, Tolstikhin et al. 2021)."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm1, self.over_tokens = nn.LayerNorm(width), mlp(tokens, tokens)
        self.norm2, self.over_channels = nn.LayerNorm(width), mlp(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.norm2(x))


class NiNBlock(nn.Module):
    """A transformer's block in which a whole mixer, as a gate on linear values, takes the place of attention."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm1, self.inner, self.values = (
            nn.LayerNorm(width),
            MixerBlock(width, tokens),
            nn.Linear(width, width),
        )
        self.norm2, self.mlp = nn.LayerNorm(width), mlp(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.inner(y) * self.values(y)
        return x + self.mlp(self.norm2(x))


class Tokens(nn.Module):
    """Patches as tokens by a convolution, blocks on a number of tokens that is fixed, their mean classified."""

    def __init__(self, classes: int, image_size: int, patch: int, width: int, depth: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(NiNBlock(width, (image_size // patch) ** 2) for _ in range(depth)))
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.fc(self.norm(self.blocks(tokens)).mean(1))


def network_in_network(num_classes: int = 10, image_size: int = 64) -> nn.Module:
    return Tokens(num_classes, image_size, patch=16, width=32, depth=2)


# A mixer of a fixed number of tokens that cuts its patches itself: its first layer is a Linear (gMLP's gate, Liu et al.
# 2021, arXiv 2105.08050).


class SpatialGate(nn.Module):
    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm, self.over_tokens = nn.LayerNorm(width // 2), nn.Linear(tokens, tokens)
        nn.init.normal_(self.over_tokens.weight, std=1e-3)
        nn.init.ones_(self.over_tokens.bias)

    def forward(self, x: Tensor) -> Tensor:
        values, gate = x.chunk(2, dim=2)
        return values * self.over_tokens(self.norm(gate).transpose(1, 2)).transpose(1, 2)


class FixedTokenMixer(nn.Module):
    def __init__(
        self, classes: int, image_size: int, patch: int = 8, width: int = 32, depth: int = 2
    ) -> None:
        super().__init__()
        self.image_size, self.patch = image_size, patch
        tokens = (image_size // patch) ** 2
        self.embed = nn.Linear(3 * patch * patch, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), SpatialGate(4 * width, tokens),
                nn.Linear(2 * width, width),
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)  # (B, 3, h, w, p, p)
        tokens = self.embed(patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.fc(self.norm(tokens).mean(1))


def fixed_token_mixer(num_classes: int = 10, image_size: int = 64) -> nn.Module:
    return FixedTokenMixer(num_classes, image_size)


NETWORKS = (
    "gated_recursive",
    "large_kernel",
    "translation_variant",
    "moat",
    "network_in_network",
    "fixed_token_mixer",
)
