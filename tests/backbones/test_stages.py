import copy
import itertools
import pickle
import random
import re
import threading

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import nn

from leaven.backbones import NoStages, create, features, stages, unused_parameters
from leaven.backbones.trace import reduction
from tests.backbones.hand_written import network_in_network

# --- timm: its own features_only wrapper, given the same weights, is the oracle ------------------------------


def wrapper(model: nn.Module, name: str) -> nn.Module:
    """timm's features_only wrapper of `name` with the weights of the plain `model`."""
    wrapped = timm.create_model(name, features_only=True)
    plain = {key.replace(".", "_"): value for key, value in model.state_dict().items()}

    def twin(key: str) -> torch.Tensor:  # wrappers put a prefix before the keys, and flatten Sequentials
        return plain[re.sub(r"^(model|body)\.", "", key).replace(".", "_")]

    wrapped.load_state_dict({key: twin(key) for key in wrapped.state_dict()}, strict=True)
    return wrapped


def compare_with_features_only(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = create(name).eval().double()
    found = stages(model)
    images = torch.randn(2, 3, size, size, dtype=torch.double)
    wrapped = wrapper(model, name).eval().double()
    with torch.no_grad():
        maps = dict(zip((s.reduction for s in found), features(model, images, found), strict=True))
        expected = dict(
            zip(wrapped.feature_info.reduction(), wrapped(images), strict=True)
        )  # last at each reduction
        alone = [features(model, images, [stage])[0] for stage in found]
    channels = dict(zip(wrapped.feature_info.reduction(), wrapped.feature_info.channels(), strict=True))
    assert [s.reduction for s in found] == sorted(maps)
    assert {s.reduction: s.channels for s in found if s.reduction in channels} == channels
    for stage, one in zip(found, alone, strict=True):  # nothing after a map changes it in place
        assert torch.equal(one, maps[stage.reduction])
        assert one.shape[:2] == (2, stage.channels)
    for side, theirs in expected.items():
        ours = maps[side]
        assert torch.equal(ours, theirs if theirs.shape == ours.shape else theirs.permute(0, 3, 1, 2))


FAMILIES = [
    ("resnet18", 64),
    ("resnetv2_18", 64),
    ("convnext_atto", 64),
    ("efficientnet_b0", 64),
    ("mobilenetv3_small_050", 64),
    ("regnetx_002", 64),
    ("densenet121", 64),
    ("dla46x_c", 64),
    ("hrnet_w18_small", 64),
    ("cs3darknet_focus_s", 64),
    ("inception_next_atto", 64),
    ("swin_tiny_patch4_window7_224", 224),
    ("pvt_v2_b0", 64),
    ("vit_tiny_patch16_224", 224),
    ("legacy_xception", 96),  # timm wraps this one with hooks only
    ("inception_v3", 139),  # borders are cropped: 35 of 299
]


@pytest.mark.parametrize(("name", "size"), FAMILIES)
def test_timm_maps_are_those_of_features_only(name: str, size: int) -> None:
    if name in ("hrnet_w18_small", "legacy_xception") and Version(timm.__version__) < Version("1.0.31"):
        pytest.skip("older timm's features_only gives other maps of this network")
    compare_with_features_only(name, size)


# The smallest model of each timm module that has four strides or more.
HIERARCHICAL = [
    "halonet_h1", "test_byobnet", "coat_tiny", "test_convnext", "cpubone_nano", "csatv2",
    "cs3darknet_focus_s", "cspnext_tiny", "davit_tiny", "densenet121", "dla46x_c", "dpn48b",
    "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "test_efficientnet",
    "efficientvit_b0", "fasternet_t0", "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_050",
    "hardcorenas_b", "hgnetv2_b0", "hiera_tiny_224", "sam2_hiera_tiny", "hrnet_w18_small", "iformer_t",
    "inception_next_atto", "inception_resnet_v2", "inception_v3", "inception_v4",
    "lcnetv2_small", "lowformer_b0", "test_mambaout", "test_coatnet", "poolformerv2_s12",
    "mobilenetv3_small_050", "mobilevit_xxs", "mvitv2_tiny", "nasnetalarge", "nextvit_small",
    "test_nfnet", "pnasnet5large", "pvt_v2_b0", "rdnet_tiny", "regnetx_002", "repghostnet_050",
    "repvit_m1", "res2next50", "resnest14d", "test_resnet", "resnetv2_18", "rexnet_100", "selecsls42",
    "legacy_seresnet18", "skresnet18", "starnet_s050", "swiftformer_xs", "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window16_256", "swinv2_cr_tiny_224", "tiny_vit_5m_224", "tresnet_m", "twins_svt_small",
    "vgg11", "ese_vovnet19b_slim_dw", "legacy_xception", "xception41p", "mobilenetv5_300m",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HIERARCHICAL)
def test_every_hierarchical_timm_module(name: str) -> None:
    with torch.device("meta"):
        config = timm.create_model(name).pretrained_cfg
    side = config["input_size"][-1]
    compare_with_features_only(name, side if config.get("fixed_input_size") else min(side, 256))


# --- modules that declare nothing: torchvision and hand-written ----------------------------------------------


def table(found) -> list[tuple[str, int, int]]:
    return [(stage.name, stage.channels, stage.reduction) for stage in found]


TORCHVISION = {
    "resnet18": [("relu", 64, 2), ("layer1", 64, 4), ("layer2", 128, 8), ("layer3", 256, 16), ("layer4", 512, 32)],
    "convnext_tiny": [(f"features.{2 * i + 1}", 96 * 2**i, 4 * 2**i) for i in range(4)],
    "swin_t": [*((f"features.{2 * i + 1}", 96 * 2**i, 4 * 2**i) for i in range(3)), ("permute", 768, 32)],
    "vgg11": [
        ("features.1", 64, 1), ("features.4", 128, 2), ("features.9", 256, 4), ("features.14", 512, 8),
        ("features.19", 512, 16), ("features.20", 512, 32),
    ],
    "regnet_y_400mf": [
        ("stem", 32, 2), ("trunk_output.block1", 48, 4), ("trunk_output.block2", 104, 8),
        ("trunk_output.block3", 208, 16), ("trunk_output.block4", 440, 32),
    ],
    "squeezenet1_1": [
        ("features.1", 64, 2), ("features.4", 128, 4), ("features.7", 256, 8), ("features.12", 512, 16)
    ],
    "mobilenet_v3_small": [
        ("features.0", 16, 2), ("features.1", 16, 4), ("features.3", 24, 8), ("features.8", 48, 16),
        ("features.12", 576, 32),
    ],
    "densenet121": [
        ("features.relu0", 64, 2), ("features.denseblock1", 256, 4), ("features.denseblock2", 512, 8),
        ("features.denseblock3", 1024, 16), ("features.norm5", 1024, 32),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_stages(name: str) -> None:
    assert table(stages(create(f"tv:{name}"))) == TORCHVISION[name]


def test_torchvision_resnet_maps_in_float64() -> None:
    model = create("tv:resnet18").eval().double()
    x = torch.randn(2, 3, 64, 96, dtype=torch.double)
    y = model.relu(model.bn1(model.conv1(x)))
    expected = [y, model.layer1(model.maxpool(y))]
    for layer in (model.layer2, model.layer3, model.layer4):
        expected.append(layer(expected[-1]))
    for ours, theirs in zip(features(model, x, stages(model)), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_channels_last_maps_come_out_as_nchw() -> None:
    model = create("tv:swin_t").eval().double()
    x = torch.randn(1, 3, 64, 96, dtype=torch.double)
    y = model.features[1](model.features[0](x))
    assert y.shape == (1, 16, 24, 96)
    assert torch.equal(features(model, x, stages(model))[0], y.permute(0, 3, 1, 2))


def test_a_map_that_is_overwritten_later_is_copied_first() -> None:
    model = create("tv:densenet121").eval().double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.double)
    last = stages(model)[-1]
    assert last.overwritten  # the relu after features works in place
    (found,) = features(model, x, [last])
    assert torch.equal(found, model.features(x))
    assert found.min() < 0


class Block(nn.Module):
    """Strides inside, so that it holds maps at two reductions; gates itself with a pooled map."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inner, outer, 1)
        self.conv = nn.Conv2d(outer, outer, 3, stride, 1)
        self.coarse = nn.Conv2d(outer, outer, 2, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.skip = nn.Conv2d(inner, outer, 1, stride)

    def forward(self, x):
        y = self.conv(self.reduce(x).relu())
        gate = self.pool(y).sigmoid() + F.interpolate(self.coarse(y), size=y.shape[-2:])
        return self.skip(x) + y * gate


class Nested(nn.Module):
    """A stem in a Sequential, stages in a ModuleList inside a body, an unused layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 5)
        self.unused = nn.Conv2d(3, 3, 1)
        self.body = nn.Module()
        self.body.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.body.blocks = nn.ModuleList([Block(4, 8, 2), Block(8, 8, 1), Block(8, 16, 2)])

    def forward(self, x):
        x = self.body.stem(x)
        for block in self.body.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Shared(nn.Module):
    """One activation module for all, stages in a dict-valued submodule, channels last, stride 3 and 2."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.one = nn.Conv2d(3, 6, 3, 3)
        self.two = nn.Linear(6 * 4, 10)

    def forward(self, x):
        x = self.act(self.one(x)).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(2, 3).flatten(3)
        return {"maps": self.act(self.two(x))}


def test_hand_written_nested() -> None:
    model = Nested().eval().double()
    found = stages(model)
    assert table(found) == [("body.stem", 4, 2), ("body.blocks.1", 8, 4), ("body.blocks.2", 16, 8)]
    x = torch.randn(2, 3, 32, 48, dtype=torch.double)
    stem = model.body.stem(x)
    one = model.body.blocks[1](model.body.blocks[0](stem))
    for ours, theirs in zip(features(model, x, found), [stem, one, model.body.blocks[2](one)], strict=True):
        assert torch.equal(ours, theirs)
    assert unused_parameters(model, found) == {"head.weight", "head.bias", "unused.weight", "unused.bias"}


def test_hand_written_with_a_shared_module_that_is_called_twice() -> None:
    model = Shared().eval().double()
    found = stages(model, image_size=96)
    assert table(found) == [("act", 6, 3), ("act", 10, 6)]
    assert [stage.call for stage in found] == [0, 1]
    x = torch.randn(2, 3, 24, 36, dtype=torch.double)
    one, two = features(model, x, found)
    assert torch.equal(one, model.one(x).relu())
    assert torch.equal(two, model(x)["maps"].permute(0, 3, 1, 2))
    assert torch.equal(features(model, x, found[1:])[0], two)


def test_a_wrapper_is_seen_through_and_only_its_trunk_runs() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = create("tv:vgg11", num_classes=4)

        def forward(self, pixel_values):
            return {"logits": self.net(pixel_values)}

    model = Wrapper().eval()
    found = stages(model)
    assert table(found) == [(f"net.{name}", c, r) for name, c, r in TORCHVISION["vgg11"]]
    ran = []
    model.net.classifier.register_forward_hook(lambda *_: ran.append(1))
    features(model, torch.randn(1, 3, 64, 64), found)
    assert ran == []


def test_forward_features_is_the_way_in_where_there_is_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 8, 2, 2)

        def forward_features(self, x):
            return self.two(self.one(x))

        def forward(self, x):
            raise AssertionError("the head must not run")

    model = Net().eval()
    found = stages(model)
    assert table(found) == [("one", 4, 2), ("two", 8, 4)]
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(features(model, x, found)[1], model.two(model.one(x)))


class Lines(nn.Module):
    """Two strided convolutions and what `forward` makes of them."""

    def __init__(self, forward, width: int = 4) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, width, 2, 2), nn.Conv2d(width, 2 * width, 2, 2)
        self.act = nn.ReLU()
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def test_a_map_that_the_pass_itself_overwrites() -> None:
    model = Lines(lambda net, x: net.two(net.one(x).sub_(5))).eval()
    found = stages(model)
    assert [stage.overwritten for stage in found] == [True, False]
    x = torch.randn(1, 3, 8, 8)
    one, two = features(model, x, found)
    assert torch.equal(one, model.one(x))
    assert torch.equal(two, model(x))
    (one.sum() + two.sum()).backward()
    assert model.one.weight.grad is not None


def test_a_container_that_strides_after_its_parts_is_a_map_too() -> None:
    body = Lines(lambda net, x: F.avg_pool2d(net.two(net.one(x)), 2))
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1))
    assert table(stages(model)) == [("0.one", 4, 2), ("0.two", 8, 4), ("0", 8, 8)]


def test_maps_in_a_tuple_are_found_inside_the_module_that_returns_it() -> None:
    body = Lines(lambda net, x: (net.two(net.act(net.one(x))), "aux"))
    model = Lines(lambda net, x: net.body(x)[0].mean((2, 3)))
    model.body = body
    assert table(stages(model)) == [("body.act", 4, 2), ("body.two", 8, 4)]


def test_a_trunk_that_takes_something_else_than_the_image_is_not_called_on_it() -> None:
    model = Lines(lambda net, x: net.body(2 * x - 1)).eval()
    model.body = Lines(lambda net, x: net.two(net.one(x)))
    x = torch.randn(1, 3, 8, 8)
    one, two = features(model, x, stages(model))
    assert torch.equal(one, model.body.one(2 * x - 1))
    assert torch.equal(two, model(x))


@pytest.mark.parametrize("pad", [nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d])
def test_a_border_makes_no_map_of_another_reduction(pad: type[nn.Module]) -> None:
    """14 positions of a 224 px image and a border are 16: as many as a reduction of 14 would give."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.pad, self.mix = nn.Conv2d(4, 8, 4, 4), pad(1), nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix(self.pad(self.down(x)))

    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), Block())
    assert [(stage.name, stage.reduction) for stage in stages(model)] == [("0", 4), ("1", 16)]


