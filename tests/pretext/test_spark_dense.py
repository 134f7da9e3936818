"""The dense masked encoder: its mask, its conversion, its refusals. Exactness on real nets: test_spark_exact.py."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from leaven.backbones import Stage, create, features, stages
from leaven.pretext.spark import SparseUnsupported
from leaven.pretext.spark.dense import convert, dense_encode, restore
from leaven.pretext.spark.dense_norms import masked_batch_norm, masked_group_norm
from tests.pretext.spark_oracle import hidden_values

CELL = 32


def maps_of(model: nn.Module) -> tuple[Stage, ...]:
    return tuple(stage for stage in stages(model) if stage.reduction >= 4)


def draw(seed: int, grid: tuple[int, int] = (2, 3), keep: int = 2, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, grid[0] * CELL, grid[1] * CELL, generator=generator)
    mask = torch.rand(batch, grid[0] * grid[1], generator=generator).argsort(-1) < keep
    return images, mask.view(batch, *grid)


def gradients(model: nn.Module, *losses: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Of the sum of losses; the model's buffers are put back."""
    buffers = copy.deepcopy(dict(model.named_buffers()))
    model.zero_grad(set_to_none=True)
    torch.stack([loss() for loss in losses]).sum().backward()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def squares(maps: list[Tensor]) -> Tensor:
    return torch.stack([m.square().mean() for m in maps]).sum()


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert a
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


# The mask


@pytest.fixture(scope="module")
def nets() -> list[tuple[nn.Module, tuple[Stage, ...]]]:
    found = []
    for name in ("test_resnet", "test_efficientnet"):
        model = create(name).eval()
        found.append((model, maps_of(model)))
        dense_encode(model, *draw(0), found[-1][1])
    return found


def test_an_encoder_inside_an_encoder(nets: Any) -> None:
    """Re-entrant, and each keeps its own mask: B runs, under another mask, whenever A finishes a layer."""
    (a, a_maps), (b, b_maps) = nets
    alone_a, alone_b = dense_encode(a, *draw(1), a_maps), dense_encode(b, *draw(2), b_maps)
    inside: list[list[Tensor]] = []
    handles = [
        m.register_forward_hook(lambda *_: inside.append(dense_encode(b, *draw(2), b_maps)))
        for m in a.children()
    ]
    try:
        mixed = dense_encode(a, *draw(1), a_maps)
    finally:
        for handle in handles:
            handle.remove()
    assert len(inside) > 2
    for found, alone in [(mixed, alone_a), *((maps, alone_b) for maps in inside)]:
        assert all(torch.equal(x, y) for x, y in zip(found, alone, strict=True))


def test_threads_on_one_backbone(nets: Any) -> None:
    model, maps = nets[1]
    alone = [dense_encode(model, *draw(seed), maps) for seed in range(4)]
    wrong: list[int] = []
    barrier = threading.Barrier(4)

    def work(seed: int) -> None:
        for _ in range(5):
            barrier.wait()
            found = dense_encode(model, *draw(seed), maps)
            wrong.extend(seed for x, y in zip(found, alone[seed], strict=True) if not torch.equal(x, y))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_exception_leaves_no_mask(nets: Any) -> None:
    model, maps = nets[0]
    images, mask = draw(3)
    plain = create("test_resnet").eval()
    plain.load_state_dict(model.state_dict())

    def fail(*_: Any) -> None:
        raise KeyError("from a hook")

    handle = model.layer2.register_forward_hook(fail)
    with pytest.raises(KeyError):
        dense_encode(model, images, mask, maps)
    handle.remove()
    assert torch.equal(model(images), plain(images))


@pytest.mark.parametrize("name", ["resnet18", "test_convnext"])
def test_checkpointing_recomputes_under_the_mask(name: str) -> None:
    model = create(name).train()
    maps, (images, mask) = maps_of(model), draw(4)
    wanted = gradients(model, lambda: squares(dense_encode(model, images, mask, maps)))
    model.set_grad_checkpointing(True)
    assert_equal(gradients(model, lambda: squares(dense_encode(model, images, mask, maps))), wanted)
    kept = dense_encode(model, *draw(5), maps)  # a graph that lives on, as a list of losses keeps it
    assert_equal(gradients(model, lambda: squares(dense_encode(model, images, mask, maps))), wanted)
    assert kept[0].requires_grad


