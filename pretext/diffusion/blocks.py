"""Blocks of diffusion models: which there are, how to listen to them, and their outputs as maps."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaven.pretext.diffusion.denoiser import Denoiser

Call = Callable[[nn.Module, Tensor, Tensor], Any]


class UnknownBlock(ValueError):
    """No such block; the message names those that there are."""


@contextmanager
def tapped(model: nn.Module, names: Sequence[str], take: Callable[[str, Any], Any]) -> Iterator[None]:
    """Call ``take(name, output)`` whenever one of the modules has run; the hooks are gone afterwards.

    What `take` returns stands in for the output, unless it is None.
    """

    def hook(name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def call(module: nn.Module, args: Any, output: Any) -> Any:
            return take(name, output)

        return call

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def block_names(model: nn.Module) -> list[str]:
    """The modules whose outputs are worth a look, in the order in which they lie.

    input_blocks, middle_block and output_blocks of `UNet`, which is how the paper counts from 1 to 37; conv_in,
    residual blocks and mid_block of diffusers' U-Nets; transformer_blocks; of other networks the children of lists and
    sequences at the top.
    """
    modules = dict(model.named_modules())
    if "input_blocks" in modules and "output_blocks" in modules:
        return [*_inside(modules, "input_blocks"), "middle_block", *_inside(modules, "output_blocks")]
    if "down_blocks" in modules and "up_blocks" in modules:
        down, up = (
            [res for block in _inside(modules, side) for res in _inside(modules, f"{block}.resnets")]
            for side in ("down_blocks", "up_blocks")
        )
        return ["conv_in", *down, "mid_block", *up]
    if "transformer_blocks" in modules:
        return _inside(modules, "transformer_blocks")
    tops = [name for name in _inside(modules, "") if isinstance(modules[name], nn.ModuleList | nn.Sequential)]
    return [name for top in tops for name in _inside(modules, top)]


def _inside(modules: Iterable[str], parent: str) -> list[str]:
    return [name for name in modules if name.rpartition(".")[0] == parent and name]


def skip_pairs(model: nn.Module) -> dict[str, str]:
    """Blocks of the encoder in order, each with the block of the decoder that reads its output as a skip.

    Of `UNet`, and of diffusers' U-Nets, where a residual block with attention is named by its attention.

    Raises:
        ValueError: a network without encoder and decoder, or of another layout.
    """
    _refuse_objective(model)
    modules = dict(model.named_modules())
    if "input_blocks" in modules and "output_blocks" in modules:
        encoder, decoder = _inside(modules, "input_blocks"), _inside(modules, "output_blocks")
    else:
        down, up = (_inside(modules, side) for side in ("down_blocks", "up_blocks"))
        encoder = ["conv_in"]
        for block in down:
            encoder += [*_attended(modules, block), *_inside(modules, f"{block}.downsamplers")]
        decoder = [name for block in up for name in _attended(modules, block)]
    if not decoder or len(encoder) != len(decoder):
        raise ValueError(
            f"{type(model).__name__} has no encoder and decoder that are known: "
            "give feedback={encoder block: decoder block}"
        )
    return dict(zip(encoder, reversed(decoder), strict=True))


def _attended(modules: Iterable[str], block: str) -> list[str]:
    """Residual blocks of one of diffusers' blocks, or the attentions behind them."""
    attentions = _inside(modules, f"{block}.attentions")
    return attentions or _inside(modules, f"{block}.resnets")


def resolve_blocks(model: nn.Module, blocks: Sequence[str | int] | str) -> list[str]:
    """Names of modules of names, numbers, or "auto".

    Raises:
        UnknownBlock: see `DiffusionFeatures`.
        TypeError: a `Denoiser` in place of its backbone.
    """
    _refuse_objective(model)
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
        if not isinstance(block, str | int):
            raise UnknownBlock(f"a block is a name or a number, not {block!r}")
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


def _refuse_objective(model: nn.Module) -> None:
    if isinstance(model, Denoiser):
        raise TypeError("the network itself is needed, not the Denoiser around it: give denoiser.backbone")


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


def default_call(model: nn.Module, x: Tensor, t: Tensor) -> Any:
    """``model(x, t)``, with null conditioning where diffusers' models want one.

    A U-Net with cross-attention gets zeros in place of a text, a DiT the class "none".
    """
    config: Mapping[str, Any] = getattr(model, "config", {}) or {}
    wanted = inspect.signature(model.forward).parameters
    more: dict[str, Any] = {}
    if "encoder_hidden_states" in wanted and config.get("cross_attention_dim"):
        more["encoder_hidden_states"] = x.new_zeros(len(x), 1, config["cross_attention_dim"])
    if "class_labels" in wanted and config.get("num_embeds_ada_norm"):
        none = config["num_embeds_ada_norm"]
        more["class_labels"] = torch.full((len(x),), none, device=x.device)
    return model(x, t, **more)
