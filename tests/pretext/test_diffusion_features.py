"""Diffusion features: noise by key, early exit, pooling, blocks of any network; against hooks and closed forms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from leaven.pretext.diffusion import (
    Cell,
    Denoiser,
    DiffusionFeatures,
    Schedule,
    UNet,
    UnknownBlock,
    adm,
    block_names,
)
from leaven.pretext.diffusion.blocks import as_map, pooled
from leaven.pretext.diffusion.features import keyed_noise

SIDE = 16


def net(in_chans: int = 2) -> UNet:
    """With weights everywhere: fresh ones end every residual branch in zeros."""
    torch.manual_seed(0)
    made = UNet(in_chans, width=32, multipliers=(1, 2), depth=1, attention=(2,))
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.1 * torch.randn_like(p))
    return made


def images(n: int = 5, channels: int = 2) -> Tensor:
    return torch.randn(n, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def features(**how: Any) -> DiffusionFeatures:
    settings: dict[str, Any] = {"timesteps": (20, 300), "pool": (2, None)} | how
    return DiffusionFeatures(settings.pop("model", None) or net(), Schedule.linear(), **settings)


def close(a: dict[Cell, Tensor], b: dict[Cell, Tensor], tolerance: float = 1e-5) -> None:
    assert list(a) == list(b)
    for cell, value in a.items():
        torch.testing.assert_close(value, b[cell], rtol=tolerance, atol=tolerance)


def test_the_paper_s_block_by_hand() -> None:
    """One pass of the whole network with one hook, on x_t made by the equation."""
    model = net().eval()
    found = features(model=model, blocks=[5], timesteps=(300,), pool=None)(images())
    abar = Schedule.linear().alphas_cumprod[300]
    noise = torch.stack([keyed_noise(0, i, 300, 0, (2, SIDE, SIDE)) for i in range(5)])
    kept: list[Tensor] = []
    name = block_names(model)[4]
    hook = model.get_submodule(name).register_forward_hook(lambda m, a, out: kept.append(out.detach()))
    model(float(abar.sqrt()) * images() + float((1 - abar).sqrt()) * noise, torch.full((5,), 300))
    hook.remove()
    (value,) = found.values()
    torch.testing.assert_close(value, kept[0])


def test_features_do_not_depend_on_batches_or_order() -> None:
    extract = features(draws=2, include_clean=True)
    x, before = images(), torch.get_rng_state()
    whole = extract(x)
    assert torch.equal(torch.get_rng_state(), before)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = extract(x[order], order, batch_size=3)
    close({cell: value[order] for cell, value in whole.items()}, shuffled)
    alone = extract(x[2:3], torch.tensor([2]))
    close({cell: value[2:3] for cell, value in whole.items()}, alone)
    assert not torch.allclose(
        extract(x[2:3])[whole_cell()], whole[whole_cell()][2:3]
    )  # as image 0: other noise


def whole_cell() -> Cell:
    return Cell(300, "middle_block", None)


def test_mixed_times_equal_separate_passes_and_requested_order_is_returned() -> None:
    blocks = ["output_blocks.1", "input_blocks.1", "middle_block"]
    mixed = features(blocks=blocks)
    found = mixed(images())
    assert [cell.block for cell in found][:2] == ["output_blocks.1"] * 2
    assert list(found) == mixed.cells
    for t in (20, 300):
        one = features(blocks=blocks, timesteps=(t,))(images())
        close({cell: value for cell, value in found.items() if cell.t == t}, one)


@pytest.mark.parametrize("last", ["input_blocks.0", "middle_block", "output_blocks.3"])
def test_early_exit_is_bit_equal_and_later_blocks_do_not_run(last: str) -> None:
    model = net()
    blocks = ["input_blocks.0", last] if last != "input_blocks.0" else [last]
    early = features(model=model, blocks=blocks)
    early(images())  # finds the order
    ran: list[str] = []
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: ran.append(name))
        for name in block_names(model)
    ]
    found = early(images())
    for hook in hooks:
        hook.remove()
    names = block_names(model)
    assert set(ran) == set(names[: names.index(last) + 1])
    full = features(model=model, blocks=blocks, early_exit=False)(images())
    assert all(torch.equal(found[cell], full[cell]) for cell in full)


def test_nothing_is_left_behind() -> None:
    model = net().train()
    model.middle_block.requires_grad_(False)
    features(model=model)(images())
    broken = features(model=model)
    broken.call = fails
    with pytest.raises(RuntimeError, match="in the middle"):
        broken(images())
    assert all(not module._forward_hooks for module in model.modules())
    assert model.training
    assert all(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.middle_block.parameters())
    assert all(p.requires_grad for p in model.output_blocks.parameters())
    assert torch.is_grad_enabled()


def fails(model: nn.Module, x: Tensor, t: Tensor) -> Any:
    model.input_blocks[0](x, t)  # type: ignore[operator, index]
    raise RuntimeError("in the middle")


def test_dropout_is_off() -> None:
    model = UNet(2, width=32, multipliers=(1, 2), dropout=0.5).train()
    close(features(model=model)(images()), features(model=model)(images()), 0)


def test_clean_is_the_image_itself() -> None:
    seen: list[Tensor] = []

    def call(model: nn.Module, x: Tensor, t: Tensor) -> Any:
        seen.append(x)
        assert t.tolist() == [0] * 5
        return model(x, t)

    features(timesteps=(), include_clean=True, draws=3, call=call, early_exit=False)(images())
    assert torch.equal(seen[0], images())


def test_draws_are_averaged() -> None:
    cells, x = features(draws=4).cells, images()
    found = features(draws=4)(x)
    model, schedule = net().eval(), Schedule.linear()
    singles = []
    for draw in range(4):
        noise = torch.stack([keyed_noise(0, i, 300, draw, (2, SIDE, SIDE)) for i in range(5)])
        one = features(model=model, timesteps=(), include_clean=True)
        one.add_noise = lambda x, n, t: x
        one.call = lambda m, x, _: m(x, torch.full((len(x),), 300))
        singles.append(one(schedule.add_noise(x, noise, torch.full((5,), 300))))
    for cell in cells:
        if cell.t == 300:
            mean = torch.stack([single[Cell("clean", cell.block, cell.pool)] for single in singles]).mean(0)
            torch.testing.assert_close(found[cell], mean, rtol=1e-4, atol=1e-5)
    close(features()(x), features(draws=1)(x), 0)


def test_more_draws_less_variance() -> None:
    spread = {}
    for draws in (1, 8):
        rows = [
            features(model=net(), blocks=["middle_block"], timesteps=(300,), draws=draws, seed=s)(images(1))
            for s in range(40)
        ]
        spread[draws] = float(torch.stack([next(iter(row.values())) for row in rows]).var(0).mean())
    assert spread[1] / spread[8] == pytest.approx(8, rel=0.5)


def test_schedules() -> None:
    linear, cosine = Schedule.linear(), Schedule.cosine()
    assert len(linear) == len(cosine) == 1000
    assert float(linear.alphas_cumprod[0]) == pytest.approx(1 - 1e-4)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert float(linear.alphas_cumprod[-1]) == pytest.approx(float((1 - betas).log().sum().exp()))
    assert float(cosine.alphas_cumprod[499]) == pytest.approx(0.5, abs=0.02)
    x = torch.full((20_000, 1), 0.7)
    for t in (0, 300, 999):
        noisy = linear.add_noise(x, torch.randn_like(x), torch.full((20_000,), t))
        abar = float(linear.alphas_cumprod[t])
        assert float(noisy.mean()) == pytest.approx(0.7 * abar**0.5, abs=0.03)
        assert float(noisy.var()) == pytest.approx(1 - abar, rel=0.05, abs=1e-6)
    for wrong in (
        torch.ones(3),
        torch.tensor([0.5, 0.9]),
        torch.tensor([[0.9, 0.5]]),
        torch.tensor([1.2, 0.5]),
    ):
        with pytest.raises(ValueError, match="alphas_cumprod must be"):
            Schedule(wrong)
    with pytest.raises(TypeError, match="str has no alphas_cumprod"):
        Schedule.of("ddpm")


def test_another_parameterisation() -> None:
    """Flow matching: a straight line between image and noise."""

    def flow(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        s = (t / 1000).view(-1, 1, 1, 1).to(x)
        return (1 - s) * x + s * noise

    seen: list[Tensor] = []
    made = DiffusionFeatures(net(), flow, timesteps=(250,), call=lambda m, x, t: (seen.append(x), m(x, t))[1])
    made(images())
    noise = torch.stack([keyed_noise(0, i, 250, 0, (2, SIDE, SIDE)) for i in range(5)])
    torch.testing.assert_close(seen[-1], 0.75 * images() + 0.25 * noise)


def test_times_are_where_the_images_are() -> None:
    seen: list[str] = []

    def flow(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        seen.append(t.device.type)
        return x + t.view(-1, 1, 1, 1) * noise

    made = DiffusionFeatures(net().to("meta"), flow, timesteps=(250,))
    assert all(maps.is_meta for maps in made(images()).values())
    assert seen == ["meta"]


def test_pooling_and_tokens() -> None:
    maps = images()
    assert torch.equal(pooled(maps, 4), F.adaptive_avg_pool2d(maps, 4))
    assert pooled(maps, 99) is maps
    assert pooled(maps, None) is maps
    assert pooled(maps.half(), 2).dtype == torch.float32
    wide = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(as_map(wide.flatten(2).mT, (32, 48), "b"), wide)
    torch.testing.assert_close(as_map((wide,), (32, 48), "b"), wide)
    for wrong, said in (
        (torch.randn(2, 3), r"gives \(2, 3\)"),
        (torch.randn(2, 7, 3), "neither a map"),
        ({}, "dict"),
    ):
        with pytest.raises(ValueError, match=said):
            as_map(wrong, (32, 32), "b")


class Twice(nn.Module):
    """Its block runs twice in a pass; the second output is what counts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for _ in range(2):
            x = self.body[0](x)
        found: Tensor = self.body[1](x)
        return found