def test_checkpointing_two_backbones_in_one_backward() -> None:
    a, b = create("test_convnext"), create("test_convnext")
    maps = maps_of(a)
    pair = nn.ModuleList([a, b])
    losses = [
        lambda: squares(dense_encode(a, *draw(6), maps)),
        lambda: squares(dense_encode(b, *draw(7), maps)),
    ]
    wanted = gradients(pair, *losses)
    for model in pair:
        model.set_grad_checkpointing(True)
    assert_equal(gradients(pair, *losses), wanted)


def test_checkpointing_that_could_use_either_of_two_masks_is_refused() -> None:
    model = create("test_convnext")
    model.set_grad_checkpointing(True)
    maps = maps_of(model)
    loss = squares(dense_encode(model, *draw(6), maps)) + squares(dense_encode(model, *draw(7), maps))
    with pytest.raises(SparseUnsupported, match="call backward after each"):
        loss.backward()


def test_reentrant_checkpointing_is_refused() -> None:
    class Stage4(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1)
            self.reentrant = False

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant)

    model = Stage4()
    maps = (Stage("block", 8, 4),)
    dense_encode(model, *draw(0), maps)
    model.reentrant = True
    with pytest.raises(SparseUnsupported, match=r"block \(Conv2d\).*non-reentrant"):
        dense_encode(model, *draw(0), maps)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.ones(2, 2, 3), "bool"),
        (torch.ones(1, 2, 3, dtype=torch.bool), "B = 2"),
        (torch.ones(2, 2, 2, dtype=torch.bool), "square mask cells"),
        (torch.ones(2, 5, 3, dtype=torch.bool), "square mask cells"),
    ],
)
def test_mask_that_does_not_fit(nets: Any, mask: Tensor, reason: str) -> None:
    model, maps = nets[0]
    with pytest.raises(ValueError, match=reason):
        dense_encode(model, draw(0)[0], mask, maps)


def test_nothing_outlives_the_backward_pass() -> None:
    model = create("test_convnext")
    maps, gone = maps_of(model), weakref.ref(model)
    squares(dense_encode(model, *draw(0), maps)).backward()
    del model
    gc.collect()
    assert gone() is None


# The conversion


def test_converted_module_is_still_the_plain_one() -> None:
    model = create("test_efficientnet").eval()
    plain = copy.deepcopy(model)
    maps, (images, mask) = maps_of(model), draw(8)
    calls: list[str] = []
    model.conv_stem.register_forward_hook(lambda *_: calls.append("hook"))
    masked = dense_encode(model, images, mask, maps)
    calls.clear()
    assert torch.equal(model(images), plain(images))
    assert calls == ["hook"]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert repr(model) == repr(plain)
    assert isinstance(model.conv_stem, nn.Conv2d)
    assert type(model.conv_stem) is not type(plain.conv_stem)
    twin = copy.deepcopy(model)
    assert type(twin.conv_stem) is type(model.conv_stem)
    assert all(torch.equal(a, b) for a, b in zip(dense_encode(twin, images, mask, maps), masked, strict=True))
    del model.conv_stem._forward_hooks[next(iter(model.conv_stem._forward_hooks))]
    assert type(pickle.loads(pickle.dumps(model)).conv_stem) is type(plain.conv_stem)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert [type(m) for m in torch.load(file, weights_only=False).modules()] == [
        type(m) for m in plain.modules()
    ]
    restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_refused_backbone_is_left_alone() -> None:
    model = create("gcresnet33ts")
    before = [type(m) for m in model.modules()]
    with pytest.raises(SparseUnsupported, match=r"stages\.0\.0\.attn.*ConvMlp"):
        convert(model, maps_of(model), CELL)
    assert [type(m) for m in model.modules()] == before


def test_replaced_layer_is_noticed() -> None:
    """Surgery after the conversion (a norm swap, say) must not leave a layer without its rule."""
    model = create("test_resnet").eval()
    maps, (images, mask) = maps_of(model), draw(9)
    dense_encode(model, images, mask, maps)
    torch.manual_seed(0)
    model.layer1[0].bn1 = nn.GroupNorm(4, model.layer1[0].bn1.num_features)
    model.layer3 = nn.Sequential(model.layer3, nn.Conv2d(maps[2].channels, maps[2].channels, 3, padding=1))
    fresh = copy.deepcopy(model)
    restore(fresh)
    found, wanted = dense_encode(model, images, mask, maps), dense_encode(fresh, images, mask, maps)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    bad = nn.Sequential(model.layer4, nn.AdaptiveAvgPool2d(2))
    model.layer4 = bad
    with pytest.raises(SparseUnsupported, match=r"layer4\.1 \(AdaptiveAvgPool2d\)"):
        dense_encode(model, images, mask, maps)


