"""Diffusion features of diffusers' models, and our U-Net against theirs on shared weights. Needs diffusers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leaven.pretext.diffusion import DifFeed, DiffusionFeatures, Schedule, UNet, open_model
from leaven.pretext.diffusion.blocks import as_map, skip_pairs
from leaven.pretext.diffusion.features import keyed_noise

diffusers = pytest.importorskip("diffusers", reason='needs diffusers: pip install "leaven[diffusion]"')


def images(n: int = 3, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, 16, 16, generator=torch.Generator().manual_seed(1))


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def text_unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=3, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def dit() -> Any:
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=3, num_layers=3, sample_size=16, patch_size=2,
        num_embeds_ada_norm=10,
    )  # fmt: skip


MODELS = {"UNet2DModel": unet, "UNet2DConditionModel": text_unet, "DiT": dit}


@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_plain_hooks(name: str) -> None:
    model = MODELS[name]().eval()
    scheduler = diffusers.DDPMScheduler()
    extract = DiffusionFeatures(model, scheduler, timesteps=(90,), pool=None)
    found = extract(images())
    kept: dict[str, Any] = {}
    for block in extract.blocks:
        model.get_submodule(block).register_forward_hook(
            lambda m, a, out, block=block: kept.update({block: out})
        )
    noise = torch.stack([keyed_noise(0, i, 90, 0, (3, 16, 16)) for i in range(3)])
    t = torch.full((3,), 90)
    noisy = scheduler.add_noise(images(), noise, t)
    more: dict[str, Any] = {}
    if name == "UNet2DConditionModel":
        more["encoder_hidden_states"] = torch.zeros(3, 1, 8)
    if name == "DiT":
        more["class_labels"] = torch.full((3,), 10)
    with torch.no_grad():
        model(noisy, t, **more)
    assert len(found) == len(extract.blocks) == {"UNet2DModel": 8, "UNet2DConditionModel": 8, "DiT": 3}[name]
    for cell, value in found.items():
        torch.testing.assert_close(
            value, as_map(kept[cell.block], (16, 16), cell.block), rtol=1e-4, atol=1e-5
        )


def test_early_exit_is_the_full_pass() -> None:
    model = unet()
    how: dict[str, Any] = {"blocks": ["mid_block", "up_blocks.0.resnets.0"], "timesteps": (20,)}
    early, full = (
        DiffusionFeatures(model, diffusers.DDPMScheduler(), early_exit=early, **how)(images())
        for early in (True, False)
    )
    assert all(torch.equal(early[cell], full[cell]) for cell in full)


def test_our_schedule_is_theirs() -> None:
    theirs = Schedule.of(diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02))
    torch.testing.assert_close(theirs.alphas_cumprod, Schedule.linear().alphas_cumprod, rtol=1e-5, atol=1e-7)
    cosine = Schedule.of(diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    torch.testing.assert_close(cosine.alphas_cumprod, Schedule.cosine().alphas_cumprod, rtol=1e-4, atol=1e-7)


def copy_block(ours: Any, theirs: Any) -> None:
    pairs = [
        (ours.in_layers[0], theirs.norm1), (ours.in_layers[2], theirs.conv1),
        (ours.emb_layers[1], theirs.time_emb_proj), (ours.out_layers[0], theirs.norm2),
        (ours.out_layers[3], theirs.conv2),
    ]  # fmt: skip
    if isinstance(ours.skip_connection, nn.Conv2d):
        pairs.append((ours.skip_connection, theirs.conv_shortcut))
    for a, b in pairs:
        b.load_state_dict(a.state_dict())


def copy_attention(ours: Any, theirs: Any) -> None:
    theirs.group_norm.load_state_dict(ours.norm.state_dict())
    width = ours.proj_out.weight.shape[0]
    for i, part in enumerate((theirs.to_q, theirs.to_k, theirs.to_v)):
        part.weight.copy_(ours.qkv.weight.view(ours.heads, 3, -1, width)[:, i].reshape(width, width))
        part.bias.copy_(ours.qkv.bias.view(ours.heads, 3, -1)[:, i].flatten())
    theirs.to_out[0].weight.copy_(ours.proj_out.weight[..., 0])
    theirs.to_out[0].bias.copy_(ours.proj_out.bias)


def copy_layers(ours: Any, resnets: Any, attentions: Any, resize: Any) -> None:
    """One of our blocks into the next residual block, attention and resize of theirs."""
    layers = list(ours)
    copy_block(layers.pop(0), next(resnets))
    for layer in layers:
        if hasattr(layer, "qkv"):
            copy_attention(layer, next(attentions))
        else:
            copy_block(layer, next(resize))


def test_our_network_is_theirs_on_the_same_weights() -> None:
    torch.manual_seed(0)
    ours = UNet(3, width=32, multipliers=(1, 2, 2), depth=2, attention=(2, 4), head_width=16).eval()
    theirs = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(32, 64, 64), layers_per_block=2, attention_head_dim=16,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
        norm_eps=1e-5, flip_sin_to_cos=True, freq_shift=0, attn_norm_num_groups=32,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(0.1 * torch.randn_like(p))
        theirs.time_embedding.linear_1.load_state_dict(ours.time_embed[0].state_dict())
        theirs.time_embedding.linear_2.load_state_dict(ours.time_embed[2].state_dict())
        first: Any = ours.input_blocks[0]
        theirs.conv_in.load_state_dict(first[0].state_dict())
        theirs.conv_norm_out.load_state_dict(ours.out[0].state_dict())
        theirs.conv_out.load_state_dict(ours.out[2].state_dict())
        blocks = iter(ours.input_blocks[1:])
        for down in theirs.down_blocks:
            resnets, attentions = iter(down.resnets), iter(getattr(down, "attentions", []))
            for _ in range(2):
                copy_layers(next(blocks), resnets, attentions, iter(()))
            for resize in down.downsamplers or []:
                copy_layers(next(blocks), iter([resize]), iter(()), iter(()))
        middle: Any = ours.middle_block
        copy_block(middle[0], theirs.mid_block.resnets[0])
        copy_attention(middle[1], theirs.mid_block.attentions[0])
        copy_block(middle[2], theirs.mid_block.resnets[1])
        blocks = iter(ours.output_blocks)
        for up in theirs.up_blocks:
            resnets, attentions = iter(up.resnets), iter(getattr(up, "attentions", []))
            for _ in range(3):
                copy_layers(next(blocks), resnets, attentions, iter(up.upsamplers or []))
        t = torch.tensor([3, 90, 700])
        torch.testing.assert_close(ours(images(), t), theirs(images(), t).sample, rtol=1e-4, atol=1e-4)
    a = DiffusionFeatures(ours, Schedule.linear(), ["middle_block"], timesteps=(90,))(images())
    b = DiffusionFeatures(theirs, Schedule.linear(), ["mid_block"], timesteps=(90,))(images())
    torch.testing.assert_close(next(iter(a.values())), next(iter(b.values())), rtol=1e-4, atol=1e-4)


def test_folders_are_opened(tmp_path: Path) -> None:
    model = unet()
    model.save_pretrained(tmp_path / "model")
    opened = open_model(tmp_path / "model")
    for a, b in zip(opened.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(opened.schedule) == 1000
    pipe = diffusers.DDPMPipeline(model, diffusers.DDPMScheduler(num_train_timesteps=200))
    pipe.save_pretrained(tmp_path / "pipeline")
    opened = open_model(tmp_path / "pipeline")
    assert len(opened.schedule) == 200
    assert opened.encode is None
    (tmp_path / "model" / "config.json").write_text('{"_class_name": "Nothing"}')
    with pytest.raises(ValueError, match="cannot open") as error:
        open_model(tmp_path / "model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel"])
def test_feedback_goes_where_the_skips_come_from(name: str) -> None:
    """With and without attention, whose output is the skip there; the added maps are seen by the decoder."""
    model = MODELS[name]().eval()
    given: dict[str, Tensor] = {}
    pairs = skip_pairs(model)
    assert len(pairs) == 4
    made = DifFeed(
        model, diffusers.DDPMScheduler(), images(1), 5, block="mid_block", width=16, heads=2
    ).eval()
    assert made.feedback == {
        "down_blocks.0.resnets.0": "up_blocks.1.resnets.0",
        "down_blocks.1.attentions.0": "up_blocks.0.attentions.0",
    }
    with torch.no_grad():
        for convolution in made.convolutions:
            convolution[1].bias.fill_(0.5)  # type: ignore[index]

    def first(output: Any) -> Tensor:
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    for encoder, decoder in pairs.items():
        reader = decoder.replace("attentions", "resnets")
        model.get_submodule(encoder).register_forward_hook(
            lambda m, a, out, n=encoder: given.update({n: first(out)})
        )
        model.get_submodule(reader).register_forward_hook(
            lambda m, a, out, n=decoder: given.update({n: a[0]})
        )
    x, t = images(), torch.full((3,), 90)
    with torch.no_grad():
        made._features.call(model, x, t)
    for encoder, decoder in pairs.items():
        assert torch.equal(given[decoder][:, -given[encoder].shape[1] :], given[encoder]), encoder
    plain = feedless(made)
    with torch.no_grad():
        assert torch.equal(plain(x), made.head(one_map(made, x)))
        assert not torch.allclose(made(x), plain(x), atol=1e-3)
    made(x).sum().backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters())


def feedless(made: DifFeed) -> DifFeed:
    twin = copy.deepcopy(made)
    with torch.no_grad():
        for convolution in twin.convolutions:
            convolution[0].weight.zero_()  # type: ignore[index]
            convolution[1].bias.zero_()  # type: ignore[index]
    return twin


def one_map(made: DifFeed, x: Tensor) -> Tensor:
    features = DiffusionFeatures(made.backbone, diffusers.DDPMScheduler(), ["mid_block"], (90,), pool=16)
    return next(iter(features(x).values()))


def test_a_transformer_has_nothing_to_feed() -> None:
    with pytest.raises(ValueError, match="DiTTransformer2DModel has no encoder and decoder that are known"):
        DifFeed(dit(), diffusers.DDPMScheduler(), images(1), 5, block=2)
