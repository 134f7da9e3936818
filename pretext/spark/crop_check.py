"""Is a masked encoder exact on this backbone? Asked of the backbone itself, in float64, before it is used."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leaven.backbones import Stage, features
from leaven.backbones.probe import reason_of
from leaven.pretext.spark.errors import SparseUnsupported
from leaven.pretext.spark.sparse_map import SparseMap

# Relative to a map's largest value. float64 rounding stays below 1e-7 even in nets that amplify it or compute a norm
# in float32; a layer that leaks is off by more than 1e-3.
TOLERANCE = 1e-5

# What nets raise when an image does not suit them.
_UNSUITABLE = (RuntimeError, AssertionError, ValueError, TypeError, IndexError)
# Set to evaluation: their draws differ between two passes, or they do not run on the CPU in training mode.
_EVALUATED_LAYERS = ("Dropout", "DropPath", "StochasticDepth", "SyncBatchNorm")

Encode = Callable[[nn.Module, Tensor, Tensor, Sequence[Stage], int], list[Tensor]]


def crop_check(
    backbone: nn.Module,
    convert: Callable[[nn.Module], None],
    encode: Encode,
    stages: Sequence[Stage],
    cell: int,
    in_chans: int = 3,
    offsets: Sequence[float] = (1.0,),
) -> None:
    """Compare the masked encoder with the plain network on the visible crop; they must agree.

    Images of three cells, two of them visible, NaN in the third, against the plain network on those two alone: its zero
    padding stands where hidden zeros do, so that whatever looks across positions without counting only visible ones
    shows up. On copies in float64 with random norm weights, in training mode (batch moments) and in evaluation.

    Args:
        backbone: a copy of a plain network, which is spoilt.
        convert: makes a copy of it ready for `encode`.
        encode: ``encode(backbone, images, mask, stages, cell) -> maps``.
        stages: the maps to compare.
        cell: side of a mask cell in pixels.
        in_chans: channels of the images.
        offsets: factor of the random biases, one check each. Where hidden positions are zeros, a maximum leaks on
            maps that are negative throughout, and a minimum on positive ones.

    Raises:
        SparseUnsupported: they differ, or one of them does not run; one line that names the module.
    """
    plain = backbone.cpu().double().requires_grad_(False)
    for offset in offsets:
        _check(plain, convert, encode, stages, cell, in_chans, offset)


def _check(
    plain: nn.Module,
    convert: Callable[[nn.Module], None],
    encode: Encode,
    stages: Sequence[Stage],
    cell: int,
    in_chans: int,
    offset: float,
) -> None:
    generator = torch.Generator().manual_seed(0)
    _randomise(plain, generator, offset)
    sparse, nudged = copy.deepcopy(plain), copy.deepcopy(plain)
    convert(sparse)
    crops = torch.randn(2, in_chans, cell, 2 * cell, generator=generator, dtype=torch.float64)
    almost = crops + 1e-10 * crops.flip(-1)
    hidden = torch.full((2, in_chans, cell, cell), float("nan"), dtype=torch.float64)
    images = torch.stack([torch.cat([crops[0], hidden[0]], -1), torch.cat([hidden[1], crops[1]], -1)])
    mask = torch.tensor([[[True, True, False]], [[False, True, True]]])

    def run_plain() -> list[Tensor]:
        return features(plain, crops, stages)

    def run_sparse() -> list[Tensor]:
        maps = encode(sparse, images, mask, stages, cell)
        return [_visible(found, wanted) for found, wanted in zip(maps, expected, strict=True)]

    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for training in (True, False):  # in this order: the first leaves running moments that suit the second
            for net in (plain, sparse, nudged):
                _set_mode(net, training)
            try:
                expected = run_plain()
            except _UNSUITABLE as error:
                raise _unless_refusal(error, plain, f"does not run on {cell}x{2 * cell} px") from error
            if offset != 1.0 and not all(map(_agree, features(nudged, almost, stages), expected)):
                # Most channels of a deep net are dead then, and norms divide by next to nothing: its own rounding
                # grows to the size of a leak. No verdict; the check with positive biases stands.
                return
            try:
                found = run_sparse()
            except _UNSUITABLE as error:
                raise _unless_refusal(error, plain, "cannot be masked") from error
            if all(map(_agree, found, expected)):
                continue
            if training and not all(map(torch.equal, expected, run_plain())):
                raise SparseUnsupported(
                    f"{type(plain).__name__} draws random numbers outside of dropout layers, so its training "
                    "mode cannot be checked; build it without"
                )
            raise SparseUnsupported(_culprit(plain, _outputs(plain, run_plain), _outputs(sparse, run_sparse)))


def _randomise(net: nn.Module, generator: torch.Generator, offset: float) -> None:
    """Scales and offsets start as constants, many as zeros, behind which a leak would hide.

    Running moments are set to take the value of one training pass: far from the data's, they blow a deep net's
    rounding up to the size of a leak.
    """
    norms: Any = [m for m in net.modules() if hasattr(m, "running_mean") and hasattr(m, "momentum")]
    for norm in norms:
        norm.momentum = 1.0
    for name, parameter in net.named_parameters():
        # Older timm: a classifier of no classes.
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        if parameter.dim() <= 1 or parameter.max() == parameter.min():
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5
            parameter.copy_(values * offset if name.endswith("bias") else values)


def _set_mode(net: nn.Module, training: bool) -> None:
    for module in net.train(training).modules():
        if any(
            kind in name for kind in _EVALUATED_LAYERS for name in (c.__name__ for c in type(module).__mro__)
        ):
            module.eval()


def _outputs(net: nn.Module, run: Callable[[], object]) -> list[tuple[str, Tensor | None]]:
    """What each module returned, in the order in which they finished; None for what is no map."""
    outputs: list[tuple[str, Tensor | None]] = []

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, SparseMap):
                output = output.geo.scatter(output.values, output.r) if output.tags == "bchw" else None
            outputs.append((name, output.clone() if isinstance(output, Tensor) else None))

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in net.named_modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _visible(found: Tensor, expected: Tensor) -> Tensor:
    """The visible two thirds of a map, wherever its width is (NCHW or NHWC); anything else as it is."""
    for width in (-1, -2):
        if found.dim() >= 4 and found.shape[width] * 2 == expected.shape[width] * 3:
            side = expected.shape[width] // 2
            return torch.cat([found[:1].narrow(width, 0, 2 * side), found[1:].narrow(width, side, 2 * side)])
    return found


def _agree(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _culprit(
    net: nn.Module, expected: list[tuple[str, Tensor | None]], found: list[tuple[str, Tensor | None]]
) -> str:
    """Name the first module whose output is wrong, and the one that it is in."""
    name = ""
    for (name, e), (_, f) in zip(expected, found, strict=False):  # noqa: B007
        f = f if f is None or e is None else _visible(f, e)
        if f is not None and e is not None and f.shape == e.shape and not _agree(f, e):
            break
    parent = name.rpartition(".")[0]
    described = [f"{n or 'the backbone'} ({type(net.get_submodule(n)).__name__})" for n in (name, parent)]
    return f"{described[0]}, inside {described[1]}, lets hidden positions change visible ones: no exact sparse form"


def _unless_refusal(error: BaseException, backbone: nn.Module, what: str) -> SparseUnsupported:
    if isinstance(error, SparseUnsupported):
        return error
    return SparseUnsupported(f"{type(backbone).__name__} {what}: {reason_of(error)}")
