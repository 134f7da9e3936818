import pytest
import timm
import torch
import torchvision.models
from torch import nn
from torchvision.ops import StochasticDepth

from leaven.backbones import UnknownBackbone, create, data_config

NETS = """
from torch import nn

def plain():
    return nn.Conv2d(3, 8, 3)

def flexible(in_chans=3, num_classes=0, image_size=None):
    net = nn.Conv2d(in_chans, 8, 3)
    net.seen = (num_classes, image_size)
    return net

def wrong():
    return [1, 2]

def needy(width, num_classes=0):
    return nn.Conv2d(3, width, 3)

instance = nn.Conv2d(3, 8, 3)
"""


@pytest.fixture
def nets(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_atto", "vit_ti", "swin_t", "mobilenetv3_small_050", "levit_128s"]
)
def test_timm_models_are_plain(name: str) -> None:
    model = create(name)
    plain = timm.create_model(type_name(name), num_classes=0)
    assert type(model) is type(plain)
    plain.load_state_dict(model.state_dict(), strict=True)


def type_name(name: str) -> str:
    return {"vit_ti": "vit_tiny_patch16_224", "swin_t": "swin_tiny_patch4_window7_224"}.get(name, name)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_torchvision_models_are_plain_and_keep_their_classifier(name: str) -> None:
    model = create(f"tv:{name}")
    plain = torchvision.models.get_model(name, weights=None)
    assert type(model) is type(plain)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert create(f"tv:{name}", num_classes=7)(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_arguments_reach_timm() -> None:
    model = create("resnet18", in_chans=5, num_classes=7)
    assert model(torch.zeros(2, 5, 64, 64)).shape == (2, 7)
    rates = {
        m.drop_prob for m in create("convnext_atto", drop_path_rate=0.3).modules() if hasattr(m, "drop_prob")
    }
    assert max(rates) == pytest.approx(0.3)


def test_one_size_nets_take_other_sizes() -> None:
    assert create("vit_ti", image_size=96).patch_embed.img_size == (96, 96)
    for name in ("vit_ti", "swin_t"):
        assert create(name)(torch.zeros(1, 3, 160, 160)).shape[0] == 1
    assert create("resnet18", image_size=96)(torch.zeros(1, 3, 64, 64)).shape == (1, 512)
    assert create("tv:vit_b_32", image_size=64).image_size == 64


def test_naflex_names_its_unknown_arguments_differently() -> None:
    assert create("naflexvit_base_patch16_gap").state_dict()


def largest_rate(model: nn.Module) -> float:
    return max(m.p for m in model.modules() if isinstance(m, StochasticDepth))


def test_drop_path_of_torchvision() -> None:
    with torch.device("meta"):  # only the rates matter
        plain = [m.p for m in torchvision.models.swin_t().modules() if isinstance(m, StochasticDepth)]
        mine = [
            m.p for m in create("tv:swin_t", drop_path_rate=0.3).modules() if isinstance(m, StochasticDepth)
        ]
        assert mine == pytest.approx([0.3 * p / max(plain) for p in plain])
        assert largest_rate(create("tv:convnext_tiny", drop_path_rate=0.4)) == pytest.approx(0.4)
        assert largest_rate(create("tv:convnext_tiny", drop_path_rate=0.0)) == 0
        assert largest_rate(create("tv:swin_t", drop_path_rate=0.0)) == 0
        assert largest_rate(create("tv:convnext_tiny")) == largest_rate(torchvision.models.convnext_tiny())
        assert create("tv:resnet18", drop_path_rate=0.0)
        assert create("vgg11", drop_path_rate=0.0)


def test_modules_and_factories(nets) -> None:
    net = nn.Conv2d(3, 8, 3)
    assert create(net) is net
    assert isinstance(create("my_nets:plain"), nn.Conv2d)
    assert create("my_nets:plain", image_size=32)  # any size will do
    net = create("my_nets:flexible", in_chans=1, num_classes=4, image_size=32)
    assert net.in_channels == 1
    assert net.seen == (4, 32)


def test_a_network_that_is_built_already_is_copied(nets) -> None:
    first, second = create("my_nets:instance"), create("my_nets:instance", image_size=32)
    first.weight.data.zero_()
    assert isinstance(second, nn.Conv2d)
    assert second.weight.any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "side"), [("googlenet", 64), ("inception_v3", 96)])