# T3, T11 and mixed precision


@pytest.mark.parametrize("name", ["resnet18", "test_convnext", "test_efficientnet"])
def test_hidden_pixels_change_nothing(name: str) -> None:
    model = create(name).train()
    maps, (images, mask) = maps_of(model), draw(10)
    hidden = ~mask.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2).unsqueeze(1)
    passes = []
    for value in (
        torch.zeros(()),
        torch.randn(images.shape),
        torch.tensor(float("nan")),
        torch.tensor(float("inf")),
    ):
        x = torch.where(hidden, value, images).requires_grad_()
        found = gradients(model, lambda x=x: squares(dense_encode(model, x, mask, maps)))
        assert x.grad is not None
        assert not x.grad[hidden.expand_as(x)].any()
        passes.append({**found, "images": x.grad})
        assert hidden_values(dense_encode(model, x, mask, maps), mask) == 0
    for other in passes[1:]:
        assert_equal(other, passes[0])


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_convnext2",
        "test_efficientnet",
        pytest.param("tv:mobilenet_v3_small", marks=pytest.mark.slow),
    ],
)
def test_compiles_once_for_many_masks(name: str) -> None:
    torch._dynamo.reset()
    model = create(name).train()
    maps = maps_of(model)
    dense_encode(model, *draw(0), maps)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(
        lambda x, m: squares(dense_encode(model, x, m, maps)), fullgraph=True, backend=counter
    )
    for seed in range(4):
        images, mask = draw(seed)
        found = gradients(model, lambda images=images, mask=mask: compiled(images, mask))
        wanted = gradients(
            model, lambda images=images, mask=mask: squares(dense_encode(model, images, mask, maps))
        )
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


def test_compiling_before_converting_is_an_error() -> None:
    torch._dynamo.reset()
    model = create("test_resnet")
    maps, (images, mask) = maps_of(model), draw(0)
    with pytest.raises(RuntimeError, match="not converted"):
        torch.compile(lambda x, m: dense_encode(model, x, m, maps), backend="eager", fullgraph=True)(
            images, mask
        )


