"""The SparK objective: decoder, masks that stay with their call, precision, compilation, processes, export."""

import copy
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from leaven.callbacks import AttachError, EvoNorm, TrAct, attach
from leaven.pretext import Auxiliary, RotNet
from leaven.pretext.spark import SparK, SparseUnsupported, UntrainedWarning, sample_mask
from leaven.pretext.spark.decoder import LightDecoder

NETS = ["resnet50", "convnext_tiny", "efficientnet_b0", "regnety_008"]
SLOW_NETS = [pytest.param(net, marks=pytest.mark.slow) for net in NETS]


def _images(batch: int = 2, height: int = 64, width: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def _mask(spark: SparK, images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    grid = spark.mask_grid(images.shape[2], images.shape[3])
    return sample_mask(len(images), grid, spark.mask_ratio, torch.Generator().manual_seed(seed))


def test_decoder_is_the_papers() -> None:
    """Widths halve from 768 to 24; 10.12 GMAC for a 224 px image."""
    decoder = LightDecoder(32, 768)
    widths = [(block.up.in_channels, block.conv[3].out_channels) for block in decoder.blocks]  # type: ignore[union-attr]
    assert widths == [(768, 384), (384, 192), (192, 96), (96, 48), (48, 24)]
    macs = 0
    for i, (a, b) in enumerate(widths):
        side = 7 * 2 ** (i + 1)
        macs += side * side * (a * a * 4 + 9 * a * a + 9 * a * b)  # 4x4 stride 2: four taps per output
    macs += 224 * 224 * 24 * 3
    assert macs / 1e9 == pytest.approx(10.12, abs=0.01)
    maps = [torch.zeros(1, 768 >> i, 1 << i, 1 << i) if i < 4 else None for i in range(5)]
    assert decoder(maps).shape == (1, 3, 32, 32)


def test_every_map_reaches_the_decoder_where_its_side_fits() -> None:
    spark = SparK("resnet18", decoder_width=64).double()
    images = _images().double()
    spark(images, _mask(spark, images)).loss.backward()
    for stage, densify in zip(spark.stages, spark.densify, strict=True):
        token, weight = densify.mask_token, densify.proj.weight  # type: ignore[union-attr]
        assert weight.shape[:2] == (64 * stage.reduction // 32, stage.channels)  # type: ignore[union-attr]
        assert token.grad.abs().min() > 0, stage  # type: ignore[union-attr]
        assert weight.grad.abs().min() > 0, stage  # type: ignore[union-attr]


def test_encoder_widths_that_fit_need_no_projection() -> None:
    assert isinstance(SparK("convnext_atto", decoder_width=320).densify[-1].proj, nn.Identity)
    assert isinstance(SparK("resnet18", decoder_width=64).densify[-1].proj, nn.Conv2d)


@pytest.mark.parametrize(
    ("net", "norm"),
    [("resnet18", nn.BatchNorm1d), ("convnext_atto", nn.LayerNorm), ("nf_resnet26", nn.Identity)],
)
def test_densify_norm_follows_the_backbone(net: str, norm: type[nn.Module]) -> None:
    assert all(type(densify.norm) is norm for densify in SparK(net, decoder_width=64).densify)


@pytest.mark.parametrize("backend", ["packed", "dense"])
def test_tract_and_evonorm_are_refused_when_attached_and_not_at_the_first_batch(backend: Any) -> None:
    spark = SparK("resnet18", decoder_width=64, stages=(4, 8), backend=backend)
    optimizer = torch.optim.SGD(spark.parameters(), lr=0.1)
    keys = spark.state_dict().keys()
    for callback, advice in ((TrAct(), "the exported backbone"), (EvoNorm(), "leave the backbone its own")):
        with pytest.raises(AttachError, match=f"^cannot attach {callback.name} to SparK: .*{advice}"):
            attach(spark, optimizer, callback, total_steps=9)
    assert spark.state_dict().keys() == keys
    spark(_images()).loss.backward()


def test_a_few_steps_learn_a_repeated_pattern() -> None:
    """Every hidden patch equals every visible one: the loss must fall well below 1, what a constant guess costs."""
    torch.manual_seed(0)
    patch = torch.randn(1, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = patch.repeat(8, 1, 4, 4)
    spark = SparK("resnet18", decoder_width=64, stages=(4, 8, 16))
    optimizer = torch.optim.AdamW(spark.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        loss = spark(images).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.0, abs=0.1)
    assert losses[-1] < 0.65


def test_smaller_and_larger_mask_cells() -> None:
    images = _images(2, 64, 96)
    small = SparK("convnext_atto", decoder_width=64, stages=(4, 8, 16), mask_cell=16)
    assert small.mask_grid(64, 96) == (4, 6)
    large = SparK("convnext_atto", decoder_width=64, stages=(4, 8), mask_cell=32)
    assert large.mask_grid(64, 96) == (2, 3)
    for spark in (small, large):
        output = spark(images)
        output.loss.backward()
        assert output.loss.isfinite()
        assert spark.reconstruct(images).shape == images.shape


def test_a_reconstruction_leaves_no_trace() -> None:
    spark = SparK("resnet18", decoder_width=64, stages=(4, 8))
    spark.decoder.eval()
    modes = [module.training for module in spark.modules()]
    before = {name: value.clone() for name, value in spark.state_dict().items()}
    images = _images()
    mask = _mask(spark, images)
    pasted = spark.reconstruct(images, mask)
    assert [module.training for module in spark.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in spark.state_dict().items())
    assert torch.equal(spark.eval().reconstruct(images, mask), pasted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_cell": 16}, "mask_cell=16 is not a multiple of 32"),
        ({"decoder_width": 100}, "decoder_width=100 must be a multiple of 32"),
        ({"stages": (4, 7)}, r"no map of reduction \[7\]"),
        ({"stages": ()}, "no map of reduction"),
        ({"decoder_width": 0}, "decoder_width=0 must be a multiple of 32"),
        ({"mask_ratio": 2.0}, "mask ratio 2.0 must be between 0 and 1"),
        ({"backend": "mask"}, "unknown backend 'mask': auto, packed, dense or spconv"),
        ({"densify_norm": "gn"}, "unknown densify_norm 'gn': auto, bn, ln or none"),
    ],
)
def test_settings_that_do_not_fit_say_so(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparK("resnet18", **{"decoder_width": 64, **settings})  # type: ignore[arg-type]


def test_a_map_as_large_as_the_image_is_refused_and_not_left_without_a_part() -> None:
    body = [nn.Sequential(nn.Conv2d(a, 8, 3, stride, 1), nn.ReLU()) for a, stride in ((3, 1), (8, 2), (8, 2))]
    with pytest.raises(ValueError, match=r"^stages=\(1, 2, 4\): a map as large as the image .* leave 1 out$"):
        SparK(nn.Sequential(*body), decoder_width=16, stages=(1, 2, 4))
    spark = SparK(nn.Sequential(*body), decoder_width=16, stages=(2, 4))
    spark(_images(2, 16, 16)).loss.backward()
    assert all(parameter.grad is not None for parameter in spark.parameters())


def test_inputs_that_do_not_fit_say_so() -> None:
    spark = SparK("resnet18", decoder_width=64)
    with pytest.raises(ValueError, match="100x96 is not a multiple of the mask cell 32; try 96x96"):
        spark(torch.zeros(1, 3, 100, 96))
    for images in (
        torch.zeros(3, 64, 64),
        torch.zeros(1, 1, 64, 64),
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match=r"images must be normalised floats \(B, 3, H, W\), got"):
            spark(images)
    with pytest.raises(ValueError, match=r"mask must be \(B, fh, fw\) = \(2, 2, 3\)"):
        spark(_images(), torch.ones(2, 3, 2, dtype=torch.bool))
    for labels in (torch.zeros(2).long(), torch.zeros(2, 5)):
        with pytest.raises(ValueError, match=r"SparK takes no labels: call it with the images alone$"):
            spark(_images(), labels)
    with pytest.raises(ValueError, match="some must be visible and some hidden"):
        spark(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("net", "named"),
    [
        ("swin_t", r"view in layers\.0\.blocks\.0 \(SwinTransformerBlock\)"),
        ("vit_s", "VisionTransformer"),
        ("inception_v4", r"conv2d in features\.0\.conv \(Conv2d\): output 15x31"),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_refused_backbones_name_operation_and_module(net: str, named: str) -> None:
    with pytest.raises(SparseUnsupported, match=named) as refusal:
        SparK(net, decoder_width=256)
    assert "\n" not in str(refusal.value)


def test_construction_leaves_the_users_module_as_it_was() -> None:
    plain = timm.create_model("efficientnet_b0", num_classes=7).eval()
    plain.blocks[0].train()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    modes = [module.training for module in plain.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    spark = SparK(plain, decoder_width=64)
    assert spark.backbone is plain
    assert [module.training for module in plain.modules()] == modes
    assert list(before) == list(plain.state_dict())
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in plain.parameters())
    assert not torch.equal(state, torch.get_rng_state()), "the decoder's own initial weights are drawn"


def _pass(spark: SparK, images: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Maps, gradients and buffers of one training pass; the buffers are put back."""
    before = {name: buffer.clone() for name, buffer in spark.named_buffers()}
    spark.zero_grad()
    maps = spark.train().encode(images, mask)
    torch.stack([m.sin().sum() for m in maps]).sum().backward()
    found = {f"map {i}": m.detach() for i, m in enumerate(maps)}
    found |= {f"gradient of {n}": p.grad for n, p in spark.named_parameters() if p.grad is not None}
    found |= {f"buffer {n}": b.clone() for n, b in spark.named_buffers()}
    spark.load_state_dict(before, strict=False)
    return found


def _agree(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    gradient = max(float(v.abs().max()) for name, v in b.items() if name.startswith("gradient"))
    for name, value in b.items():
        scale = gradient if name.startswith("gradient") else max(float(value.abs().max()), 1e-3)
        assert (a[name] - value).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("net", [*SLOW_NETS[:3], NETS[3]])
def test_backends_agree_in_float64(net: str) -> None:
    """T7: features, every gradient and buffer of packed and dense."""
    packed = SparK(net, decoder_width=32, backend="packed").double()
    dense = SparK(copy.deepcopy(packed.backbone), decoder_width=32, backend="dense").double()
    images = _images(2, 96, 128).double()
    mask = _mask(packed, images)
    _agree(_pass(packed, images, mask), _pass(dense, images, mask), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["packed", "dense"])
@pytest.mark.parametrize("net", NETS)
def test_results_do_not_depend_on_the_number_of_threads(net: str, backend: str) -> None:
    """T7: 20 repeats under 1, 2 and as many threads as there are cores."""
    spark = SparK(net, decoder_width=32, backend=backend).double()  # type: ignore[arg-type]
    images = _images(4, 64, 64).double()
    mask = _mask(spark, images)
    expected = _pass(spark, images, mask)
    threads = torch.get_num_threads()
    try:
        for repeat in range(20):
            torch.set_num_threads((1, 2, os.cpu_count() or 2)[repeat % 3])
            _agree(_pass(spark, images, mask), expected, 1e-9)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["packed", "dense"])
@pytest.mark.parametrize("nets", [("resnet50", "convnext_tiny"), ("efficientnet_b0", "regnety_008")])
def test_two_encoders_two_masks_threads_and_exceptions_do_not_mix(
    backend: str, nets: tuple[str, str]
) -> None:
    """T9: the mask belongs to the call."""
    sparks = [SparK(net, decoder_width=32, backend=backend).eval() for net in nets]  # type: ignore[arg-type]
    images = _images(2, 96, 96)
    masks = [_mask(sparks[0], images, seed) for seed in range(4)]
    expected = {
        (i, j): spark.encode(images, mask) for i, spark in enumerate(sparks) for j, mask in enumerate(masks)
    }

    def boom(*_: object) -> None:
        raise KeyError("inside a forward")

    inner = sparks[0].backbone.get_submodule(sparks[0].stages[2].name)
    handle = inner.register_forward_pre_hook(boom)
    with pytest.raises(KeyError):
        sparks[0].encode(images, masks[0])
    handle.remove()
    dense = copy.deepcopy(sparks[0].backbone)(images)
    assert torch.equal(sparks[0].backbone(images), dense), (
        "outside of an encoder's call the backbone is dense"
    )
    found: dict[tuple[int, int], list[torch.Tensor]] = {}

    def work(i: int, j: int) -> None:
        for _ in range(3):
            found[i, j] = sparks[i].encode(images, masks[j])

    threads = [threading.Thread(target=work, args=key) for key in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, maps in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(maps, found[key], strict=True))


@pytest.mark.parametrize("net", ["resnet18", "convnext_atto", *SLOW_NETS])
def test_activation_checkpointing_recomputes_under_the_right_mask(net: str) -> None:
    images = _images()
    plain = SparK(net, decoder_width=32)
    again = copy.deepcopy(plain)
    again.backbone.set_grad_checkpointing()  # type: ignore[operator]
    first, second = (_mask(plain, images, seed) for seed in (1, 2))
    for spark in (plain, again):
        (spark(images, first).loss + 2 * spark(images, second).loss).backward()
    for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["packed", "dense"])
@pytest.mark.parametrize("net", NETS)
def test_bf16_autocast_stays_near_fp32(net: str, backend: str) -> None:
    torch.manual_seed(0)
    spark = SparK(net, decoder_width=32, backend=backend)  # type: ignore[arg-type]
    images = _images()
    mask = _mask(spark, images)
    single = spark(images, mask).loss
    with torch.autocast("cpu", torch.bfloat16):
        half = spark(images, mask).loss
    half.backward()
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(single.item(), rel=0.05)
    assert all(p.grad is None or p.grad.isfinite().all() for p in spark.parameters())


@pytest.mark.parametrize("backend", ["packed", pytest.param("dense", marks=pytest.mark.slow)])
@pytest.mark.parametrize("net", ["resnet18", "convnext_atto", "mobilenetv3_small_100", *SLOW_NETS])
def test_one_full_graph_for_many_masks(net: str, backend: str) -> None:
    """T11. The captured graph runs as is ("eager" backend), so that results are equal to the bit."""
    torch._dynamo.reset()
    spark = SparK(net, decoder_width=32, backend=backend)  # type: ignore[arg-type]
    other = copy.deepcopy(spark)
    if backend == "dense":
        other(_images())  # converts the copy
        spark(_images())
    counter = CompileCounter()
    compiled = torch.compile(other, fullgraph=True, backend=counter)
    for seed in range(4):
        images = _images(seed=seed)
        mask = _mask(spark, images, seed)
        assert torch.equal(spark(images, mask).loss, compiled(images, mask).loss)
    assert counter.frame_count == 1
    compiled(images, mask).loss.backward()
    spark(images, mask).loss.backward()
    pairs = zip(spark.parameters(), other.parameters(), strict=True)
    assert all(a.grad is None or torch.equal(a.grad, b.grad) for a, b in pairs)  # type: ignore[arg-type]


def test_a_compiled_graph_checks_the_masks_count() -> None:
    torch._dynamo.reset()
    spark = SparK("resnet18", decoder_width=32)
    compiled = torch.compile(spark, fullgraph=True, backend="eager")
    mask = torch.zeros(2, 2, 3, dtype=torch.bool)
    mask[:, 0, 0] = True
    with pytest.raises(RuntimeError, match="2 visible"):
        compiled(_images(), mask)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["convnext_atto", "resnet18"])  # resnet18 for its pool before the first map
def test_inductor_trains_to_the_same_losses(net: str) -> None:
    """In float64, where fused arithmetic leaves no room for differences."""
    torch._dynamo.reset()
    spark = SparK(net, decoder_width=32).double()
    other = copy.deepcopy(spark)
    compiled = torch.compile(other, fullgraph=True)
    for seed in range(3):
        images = _images(seed=seed).double()
        mask = _mask(spark, images, seed)
        a, b = spark(images, mask).loss, compiled(images, mask).loss
        assert a.item() == pytest.approx(b.item(), rel=1e-10)
        for net, loss in ((spark, a), (other, b)):
            net.zero_grad()
            loss.backward()
        for p, q in zip(spark.parameters(), other.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10)


def test_exported_weights_load_strictly_into_plain_libraries(tmp_path: Path) -> None:
    images = _images()
    for name, plain in (
        ("convnext_atto", timm.create_model("convnext_atto", num_classes=0)),
        ("tv:resnet18", torchvision.models.resnet18()),
    ):
        spark = SparK(name, decoder_width=32)
        optimizer = torch.optim.SGD(spark.parameters(), 0.1)
        spark(images).loss.backward()
        optimizer.step()
        spark.export(tmp_path / "backbone.safetensors")
        plain.load_state_dict(load_file(tmp_path / "backbone.safetensors"), strict=True)
        assert torch.equal(plain.eval()(images), spark.backbone.eval()(images))


def test_a_module_without_a_name_is_exported_without_one(tmp_path: Path) -> None:
    class resnet18(nn.Sequential):  # named as one of timm's, which it is not
        pass

    net = resnet18(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 16, 2, 2))
    spark = SparK(net, decoder_width=32)
    Auxiliary(spark, RotNet(net)).export(
        tmp_path / "own.safetensors", epochs=3
    )  # as all objectives take notes
    with safe_open(tmp_path / "own.safetensors", "pt") as file:
        assert file.metadata().items() >= {"method": "SparK", "epochs": "3"}.items()
    spark.export(tmp_path / "own.safetensors")
    with safe_open(tmp_path / "own.safetensors", "pt") as file:
        assert "backbone" not in file.metadata()
    net.load_state_dict(load_file(tmp_path / "own.safetensors"), strict=True)


def test_mask_tokens_are_not_decayed() -> None:
    spark = SparK("resnet18", decoder_width=64)
    assert spark.no_weight_decay() == {f"densify.{i}.mask_token" for i in range(4)}
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(spark, opt="adamw", weight_decay=0.04)
    free = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    names = {name for name, p in spark.named_parameters() if id(p) in free}
    assert spark.no_weight_decay() <= names
    assert not any(name.endswith("conv1.weight") for name in names)


def test_the_mask_drawn_inside_comes_from_the_cpu_generator() -> None:
    spark = SparK("resnet18", decoder_width=32).eval()
    images = _images()
    torch.manual_seed(5)
    a = spark(images).loss
    torch.manual_seed(5)
    b = spark(images, sample_mask(2, (2, 3), 0.6)).loss
    assert torch.equal(a, b)
    assert spark(images).logs["mask_ratio"] == pytest.approx(4 / 6)


def test_one_and_four_channel_images() -> None:
    for channels in (1, 4):
        spark = SparK(timm.create_model("resnet18", in_chans=channels), decoder_width=32)
        images = torch.randn(2, channels, 64, 64)
        assert spark.reconstruct(images).shape == images.shape


_TWO_PROCESSES = """
import copy, sys
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from leaven.pretext.spark import SparK, sample_mask

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
mine = slice(2 * rank, 2 * rank + 2)


def close(a, b, name):
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10, msg=lambda text: f"{name}: {text}")


cases = (("resnet50", "packed"), ("resnet50", "dense"), ("efficientnet_b0", "packed"), ("regnety_008", "packed"))
for net, backend in cases:
    torch.manual_seed(0)
    spark = SparK(net, decoder_width=32, backend=backend).double()
    images = torch.randn(4, 3, 64, 96, dtype=torch.double)
    mask = sample_mask(4, (2, 3), 0.6)
    single = copy.deepcopy(spark)
    weights = [torch.randn(m.shape, dtype=m.dtype) for m in copy.deepcopy(spark).encode(images, mask)]
    spark.backbone = convert_sync_batchnorm(spark.backbone)
    sum((m * w[mine]).sum() for m, w in zip(spark.encode(images[mine], mask[mine]), weights)).backward()
    sum((m * w).sum() for m, w in zip(single.encode(images, mask), weights)).backward()
    largest = max(p.grad.abs().max() for p in single.backbone.parameters() if p.grad is not None)
    for (name, a), b in zip(spark.backbone.named_parameters(), single.backbone.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:  # relative to the largest: a bias in front of a norm has gradient zero
            dist.all_reduce(a.grad)
            close(a.grad / largest, b.grad / largest, name)
    for (name, a), b in zip(spark.backbone.named_buffers(), single.backbone.buffers()):
        close(a, b, name)
    print("synchronised", net, backend)

for net in ("efficientnet_b0", "convnext_tiny"):  # their heads get no gradient: DDP must not wait for them
    torch.manual_seed(0)
    spark = SparK(net, decoder_width=32).double().eval()
    single = copy.deepcopy(spark)
    images = torch.randn(4, 3, 64, 96, dtype=torch.double)
    mask = sample_mask(4, (2, 3), 0.6)
    ddp = nn.parallel.DistributedDataParallel(spark)
    for _ in range(2):  # a second step would fail if a bucket of the first never came
        ddp.zero_grad()
        ddp(images[mine], mask[mine]).loss.backward()
    single(images, mask).loss.backward()
    ignored = 0
    for (name, a), b in zip(spark.named_parameters(), single.named_parameters()):
        if name in spark._ddp_params_and_buffers_to_ignore:
            assert a.grad is None
            ignored += 1
        else:
            close(a.grad, b[1].grad, name)
    assert ignored or net != "efficientnet_b0"
    print("parallel", net)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """T10: SyncBatchNorm over the union batch, and DDP with layers that get no gradient."""
    script = tmp_path / "two.py"
    script.write_text(_TWO_PROCESSES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for run in runs:
        out, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors[-3000:]
        assert (out.count("synchronised"), out.count("parallel")) == (4, 2)


class DividesByTheArea(nn.Module):
    """Sums over positions, and divides by the sides that the map shows: with hidden cells that is no mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(x + x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3]))


@pytest.mark.parametrize("backend", ["packed", "dense", "spconv"])
def test_arithmetic_with_the_maps_sides_is_found_out(backend: str) -> None:
    with pytest.raises(SparseUnsupported, match=r"\(Conv2d\).* lets hidden positions change visible ones"):
        SparK(DividesByTheArea(), decoder_width=32, backend=backend)  # type: ignore[arg-type]


def test_parts_that_no_map_used_depends_on_are_named() -> None:
    assert SparK("resnet10t", decoder_width=64).untrained == []
    assert SparK("resnet10t", decoder_width=64, stages=(4, 8)).untrained == ["layer3", "layer4"]
    assert SparK("tv:resnet18", decoder_width=64).untrained == ["fc"]
    assert "stages.3" in SparK("convnext_atto", decoder_width=64, stages=(4, 8, 16)).untrained[0]


def test_a_good_part_that_stays_untrained_is_warned_of() -> None:
    """Not of a classifier, and not where the maps were chosen."""
    with pytest.warns(
        UntrainedWarning, match=r"attention \(\d+% of the backbone's parameters\) stay as they are"
    ):
        SparK(Tail(), decoder_width=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedWarning)
        for backbone in ("resnet10t", "tv:resnet18", "convnext_atto"):
            SparK(backbone, decoder_width=64)
        SparK("resnet10t", decoder_width=64, stages=(4, 8))


class Tail(nn.Module):
    """A map, and attention behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 4, 4)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        tokens = x.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)


def test_a_mask_that_hides_nothing_is_refused_for_training_only() -> None:
    spark, images = SparK("resnet10t", decoder_width=32), _images()
    everything = torch.ones(2, *spark.mask_grid(64, 96), dtype=torch.bool)
    with pytest.raises(ValueError, match="the mask hides nothing"):
        spark(images, everything)
    assert spark.encode(images, everything)[-1].shape == (2, 512, 2, 3)