def test_torchvisions_inceptions_have_one_output(
    name: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No auxiliary classifiers, in training either; pretrained ones see the images that they were trained on."""
    model = create(f"tv:{name}", num_classes=7)
    assert model(torch.randn(2, 3, side, side)).shape == (2, 7)
    how = {"aux_logits": False, "init_weights": False, "num_classes": 7}
    plain = getattr(torchvision.models, name)(**how)
    plain.load_state_dict(model.state_dict(), strict=True)
    state = getattr(torchvision.models, name)(init_weights=False).state_dict()
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: state)
    theirs, ours = getattr(torchvision.models, name)(weights="DEFAULT"), create(f"tv:{name}", pretrained=True)
    pixels, config = torch.rand(2, 3, side, side), data_config(ours)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = theirs.eval()((pixels - mean) / std)
        own_mean, own_std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
        torch.testing.assert_close(ours.eval()((pixels - own_mean) / own_std), expected, atol=1e-4, rtol=1e-4)
    fresh = create(f"tv:{name}", pretrained=True, num_classes=7)
    assert data_config(fresh) == config
    assert fresh.fc.weight.shape[0] == 7


@pytest.mark.parametrize(
    ("backbone", "arguments", "error", "message"),
    [
        ("vgg11", {"drop_path_rate": 0.1}, ValueError, "vgg11 takes no drop_path_rate"),
        ("tv:resnet18", {"drop_path_rate": 0.1}, ValueError, "tv:resnet18 takes no drop_path_rate"),
        ("tv:resnet18", {"in_chans": 1}, ValueError, "tv:resnet18 takes 3 channels, not 1"),
        (
            nn.Identity(),
            {"pretrained": True, "in_chans": 1},
            ValueError,
            "pretrained, in_chans: not for a module",
        ),
        ("my_nets:plain", {"in_chans": 1}, ValueError, "my_nets:plain takes no in_chans"),
        ("my_nets:plain", {"num_classes": 4}, ValueError, "as in def factory(num_classes=0)"),
        ("my_nets:needy", {}, ValueError, "cannot be called with (): missing a required argument: 'width'"),
        (
            "my_nets:instance",
            {"num_classes": 4},
            ValueError,
            "is a network that is built already, and cannot be given num_classes: name a function that builds it",
        ),
        ("my_nets:wrong", {}, UnknownBackbone, "my_nets:wrong returned list, not an nn.Module"),
        ("my_nets:missing", {}, UnknownBackbone, "has no callable 'missing'"),
        ("convnext_tinny", {}, UnknownBackbone, "convnext_tiny"),
    ],
)
def test_refusals_are_one_line(nets, backbone, arguments, error, message) -> None:
    with pytest.raises(error) as caught:
        create(backbone, **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pretrained_is_handed_on(monkeypatch) -> None:
    asked = {}
    monkeypatch.setattr(
        timm, "create_model", lambda name, **kw: asked.update(timm=kw["pretrained"]) or nn.Identity()
    )
    monkeypatch.setattr(
        torchvision.models, "get_model", lambda name, **kw: asked.update(tv=kw["weights"]) or nn.Identity()
    )
    create("resnet18", pretrained=True)
    create("tv:resnet18", pretrained=True)
    assert asked == {"timm": True, "tv": "DEFAULT"}
    create("resnet18")
    create("tv:resnet18")
    assert asked == {"timm": False, "tv": None}


def test_data_config() -> None:
    timm_config = data_config(create("inception_v4"))
    assert timm_config["input_size"] == (3, 299, 299)
    assert timm_config["mean"] == (0.5, 0.5, 0.5)
    other = data_config(nn.Identity())
    assert other["mean"] == (0.485, 0.456, 0.406)
    assert other["std"] == (0.229, 0.224, 0.225)
    assert other["input_size"] == (3, 224, 224)
    assert set(other) == set(timm_config) == {"mean", "std", "input_size", "interpolation"}
