"""Convolutions at visible positions, by halo and on spconv's pairs, against the dense one on the scattered map."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from leaven.pretext.spark import SparK, sample_mask
from leaven.pretext.spark import spconv_rule as spconv_module
from leaven.pretext.spark.geometry import Geometry
from leaven.pretext.spark.halo import halo_conv2d, halo_pays
from leaven.pretext.spark.spconv_rule import spconv_conv2d

# (kernel, dilation, groups, cell side)
SHAPES = [
    ((3, 3), (1, 1), 1, 4),
    ((3, 3), (1, 1), 1, 1),
    ((3, 3), (2, 2), 1, 4),
    ((1, 5), (1, 1), 1, 2),
    ((5, 3), (1, 2), 1, 4),
    ((7, 7), (1, 1), 1, 2),
    ((3, 3), (1, 1), 2, 4),
    ((5, 5), (1, 1), 8, 4),
]


def _case(kernel: tuple[int, int], groups: int, r: int) -> tuple[Geometry, Tensor, Tensor, Tensor]:
    """3 images of 3x4 cells, 5 visible; values, weight and bias that want gradients."""
    generator = torch.Generator().manual_seed(r)
    ids = torch.stack([torch.randperm(12, generator=generator)[:5].sort()[0] for _ in range(3)])
    values = torch.randn(3, 5 * r * r, 8, dtype=torch.double, generator=generator)
    weight = torch.randn(
        6 if groups == 1 else 8, 8 // groups, *kernel, dtype=torch.double, generator=generator
    )
    bias = torch.randn(len(weight), dtype=torch.double, generator=generator)
    return Geometry(ids, (3, 4)), *(tensor.requires_grad_() for tensor in (values, weight, bias))  # type: ignore[return-value]


def _dense(geo: Geometry, r: int, values: Tensor, weight: Tensor, bias: Tensor, *rest: object) -> Tensor:
    dilation, groups = rest
    padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, weight.shape[2:], strict=True))  # type: ignore[call-overload]
    dense = F.conv2d(geo.scatter(values, r), weight, bias, 1, padding, dilation, groups)  # type: ignore[arg-type]
    return geo.gather(dense, r)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("kernel", "dilation", "groups", "r"), SHAPES)
@pytest.mark.parametrize("way", ["halo", "spconv"])
def test_values_and_gradients_are_the_dense_ones(
    way: str, kernel: tuple[int, int], dilation: tuple[int, int], groups: int, r: int, threads: int
) -> None:
    if way == "spconv" and groups > 1:
        pytest.skip("spconv knows no groups: such layers take another way")
    geo, values, weight, bias = _case(kernel, groups, r)
    tensors = (values, weight, bias)
    expected = _dense(geo, r, *tensors, dilation, groups)
    probe = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, tensors, probe)
    for _ in range(20 if threads == 2 else 1):  # a race would not show every time
        if way == "halo":
            got = halo_conv2d(values, geo, r, weight, bias, dilation, groups)
        else:
            got = spconv_conv2d(values, geo, r, weight, bias, dilation)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
        for mine, his in zip(torch.autograd.grad(got, tensors, probe), gradients, strict=True):
            torch.testing.assert_close(mine, his, rtol=0, atol=1e-10)


@pytest.mark.parametrize("way", ["halo", "spconv"])
@pytest.mark.parametrize("frozen", ["values", "weight"])
def test_a_frozen_input_gets_no_gradient_and_the_other_its_own(way: str, frozen: str) -> None:
    geo, values, weight, bias = _case((3, 3), 1, 4)
    still, moving = (values, weight) if frozen == "values" else (weight, values)
    still.requires_grad_(False)
    expected = torch.autograd.grad(_dense(geo, 4, values, weight, bias, (1, 1), 1).sum(), moving)[0]
    got = (
        halo_conv2d(values, geo, 4, weight, None, (1, 1), 1)
        if way == "halo"
        else spconv_conv2d(values, geo, 4, weight, None, (1, 1))
    )
    got.sum().backward()
    assert still.grad is None
    torch.testing.assert_close(moving.grad, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("way", ["halo", "spconv"])
def test_autocast_computes_in_half_precision_like_the_dense_convolution(way: str) -> None:
    geo, *doubles = _case((3, 3), 1, 4)
    values, weight, bias = (tensor.detach().float().requires_grad_() for tensor in doubles)
    results = []
    for conv in (_dense, halo_conv2d if way == "halo" else spconv_conv2d):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if conv is _dense:
                out = _dense(geo, 4, values, weight, bias, (1, 1), 1)
            else:
                rest = ((1, 1), 1) if way == "halo" else ((1, 1),)
                out = conv(values, geo, 4, weight, bias, *rest)  # type: ignore[operator]
        assert out.dtype == torch.bfloat16
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (values, weight, bias))))
    for dense, sparse in zip(*results, strict=True):
        assert sparse.dtype == dense.dtype
        assert (dense - sparse).float().norm() < 0.02 * dense.float().norm()


def test_the_halo_is_taken_where_its_windows_are_small() -> None:
    geo = Geometry(torch.arange(10).expand(2, 10), (5, 5))
    sides = {r: halo_pays(geo, r, (1, 1), depthwise=False) for r in (1, 2, 4, 8, 16)}
    assert sides == {1: False, 2: False, 4: True, 8: True, 16: True}
    assert halo_pays(geo, 2, (1, 1), depthwise=True)
    assert halo_pays(geo, 8, (3, 3), depthwise=True)  # ConvNeXt's first stage
    assert not halo_pays(geo, 4, (3, 3), depthwise=True)
    everything = Geometry(torch.arange(25).expand(2, 25), (5, 5))
    assert not halo_pays(everything, 4, (1, 1), depthwise=False)


def _pass(backend: str, net: str, mask: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Maps, gradients and buffers of one backbone by name."""
    torch.manual_seed(0)
    spark = SparK(timm.create_model(net).double(), decoder_width=32, backend=backend).double()  # type: ignore[arg-type]
    spark.train()
    maps = spark.encode(images, mask)
    probes = [torch.linspace(-1, 1, m.numel(), dtype=m.dtype).view_as(m) for m in maps]
    torch.autograd.backward(maps, probes)
    gradients = {
        f"gradient of {n}": p.grad for n, p in spark.backbone.named_parameters() if p.grad is not None
    }
    results = {f"map {i}": m.detach() for i, m in enumerate(maps)}
    return results | gradients | dict(spark.backbone.named_buffers())


