import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from leaven.backbones import create, first_layers

# timm notes the first convolution of every model itself: an independent oracle.
NAMES = [
    "resnet18", "resnet50d", "convnext_atto", "efficientnet_b0", "mobilenetv3_small_050", "regnety_002",
    "levit_128s", "mixer_s32_224", "coat_tiny", "crossvit_tiny_240", "cs3darknet_focus_s", "repvgg_a0",
    "mobileone_s0", "nf_resnet26", "resnetv2_18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224",
    "fastvit_t8", "test_nfnet",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_timms_own_notes(name: str) -> None:
    model = create(name)
    noted = model.pretrained_cfg["first_conv"]
    found = first_layers(model, torch.randn(1, *model.pretrained_cfg["input_size"]))
    assert sorted(found) == sorted([noted] if isinstance(noted, str) else noted)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("resnet18", "conv1"), ("mobilenet_v3_small", "features.0.0"), ("vit_b_32", "conv_proj")],
)
def test_torchvision(name: str, layer: str) -> None:
    assert first_layers(create(f"tv:{name}"), torch.randn(1, 3, 224, 224)) == [layer]


class Net(nn.Module):
    """A net whose forward is given; its layers stand in an order that has nothing to do with it."""

    def __init__(self, forward, **layers) -> None:
        super().__init__()
        self.last = nn.Conv2d(8, 8, 1)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def conv(channels: int = 3, **keywords) -> nn.Conv2d:
    return nn.Conv2d(channels, 8, 3, padding=1, **keywords)


def focus(net, x):
    parts = [x[..., i::2, j::2] for i in range(2) for j in range(2)]
    return net.last(net.stem(torch.cat(parts, 1)))


def normalised(net, x):
    x = (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1e-5)
    x *= 2
    return net.last(net.stem(F.pad(x, (1, 1, 1, 1), mode="reflect").contiguous().to(torch.float32)))


def patches(net, x):
    b, c, h, w = x.shape
    tokens = x.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return net.attention(*[net.stem(tokens)] * 3)[0]


def two_branches(net, x):
    low = F.interpolate(x, scale_factor=0.5, mode="bilinear")
    return net.last(net.fine(x)) + F.interpolate(net.coarse(low), scale_factor=2)


def coordinates(net, x):
    b, _, h, w = x.shape
    grid = torch.linspace(-1, 1, w).expand(b, 1, h, w)
    return net.last(net.stem(torch.cat([x, grid], 1)))


def assembled(net, x):
    canvas = torch.zeros(x.shape[0], 3, x.shape[2] + 4, x.shape[3] + 4)
    canvas[:, :, 2:-2, 2:-2] = x
    return net.last(net.stem(canvas))


def gated(net, x):
    return net.last(net.stem(x * x))


def activated(net, x):
    return net.last(net.stem(x.sub(0.1).relu_()))


def own_weight(net, x):
    return net.last(F.conv2d(x, net.kernel))


def standardised(net, x):
    return net.last(net.stem(x)) + net.last(F.conv2d(x, net.kernel - net.kernel.mean()))


def blurred(net, x):
    return net.last(net.stem(net.blur(x)))


def filtered(net, x):
    return net.last(net.stem(F.conv2d(x, torch.ones(3, 1, 3, 3) / 9, padding=1, groups=3)))


def shared(net, x):
    left, right = x.chunk(2, dim=3)
    return net.last(net.stem(left) + net.stem(right))


def skip(net, x):
    """The image is concatenated to a deep map, as a U-Net's last layer may."""
    return net.last(net.late(torch.cat([net.stem(x), x], 1)))


class Blur(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.ones(3, 1, 3, 3) / 9)

    def forward(self, x):
        return F.conv2d(x, self.kernel, padding=1, groups=3)


CASES = {
    "focus": (focus, {"stem": conv(12)}, ["stem"]),
    "space to depth": (lambda n, x: n.last(n.stem(F.pixel_unshuffle(x, 2))), {"stem": conv(12)}, ["stem"]),
    "normalised": (normalised, {"stem": conv()}, ["stem"]),
    "batch norm first": (
        lambda n, x: n.last(n.stem(n.norm(x))),
        {"stem": conv(), "norm": nn.BatchNorm2d(3)},
        ["stem"],
    ),
    "patches": (patches, {"attention": nn.MultiheadAttention(48, 4), "stem": nn.Linear(48, 48)}, ["stem"]),
    "attention on pixels": (
        lambda n, x: n.attention(*[x.flatten(2).transpose(1, 2)] * 3)[0],
        {"attention": nn.MultiheadAttention(3, 1, batch_first=True)},
        ["attention"],
    ),
    "two branches": (two_branches, {"coarse": conv(), "fine": conv()}, ["fine", "coarse"]),
    "coordinates": (coordinates, {"stem": conv(4)}, ["stem"]),
    "assembled": (assembled, {"stem": conv()}, ["stem"]),
    "wrapped": (
        lambda n, x: n.last(n.stem(x)),
        {"stem": nn.Sequential(nn.Identity(), conv(), nn.ReLU())},
        ["stem.1"],
    ),
    "square": (gated, {"stem": conv()}, []),
    "activation": (activated, {"stem": conv()}, []),
    "weight of the root": (own_weight, {"kernel": nn.Parameter(torch.randn(8, 3, 1, 1))}, [""]),
    "derived weight": (
        standardised,
        {
            "stem": nn.utils.parametrizations.weight_norm(conv()),
            "kernel": nn.Parameter(torch.randn(8, 3, 1, 1)),
        },
        ["stem", ""],
    ),
    "blur": (blurred, {"stem": conv(), "blur": Blur()}, ["stem"]),
    "filter of the root": (filtered, {"stem": conv()}, ["stem"]),
    "shared": (shared, {"stem": conv()}, ["stem"]),
    "skip": (skip, {"stem": conv(), "late": conv(11)}, ["stem", "late"]),
    "keyword": (lambda n, x: n.last(n.stem(input=x)), {"stem": conv()}, ["stem"]),
}


@pytest.mark.parametrize("case", CASES)
def test_follows_the_input(case: str) -> None:
    forward, layers, expected = CASES[case]
    net = Net(forward, **layers)
    assert first_layers(net, torch.randn(2, 3, 16, 16)) == expected
    assert first_layers(net.requires_grad_(False), torch.randn(2, 3, 16, 16)) == expected
    assert not any(p.requires_grad for p in net.parameters())


def test_leaves_no_trace() -> None:
    model = create("resnet18").train()
    model.layer1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        first_layers(model, torch.randn(1, 4, 64, 64))
    torch.set_rng_state(state)
    first_layers(model, torch.ones(1, 3, 64, 64))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert not model.layer1.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.slow
def test_agrees_with_timms_own_notes_everywhere() -> None:
    """Smallest name per module, by the length of its number: enough variety without building every model."""
    wrong = {}
    for module in timm.list_modules():
        name = min(timm.list_models(module=module), key=lambda n: (len(n), n))
        with torch.device("meta"):
            size = sum(p.numel() for p in timm.create_model(name).parameters())
        if size > 60e6:
            continue
        model = create(name)
        noted = model.pretrained_cfg.get("first_conv")
        if not noted:
            continue  # csatv2, whose stem works on DCT coefficients, notes none
        found = first_layers(model, torch.randn(1, *model.pretrained_cfg["input_size"]))
        if sorted(found) != sorted([noted] if isinstance(noted, str) else noted):
            wrong[name] = (found, noted)
    assert wrong == {}
