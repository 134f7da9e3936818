# ruff: noqa: E501
"""Every rule of the sparse map against the dense operation: on all cells visible, and on one visible cell against its crop."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leaven.pretext.spark import SparseUnsupported
from leaven.pretext.spark.geometry import Geometry
from leaven.pretext.spark.packed import packed_encode
from leaven.pretext.spark.sparse_map import RULES, SparseMap
from leaven.pretext.spark.swaps import swap

SIDE, GRID, CHANNELS = 4, (2, 3), 8
generator = torch.Generator().manual_seed(0)
IMAGES = torch.randn(2, CHANNELS, 8, 12, dtype=torch.double, generator=generator)
VISIBLE = ((0, 1), (1, 2))  # cell (row, column) of either image
CROPS = torch.stack([IMAGES[b, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] for b, (y, x) in enumerate(VISIBLE)])
W1 = torch.randn(6, CHANNELS, 1, 1, dtype=torch.double, generator=generator)
W2 = torch.randn(6, CHANNELS, 2, 2, dtype=torch.double, generator=generator)
W3 = torch.randn(6, CHANNELS, 3, 3, dtype=torch.double, generator=generator)
WD = torch.randn(CHANNELS, 1, 3, 3, dtype=torch.double, generator=generator)
WG = torch.randn(6, CHANNELS // 2, 1, 1, dtype=torch.double, generator=generator)
B6 = torch.randn(6, dtype=torch.double, generator=generator)
GATE = torch.rand(2, CHANNELS, 1, 1, dtype=torch.double, generator=generator)
C8 = torch.rand(CHANNELS, dtype=torch.double, generator=generator)
LIN = torch.randn(5, CHANNELS, dtype=torch.double, generator=generator)


def swapped(module: nn.Module) -> nn.Module:
    """The module with its map-aware class and random parameters; on ordinary tensors it is what it was."""
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, generator=generator)
    swap(module)
    assert type(module).__bases__[0].__module__ == "leaven.pretext.spark.swaps"
    return module


EVONORM = swapped(timm.layers.EvoNorm2dS0(CHANNELS, groups=2))
CONTEXT = swapped(timm.layers.GlobalContext(CHANNELS, fuse_add=True))
IN_FLOAT32 = ("float", "EvoNorm")

OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": F.relu,
    "relu inplace": lambda x: F.relu(x.clone(), inplace=True),
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid method": lambda x: x.sigmoid(),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "prelu": lambda x: F.prelu(x, C8),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "scalar arithmetic": lambda x: 2 - (x + 1) * 3 / 2,
    "reflected": lambda x: GATE.sum() - x,
    "tensor times map": lambda x: GATE * x,
    "map times tensor": lambda x: x * GATE,
    "map times map": lambda x: x * x.tanh() - x,
    "in-place sum": lambda x: x.clone().add_(x),
    "gate expanded to the map": lambda x: x * GATE.expand_as(x),
    "layer scale, channels last": lambda x: x.permute(0, 2, 3, 1).mul(C8).permute(0, 3, 1, 2),
    "conv 1x1": lambda x: F.conv2d(x, W1, B6),
    "conv 1x1 stride 2": lambda x: F.conv2d(x, W1, B6, stride=2),
    "conv 1x1 grouped": lambda x: F.conv2d(x, WG, B6, groups=2),
    "conv 2x2 stride 2": lambda x: F.conv2d(x, W2, B6, stride=2),
    "conv 3x3": lambda x: F.conv2d(x, W3, B6, padding=1),
    "conv 3x3 stride 2": lambda x: F.conv2d(x, W3, B6, stride=2, padding=1),
    "conv 3x3 same": lambda x: F.conv2d(x, W3, B6, padding="same"),
    "conv 3x3 depthwise dilated": lambda x: F.conv2d(x, WD, padding=2, dilation=2, groups=CHANNELS),
    "padded, then conv": lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), W3, stride=2),
    "max_pool 3 stride 2": lambda x: F.max_pool2d(x - 5, 3, 2, 1),
    "max_pool 2 ceil": lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True),
    "max_pool after a pad of zeros": lambda x: F.max_pool2d(F.pad(x - 5, (0, 1, 0, 1)), 2, 1),
    "avg_pool 2": lambda x: F.avg_pool2d(x, 2),
    "avg_pool 3, padding counts": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "avg_pool 3, padding does not count": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive_avg_pool 1": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_max_pool 1": lambda x: F.adaptive_max_pool2d(x, 1),
    "mean over space": lambda x: x.mean((2, 3), keepdim=True),
    "mean over space, dims dropped": lambda x: x.mean([-2, -1]),
    "mean over space and channels": lambda x: x.mean((1, 2, 3), keepdim=True),
    "mean over channels": lambda x: x.mean(1, keepdim=True),
    "mean over channels, dropped": lambda x: x.mean(1).unsqueeze(1),
    "positional keepdim": lambda x: x.mean(1, True),
    "var over space": lambda x: x.var((2, 3)),
    "biased var over channels": lambda x: x.var(1, unbiased=False, keepdim=True),
    "amax over space": lambda x: x.amax((2, 3)),
    "sum over tokens": lambda x: x.flatten(2).sum(-1),
    "2-norm over space, channels last": lambda x: x.permute(0, 2, 3, 1).norm(p=2, dim=(1, 2), keepdim=True),
    "batch_norm, training": lambda x: F.batch_norm(x, None, None, C8, C8, True),
    "batch_norm, evaluation": lambda x: F.batch_norm(x, C8, C8 + 1, C8, C8, False),
    "layer_norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (CHANNELS,), C8, C8).permute(0, 3, 1, 2),
    "rms_norm": lambda x: F.rms_norm(x.permute(0, 2, 3, 1), (CHANNELS,), C8, 1e-6).permute(0, 3, 1, 2),
    "group_norm": lambda x: F.group_norm(x, 2, C8, C8),
    "linear": lambda x: F.linear(x.permute(0, 2, 3, 1), LIN).permute(0, 3, 1, 2),
    "softmax over channels": lambda x: x.softmax(1),
    "channel shuffle": lambda x: x.view(2, 2, 4, *x.shape[2:]).transpose(1, 2).reshape(2, 8, *x.shape[2:]),
    "split attention sum": lambda x: (x.reshape(2, 2, 4, *x.shape[2:]) * GATE.view(2, 2, 4, 1, 1)).sum(1),
    "chunk and cat": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "split and stack": lambda x: torch.stack(x.split(4, 1), 1).sum(1),
    "channel slice": lambda x: x[:, 2:6],
    "channel stride": lambda x: x[:, ::2],
    "narrow": lambda x: x.narrow(1, 1, 3),
    "unbind": lambda x: x.view(2, 2, 4, *x.shape[2:]).unbind(1)[1],
    "channel padding": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "focus": lambda x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[:, :, ::2, 1::2], x[..., 1::2, 1::2]], 1),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "nearest x2": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "to tokens and back": lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).unflatten(2, x.shape[2:]),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "movedim": lambda x: x.movedim(1, -1).movedim(-1, 1),
    "drop-path noise": lambda x: x * x.new_empty(2, 1, 1, 1).fill_(0.5),
    "float": lambda x: x.float().double(),
    "EvoNorm": lambda x: EVONORM(x),
    "global context": lambda x: CONTEXT(x),
}  # fmt: skip

REFUSALS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "matmul": (lambda x: torch.matmul(x, x), "run matmul"),
    "operator @": (lambda x: x @ x, "matmul"),
    "softmax over space": (lambda x: x.softmax(-1), "over positions"),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), "only nearest"),
    "reflect pad": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "mode reflect"),
    "pad then relu": (lambda x: F.relu(F.pad(x, (1, 1, 1, 1))), "only a convolution or a pool"),
    "valid conv": (lambda x: F.conv2d(x, W3), "output 6x10 is not input 8x12"),
    "stride past the cell": (lambda x: F.conv2d(x, W3, stride=8, padding=1), "inside mask cells of side 4"),
    "transposed conv": (lambda x: F.conv_transpose2d(x, W2.transpose(0, 1)), "conv_transpose2d"),
    "mean of a row": (lambda x: x.mean(3), "part of space"),
    "mean over images": (lambda x: x.mean((0, 2, 3)), "over images"),
    "global mean": (lambda x: x.mean(), "without dimensions"),
    "full-shape noise": (lambda x: x * torch.rand(x.shape), "varies over space"),
    "position embedding": (lambda x: x + torch.zeros(1, 8, 8, 12), "varies over space"),
    "roll": (lambda x: x.roll(1, 2), "roll"),
    "spatial crop": (lambda x: x[:, :, :4], "selects positions"),
    "fft": (lambda x: torch.fft.fft2(x), "fft"),
    "flatten all": (lambda x: x.flatten(1), "mixes positions"),
    "pool to 2x2": (lambda x: F.adaptive_avg_pool2d(x, 2), "only 1x1"),
    "dropout2d": (lambda x: F.dropout2d(x, 0.5), "dropout2d"),
    "layer norm over space": (lambda x: F.layer_norm(x, (8, 12)), "not channels alone"),
    "linear over width": (lambda x: F.linear(x, torch.ones(3, 12)), "not channels"),
    "unknown method": (lambda x: x.cumsum(1), "cumsum"),
    "data": (lambda x: x.data, "Tensor.data"),
    "numpy": (lambda x: x.numpy(), "Tensor.numpy"),
    "two resolutions": (lambda x: x + F.interpolate(x, scale_factor=2), "combines"),
    "cat over batch": (lambda x: torch.cat([x, x]), "not channels"),
    "batch first moved": (lambda x: x.transpose(0, 1), "batch dimension"),
}  # fmt: skip


def pack(images: Tensor, ids: list[list[int]]) -> SparseMap:
    return SparseMap.from_images(images, Geometry(torch.tensor(ids), GRID))


def unpack(result: SparseMap) -> Tensor:
    """A map as a dense tensor of its outer shape, position by position, NaN where hidden; independent of ``scatter``."""
    (gh, gw), r = result.geo.grid, result.r
    dense = torch.full(
        (result.geo.batch, gh * r, gw * r, *result.values.shape[2:]), float("nan"), dtype=torch.double
    )
    for b in range(result.geo.batch):
        for k, cell in enumerate(result.geo.ids[b].tolist()):
            for i in range(r):
                for j in range(r):
                    position = (b, cell // gw * r + i, cell % gw * r + j)
                    dense[position] = result.values[b, (k * r + i) * r + j]
    assert result.tags == "bchw"
    return dense.permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", OPERATIONS)
def test_all_visible_equals_the_dense_operation(name: str) -> None:
    result = OPERATIONS[name](pack(IMAGES, [list(range(6))] * 2))
    expected = OPERATIONS[name](IMAGES)
    assert tuple(result.shape) == tuple(expected.shape)
    found = unpack(result) if isinstance(result, SparseMap) else result
    torch.testing.assert_close(found, expected, rtol=1e-6 if name in IN_FLOAT32 else 1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_visible_cell_equals_the_dense_operation_on_its_crop(name: str) -> None:
    hidden_nan = torch.full_like(IMAGES, float("nan"))
    for b, (y, x) in enumerate(VISIBLE):
        hidden_nan[b, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = CROPS[b]
    result = OPERATIONS[name](pack(hidden_nan, [[3 * y + x] for y, x in VISIBLE]))
    expected = OPERATIONS[name](CROPS)
    if isinstance(result, SparseMap):
        r, dense = result.r, unpack(result)
        found = torch.stack(
            [dense[b, :, r * y : r * y + r, r * x : r * x + r] for b, (y, x) in enumerate(VISIBLE)]
        )
        assert dense.isnan().sum() == dense.numel() - found.numel()
    else:
        found = result
    torch.testing.assert_close(found, expected, rtol=1e-6 if name in IN_FLOAT32 else 1e-12, atol=1e-12)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_operation_and_the_module(name: str) -> None:
    class Mixer(nn.Module):
        def forward(self, x: Any) -> Any:
            return REFUSALS[name][0](x)

    net = nn.Sequential(nn.Identity(), nn.Sequential(Mixer()))
    with pytest.raises(SparseUnsupported, match=REFUSALS[name][1]) as refusal:
        net(pack(IMAGES, [[0, 1], [2, 4]]))
    assert "1.0 (Mixer)" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_map_aware_modules_are_copied_and_pickled(copied: Callable[[nn.Module], nn.Module]) -> None:
    """Those classes that are made for another library's have its name, by which pickle would not find them."""
    synced = nn.Sequential(timm.layers.norm_act.SyncBatchNormAct(CHANNELS), nn.Hardswish())
    swap(synced)
    for module in (EVONORM, CONTEXT, *synced):
        twin = copied(module)
        assert twin is not module
        assert type(twin) is type(module)
        assert repr(twin) == repr(module)
        ours, theirs = module.state_dict(), twin.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(copied(CONTEXT)(IMAGES), CONTEXT(IMAGES))