def test_calls_before_the_trunk_are_counted() -> None:
    body = Lines(lambda net, x: net.act(net.two(net.act(net.one(x)))))
    model = Lines(lambda net, x: (net.body.act(x[:, :1]), net.body(x))[1]).eval()
    model.body = body
    found = stages(model)
    assert table(found) == [("body.act", 1, 1), ("body.act", 4, 2), ("body.act", 8, 4)]
    x = torch.randn(1, 3, 8, 8)
    assert [m.shape[1] for m in features(model, x, found)] == [1, 4, 8]


def test_the_layout_is_known_even_where_channels_look_like_a_side() -> None:
    model = Lines(lambda net, x: net.act(net.one(F.avg_pool2d(x, 2)).permute(0, 2, 3, 1)), width=56).eval()
    (found,) = [stage for stage in stages(model) if stage.name == "act"]
    assert (found.channels, found.reduction, found.channels_last) == (56, 4, True)


def test_it_is_the_eval_mode_that_is_looked_at() -> None:
    model = Lines(lambda net, x: net.norm(net.two(net.one(x)).mean((2, 3))))
    model.norm = nn.BatchNorm1d(8)  # refuses a batch of one in train mode
    assert len(stages(model.train())) == 2
    assert model.norm.training


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16, 32])
def test_reduction_of_padded_maps(side: int) -> None:
    for height, width in itertools.product(range(192, 320, 8), repeat=2):
        floor, ceil = (height // side, width // side), (-(-height // side), -(-width // side))
        assert reduction((height, width), floor, side) == side
        assert reduction((height, width), ceil, side) == side
        if height % side == 0 and width % side == 0:
            assert reduction((height, width), floor) == side


@pytest.mark.parametrize("name", ["inception_v3", "alexnet"])
def test_reductions_of_cropped_maps_are_powers_of_two(name: str) -> None:
    sides = [stage.reduction for stage in stages(create(f"tv:{name}"))]
    assert sides == [2, 4, 8, 16, 32][-len(sides) :]


def test_reduction_refuses_what_is_no_map() -> None:
    assert reduction((224, 256), (1, 1)) is None
    assert reduction((224, 256), (49, 49)) is None  # attention among 7x7 tokens
    assert reduction((224, 256), (256, 224)) is None
    assert reduction((224, 224), (448, 448)) is None
    assert reduction((224, 256), (25, 32)) is None  # nothing crops one side alone
    assert reduction((224, 256), (64, 72)) is None  # nor grows both
    assert reduction((224, 256), (25, 29)) == 8
    assert reduction((224, 256), (16, 18)) == 14


# --- errors ---------------------------------------------------------------------------------------------------


class Picky(nn.Module):
    """For 48-pixel images only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, 2)
        self.head = nn.Linear(4 * 24 * 24, 2)

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create("tv:vit_b_32"), "works on a sequence of tokens after conv_proj"),
        (
            lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)),
            "returned no feature map",
        ),
        (lambda: Picky(), "did not run on a test image; pass image_size"),
        (
            lambda: timm.create_model("resnet18", features_only=True),
            "features_only wrapper; pass the plain model",
        ),
        (lambda: timm.create_model("legacy_xception", features_only=True), "features_only wrapper"),
        (lambda: timm.create_model("vgg11", features_only=True), "features_only wrapper"),
    ],
)
def test_refusals_are_one_line(make, message: str) -> None:
    with pytest.raises(NoStages) as caught:
        stages(make())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_image_size_serves_a_net_of_one_size() -> None:
    assert table(stages(Picky(), image_size=48)) == [("conv", 4, 2)]
    assert table(stages(Picky(), image_size=(48, 48))) == [("conv", 4, 2)]


def test_nets_of_one_size_get_the_size_that_they_note() -> None:
    assert stages(timm.create_model("vit_tiny_patch16_384"))[0].channels == 192
    assert len(stages(create("mvitv2_tiny"))) == 4  # an IndexError at any other size
    assert stages(timm.create_model("vit_tiny_patch16_224", img_size=96))[0].channels == 192


def test_grey_images() -> None:
    for model in (create("resnet18", in_chans=1), nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 1))):
        assert stages(model)[0].reduction == 2


def test_a_stage_that_does_not_run_is_an_error() -> None:
    model = create("tv:resnet18").eval()
    found = stages(model)
    model.layer4 = nn.Identity()
    model.fc = nn.Linear(256, 2)
    assert len(features(model, torch.randn(1, 3, 64, 64), found)) == 5  # a module of that name did run
    model.forward = lambda x: model.layer1(x)
    with pytest.raises(RuntimeError, match=r"^relu of ResNet was not run.*[^\n]$"):
        features(model, torch.randn(1, 64, 8, 8), found)


# --- no trace left, no crossing -------------------------------------------------------------------------------


class Restless(nn.Module):
    """Changes buffers and draws random numbers in every forward, in whatever mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, 2)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(1), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.mean = self.mean + x.mean()  # rebinds the buffer
        random.random()
        return self.norm(self.conv(x)) + torch.randn(1)


