"""What a diffusion model sees in an image: the output of its blocks on noisy copies of it."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaven.pretext.diffusion.schedule import AddNoise, Schedule
from leaven.pretext.features import device_of, eval_mode

Time = int | Literal["clean"]
Call = Callable[[nn.Module, Tensor, Tensor], Any]


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


class UnknownBlock(ValueError):
    """No such block; the message names those that there are."""


class DiffusionFeatures:
    """Features of a frozen diffusion model, for every timestep, block and pooling in one go.

    Noise is keyed by (seed, image, timestep, draw): features do not depend on batches or their order, and the global
    random state is left as it was. A pass ends behind the last block that is asked for.

    Source: Mukhopadhyay et al., Diffusion Models Beat GANs on Image Classification, 2023 (2307.08702); averaging over
    draws and "clean" are additions.

    Args:
        model: called as ``model(x_t, t)`` with t (B,): `UNet`, diffusers' UNet2DModel, UNet2DConditionModel and
            DiTTransformer2DModel (these two with null conditioning), or any module with `call`.
        scheduler: a `Schedule`, a scheduler of diffusers, a tensor of alphas_cumprod, or for other parameterisations a
            function ``add_noise(x, noise, t)``.
        blocks: names of modules, or numbers counted from 1 over `block_names`; "auto": all of these.
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
        ValueError: a timestep out of range, no block, or numbers below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        blocks: Sequence[str | int] | str = "auto",
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
        if (
            isinstance(scheduler, nn.Module)
            or not callable(scheduler)
            or hasattr(scheduler, "alphas_cumprod")
        ):
            self.schedule = Schedule.of(scheduler)
            self.add_noise: AddNoise = self.schedule.add_noise
        else:
            self.add_noise = scheduler
        self.call, self.encode = call or default_call(model), encode
        self.blocks = resolve_blocks(
            model, [blocks] if isinstance(blocks, str) and blocks != "auto" else blocks
        )
        self.times: list[Time] = [*(["clean"] if include_clean else []), *timesteps]  # type: ignore[list-item]
        pools = [pool] if pool is None or isinstance(pool, int) else list(pool)
        for t in timesteps:
            last = "T" if self.schedule is None else len(self.schedule)
            if t < 0 or (self.schedule is not None and t >= len(self.schedule)):
                raise ValueError(f"timestep {t} is out of range: there are 0 to {last} - 1")
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
            indices: (B,) which images of the data these are, for the noise; by default 0 to B - 1.
            batch_size: noisy images per pass; all times and draws of all images are passed one after another.

        Raises:
            ValueError: images that the model cannot take, or a block whose output is no map.
        """
        indices = torch.arange(len(images)) if indices is None else indices.cpu()
        if len(indices) != len(images) or not len(images):
            raise ValueError(f"{len(indices)} indices for {len(images)} images")
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
        times = torch.tensor([0 if t == "clean" else t for t, _, _ in part])
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
        return torch.where(clean, rows, self.add_noise(rows, noise, times)), times.to(x.device)

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


@contextmanager
def tapped(model: nn.Module, names: Sequence[str], take: Callable[[str, Any], object]) -> Iterator[None]:
    """Call ``take(name, output)`` whenever one of the modules has run; the hooks are gone afterwards."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def call(module: nn.Module, args: Any, output: Any) -> None:
            take(name, output)

        return call

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def keyed_noise(seed: int, index: int, t: int, draw: int, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers that depend on their key alone; the same on every device."""
    key = blake2b(f"{seed} {index} {t} {draw}".encode(), digest_size=7).digest()
    return torch.randn(*shape, generator=torch.Generator().manual_seed(int.from_bytes(key)))


def block_names(model: nn.Module) -> list[str]:
    """The modules whose outputs are worth a look, in the order in which they lie.

    input_blocks, middle_block and output_blocks of `UNet`, which is how the paper counts from 1 to 37; conv_in,
    residual blocks and mid_block of diffusers' U-Nets; transformer_blocks; of other networks the children of lists and
    sequences at the top.
    """
    modules = dict(model.named_modules())

    def inside(parent: str) -> list[str]:
        return [name for name in modules if name.rpartition(".")[0] == parent and name]

    if "input_blocks" in modules and "output_blocks" in modules:
        return [*inside("input_blocks"), "middle_block", *inside("output_blocks")]
    if "down_blocks" in modules and "up_blocks" in modules:
        down, up = (
            [res for block in inside(side) for res in inside(f"{block}.resnets")]
            for side in ("down_blocks", "up_blocks")
        )
        return ["conv_in", *down, "mid_block", *up]
    if "transformer_blocks" in modules:
        return inside("transformer_blocks")
    tops = [name for name in inside("") if isinstance(modules[name], nn.ModuleList | nn.Sequential)]
    return [name for top in tops for name in inside(top)]


def resolve_blocks(model: nn.Module, blocks: Sequence[str | int] | str) -> list[str]:
    """Names of modules of names, numbers, or "auto".

    Raises:
        UnknownBlock: see `DiffusionFeatures`.
    """
    known = block_names(model)
    if isinstance(blocks, str):
        blocks = known
    if not blocks:
        raise UnknownBlock(
            f"no block: {type(model).__name__} has none that are known; give names of its modules"
        )
    modules = dict(model.named_modules())
    found = []
    for block in blocks:
        if isinstance(block, int):
            if not 1 <= block <= len(known):
                raise UnknownBlock(f"block {block}: {type(model).__name__} has 1 to {len(known)}")
            block = known[block - 1]
        if block not in modules:
            raise UnknownBlock(f"no block {block!r} in {type(model).__name__}; there are: {', '.join(known)}")
        found.append(block)
    if len(set(found)) < len(found):
        raise UnknownBlock(f"a block is asked for twice: {', '.join(found)}")
    return found


def as_map(output: Any, size: Sequence[int], block: str) -> Tensor:
    """Maps (B, C, h, w) of a block's output: itself, or tokens (B, N, C) laid out as the image is.

    Args:
        output: a tensor, or a tuple that starts with one.
        size: (H, W) of the model's input.
        block: for the error.

    Raises:
        ValueError: neither.
    """
    output = output[0] if isinstance(output, tuple | list) else output
    if isinstance(output, Tensor) and output.ndim == 4:
        return output
    if isinstance(output, Tensor) and output.ndim == 3:
        height = round((output.shape[1] * size[0] / size[1]) ** 0.5)
        if height and height * (output.shape[1] // height) == output.shape[1]:
            maps: Tensor = output.mT.unflatten(2, (height, output.shape[1] // height))
            return maps
    what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(
        f"block {block} gives {what}, which is neither a map (B, C, h, w) nor its tokens (B, N, C)"
    )


def pooled(maps: Tensor, side: int | None) -> Tensor:
    """Maps averaged to (B, C, side, side), in float32 at least; those that are no larger stay as they are."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if side is None or side >= max(maps.shape[-2:]):
        return maps
    return F.adaptive_avg_pool2d(maps, (min(side, maps.shape[-2]), min(side, maps.shape[-1])))


def default_call(model: nn.Module) -> Call:
    """``model(x, t)``, with null conditioning where diffusers' models want one.

    A U-Net with cross-attention gets zeros in place of a text, a DiT the class "none".
    """
    config: Mapping[str, Any] = getattr(model, "config", {}) or {}
    wanted = inspect.signature(model.forward).parameters

    def call(model: nn.Module, x: Tensor, t: Tensor) -> Any:
        more: dict[str, Any] = {}
        if "encoder_hidden_states" in wanted and config.get("cross_attention_dim"):
            more["encoder_hidden_states"] = x.new_zeros(len(x), 1, config["cross_attention_dim"])
        if "class_labels" in wanted and config.get("num_embeds_ada_norm"):
            none = config["num_embeds_ada_norm"]
            more["class_labels"] = torch.full((len(x),), none, device=x.device)
        return model(x, t, **more)

    return call