def test_any_module_and_a_block_that_runs_twice() -> None:
    model = Twice()
    assert block_names(model) == ["body.0", "body.1"]
    extract = features(model=model, blocks=["body.0"], timesteps=(), include_clean=True, pool=None)
    (found,) = extract(images()).values()
    torch.testing.assert_close(found, model.body[0](model.body[0](images())).detach())


def test_adm_is_the_network_of_the_paper() -> None:
    """Parameters and work are those of the authors' network; behind block 24 lies more than two thirds of a pass."""
    with torch.device("meta"):
        model = adm().eval()
        assert sum(p.numel() for p in model.parameters()) == 552_814_086
        assert len(block_names(model)) == 37
        assert block_names(model)[23] == "output_blocks.4"
        x, t = torch.zeros(1, 3, 256, 256), torch.zeros(1)
        shapes = []
        for name in block_names(model):
            model.get_submodule(name).register_forward_hook(
                lambda m, a, out: shapes.append(tuple(out.shape[1:]))
            )
        with FlopCounterMode(display=False) as full:
            model(x, t)
    assert full.get_total_flops() == pytest.approx(2238e9, rel=0.005)
    # channels and sides of blocks 1 to 37, from the table of the specification
    sides = [256] * 3 + [128] * 3 + [64] * 3 + [32] * 3 + [16] * 3 + [8] * 6 + [16] * 3 + [32] * 3
    sides += [64] * 3 + [128] * 3 + [256] * 4
    widths = [256] * 7 + [512] * 6 + [1024] * 12 + [512] * 6 + [256] * 6
    assert shapes == [(c, s, s) for c, s in zip(widths, sides, strict=True)]


