"""What a diffusion model sees in an image: the output of its blocks on noisy copies of it."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from leaven.pretext.diffusion.blocks import Call, as_map, default_call, pooled, resolve_blocks, tapped
from leaven.pretext.diffusion.schedule import AddNoise, Schedule
from leaven.pretext.features import device_of, eval_mode

Time = int | Literal["clean"]


class Cell(NamedTuple):
    """One kind of feature.

    Attributes:
        t: timestep, or "clean": no noise, and the network told t = 0.
        block: name of the module.
        pool: side that its map is averaged to; None: as it is.
    """

    t: Time
    block: str
    pool: int | None

    def __str__(self) -> str:
        return f"t={self.t}, {self.block}, {'whole map' if self.pool is None else f'pool {self.pool}'}"


class DiffusionFeatures:
    """Features of a frozen diffusion model, for every timestep, block and pooling in one go.

    Noise is keyed by (seed, index of the image, timestep, draw): where indices are given, features do not depend on
    batches or their order. The global random state is left as it was. A pass ends behind the last block that is asked
    for.

    Source: Mukhopadhyay et al., Diffusion Models Beat GANs on Image Classification, 2023 (2307.08702); averaging over
    draws and "clean" are additions.

    Args:
        model: called as ``model(x_t, t)`` with t (B,): `UNet`, diffusers' UNet2DModel, UNet2DConditionModel and
            DiTTransformer2DModel (these two with null conditioning), or any module with `call`.
        scheduler: a `Schedule`, a scheduler of diffusers, a tensor of alphas_cumprod, or for other parameterisations a
            function ``add_noise(x, noise, t)``.
        blocks: names of modules, or numbers counted from 1 over `block_names`, one or several; "auto": all of these.
        timesteps: from 0 to T - 1.
        pool: a side, or several: what maps are averaged to, see `Cell`.
        draws: of noise, over which features are averaged.
        include_clean: also the image without noise.
        seed: of the noise.
        early_exit: False runs the whole network; the features are the same.
        call: how the model is called, where it is not as above.
        encode: images to what the model sees, for latent models.

    Attributes:
        cells: in the order that they are given back in: timestep by timestep, block by block, pool by pool.

    Raises:
        UnknownBlock: a block that is not there.
        TypeError: a `Denoiser` in place of its backbone.
        ValueError: a timestep out of range, no block, or numbers below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        blocks: Sequence[str | int] | str | int = "auto",
        timesteps: Sequence[int] = (90,),
        pool: int | Sequence[int | None] | None = 2,
        draws: int = 1,
        include_clean: bool = False,
        *,
        seed: int = 0,
        early_exit: bool = True,
        call: Call | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.draws, self.seed, self.early_exit = model, draws, seed, early_exit
        self.schedule: Schedule | None = None
        if callable(scheduler) and not hasattr(scheduler, "alphas_cumprod"):
            self.add_noise: AddNoise = scheduler
        else:
            self.schedule = Schedule.of(scheduler)
            self.add_noise = self.schedule.add_noise
        self.call, self.encode = call or default_call, encode
        self.blocks = resolve_blocks(
            model, [blocks] if isinstance(blocks, str | int) and blocks != "auto" else blocks
        )
        self.times: list[Time] = [*(["clean"] if include_clean else []), *timesteps]  # type: ignore[list-item]
        pools = [pool] if pool is None or isinstance(pool, int) else list(pool)
        for t in timesteps:
            if type(t) is not int:
                raise ValueError(f"timestep {t!r} is no whole number")
            last = "T - 1" if self.schedule is None else len(self.schedule) - 1
            if t < 0 or (self.schedule is not None and t >= len(self.schedule)):
                raise ValueError(f"timestep {t} is out of range: there are 0 to {last}")
        if not self.times or not pools:
            raise ValueError("give timesteps, or include_clean, and a pool")
        if draws < 1 or any(p is not None and p < 1 for p in pools):
            raise ValueError(f"draws and pool must be at least 1, got {draws} and {pool}")
        self.cells = [Cell(t, block, p) for t in self.times for block in self.blocks for p in pools]
        self.pools = pools
        self._last: tuple[str, int] | None = None  # the block that runs last, and in which of its calls

    def __call__(
        self, images: Tensor, indices: Tensor | None = None, *, batch_size: int = 64
    ) -> dict[Cell, Tensor]:
        """Maps (B, C, k, k) of every cell, without gradient, on the model's device.

        Args:
            images: (B, C, H, W), scaled as the model was trained: for most, to [-1, 1].
            indices: (B,) which images of the data these are, for the noise. By default 0 to B - 1, which is right for
                data that are one batch: every other batch would get the same noise again.
            batch_size: noisy images per pass; all times and draws of all images are passed one after another.

        Raises:
            ValueError: images that the model cannot take or that are not finite, or a block whose output is no map.
        """
        indices = torch.arange(len(images)) if indices is None else indices.cpu()
        if len(indices) != len(images) or not len(images):
            raise ValueError(f"{len(indices)} indices for {len(images)} images")
        if not torch.isfinite(images).all():
            raise ValueError("there is a NaN or an infinity in the images")
        device = device_of(self.model)
        sums: dict[Cell, Tensor] = {}
        with torch.no_grad(), eval_mode(self.model):
            x = images.to(device)
            x = x if self.encode is None else self.encode(x)
            jobs = [
                (t, draw, row)
                for t in self.times
                for draw in range(1 if t == "clean" else self.draws)
                for row in range(len(x))
            ]
            for start in range(0, len(jobs), batch_size):
                part = jobs[start : start + batch_size]
                noisy, times = self._noisy(x, indices, part)
                for block, found in self._run(noisy, times).items():
                    grid = as_map(found, x.shape[-2:], block)
                    for pool in self.pools:
                        self._add(sums, part, block, pool, pooled(grid, pool), len(x))
        counts = {t: 1 if t == "clean" else self.draws for t in self.times}
        return {cell: sums[cell] / counts[cell.t] for cell in self.cells}

    def _noisy(self, x: Tensor, indices: Tensor, part: list[tuple[Time, int, int]]) -> tuple[Tensor, Tensor]:
        rows = x[[row for _, _, row in part]]
        times = torch.tensor([0 if t == "clean" else t for t, _, _ in part], device=x.device)
        noise = torch.stack(
            [
                torch.zeros(x.shape[1:])
                if t == "clean"
                else keyed_noise(self.seed, int(indices[row]), t, draw, x.shape[1:])
                for t, draw, row in part
            ]
        ).to(rows)
        clean = torch.tensor([t == "clean" for t, _, _ in part], device=x.device).view(
            -1, *[1] * (x.ndim - 1)
        )
        return torch.where(clean, rows, self.add_noise(rows, noise, times)), times

    @staticmethod
    def _add(
        sums: dict[Cell, Tensor],
        part: list[tuple[Time, int, int]],
        block: str,
        pool: int | None,
        found: Tensor,
        n: int,
    ) -> None:
        for i, (t, _, row) in enumerate(part):
            cell = Cell(t, block, pool)
            if cell not in sums:
                sums[cell] = found.new_zeros(n, *found.shape[1:])
            sums[cell][row] += found[i]

    def _run(self, x: Tensor, t: Tensor) -> dict[str, Any]:
        """The blocks' outputs."""
        if self.early_exit and self._last is None:
            order: list[str] = []
            with tapped(self.model, self.blocks, lambda name, _: order.append(name)):
                self.call(self.model, x[:1], t[:1])
            self._last = (order[-1], order.count(order[-1])) if order else None
        found: dict[str, Any] = {}
        calls: list[str] = []

        def take(name: str, output: Any) -> None:
            found[name] = output
            calls.append(name)
            if self._last == (name, calls.count(name)):
                raise _Enough

        with tapped(self.model, self.blocks, take), suppress(_Enough):
            self.call(self.model, x, t)
        for name in self.blocks:
            if name not in found:
                raise ValueError(f"block {name} did not run: it is no part of a pass")
        return found


class _Enough(Exception):
    """The last block has run."""


def keyed_noise(seed: int, index: int, t: int, draw: int, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers that depend on their key alone; the same on every device."""
    key = blake2b(f"{seed} {index} {t} {draw}".encode(), digest_size=7).digest()
    return torch.randn(*shape, generator=torch.Generator().manual_seed(int.from_bytes(key)))