def test_maps_of_two_masks_do_not_combine() -> None:
    with pytest.raises(SparseUnsupported, match="combines"):
        pack(IMAGES, [[0], [1]]) + pack(IMAGES, [[0], [1]])


def test_in_place_operations_return_the_very_object() -> None:
    x = pack(IMAGES, [[0], [1]])
    values = x.values
    assert F.relu(x, inplace=True) is x
    assert x.mul_(2) is x
    x += 1
    assert x.values is values


def test_shape_is_the_dense_one_for_padding_arithmetic() -> None:
    x = pack(IMAGES, [[0], [1]])
    assert x.shape == IMAGES.shape
    assert x.size(-1) == 12
    assert x.permute(0, 2, 3, 1).shape == (2, 8, 12, 8)
    assert F.pad(x, (1, 2, 3, 4)).shape == (2, 8, 15, 15)
    assert x.flatten(2).shape == (2, 8, 96)


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad * 2


def test_gradients_are_never_lost_silently() -> None:
    x = pack(IMAGES.clone().requires_grad_(), [[0], [1]])
    with pytest.raises(SparseUnsupported, match="no_grad"):
        _Double.apply(x)
    with pytest.raises(SparseUnsupported, match="no_grad"):
        checkpoint(lambda v: v * 2, x, use_reentrant=True)
    with torch.no_grad(), pytest.raises(SparseUnsupported, match="no_grad"):
        x * 2


def test_non_reentrant_checkpointing_is_exact() -> None:
    conv = nn.Conv2d(CHANNELS, 6, 3, padding=1).double()
    grads = []
    for block in (conv, lambda v: checkpoint(conv, v, use_reentrant=False)):
        conv.zero_grad()
        block(pack(IMAGES, [[0, 5], [1, 2]])).values.square().sum().backward()
        assert conv.weight.grad is not None
        grads.append(conv.weight.grad.clone())
    assert torch.equal(*grads)


def test_without_gradients_nothing_is_refused() -> None:
    with torch.no_grad():
        assert (pack(IMAGES, [[0], [1]]) * 2).shape == IMAGES.shape


def test_every_rule_is_keyed_by_a_function_object() -> None:
    assert len(RULES) > 200
    assert all(callable(function) for function in RULES)


def test_an_encoder_that_returns_a_dense_map_is_refused() -> None:
    from leaven.backbones import Stage

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d(1)

        def forward(self, x: Any) -> Any:
            return self.pool(x)

    geo = Geometry(torch.tensor([[0], [1]]), GRID)
    with pytest.raises(SparseUnsupported, match="came out dense"):
        packed_encode(Pooled(), IMAGES, geo, [Stage("pool", CHANNELS, 4)])
