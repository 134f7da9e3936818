"""DifFeed against two passes written out, with plain features where nothing is fed back, and what it leaves alone."""

import copy
import io
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaven.pretext.diffusion import (
    AttentionHead,
    Denoiser,
    DifFeed,
    DiffusionFeatures,
    Schedule,
    UNet,
    UnknownBlock,
    adm,
    block_names,
)
from leaven.pretext.diffusion.blocks import skip_pairs
from leaven.pretext.diffusion.features import keyed_noise
from leaven.pretext.diffusion.unet import timestep_embedding

SIDE = 16


def images(n: int = 3, channels: int = 2) -> Tensor:
    return torch.randn(n, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def x_t(x: Tensor, t: int, draw: int = 0) -> Tensor:
    abar = Schedule.linear().alphas_cumprod[t]
    noise = torch.stack([keyed_noise(0, i, t, draw, x.shape[1:]) for i in range(len(x))])
    return float(abar.sqrt()) * x + float((1 - abar).sqrt()) * noise


def filled(model: Any) -> Any:
    """With weights everywhere: fresh ones end every residual branch in zeros."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn_like(p))
    return model


def unet(multipliers: tuple[int, ...] = (1, 2)) -> UNet:
    torch.manual_seed(0)
    made: UNet = filled(UNet(2, width=32, multipliers=multipliers, attention=(2,), dropout=0.1))
    return made


def feed(
    model: nn.Module | None = None, *, zero: bool = False, example: Tensor | None = None, **how: Any
) -> DifFeed:
    settings: dict[str, Any] = {"block": "middle_block", "pool": 4, "width": 16, "heads": 2} | how
    model = model or unet()
    torch.manual_seed(1)
    made = DifFeed(model, Schedule.linear(), images(1) if example is None else example, 5, **settings)
    with torch.no_grad():
        for convolution in made.convolutions:
            conv, norm, _ = convolution  # type: ignore[misc]
            conv.weight.mul_(0.0 if zero else 1.0)
            norm.bias.fill_(0.0 if zero else 0.3)
            norm.running_mean.fill_(0.0 if zero else 0.2)
            norm.running_var.fill_(1.5)
        made.head.cls.normal_()
    return made


class TwoLevels(nn.Module):
    """The smallest U-Net there is, with names that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.deep, self.up = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(12, 5, 3, padding=1)
        self.last, self.out = nn.Conv2d(9, 7, 3, padding=1), nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first = torch.tanh(self.one(x + 0.001 * t.view(-1, 1, 1, 1)))
        first = self.keep_one(first)
        second = self.keep_two(torch.tanh(self.two(first)))
        h = torch.tanh(self.deep(second))
        h = torch.tanh(self.up(torch.cat([h, second], dim=1)))
        h = F.interpolate(h, scale_factor=2.0)
        out: Tensor = self.out(torch.tanh(self.last(torch.cat([h, first], dim=1))))
        return out

    # Blocks are modules: what is kept for a skip passes through them.
    keep_one: nn.Module
    keep_two: nn.Module


def two_levels() -> TwoLevels:
    torch.manual_seed(2)
    made = TwoLevels()
    made.keep_one, made.keep_two = nn.Identity(), nn.Identity()
    return made


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "feedback", [{"keep_two": "up", "keep_one": "last"}, {"keep_one": "up", "keep_two": "last"}], ids=str
)
def test_both_passes_in_plain_code(feedback: dict[str, str], training: bool) -> None:
    """A U-Net of two levels written out twice; in the second case maps must be resized, down and up."""
    model = two_levels()
    made = feed(model, block="last", timestep=300, feedback=feedback, pool=8).train(training)
    w: Mapping[str, Tensor] = copy.deepcopy(made.state_dict())

    def plain(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = w[f"backbone.{name}.weight"]
        padding = weight.shape[-1] // 2
        return F.conv2d(x, weight, w[f"backbone.{name}.bias"], stride=stride, padding=padding)

    def passed(x: Tensor, fed: dict[str, Tensor]) -> dict[str, Tensor]:
        first = torch.tanh(plain("one", x + 0.3)) + fed.get("keep_one", 0)
        second = torch.tanh(plain("two", first, 2)) + fed.get("keep_two", 0)
        up = plain("up", torch.cat([torch.tanh(plain("deep", second)), second], dim=1))
        wide = torch.tanh(up).repeat_interleave(2, 2).repeat_interleave(2, 3)
        return {"up": up, "last": plain("last", torch.cat([wide, first], dim=1))}

    noisy = x_t(images(), 300)
    maps = passed(noisy, {})
    fed = {}
    for i, (encoder, decoder) in enumerate(feedback.items()):
        x = torch.einsum("bchw,dc->bdhw", maps[decoder], w[f"convolutions.{i}.0.weight"][:, :, 0, 0])
        mean, var = w[f"convolutions.{i}.1.running_mean"], w[f"convolutions.{i}.1.running_var"]
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        x = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-5).sqrt()
        x = x * w[f"convolutions.{i}.1.weight"].view(-1, 1, 1) + w[f"convolutions.{i}.1.bias"].view(-1, 1, 1)
        side = {"keep_one": 16, "keep_two": 8}[encoder]
        fed[encoder] = F.interpolate(x.clamp_min(0), (side, side), mode="bilinear", align_corners=False)
        assert float(fed[encoder].abs().mean()) > 0.05
    seen = F.avg_pool2d(passed(noisy, fed)["last"], 2)
    with torch.no_grad():
        torch.testing.assert_close(made(images()), made.head(seen), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(made(images()), made.head(F.avg_pool2d(maps["last"], 2)), atol=1e-2)


def test_in_our_network_the_next_block_and_the_skip_read_the_sum() -> None:
    model = unet()
    made = feed(model, block="output_blocks.3", timestep=90).eval()
    assert made.feedback == {"input_blocks.1": "output_blocks.2", "input_blocks.3": "output_blocks.0"}
    t = torch.full((3,), 90)

    def passed(x: Tensor, fed: dict[str, Tensor]) -> dict[str, Tensor]:
        emb = model.time_embed(timestep_embedding(t, 32))
        h, skips, found = x, [], {}
        for i, block in enumerate(model.input_blocks):
            h = block(h, emb) + fed.get(f"input_blocks.{i}", 0)
            skips.append(h)
        h = model.middle_block(h, emb)
        for i, block in enumerate(model.output_blocks):
            h = found[f"output_blocks.{i}"] = block(torch.cat([h, skips.pop()], dim=1), emb)
        return found

    with torch.no_grad():
        noisy = x_t(images(), 90)
        maps = passed(noisy, {})
        fed = {
            encoder: convolution(maps[decoder])
            for (encoder, decoder), convolution in zip(made.feedback.items(), made.convolutions, strict=True)
        }
        seen = F.adaptive_avg_pool2d(passed(noisy, fed)["output_blocks.3"], 4)
        torch.testing.assert_close(made(images()), made.head(seen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("block", ["middle_block", "output_blocks.1"])
def test_fed_with_nothing_it_is_the_attention_head_on_plain_features(block: str, training: bool) -> None:
    model, indices = unet(), torch.tensor([7, 3, 11])
    made = feed(model, zero=True, block=block, timestep=20).train(training)
    one = AttentionHead(64, 4, 5, width=16, heads=2)
    one.load_state_dict(made.head.state_dict())
    (maps,) = DiffusionFeatures(model, Schedule.linear(), [block], (20,), pool=4)(images(), indices).values()
    assert torch.equal(made(images(), indices), one(maps))


def test_both_passes_see_the_same_noise() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def call(model: nn.Module, x: Tensor, t: Tensor) -> Any:
        seen.append((x, t))
        return model(x, t)

    made = feed(call=call, timestep=300)
    seen.clear()
    before = torch.get_rng_state()
    made(images())
    made(images(), draw=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(seen) == 4
    for (x, t), draw in zip(seen, (0, 0, 4, 4), strict=True):
        torch.testing.assert_close(x, x_t(images(), 300, draw))
        assert t.tolist() == [300] * 3
    assert torch.equal(seen[0][0], seen[1][0])
    made.eval()
    torch.testing.assert_close(
        made(images())[1:2], made(images()[1:2], torch.tensor([1])), rtol=1e-4, atol=1e-5
    )


def test_the_first_pass_has_no_graph_and_ends_early() -> None:
    model = unet()
    made = feed(model, block="middle_block", feedback={2: 7})
    ran: list[tuple[str, bool]] = []
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: ran.append((name, out.requires_grad))
        )
        for name in block_names(model)
    ]
    made(images())
    for hook in hooks:
        hook.remove()
    # Hooks that were there before see what the network gave; the sum comes behind them.
    first = [(name, False) for name in block_names(model)[:7]]
    second = [(f"input_blocks.{i}", i > 1) for i in range(4)] + [("middle_block", True)]
    assert ran == first + second


@pytest.mark.parametrize("autocast", [False, True])
def test_who_gets_a_gradient(autocast: bool) -> None:
    for freeze in (True, False):
        model = unet()
        made = feed(model, block="middle_block", freeze=freeze)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            made(images()).float().square().sum().backward()
        names = [name for name, p in made.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        mine = [name for name, _ in made.named_parameters() if not name.startswith("backbone.")]
        assert set(mine) <= set(names)
        reached = {".".join(name.split(".")[1:3]) for name in names if name.startswith("backbone.")}
        blocks = {f"input_blocks.{i}" for i in range(4)} | {
            "middle_block.0",
            "middle_block.1",
            "middle_block.2",
        }
        assert reached == (set() if freeze else blocks | {"time_embed.0", "time_embed.2"})
        assert all(p.requires_grad != freeze for p in model.parameters())
        untouched = [p for name, p in model.named_parameters() if name.startswith(("output", "out."))]
        assert all(p.grad is None for p in untouched)


def test_the_network_stays_in_eval_mode() -> None:
    made = feed(unet().train())
    assert made.train().training
    assert made.convolutions.training
    assert not any(module.training for module in made.backbone.modules())


def test_no_hooks_are_left() -> None:
    made = feed()
    made(images())

    def fails(model: nn.Module, x: Tensor, t: Tensor) -> Any:
        if len(made.backbone.input_blocks[1]._forward_hooks) > 0:  # type: ignore[index]
            raise RuntimeError("in the second pass")
        return model(x, t)

    made._features.call = fails
    with pytest.raises(RuntimeError, match="in the second pass"):
        made(images())
    assert all(not module._forward_hooks for module in made.modules())
    assert torch.is_grad_enabled()


def test_a_few_steps_lower_the_loss_and_leave_the_network_as_it_was() -> None:
    made = feed(timestep=10)
    before = copy.deepcopy(made.state_dict())
    x, labels = images(10), torch.arange(10) % 5
    optimizer = torch.optim.AdamW((p for p in made.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for step in range(30):
        loss = F.cross_entropy(made(x, draw=step), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("backbone."), name


def test_weights_come_back_and_copies_are_their_own() -> None:
    made = feed().eval()
    expected = made(images())
    other = feed(filled(unet()))
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.eval()(images()), expected)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for twin in (copy.deepcopy(made), torch.load(file, weights_only=False)):
        assert torch.equal(twin(images()), expected)
        with torch.no_grad():
            twin.backbone.input_blocks[0][0].weight.zero_()
        assert not torch.equal(twin(images()), expected)
        assert torch.equal(made(images()), expected)


def test_latents_and_half_precision() -> None:
    model = unet()
    made = feed(model, encode=lambda x: F.avg_pool2d(x, 2)).eval()
    small = feed(model)
    small.load_state_dict(made.state_dict())
    assert torch.equal(made(images()), small.eval()(F.avg_pool2d(images(), 2)))
    half = feed(unet().bfloat16(), example=images(1).bfloat16())
    half(images().bfloat16()).sum().backward()
    assert half.head.classifier.weight.dtype == torch.float32


def test_pairs_are_those_of_the_skips() -> None:
    """What a block of the decoder reads last is what its partner gave; ADM's are the paper's 38 - b."""
    model = unet((1, 2, 2)).eval()
    given: dict[str, Tensor] = {}
    pairs = skip_pairs(model)
    for encoder, decoder in pairs.items():
        model.get_submodule(encoder).register_forward_hook(
            lambda m, a, out, n=encoder: given.update({n: out})
        )
        model.get_submodule(decoder).register_forward_hook(
            lambda m, a, out, n=decoder: given.update({n: a[0]})
        )
    model(images(), torch.tensor(5))
    assert len(pairs) == 6
    for encoder, decoder in pairs.items():
        assert torch.equal(given[decoder][:, -given[encoder].shape[1] :], given[encoder])
    with torch.device("meta"):
        large = adm()
    names = block_names(large)
    numbers = {names.index(a) + 1: names.index(b) + 1 for a, b in skip_pairs(large).items()}
    assert numbers == {b: 38 - b for b in range(1, 19)}


def test_by_default_adm_is_fed_as_in_the_paper() -> None:
    """In small: as many blocks at as many sizes."""
    torch.manual_seed(0)
    model = UNet(2, width=8, multipliers=(1, 1, 2, 2, 4, 4), depth=2, attention=(), head_width=8)
    x = torch.randn(1, 2, 64, 64)
    made = DifFeed(model, Schedule.linear(), x, 3, block=24, width=16, heads=2)
    names = block_names(model)
    numbers = {names.index(b) + 1: names.index(a) + 1 for a, b in made.feedback.items()}
    assert numbers == {b: 38 - b for b in (36, 33, 30, 27, 24, 21)}
    assert made.block == "output_blocks.4"
    assert made(x).shape == (1, 3)


class Dit(nn.Module):
    """Without encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("model", "how", "message"),
    [
        (Dit, {"block": 2}, "Dit has no encoder and decoder that are known: give feedback="),
        (unet, {"feedback": {}}, "no feedback: give"),
        (unet, {"block": 3}, "feedback into input_blocks.3 never comes to input_blocks.2"),
        (unet, {"feedback": {5: 8}}, "feedback into middle_block never comes to middle_block"),
        (unet, {"feedback": {"input_blocks.9": "output_blocks.1"}}, "no block 'input_blocks.9' in UNet"),
        (unet, {"block": 12}, "block 12: UNet has 1 to 9"),
        (unet, {"timestep": 1000}, "timestep 1000 is out of range"),
        (unet, {"pool": 0}, "pool must be at least 1"),
        (two_levels, {"block": "deep", "feedback": {"keep_one": "unused"}}, "no block 'unused'"),
    ],
)  # fmt: skip
def test_what_is_unsuitable_is_refused(model: Any, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        feed(model(), **how)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, UnknownBlock) == ("no block" in message or "has 1 to" in message)


def test_things_of_another_kind_are_named() -> None:
    for example in (64, torch.zeros(2, 32, 32)):
        with pytest.raises(ValueError, match=r"^example must be images \(B, C, H, W\)"):
            DifFeed(unet(), Schedule.linear(), example, 5, block="middle_block")  # type: ignore[arg-type]
    with pytest.raises(UnknownBlock, match=r"a block is a name or a number, not \[10\]"):
        feed(unet(), block=[10])
    with pytest.raises(TypeError, match=r"not the Denoiser around it: give denoiser.backbone"):
        feed(Denoiser(unet()))


def test_wrong_images() -> None:
    with pytest.raises(ValueError, match="2 indices for 3 images"):
        feed()(images(), torch.arange(2))
    with pytest.raises(ValueError, match="the map of middle_block is 8x4: lower pool until it is square"):
        DifFeed(unet(), Schedule.linear(), torch.zeros(1, 2, 16, 8), 5, block="middle_block")
    model = unet()
    model.spare = nn.Conv2d(2, 2, 1)
    with pytest.raises(ValueError, match="block spare did not run"):
        feed(model, feedback={"input_blocks.0": "spare"})