@pytest.mark.parametrize(
    "net",
    [
        "test_resnet",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("convnext_atto", "resnet50", "regnety_008")),
    ],
)
def test_backends_agree_on_features_gradients_and_buffers(net: str, threads: int) -> None:
    """In float64; spconv 20 times with two threads."""
    images = torch.randn(2, 3, 64, 96, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    mask = sample_mask(2, (2, 3), 0.6, torch.Generator().manual_seed(1))
    packed = _pass("packed", net, mask, images)
    for backend, repeats in (("dense", 1), ("spconv", 20 if threads == 2 and net == "test_resnet" else 1)):
        for _ in range(repeats):
            other = _pass(backend, net, mask, images)
            assert other.keys() == packed.keys()
            for name, tensor in packed.items():
                error = float((other[name] - tensor).abs().max())
                assert error <= 1e-9 * max(1.0, float(tensor.abs().max())), (backend, name, error)


def test_spconv_serves_the_ungrouped_convolutions_of_stride_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 13 of resnet18's 3x3 layers that have stride 1, by one set of pairs per resolution; no 1x1, no stride 2."""
    served: list[tuple[int, ...]] = []
    made: list[object] = []
    conv, pairs = spconv_module.spconv_conv2d, spconv_module.index_pairs

    def spy(values: Tensor, geo: Geometry, r: int, weight: Tensor, *rest: object) -> Tensor:
        served.append(tuple(weight.shape))
        return conv(values, geo, r, weight, *rest)  # type: ignore[arg-type]

    spark = SparK("resnet18", decoder_width=32, backend="spconv")
    monkeypatch.setattr("leaven.pretext.spark.spatial_rules.halo_pays", lambda *_, **__: False)
    monkeypatch.setattr("leaven.pretext.spark.spatial_rules.spconv_conv2d", spy)
    monkeypatch.setattr(spconv_module, "index_pairs", lambda *args: made.append(args[1:]) or pairs(*args))
    spark(torch.randn(2, 3, 64, 64))
    assert len(served) == 13
    assert {shape[2:] for shape in served} == {(3, 3)}
    assert made == [(r, (3, 3), (1, 1)) for r in (8, 4, 2, 1)]  # once per resolution


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spconv.pytorch", None)
    with pytest.raises(ValueError, match=r"cannot import spconv .*pip install 'leaven\[spconv\]'"):
        SparK("resnet18", backend="spconv")


_OWN_CONVOLUTION = """
import torch, spconv.pytorch as spconv
torch.manual_seed(0)
layer = spconv.SubMConv2d(64, 64, 3, bias=False)
spots = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(40), torch.arange(40), indexing="ij"), -1)
spots = spots.reshape(-1, 3)[torch.rand(6400) < 0.5].int().contiguous()
x = spconv.SparseConvTensor(torch.randn(len(spots), 64), spots, [40, 40], 4)
dense = torch.nn.functional.conv2d(x.dense(), layer.weight.permute(0, 3, 1, 2), padding=1)
b, i, j = spots.long().T
right = dense[b, :, i, j]
with torch.no_grad():
    print(sum(not torch.allclose(layer(x).features, right, atol=1e-4) for _ in range(40)))
"""


@pytest.mark.skipif(
    (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) < 2,
    reason="a race needs two cores",
)
def test_spconvs_own_cpu_convolution_still_races() -> None:
    """Why the products are ours. Should this fail, spconv has mended it, and `_GatherMatmulScatter` can go."""

    def wrong(threads: int) -> int:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _OWN_CONVOLUTION],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])

    assert wrong(1) == 0
    # On a busy machine two threads may take turns, and nothing races.
    assert any(wrong(2) > 0 for _ in range(20)), "spconv's own CPU convolution is right now with two threads"
