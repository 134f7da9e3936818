"""Classifiers on the maps of a frozen network, and many of them trained at once."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaven.pretext.diffusion.features import Cell

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
        self.norm = nn.LayerNorm((channels, side, side))
        self.narrow = nn.Conv2d(channels, width, 1)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = _transformer(width, heads, depth)
        self.classifier = nn.Linear(width, classes)

    def forward(self, maps: Tensor) -> Tensor:
        """Logits (B, classes) of maps (B, C, side, side)."""
        tokens = self.narrow(self.norm(maps)).flatten(2).mT
        tokens = self.blocks(torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], dim=1))
        logits: Tensor = self.classifier(tokens[:, 0])
        return logits


def _transformer(width: int, heads: int, depth: int) -> nn.Sequential:
    from timm.models.vision_transformer import Block

    if width % heads:
        raise ValueError(f"width={width} must be a multiple of heads={heads}")
    return nn.Sequential(*(Block(width, heads, mlp_ratio=4.0, qkv_bias=False) for _ in range(depth)))


class DifFormerHead(nn.Module):
    """`AttentionHead` for the maps of several blocks and timesteps at once.

    Every block has its own norm and 1x1 convolution. Tokens of all blocks at one timestep make one sequence under the
    transformer blocks. The class tokens of all timesteps, side by side, are classified. Timesteps share all weights but
    the classifier's. Of one block and one timestep it is `AttentionHead`.

        maps = DiffusionFeatures(model, schedule, blocks=[19, 24, 30], timesteps=(90, 150), pool=16)(images)
        head = DifFormerHead({cell: each.shape[1:] for cell, each in maps.items()}, classes=10)
        logits = head(maps)

    Source: Mukhopadhyay et al., Do text-free diffusion models learn discriminative visual representations?, ECCV 2024
    (2311.17921).

    Args:
        shapes: (C, h, w) of the maps of every cell, of each timestep the same.
        classes: outputs.
        width: of the tokens; the paper's is 1024.
        heads, depth: of the transformer blocks.

    Attributes:
        times: in the order in which their class tokens lie.
        kinds: block and pool, in the order of `norms` and `narrows`.

    Raises:
        ValueError: no cells, no shapes (C, h, w), timesteps that differ in blocks, pools or shapes, or a width that is
            no multiple of heads.
    """

    def __init__(
        self,
        shapes: Mapping[Cell, Sequence[int]],
        classes: int,
        width: int = 256,
        heads: int = 8,
        depth: int = 2,
    ) -> None:
        super().__init__()
        for cell, shape in shapes.items():
            if isinstance(shape, Tensor) or len(shape) != 3:
                given = f"a tensor {tuple(shape.shape)}" if isinstance(shape, Tensor) else tuple(shape)
                raise ValueError(
                    f"{cell}: the shape (C, h, w) of its maps is needed, without the batch, as in "
                    f"{{cell: each.shape[1:] for cell, each in maps.items()}}, not {given}"
                )
        self.times = list(dict.fromkeys(cell.t for cell in shapes))
        sizes: dict[tuple[str, int | None], tuple[int, ...]] = {}
        for cell, shape in shapes.items():
            sizes.setdefault((cell.block, cell.pool), tuple(shape))
        self.kinds = list(sizes)
        for cell in [Cell(t, *kind) for t in self.times for kind in self.kinds]:
            if cell not in shapes or tuple(shapes[cell]) != sizes[cell.block, cell.pool]:
                raise ValueError(
                    f"every timestep needs the same maps: those of {cell} are missing or differ in shape"
                )
        if not sizes:
            raise ValueError("no cells: give the shape (C, h, w) of the maps of each")
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in sizes.values())
        self.narrows = nn.ModuleList(nn.Conv2d(size[0], width, 1) for size in sizes.values())
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = _transformer(width, heads, depth)
        self.classifier = nn.Linear(width * len(self.times), classes)

    def forward(self, maps: Mapping[Cell, Tensor]) -> Tensor:
        """Logits (B, classes) of maps (B, C, h, w) of every cell.

        Raises:
            ValueError: maps of a cell are missing.
        """
        for cell in (Cell(t, *kind) for t in self.times for kind in self.kinds):
            if cell not in maps:
                there = "; ".join(map(str, maps))
                raise ValueError(
                    f"there are no maps of the cell {cell} that this head reads, only of: {there}"
                )
        read = []
        for t in self.times:
            tokens = [
                narrow(norm(maps[Cell(t, *kind)])).flatten(2).mT
                for kind, norm, narrow in zip(self.kinds, self.norms, self.narrows, strict=True)
            ]
            sequence = self.blocks(torch.cat([self.cls.expand(len(tokens[0]), -1, -1), *tokens], dim=1))
            read.append(sequence[:, 0])
        logits: Tensor = self.classifier(torch.cat(read, dim=1))
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
    features: Mapping[K, Tensor | Mapping[Cell, Tensor]],
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
        features: maps (N, C, k, k) of each; of a `DifFormerHead` those of all its cells.
        labels: (N,) class indices.
        steps, batch_size, lr, weight_decay: the usual.
        optimizer: "adamw", or plain "sgd".
        seed: of the batches.

    Raises:
        FloatingPointError: a loss is not finite; its head is named.
        ValueError: no heads, a head without features, numbers of images that do not fit, or labels that are no indices
            of a head's classes.
    """
    if not heads:
        raise ValueError("no heads to train")
    if min(steps, batch_size) < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    if labels.is_floating_point() or labels.ndim != 1:
        raise ValueError(f"labels must be class indices (N,), got {tuple(labels.shape)} of {labels.dtype}")
    if missing := [str(name) for name in heads if name not in features]:
        raise ValueError(
            f"no features for the heads {', '.join(missing)}: give each head's under its own name, {{name: maps}}, and "
            "a DifFormerHead's as {name: {cell: maps}}"
        )
    inputs: dict[K, Tensor | dict[Cell, Tensor]] = {}
    for name in heads:
        given = features[name]
        cells = {} if isinstance(given, Tensor) else dict(given)  # a cache is read once
        inputs[name] = given if isinstance(given, Tensor) else cells
        for maps in [given] if isinstance(given, Tensor) else cells.values():
            if len(maps) != len(labels):
                raise ValueError(f"{name}: {len(maps)} maps and {len(labels)} labels")
            if not torch.isfinite(maps).all():
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
        logits = {name: head(_rows(inputs[name], rows)) for name, head in heads.items()}
        for name, found in logits.items() if step == 0 else ():
            if labels.min() < 0 or labels.max() >= found.shape[1]:
                raise ValueError(
                    f"{name}: labels from {int(labels.min())} to {int(labels.max())}, but it has classes 0 to "
                    f"{found.shape[1] - 1}"
                )
        losses = {name: F.cross_entropy(found, labels[rows]) for name, found in logits.items()}
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


def _rows(maps: Tensor | dict[Cell, Tensor], rows: Tensor) -> Tensor | dict[Cell, Tensor]:
    return maps[rows] if isinstance(maps, Tensor) else {cell: each[rows] for cell, each in maps.items()}
