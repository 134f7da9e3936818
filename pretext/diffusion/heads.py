"""Classifiers on the maps of a frozen network, and many of them trained at once."""

from collections.abc import Hashable, Mapping
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["linear", "mlp", "conv", "attention"]
K = TypeVar("K", bound=Hashable)


class AttentionHead(nn.Module):
    """Tokens of a map under two transformer blocks, read by a class token.

    Source: Mukhopadhyay et al. 2023: LayerNorm over the whole map, 1x1 convolution, no position embedding.

    Args:
        channels, side: of the maps.
        classes: outputs.
        width: of the tokens; the paper's is 1024.
        heads, depth: of the blocks.
    """

    def __init__(
        self, channels: int, side: int, classes: int, width: int = 256, heads: int = 8, depth: int = 2
    ) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        self.norm = nn.LayerNorm((channels, side, side))
        self.narrow = nn.Conv2d(channels, width, 1)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(
            *(Block(width, heads, mlp_ratio=4.0, qkv_bias=False) for _ in range(depth))
        )
        self.classifier = nn.Linear(width, classes)

    def forward(self, maps: Tensor) -> Tensor:
        """Logits (B, classes) of maps (B, C, side, side)."""
        tokens = self.narrow(self.norm(maps)).flatten(2).mT
        tokens = self.blocks(torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], dim=1))
        logits: Tensor = self.classifier(tokens[:, 0])
        return logits


def make_head(kind: Kind, channels: int, side: int, classes: int, width: int = 256) -> nn.Module:
    """A classifier of maps (B, C, side, side).

    Args:
        kind: "linear"; "mlp", one hidden layer; "conv", two convolutions and a mean; "attention".
        channels, side: of the maps.
        classes: outputs.
        width: of what is hidden.

    Raises:
        ValueError: an unknown kind.
    """
    numbers = channels * side * side
    if kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(numbers, classes))
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(numbers, width), nn.ReLU(), nn.Linear(width, classes))
    if kind == "conv":
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes),
        )  # fmt: skip
    if kind == "attention":
        return AttentionHead(channels, side, classes, width)
    raise ValueError(f"unknown head {kind!r}: linear, mlp, conv or attention")


def fit_heads(
    heads: Mapping[K, nn.Module],
    features: Mapping[K, Tensor],
    labels: Tensor,
    *,
    steps: int = 1000,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    optimizer: Literal["adamw", "sgd"] = "adamw",
) -> None:
    """Train all heads in one pass over the same batches; each ends as if it were trained alone.

    Their losses are summed and share no parameter, and both optimizers treat every number by itself. The learning rate
    falls to 0 as half a cosine.

    Args:
        heads: trained in place, and left in eval mode.
        features: maps (N, C, k, k) of each.
        labels: (N,) class indices.
        steps, batch_size, lr, weight_decay: the usual.
        optimizer: "adamw", or plain "sgd".
        seed: of the batches.

    Raises:
        FloatingPointError: a loss is not finite; its head is named.
        ValueError: no heads, or numbers of images that do not fit.
    """
    if not heads:
        raise ValueError("no heads to train")
    if min(steps, batch_size) < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    for name in heads:
        if len(features[name]) != len(labels):
            raise ValueError(f"{name}: {len(features[name])} maps and {len(labels)} labels")
        if not torch.isfinite(features[name]).all():
            raise ValueError(f"{name}: there is a NaN or an infinity in the maps")
    parameters = [p for head in heads.values() for p in head.train().parameters()]
    stepper: torch.optim.Optimizer = (
        torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
        if optimizer == "adamw"
        else torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(labels), (min(batch_size, len(labels)),), generator=generator)
        losses = {
            name: F.cross_entropy(head(features[name][rows]), labels[rows]) for name, head in heads.items()
        }
        for name, loss in losses.items():
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"{name}: the loss is {float(loss.detach())} at update {step + 1}: lower lr"
                )
        stepper.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        stepper.step()
        schedule.step()
    for head in heads.values():
        head.eval()