def test_compiled_layer_inside_sees_the_mask() -> None:
    """A backbone of which the user compiled one stage."""
    torch._dynamo.reset()
    model = create("test_resnet").eval()
    maps = maps_of(model)
    wanted = [dense_encode(model, *draw(seed), maps) for seed in range(2)]
    model.layer2.compile(backend="eager")
    for seed in range(2):
        found = dense_encode(model, *draw(seed), maps)
        for a, b in zip(found, wanted[seed], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_bfloat16(name: str) -> None:
    model = create(name).train()
    maps, (images, mask) = maps_of(model), draw(11)
    wanted = dense_encode(model, images, mask, maps)
    with torch.autocast("cpu", torch.bfloat16):
        found = dense_encode(model, images, mask, maps)
        plain = features(model, images, maps)
    for a, b, c in zip(found, wanted, plain, strict=True):
        assert a.dtype == c.dtype
        assert (a - b).detach().abs().mean() < 0.05 * b.detach().abs().mean()
    squares(found).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# Counting visible positions


def test_images_with_different_counts() -> None:
    """Gates, norms of an image and pools average over the positions of that image, however many there are."""
    model = create("test_efficientnet_gn").double().eval()
    maps, (images, _) = maps_of(model), draw(12)
    mask = torch.tensor(
        [[[True, False, False], [False, False, False]], [[True, True, False], [True, False, True]]]
    )
    both = dense_encode(model, images.double(), mask, maps)
    for i in range(2):
        one = dense_encode(model, images[i : i + 1].double(), mask[i : i + 1], maps)
        for a, b in zip(both, one, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_of_visible_positions(momentum: float | None) -> None:
    """Against torch's own on the gathered positions, (N, C), with unequal counts per image."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    visible = torch.rand(3, 1, 4, 6) > 0.6
    ours, theirs = (
        nn.BatchNorm2d(5, momentum=momentum).double(),
        nn.BatchNorm1d(5, momentum=momentum).double(),
    )
    nn.init.uniform_(ours.weight)
    nn.init.uniform_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    chosen = visible.expand_as(x).movedim(1, -1)
    for _ in range(2):
        a = x.clone().requires_grad_()
        b = x.movedim(1, -1)[chosen].view(-1, 5).requires_grad_()
        found, wanted = masked_batch_norm(ours, a, visible), theirs(b)
        torch.testing.assert_close(found.movedim(1, -1)[chosen].view(-1, 5), wanted)
        (found * visible).pow(3).sum().backward()
        wanted.pow(3).sum().backward()
        torch.testing.assert_close(a.grad.movedim(1, -1)[chosen].view(-1, 5), b.grad)
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value)


SYNC_RANK = """
import sys, torch
from torch import nn
from leaven.pretext.spark.dense_norms import masked_batch_norm

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
x, visible = (t[2 * rank : 2 * rank + 2] for t in torch.load(f"{folder}/batch.pt"))
x.requires_grad_()
norm = nn.SyncBatchNorm(5).double().train()
y = masked_batch_norm(norm, x, visible)
(y * visible).pow(3).sum().backward()
torch.save((y.detach(), x.grad, norm.weight.grad, norm.state_dict()), f"{folder}/{rank}.pt")
torch.distributed.barrier()  # a rank that leaves early aborts the other
torch.distributed.destroy_process_group()
"""


def test_sync_batch_norm_is_one_norm_over_all_processes(tmp_path: Any) -> None:
    """T10: two gloo processes with unequal counts equal one process with both halves, gradients included."""
    torch.manual_seed(0)
    x, visible = torch.randn(4, 5, 4, 6, dtype=torch.float64), torch.rand(4, 1, 4, 6) > 0.6
    torch.save((x, visible), tmp_path / "batch.pt")
    norm, whole = nn.BatchNorm2d(5).double(), x.clone().requires_grad_()
    y = masked_batch_norm(norm, whole, visible)
    (y * visible).pow(3).sum().backward()
    ranks = [
        subprocess.Popen([sys.executable, "-c", SYNC_RANK, str(rank), str(tmp_path)]) for rank in range(2)
    ]
    assert [process.wait() for process in ranks] == [0, 0]
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([half[0] for half in halves]), y.detach())
    torch.testing.assert_close(torch.cat([half[1] for half in halves]), whole.grad)
    torch.testing.assert_close(halves[0][2] + halves[1][2], norm.weight.grad)
    for half in halves:
        for key, value in norm.state_dict().items():
            torch.testing.assert_close(half[3][key], value)


def test_group_norm_of_visible_positions() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, 4, 6, dtype=torch.float64)
    visible = torch.rand(3, 1, 4, 6) > 0.6
    norm = nn.GroupNorm(2, 6).double()
    nn.init.uniform_(norm.weight)
    found = masked_group_norm(norm, x, visible)
    for i in range(3):
        values = x[i][:, visible[i, 0]]  # (C, n)
        torch.testing.assert_close(found[i][:, visible[i, 0]], norm(values[None])[0])


# Refusals: layers of a user's own net, by reason


class Toy(nn.Module):
    """A stride-4 stem, the block in question, and a convolution that spreads what leaks."""

    def __init__(self, block: nn.Module | Callable[[Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.BatchNorm2d(8)
        self.block = block if isinstance(block, nn.Module) else Block(block)
        self.last = nn.Conv2d(channels, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.block(self.norm(self.stem(x)).relu()))


class Block(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.zeros(8, 1, 1))  # not 1-D, and hides the block unless randomised

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.function(x)


class ChannelsFirstNorm(nn.Module):
    """A user's own layer norm over channels: pointwise in space, with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.movedim(1, -1), (8,), self.weight, self.bias)
        return x.movedim(-1, 1)


class OwnBatchNorm(nn.BatchNorm2d):
    """Overrides forward: its batch moments would count hidden positions, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )


class Extreme(nn.Module):
    """A gate by the largest or smallest value over space of a signed map, without a name that a rule would know."""

    def __init__(self, channels: int, sign: float) -> None:
        super().__init__()
        self.norm, self.sign = nn.BatchNorm2d(channels), sign

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x * (self.sign * x).flatten(2).sort(2).values[:, :, -1:, None]


def attention(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2).unflatten(2, x.shape[2:])


def timm_layer(name: str, *args: Any, **kwargs: Any) -> nn.Module:
    import timm

    layer: nn.Module = getattr(timm.layers, name)(*args, **kwargs)
    return layer


ACCEPTED = {
    "gate with a convolution over channels": lambda: timm_layer("EcaModule", 8),
    "group standard deviation": lambda: timm_layer("EvoNorm2dS0", 8, groups=2),
    "mean square": lambda: timm_layer("FilterResponseNormTlu2d", 8),
    "own channels-first norm": ChannelsFirstNorm,
    "gelu": lambda: nn.GELU(),
    "bias in front of a convolution": lambda: lambda x: x + 1.0,
    "pool inside the cell": lambda: lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0),
    "maximum over channels": lambda: lambda x: x.amax(1, keepdim=True) * x,
    "maximum of negative values": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.MaxPool2d(3, 1, 1)),
    "nearest upsampling": lambda: nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=2.0)),
}
REFUSED = {
    "functional gate": (lambda: lambda x: x * x.mean((2, 3), keepdim=True), r"block \(Block\)"),
    "attention": (lambda: attention, r"block \(Block\)"),
    "shift": (lambda: lambda x: x.roll(1, -1), r"block \(Block\)"),
    "pool across cells": (lambda: lambda x: F.avg_pool2d(x + 1, 3, 1, 1), r"block \(Block\)"),
    "softmax over space": (lambda: lambda x: x.flatten(2).softmax(-1).view_as(x), r"block \(Block\)"),
    "maximum over space": (lambda: Extreme(8, 1.0), r"block \(Extreme\)"),
    "minimum over space": (lambda: Extreme(8, -1.0), r"block \(Extreme\)"),
    "own batch norm": (lambda: OwnBatchNorm(8), r"block \(OwnBatchNorm\)"),
    "random draws": (lambda: lambda x: F.dropout(x, 0.5), "random numbers"),
    "reflected padding": (
        lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        r"block \(Conv2d\).*reflect",
    ),
    "no padding": (lambda: nn.Conv2d(8, 8, 3), r"block \(Conv2d\).*does not fit"),
    "transposed convolution": (lambda: nn.ConvTranspose2d(8, 8, 3, padding=1), r"block \(ConvTranspose2d\)"),
    "instance norm": (lambda: nn.InstanceNorm2d(8), r"block \(InstanceNorm2d\)"),
    "layer norm over positions": (lambda: nn.LayerNorm((8, 8, 16)), r"block \(LayerNorm\).*over positions"),
    "pool to 4x4": (lambda: nn.AdaptiveAvgPool2d(4), r"block \(AdaptiveAvgPool2d\).*more than one"),
    "bilinear": (lambda: nn.Upsample(scale_factor=2.0, mode="bilinear"), r"block \(Upsample\).*bilinear"),
    "wrong input": (lambda: nn.Conv2d(5, 8, 1), "does not run"),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_accepted(kind: str) -> None:
    model = Toy(ACCEPTED[kind]())
    convert(model, (Stage("last", 8, 4),), CELL)


def test_maps_are_zero_at_hidden_positions_whatever_made_them() -> None:
    images, mask = draw(13)
    model = Toy(lambda x: x + 1.0)
    nn.init.ones_(model.block.scale)  # type: ignore[arg-type]
    maps = dense_encode(model, images, mask, (Stage("block", 8, 4),))
    assert hidden_values(maps, mask) == 0


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    block, reason = REFUSED[kind]
    model = Toy(block())
    with pytest.raises(SparseUnsupported, match=reason) as caught:
        convert(model, (Stage("last", 8, 4),), CELL)
    assert "\n" not in str(caught.value)


def test_drop_block_is_refused_in_training() -> None:
    from timm.layers import DropBlock2d

    with pytest.raises(SparseUnsupported, match=r"block \(DropBlock2d\).*across cells"):
        convert(Toy(DropBlock2d()), (Stage("last", 8, 4),), CELL)


@pytest.mark.parametrize(
    "lost", ["timm.layers.norm_act.BatchNormAct2d", "timm.models._efficientnet_blocks.SqueezeExcite"]
)
def test_check_finds_a_missing_rule(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rule for a layer the backbone is refused, whatever else the table says."""
    from leaven.pretext.spark import dense_rules

    monkeypatch.delitem(dense_rules._RULES, lost)
    model = create("test_efficientnet")
    with pytest.raises(SparseUnsupported, match=lost.rpartition(".")[2]):
        convert(model, maps_of(model), CELL)