@pytest.mark.parametrize(("block", "share"), [(19, 0.259), (24, 0.286), (30, 0.412), (33, 0.569)])
def test_the_share_of_a_pass_that_is_needed(block: int, share: float) -> None:
    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    with torch.device("meta"):
        model = adm()
        model.get_submodule(block_names(model)[block - 1]).register_forward_hook(stop)
        with FlopCounterMode(display=False) as counted, pytest.raises(Stop):
            model(torch.zeros(1, 3, 256, 256), torch.zeros(1))
    assert counted.get_total_flops() / 2239.67e9 == pytest.approx(share, abs=0.002)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: features(blocks=["mid"]), "no block 'mid' in UNet; there are: input_blocks.0, "),
        (lambda: features(blocks=[99]), "block 99: UNet has 1 to 9"),
        (lambda: features(blocks=[0]), "block 0: UNet has 1 to 9"),
        (lambda: features(blocks=["middle_block", "middle_block"]), "asked for twice"),
        (lambda: features(blocks=[]), "no block: UNet has none that are known"),
        (lambda: features(model=nn.Linear(2, 2)), "no block: Linear has none"),
        (lambda: features(timesteps=(1000,)), "timestep 1000 is out of range: there are 0 to 999"),
        (lambda: features(timesteps=(20.5,)), "timestep 20.5 is no whole number"),
        (lambda: features()(images() * torch.nan), "a NaN or an infinity in the images"),
        (lambda: UNet(0), "must be at least 1"),
        (lambda: features(timesteps=(-1,)), "timestep -1 is out of range"),
        (lambda: features(timesteps=()), "give timesteps"),
        (lambda: features(pool=0), "draws and pool must be at least 1"),
        (lambda: features(draws=0), "draws and pool must be at least 1"),
        (lambda: features()(images(channels=3)), r"images \(B, 2, H, W\) are needed, not"),
        (lambda: features()(images()[..., :15]), "images of 16x15 pixels: both sides must be multiples of 2"),
        (lambda: features()(images(), torch.arange(3)), "3 indices for 5 images"),
        (
            lambda: features(blocks=["out.0"], early_exit=False, call=lambda m, x, t: x)(images()),
            "did not run",
        ),
    ],
)
def test_wrong_input(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_one_block_by_its_number_and_a_denoiser_is_refused() -> None:
    assert features(blocks=3).blocks == features(blocks=[3]).blocks
    with pytest.raises(TypeError, match=r"not the Denoiser around it: give denoiser.backbone"):
        features(model=Denoiser(net()))


def test_unknown_blocks_have_an_error_of_their_own() -> None:
    with pytest.raises(UnknownBlock):
        features(blocks=["mid"])


def test_heads_suit_the_channels() -> None:
    assert UNet(2, width=8)(images(), torch.tensor([3])).shape == images().shape  # one narrow head
    with pytest.raises(ValueError, match="attention on 100 channels: head_width must divide them"):
        UNet(2, width=50)


def test_a_network_of_half_precision() -> None:
    """Weights in bfloat16, norms computed in float32: near what full precision gives."""
    full, half = net().eval(), net().eval().bfloat16()
    t = torch.tensor([90])
    with torch.no_grad():
        expected, found = full(images(), t), half(images().bfloat16(), t)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).norm() / expected.norm()) < 0.05
