"""DifFeed: a diffusion network that reads its own decoder in a second pass, and a classifier on it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaven.pretext.diffusion.blocks import Call, as_map, pooled, resolve_blocks, skip_pairs, tapped
from leaven.pretext.diffusion.features import DiffusionFeatures, _Enough
from leaven.pretext.diffusion.heads import AttentionHead


class DifFeed(nn.Module):
    """Logits of images, from two passes of a diffusion network over the same noisy images.

    The first pass, without gradient, gives maps of the decoder. Each goes through a 1x1 convolution to the width of a
    block of the encoder, BatchNorm and ReLU, and is resized to that block's map. In the second pass it is added to the
    block's output: the next block and the skip both read the sum. An `AttentionHead` on a block of the second pass
    classifies. It is trained as any classifier:

        feed = DifFeed(model, schedule, images[:1], classes=10, block=24)
        F.cross_entropy(feed(images, indices, draw=epoch), labels).backward()

    Noise is keyed as in `DiffusionFeatures`: where all that is added is 0, the head reads what that gives. The network
    stays in eval mode.

    Source: Mukhopadhyay et al., Do text-free diffusion models learn discriminative visual representations?, ECCV 2024
    (2311.17921). Theirs is ADM with block 24 for the head, and blocks 2, 5, 8, 11, 14 and 17 fed by 36, 33, 30, 27, 24
    and 21. The default is this rule: at every size the encoder's second block, fed by the block that reads its skip.

    Args:
        model: with encoder and decoder: `UNet`, U-Nets of diffusers, or with `feedback` another one.
        scheduler: see `DiffusionFeatures`.
        example: images (B, C, H, W) of the size to come, one is enough; they are passed through the network once.
        classes: outputs.
        block: that the head reads: a name, or a number, see `block_names`.
        timestep: of the noise.
        feedback: blocks of the encoder, each with the block of the decoder that feeds it, by names or by numbers.
        pool: side that the head's map is averaged to; a smaller one stays as it is.
        width, heads, depth: see `AttentionHead`.
        freeze: keep the network's weights as they are; False trains them as far as `block`.
        seed: of the noise.
        call, encode: see `DiffusionFeatures`.

    Attributes:
        backbone: the network.
        feedback: names of the encoder's blocks, each with that of the decoder's.
        convolutions: for each of them.
        head: the classifier.

    Raises:
        UnknownBlock: a block that is not there.
        TypeError: a `Denoiser` in place of its backbone.
        ValueError: an example that is no images, a network without encoder and decoder, feedback of no blocks or of
            blocks that do not run before `block`, a timestep out of range, a map that is not square.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        example: Tensor,
        classes: int,
        *,
        block: str | int,
        timestep: int = 90,
        feedback: Mapping[str, str] | Mapping[int, int] | None = None,
        pool: int = 16,
        width: int = 256,
        heads: int = 8,
        depth: int = 2,
        freeze: bool = True,
        seed: int = 0,
        call: Call | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(example, Tensor) or example.ndim != 4:
            what = tuple(example.shape) if isinstance(example, Tensor) else repr(example)
            raise ValueError(f"example must be images (B, C, H, W), such as the first of a batch, not {what}")
        if feedback is None:
            pairs = skip_pairs(model)
        else:
            pairs = {
                resolve_blocks(model, [a])[0]: resolve_blocks(model, [b])[0] for a, b in feedback.items()
            }
        if not pairs:
            raise ValueError("no feedback: give {block of the encoder: block of the decoder}")
        self._features = DiffusionFeatures(
            model, scheduler, [block], (timestep,), pool, seed=seed, call=call, encode=encode
        )
        (self.block,), self.timestep, self.pool = self._features.blocks, timestep, pool
        self.backbone = model.eval()
        maps = self._look(example, [*pairs, *pairs.values(), self.block])
        self.feedback = _second_of_each_size(pairs, maps) if feedback is None else pairs
        for name in self.feedback:
            if list(maps).index(name) >= list(maps).index(self.block):
                raise ValueError(f"feedback into {name} never comes to {self.block}: take a block behind it")
        self.convolutions = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(maps[decoder].shape[1], maps[encoder].shape[1], 1, bias=False),
                nn.BatchNorm2d(maps[encoder].shape[1]),
                nn.ReLU(),
            )
            for encoder, decoder in self.feedback.items()
        )
        channels, height, side = pooled(maps[self.block], pool).shape[1:]
        if height != side:
            raise ValueError(f"the map of {self.block} is {height}x{side}: lower pool until it is square")
        self.head = AttentionHead(channels, side, classes, width, heads, depth)
        if freeze:
            model.requires_grad_(False)

    def forward(self, images: Tensor, indices: Tensor | None = None, draw: int = 0) -> Tensor:
        """Logits (B, classes).

        Args:
            images: (B, C, H, W), scaled as the network was trained: for most, to [-1, 1].
            indices: (B,) which images of the data these are, for the noise; by default 0 to B - 1. Held-out images need
                others than training images, or another draw.
            draw: of the noise: the epoch gives new noise in each.

        Raises:
            ValueError: as many indices are needed as images.
        """
        with torch.no_grad():
            x, t = self._noisy(images, indices, draw)
            maps = self._run(x, t, list(self.feedback.values()))
        torch.clear_autocast_cache()  # older PyTorch keeps weights in it that were cast without gradient
        fed = {
            encoder: convolution(maps[decoder].to(self.head.cls.dtype))
            for (encoder, decoder), convolution in zip(self.feedback.items(), self.convolutions, strict=True)
        }
        with tapped(self.backbone, list(fed), lambda name, output: _plus(output, fed[name])):
            found = self._run(x, t, [self.block])[self.block]
        logits: Tensor = self.head(pooled(found, self.pool).to(self.head.cls.dtype))
        return logits

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def _look(self, example: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        return self._run(*self._noisy(example, None, 0), names)

    def _noisy(self, images: Tensor, indices: Tensor | None, draw: int) -> tuple[Tensor, Tensor]:
        """Noisy images, or latents, and their times (B,)."""
        indices = torch.arange(len(images)) if indices is None else indices.cpu()
        if len(indices) != len(images):
            raise ValueError(f"{len(indices)} indices for {len(images)} images")
        x = images if self._features.encode is None else self._features.encode(images)
        return self._features._noisy(x, indices, [(self.timestep, draw, row) for row in range(len(x))])

    def _run(self, x: Tensor, t: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Maps of blocks in the order in which they run; the pass ends behind the last one."""
        names, found = list(dict.fromkeys(names)), {}

        def take(name: str, output: Any) -> None:
            found[name] = as_map(output, x.shape[-2:], name)
            if len(found) == len(names):
                raise _Enough

        with tapped(self.backbone, names, take), suppress(_Enough):
            self._features.call(self.backbone, x, t)
        for name in names:
            if name not in found:
                raise ValueError(f"block {name} did not run: it is no part of a pass")
        return found


def _plus(output: Any, more: Tensor) -> Any:
    """A block's output, a map or a tuple that starts with one, with something added."""
    if isinstance(output, tuple):
        return (_plus(output[0], more), *output[1:])
    if more.shape[-2:] != output.shape[-2:]:
        more = F.interpolate(more, output.shape[-2:], mode="bilinear")
    return output + more.to(output.dtype)


def _second_of_each_size(pairs: Mapping[str, str], maps: Mapping[str, Tensor]) -> dict[str, str]:
    by_size: dict[torch.Size, list[str]] = {}
    for encoder in pairs:
        by_size.setdefault(maps[encoder].shape[-2:], []).append(encoder)
    return {names[1]: pairs[names[1]] for names in by_size.values() if len(names) > 1}