@pytest.mark.parametrize(
    "call", [stages, lambda m: unused_parameters(m, stages(m))], ids=["stages", "unused"]
)
@pytest.mark.parametrize("make", [Restless, lambda: create("tv:resnet18"), lambda: create("resnet18")])
def test_the_model_is_left_as_it_was(make, call) -> None:
    model = make().train()
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    model.get_parameter(next(n for n, _ in model.named_parameters())).grad = (
        torch.ones(1)[0].expand_as(next(model.parameters())).clone()
    )
    model.register_buffer("odd", torch.full((1,), float("nan")))
    buffers = {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    weights = {name: p.clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    keys = set(vars(model))
    call(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002
    for name, b in model.named_buffers():
        assert id(b) == buffers[name][0]
        torch.testing.assert_close(b, buffers[name][1], rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert [m.training for m in model.modules()] == modes
    assert set(vars(model)) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    pickle.dumps(model)


def test_hooks_go_even_when_the_pass_fails() -> None:
    model = create("tv:resnet18").eval()
    found = stages(model)
    with pytest.raises(RuntimeError):
        features(model, torch.randn(1, 5, 64, 64), found)
    assert not any(m._forward_hooks for m in model.modules())

    mine = model.layer1.register_forward_hook(lambda module, args, output: None)
    features(model, torch.randn(1, 3, 64, 64), found)
    assert list(model.layer1._forward_hooks) == [mine.id]


def test_stages_serve_a_copy_of_the_model() -> None:
    model = create("tv:resnet18").eval()
    found = stages(model)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.layer4[1].bn2.weight)
    x = torch.randn(1, 3, 64, 64)
    a, b = features(model, x, found), features(twin, x, found)
    assert torch.equal(a[3], b[3])
    assert not torch.equal(a[4], b[4])


@pytest.mark.parametrize("name", ["tv:resnet18", "resnet18"])
def test_two_threads_on_one_model_do_not_mix(name: str) -> None:
    model = create(name).eval()
    found = stages(model)
    batches = [torch.randn(1, 3, 32, 32) for _ in range(2)]
    with torch.no_grad():
        expected = [features(model, x, found) for x in batches]
    # a barrier inside the network forces the two passes to interleave at every stage
    barrier = threading.Barrier(2, timeout=60)

    def wait(*_) -> None:
        barrier.wait()

    waits = [model.get_submodule(layer).register_forward_hook(wait) for layer in ("layer1", "layer3")]
    results: list[list[torch.Tensor]] = [[], []]

    def work(i: int) -> None:
        with torch.no_grad():
            results[i] = features(model, batches[i], found)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in waits:
        handle.remove()
    for ours, theirs in zip(results, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not any(m._forward_hooks for m in model.modules())


# --- objects that only look like a tensor, and torch.compile --------------------------------------------------


class Duck:
    """Not a tensor: carries one, and answers torch functions and methods with ducks."""

    def __init__(self, inside: torch.Tensor) -> None:
        self.inside = inside

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return wrap(func(*unwrap(args), **unwrap(kwargs or {})))

    def __getattr__(self, name: str):
        found = getattr(self.inside, name)
        return (lambda *a, **k: wrap(found(*unwrap(a), **unwrap(k)))) if callable(found) else found

    def __add__(self, other):
        return Duck(self.inside + unwrap(other))

    def __iadd__(self, other):
        return self + other

    def __mul__(self, other):
        return Duck(self.inside * unwrap(other))

    __radd__, __rmul__ = __add__, __mul__

    def __bool__(self) -> bool:
        raise AssertionError("looked at")


def unwrap(x):
    if isinstance(x, Duck):
        return x.inside
    if isinstance(x, (list, tuple)):
        return type(x)(unwrap(item) for item in x)
    return {key: unwrap(value) for key, value in x.items()} if isinstance(x, dict) else x


def wrap(x):
    return Duck(x) if isinstance(x, torch.Tensor) else x


COMPILED = [
    "resnet18",
    "convnext_atto",
    "efficientnet_b0",
    "densenet121",
    "regnety_002",
    "tv:resnet18",
    "tv:densenet121",
    "tv:convnext_tiny",
]


@pytest.mark.parametrize("name", COMPILED)
def test_duck_typed_images_pass_through(name: str) -> None:
    model = create(name).eval()
    found = stages(model)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = features(model, x, found)
        maps = features(model, Duck(x), found)
    assert all(type(m) is Duck for m in maps)
    assert all(torch.equal(m.inside, e) for m, e in zip(maps, expected, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if "densenet" in n else ())
        for n in [*COMPILED, "nested", "shared"]
    ],
)
def test_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    model = {"nested": Nested, "shared": Shared}[name]() if name in ("nested", "shared") else create(name)
    found = stages(model, image_size=96)
    x = torch.randn(2, 3, 96, 96)
    compiled = torch.compile(lambda x: features(model, x, found), backend="eager", fullgraph=True)
    twin = copy.deepcopy(model)
    torch.manual_seed(0)  # train mode: blocks are dropped, and batch statistics move
    maps = compiled(x)
    torch.manual_seed(0)
    expected = features(twin, x, found)
    assert all(torch.equal(m, e) for m, e in zip(maps, expected, strict=True))
    assert all(torch.equal(b, twin.get_buffer(key)) for key, b in model.named_buffers())
    assert not any(m._forward_hooks for m in model.modules())
    for outputs in (maps, expected):
        torch.stack([m.square().mean() for m in outputs]).sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.14"),
    reason="a compiled call leaves modules that take no hooks there",
)
def test_compiling_in_train_and_eval_mode_and_again_after_an_eager_call() -> None:
    torch._dynamo.reset()
    model = create("tv:resnet18")
    found = stages(model)
    compiled = torch.compile(lambda x: features(model, x, found), backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 64, 64)
    for training in (False, True, False):
        model.train(training)
        compiled(x)
        model.eval()
        assert all(torch.equal(a, b) for a, b in zip(features(model, x, found), compiled(x), strict=True))


# --- unused parameters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "tv:shufflenet_v2_x0_5"])
def test_unused_parameters_are_those_that_no_map_depends_on(name: str) -> None:
    torch.manual_seed(0)
    model = create(name, num_classes=3).eval().double()
    for p in model.parameters():  # zero gains would hide a dependence
        nn.init.normal_(p, std=0.5)
    found = stages(model)
    found = found[:-1] if name == "test_resnet" else found
    x = torch.randn(1, 3, 64, 64, dtype=torch.double)
    idle = set()
    with torch.no_grad():
        before = features(model, x, found)
        for key, p in model.named_parameters():
            kept = p.clone()
            p.add_(torch.randn_like(p))
            if all(torch.equal(a, b) for a, b in zip(before, features(model, x, found), strict=True)):
                idle.add(key)
            p.copy_(kept)
    assert idle
    assert unused_parameters(model, found) == idle


def test_unused_parameters_of_frozen_models() -> None:
    model = create("test_resnet", num_classes=3)
    found = stages(model)
    model.requires_grad_(False)
    assert unused_parameters(model, found) == set()
    model.fc.requires_grad_(True)
    assert unused_parameters(model, found) == {"fc.weight", "fc.bias"}


def test_a_net_that_yields_no_maps_is_not_asked_again_with_other_images() -> None:
    class Tokens(nn.Module):
        """A patch embedding and blocks on tokens; at 32 pixels, a map."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block = nn.Conv2d(3, 4, 16, 16), nn.Linear(4, 999)
            self.sizes: list[int] = []

        def forward(self, x):
            self.sizes.append(x.shape[-1])
            x = self.embed(x)
            return x if x.shape[-1] == 2 else self.block(x.flatten(2).transpose(1, 2))

    model = Tokens()
    with pytest.raises(NoStages, match="sequence of tokens after embed"):
        stages(model)
    assert len(model.sizes) == 1


def test_few_tokens_are_tokens_too() -> None:
    """A large patch embedding before small blocks: it is the larger part of the network and still no feature map."""
    model = network_in_network(image_size=64)
    embed = sum(p.numel() for p in model.embed.parameters())
    assert 2 * embed > sum(p.numel() for p in model.parameters())
    with pytest.raises(NoStages, match="works on a sequence of tokens after embed"):
        stages(model)
