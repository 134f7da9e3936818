"""EvoNorm's layers against their formulas in numpy; surgery by layers that leave a network what it is, bit for bit."""

import copy
import pickle
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from callback_toys import TinyNet
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from leaven.callbacks import (
    EMA,
    AttachError,
    Callback,
    EvoNorm,
    NoEffectWarning,
    attach,
    evo_norm,
    replace_norm_act,
)

B, S = ("b0", "b1", "b2"), ("s0", "s1", "s2")
KINDS = (*B, *S, "s0a", "s1a", "s2a")
each_kind = pytest.mark.parametrize("kind", KINDS)


# --- layers --------------------------------------------------------------------------------------------------------


def layer_of(kind: str, channels: int = 6, **how: Any) -> nn.Module:
    """With parameters that are all different."""
    torch.manual_seed(0)
    layer = evo_norm(kind, channels, groups=3, **how) if kind[0] == "s" else evo_norm(kind, channels, **how)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return layer


def images(n: int = 3, channels: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, channels, 5, 4, generator=torch.Generator().manual_seed(seed)) * 2 + 0.3


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def by_formula(kind: str, layer: Any, x: Tensor, batch_variance: Any = None) -> np.ndarray:
    """float64, channel by channel, group by group: the table of the paper."""
    x64 = x.double().numpy()
    eps, out = layer.eps, np.empty_like(x64)
    weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    v = layer.v.detach().double().numpy() if getattr(layer, "v", None) is not None else None
    for b in range(x64.shape[0]):
        for c in range(x64.shape[1]):
            plane = x64[b, c]
            if kind[0] == "b":
                variance = x64[:, c].var() if batch_variance is None else batch_variance[c]
                std, own, rms = (
                    np.sqrt(variance + eps),
                    np.sqrt(plane.var() + eps),
                    np.sqrt((plane**2).mean() + eps),
                )
                if kind == "b0":
                    right = v[c] * plane + own
                else:
                    right = (plane + 1) * rms if kind == "b1" else rms - plane
                y = plane / np.maximum(std, right)
            else:
                first = c // 2 * 2  # groups of two channels
                group = x64[b, first : first + 2]
                scale = np.sqrt(((group**2).mean() if kind[1] == "2" else group.var()) + eps)
                y = plane * sigmoid(v[c] * plane if v is not None else plane) / scale
            out[b, c] = y * weight[c] + bias[c]
    return out


@each_kind
def test_layers_follow_their_formulas(kind: str) -> None:
    layer, x = layer_of(kind), images()
    np.testing.assert_allclose(layer(x).detach().numpy(), by_formula(kind, layer, x), rtol=2e-5, atol=2e-5)
    if kind in B:  # the running variance is unbiased, from 1, a tenth at a time
        variance = 0.9 + 0.1 * x.double().numpy().var((0, 2, 3), ddof=1)
        np.testing.assert_allclose(layer.running_var.numpy(), variance, rtol=1e-5)
        layer.eval()
        expected = by_formula(kind, layer, x, variance)
        np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(layer.running_var.numpy(), variance, rtol=1e-5)
    else:
        trained = layer(x)
        assert torch.equal(layer.eval()(x), trained)


@pytest.mark.parametrize("kind", S)
def test_the_s_series_does_not_see_the_other_images(kind: str) -> None:
    layer, x = layer_of(kind), images()
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))


@pytest.mark.parametrize("kind", B)
def test_the_b_series_does_not_see_the_other_images_in_eval(kind: str) -> None:
    layer, x = layer_of(kind).eval(), images()
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))
    layer.train()
    assert not torch.allclose(layer(x)[:1], layer(x[:1]), rtol=1e-2)
    for seed in range(200):
        layer(images(8, seed=seed))
    torch.testing.assert_close(layer.eval()(images(8)), layer.train()(images(8)), rtol=0.1, atol=0.1)


@each_kind
def test_without_activation_scale_and_shift_are_left(kind: str) -> None:
    layer, x = layer_of(kind, apply_act=False), images()
    y = x
    if kind.endswith("a"):  # which divides all the same
        groups = x.unflatten(1, (3, 2))
        spread = groups.square().mean((2, 3, 4)) if kind == "s2a" else groups.var((2, 3, 4), correction=0)
        y = x / (spread + layer.eps).sqrt().repeat_interleave(2, 1)[:, :, None, None]
    expected = y * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(layer(x), expected)
    assert getattr(layer, "v", None) is None


@each_kind
def test_gradients_are_finite_and_right(kind: str) -> None:
    """Against central differences: float32 statistics leave 3 digits."""
    layer, x = layer_of(kind), images().requires_grad_()
    torch.manual_seed(1)
    direction, weights = torch.randn_like(x), torch.randn_like(x)
    (layer(x) * weights).sum().backward()
    with torch.no_grad():
        step = 1e-2
        ahead, back = ((layer(x + sign * step * direction) * weights).sum() for sign in (1, -1))
    torch.testing.assert_close((x.grad * direction).sum(), (ahead - back) / (2 * step), rtol=2e-2, atol=2e-2)


@each_kind
def test_float16_does_not_overflow(kind: str) -> None:
    layer = layer_of(kind)
    x = (images() * 8000).clamp(-60000, 60000)
    y = layer(x.half())
    assert y.dtype == torch.float16
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y.float(), layer_of(kind)(x.half().float()), rtol=1e-2, atol=1e-2)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_groups_are_the_largest_number_that_divides_the_channels() -> None:
    for channels, groups, expected in (
        (24, 32, 24),
        (48, 32, 24),
        (64, 32, 32),
        (7, 32, 7),
        (10, 4, 2),
        (1, 8, 1),
    ):
        assert evo_norm("s0", channels, groups=groups).groups == expected


@each_kind
def test_weights_are_timms(kind: str) -> None:
    plain = timm.layers.get_norm_act_layer(f"evonorm{kind}")(6)
    plain.load_state_dict(layer_of(kind).state_dict(), strict=True)
    layer_of(kind).load_state_dict(plain.state_dict(), strict=True)
    assert isinstance(layer_of(kind), type(plain))


def test_what_a_layer_refuses() -> None:
    with pytest.raises(ValueError, match="kind must be one of b0, b1, b2, s0"):
        evo_norm("s3", 8)
    with pytest.raises(ValueError, match="kind must be one of"):
        EvoNorm("relu")
    with pytest.raises(ValueError, match="groups must be at least 1"):
        EvoNorm(groups=0)
    with pytest.raises(ValueError, match="num_features must be at least 1, got 0"):
        evo_norm("s0", 0)
    for kind, wrong, there in (
        ("s0", "group", "eps"),
        ("s0", "momentum", "eps"),
        ("b0", "foo", "momentum, eps"),
    ):
        with pytest.raises(
            TypeError, match=f"EvoNorm-{kind} has no argument '{wrong}'; it has groups, .*{there}"
        ):
            EvoNorm(kind, **{wrong: 3})
    assert evo_norm("b0", 8, eps=0.5, momentum=0.25).eps == 0.5
    with pytest.raises(ValueError, match=r"EvoNormS0 takes images \(B, C, H, W\), not \(3, 6\)"):
        layer_of("s0")(torch.ones(3, 6))
    for kind in B:
        with pytest.raises(ValueError, match="more than one value per channel"):
            layer_of(kind)(torch.ones(1, 6, 1, 1))
        layer_of(kind).eval()(torch.ones(1, 6, 1, 1))


# --- surgery ---------------------------------------------------------------------------------------------------------


class NormThenAct(nn.BatchNorm2d):
    """The layer that changes nothing: BatchNorm and the activation that was there."""

    def __init__(self, act: Any, num_features: int, apply_act: bool) -> None:
        super().__init__(num_features)
        self.activation = act if apply_act else None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.activation is None else self.activation(x)


def same_as(act: Any, eps: float = 1e-5) -> Any:
    def factory(num_features: int, *, apply_act: bool) -> nn.Module:
        layer = NormThenAct(act, num_features, apply_act)
        layer.eps = eps
        return layer

    return factory


def timms(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=3)


def tv(name: str) -> nn.Module:
    how = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, num_classes=3, **how)


CASES = {
    "timm resnet18": (partial(timms, "resnet18"), F.relu, 9, 11, 0),
    "timm resnet50": (partial(timms, "resnet50"), F.relu, 33, 20, 0),
    "timm mobilenetv2": (partial(timms, "mobilenetv2_050"), F.relu6, 35, 17, 0),
    "timm efficientnet": (partial(timms, "efficientnet_b0"), F.silu, 33, 16, 0),
    "timm regnet": (partial(timms, "regnety_002"), F.relu, 27, 17, 0),
    "timm densenet": (partial(timms, "densenet121"), F.relu, 121, 0, 0),
    "tv resnet18": (partial(tv, "resnet18"), F.relu, 9, 11, 0),
    "tv resnet50": (partial(tv, "resnet50"), F.relu, 33, 20, 0),
    "tv mobilenet_v2": (partial(tv, "mobilenet_v2"), F.relu6, 35, 17, 0),
    "tv efficientnet": (partial(tv, "efficientnet_b0"), F.silu, 33, 16, 0),
    "tv regnet": (partial(tv, "regnet_y_400mf"), F.relu, 33, 20, 0),
    "tv densenet": (partial(tv, "densenet121"), F.relu, 120, 0, 1),
    "tv googlenet": (partial(tv, "googlenet"), F.relu, 57, 0, 0),
    "tv vgg": (partial(tv, "vgg11_bn"), F.relu, 8, 0, 0),
}
LARGE = {"timm resnet50", "timm densenet", "tv resnet50", "tv densenet", "tv efficientnet", "tv vgg"}


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """In eval and in training mode, and a gradient: of fresh copies."""
    found = []
    for training in (False, True):
        twin = copy.deepcopy(model).train(training)
        torch.manual_seed(0)  # of dropout
        y = twin(x)
        y.square().sum().backward()
        found += [y.detach(), next(twin.parameters()).grad]
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in CASES]
)
def test_a_network_with_the_same_layers_anew_is_the_same_network(name: str) -> None:
    """Every activation is where it was: outputs and gradients bit for bit, and after undoing it all as well."""
    build, act, pairs, linear, skipped = CASES[name]
    torch.manual_seed(0)
    model, x = build(), torch.randn(2, 3, 64, 64)
    eps = next(m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    own, keys, modules = outputs(model, x), list(model.state_dict()), dict(model.named_modules())
    report = replace_norm_act(model, same_as(act, eps))
    counts = [sum((site.activation != "none") == has for site in report.replaced) for has in (True, False)]
    assert [*counts, len(report.skipped)] == [pairs, linear, skipped], report
    assert all(map(torch.equal, outputs(model, x), own))
    assert list(model.state_dict()) == keys
    report.undo()
    assert all(a is b for a, b in zip(dict(model.named_modules()).values(), modules.values(), strict=True))
    assert all(map(torch.equal, outputs(model, x), own))

    report = replace_norm_act(model, partial(evo_norm, "s0"))
    assert sum("EvoNormS0" in type(m).__name__ for m in model.modules()) == pairs + linear
    assert model(x).shape == (2, 3)
    twin = pickle.loads(pickle.dumps(model))
    again = build()
    replace_norm_act(again, partial(evo_norm, "s0"))
    again.load_state_dict(model.state_dict(), strict=True)
    for other in (twin, copy.deepcopy(model), again):
        assert torch.equal(other.eval()(x), model.eval()(x))


def test_weights_stay_and_an_optimizer_goes_on() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_var.uniform_(1, 2)
    norms = [p for p in model.parameters() if p.ndim == 1]
    others = [p for p in model.parameters() if p.ndim > 1]
    optimizer = AdamW([{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}])
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])

    def update() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    update()
    variances = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("running_var")}
    report = replace_norm_act(model, partial(evo_norm, "b0"), optimizers=[optimizer])
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in variances.items() if f"{k[:-12]}.v" in state)
    now = {id(p) for p in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == now
    assert {id(p) for p in norms} < now
    vs = {id(p) for k, p in model.named_parameters() if k.endswith(".v")}
    assert len(vs) == 9
    assert vs < {id(p) for p in optimizer.param_groups[1]["params"]}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    update()
    assert all(not torch.equal(before[k], v) for k, v in model.named_parameters())
    report.undo()
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(others), len(norms)]
    update()


def test_a_module_that_serves_two_places_is_left_for_the_other() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.norm2, self.act = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.norm(x))
            return self.act(self.norm2(y) + x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Block())
    x = torch.randn(2, 3, 8, 8)
    own = outputs(model, x)
    report = replace_norm_act(model, same_as(F.relu))
    assert [site.activation for site in report.sites] == ["1.act", "none"]
    assert all(map(torch.equal, outputs(model, x), own))
    assert not torch.equal(*outputs(model, x)[0:4:2])


def code(forward: Any, **parts: nn.Module) -> nn.Sequential:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    return nn.Sequential(Part())


def test_a_norm_at_the_end_of_a_sequential_counts_as_the_blocks_own() -> None:
    """relu(conv_norm(x)), as many people write it; the block calls the function twice."""
    torch.manual_seed(0)
    first, second, third = (
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Sequential(nn.BatchNorm2d(3))) for _ in range(3)
    )
    model = code(
        lambda m, x: F.relu(m.second(F.relu(m.first(x)))) + m.third(x),
        first=first,
        second=second,
        third=third,
    )
    x = torch.randn(2, 3, 8, 8)
    own = outputs(model, x)
    report = replace_norm_act(model, same_as(F.relu))
    assert [site.activation for site in report.replaced] == ["relu", "relu", "none"], report
    assert all(map(torch.equal, outputs(model, x), own))


@pytest.mark.parametrize("how", ["left out", "given", "by name", "none by name"])
def test_code_that_asks_for_an_argument_stays_right(how: str) -> None:
    """timm's DLA: `if shortcut is None`, which is never true of what torch.fx traces with."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.norm2, self.relu = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU(inplace=True)

        def forward(self, x: Tensor, shortcut: Tensor | None = None, half: bool = False) -> Tensor:
            if shortcut is None:
                shortcut = x
            y = self.norm2(self.relu(self.norm(x)))
            return self.relu(y / 2 + shortcut if half else y + shortcut)

    calls = {
        "left out": lambda m, x: m.block(x),
        "given": lambda m, x: m.block(x, 2 * x, True),
        "by name": lambda m, x: m.block(x, shortcut=2 * x),
        "none by name": lambda m, x: m.block(x, shortcut=None, half=True),
    }
    torch.manual_seed(0)
    model = code(calls[how], block=Block())
    x = torch.randn(2, 3, 8, 8)
    own = outputs(model, x)
    report = replace_norm_act(model, same_as(F.relu))
    assert [site.activation for site in report.replaced] == ["0.block.relu", "none"], report
    assert all(map(torch.equal, outputs(model, x), own))
    if how == "left out":
        with pytest.raises(AssertionError, match="shortcut has been specialized"):
            model[0].block(x, 2 * x)


@pytest.mark.parametrize("training", [True, False])
def test_code_with_a_branch_for_training_is_left_alone(training: bool) -> None:
    """torch.fx takes the branch of the mode in which it traces, for good."""

    def louder(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.norm(x))
        return y + 100 if m.training else y

    model, x = code(louder, norm=nn.BatchNorm2d(3)).train(training), torch.randn(2, 3, 8, 8)
    own = outputs(model, x)
    with pytest.warns(NoEffectWarning, match="0 asks whether it is training"):
        replace_norm_act(model, same_as(F.relu))
    assert all(map(torch.equal, outputs(model, x), own))
    assert model[0].training is training


def test_every_module_of_a_block_keeps_its_mode() -> None:
    model = code(lambda m, x: m.drop(F.relu(m.norm(x))), norm=nn.BatchNorm2d(3), drop=nn.Dropout())
    model[0].norm.eval()
    model[0].drop.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    report = replace_norm_act(model, partial(evo_norm, "b0"))
    assert {name: module.training for name, module in model.named_modules()} == modes
    report.undo()
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_a_block_that_is_a_graph_already_is_itself_again_after_undoing() -> None:
    """Copies of a GraphModule are made from its graph, not from its code."""
    block = code(lambda m, x: F.relu(m.norm(x)), norm=nn.BatchNorm2d(3))[0]
    model, x = nn.Sequential(torch.fx.symbolic_trace(block)), torch.randn(2, 3, 8, 8)
    own = outputs(model, x)
    report = replace_norm_act(model, same_as(F.relu))
    assert len(report.replaced) == 1
    assert all(map(torch.equal, outputs(model, x), own))
    report.undo()
    assert all(map(torch.equal, outputs(model, x), own))


def test_what_is_left_is_left_with_a_reason() -> None:
    norm, act = partial(nn.BatchNorm2d, 3), nn.ReLU
    cases: dict[str, nn.Module] = {
        "it is used more than once": code(lambda m, x: m.norm(m.norm(x)), norm=norm()),
        "it was not used": code(lambda m, x: x, norm=norm()),
        "its output is used beside the activation too": code(
            lambda m, x: m.act(y := m.norm(x)) + y, norm=norm(), act=act()
        ),
        "cannot be traced": code(
            lambda m, x: m.act(m.act(m.norm(x)) * (1 if x.sum() > 0 else 2)), norm=norm(), act=act()
        ),
        "asks whether it is training": code(
            lambda m, x: F.dropout(F.relu(m.norm(x)), 0.5, training=m.training), norm=norm()
        ),
        "0 has what its code did not use (aux.bias)": code(
            lambda m, x: F.relu(m.norm(x)), norm=norm(), aux=nn.Linear(3, 3)
        ),
        "in the code of the model itself": code(lambda m, x: F.relu(m.norm(x)), norm=norm())[0],
    }
    hooked = code(lambda m, x: F.relu(m.norm(x)), norm=norm())
    hooked[0].register_forward_hook(lambda *_: None)
    cases["0 has hooks"] = hooked
    for reason, model in cases.items():
        with pytest.warns(NoEffectWarning, match="all was skipped"):
            report = replace_norm_act(model, partial(evo_norm, "s0"))
        assert len(report.sites) == 1
        assert reason in report.sites[0].skipped, report
        assert reason in str(report)
        assert type(next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))) is nn.BatchNorm2d


def test_a_network_without_batchnorm_is_named() -> None:
    with pytest.warns(NoEffectWarning, match="no layer of ConvNeXt was replaced: it has no BatchNorm2d"):
        replace_norm_act(timm.create_model("convnext_atto"), partial(evo_norm, "s0"))


def test_a_network_that_does_not_run_is_left_alone() -> None:
    model = nn.Sequential(nn.Embedding(3, 3), nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match=r"cannot see the layers of Sequential at work.*give an example"):
        replace_norm_act(model, partial(evo_norm, "s0"))

    def wrong(num_features: int, *, apply_act: bool) -> nn.Module:
        return nn.Conv2d(1, 1, 1)

    net, x = TinyNet().eval(), torch.randn(2, 3, 8, 8)
    expected = net(x)
    with pytest.raises(ValueError, match="does not run"):
        replace_norm_act(net, wrong)
    assert torch.equal(net(x), expected)


class KeywordNet(TinyNet):
    """Takes its images by name alone."""

    def forward(self, *, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(pixel_values)


def test_a_network_that_takes_keywords_alone_gets_an_example_of_them() -> None:
    net, x = KeywordNet(), torch.randn(2, 3, 8, 8)
    for example in (None, x):
        with pytest.raises(
            AttachError, match=r"KeywordNet at work.*1 positional.*dict of its keyword arguments"
        ):
            attach(net, None, EvoNorm(example=example), total_steps=1)
    callback = EvoNorm(example={"pixel_values": x})
    attach(net, None, callback, total_steps=1)
    assert [site.activation for site in callback.report.replaced] == ["act"]
    assert net(pixel_values=x).shape == (2, 3)


def far_apart(*between: nn.Module, pairs: int = 0) -> nn.Sequential:
    """Four BatchNorms, so many with a ReLU directly behind them, the others with something in between."""
    parts = [
        part
        for i in range(4)
        for part in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), *(between if i >= pairs else (nn.ReLU(),)))
    ]
    return nn.Sequential(*parts)


@pytest.mark.parametrize(
    "between", [(nn.MaxPool2d(1), nn.ReLU()), (nn.Dropout(0.1), nn.ReLU()), (nn.Sigmoid(),), ()]
)
def test_a_network_that_would_lose_its_normalisation_is_refused(between: tuple[nn.Module, ...]) -> None:
    model, x = far_apart(*between), torch.randn(2, 3, 8, 8)
    optimizer = SGD(model.parameters(), lr=0.1)
    own, modules = outputs(model, x), list(model)
    line = "none of the 4 BatchNorm layers of Sequential .* nothing would be normalised.*s0a"
    with pytest.raises(ValueError, match=f"^{line}"):
        replace_norm_act(model, partial(evo_norm, "b0"))
    with pytest.raises(AttachError, match=f"^EvoNorm: {line}"):
        attach(model, optimizer, EvoNorm(), total_steps=1)
    assert all(a is b for a, b in zip(model, modules, strict=True))
    assert all(map(torch.equal, outputs(model, x), own))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = replace_norm_act(model, partial(evo_norm, "s0a"))  # which divides all the same
    assert report.summary() == ["4 of 4 BatchNorm layers replaced"]


def test_a_network_that_loses_most_of_its_normalisation_is_warned_of() -> None:
    line = r"^3 of the 4 BatchNorm layers of Sequential that were replaced .*scale and shift alone"
    with pytest.warns(NoEffectWarning, match=line):
        report = replace_norm_act(far_apart(pairs=1), partial(evo_norm, "s0"))
    assert [site.bare for site in report.sites] == [False, True, True, True]
    said = "4 of 4 BatchNorm layers replaced, 3 by scale and shift alone, for no activation follows"
    assert report.summary() == [said]
    assert str(report).endswith(said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(replace_norm_act(far_apart(pairs=2), partial(evo_norm, "s0")).bare) == 2


class DistributedDataParallel(nn.Module):
    """By its name, as DDP is known."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_a_wrapped_network_is_refused() -> None:
    net = TinyNet()
    with pytest.raises(ValueError, match=r"TinyNet would change: .* before it is wrapped in DistributedData"):
        replace_norm_act(DistributedDataParallel(net), partial(evo_norm, "s0"))
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager")
    compiled(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"cannot replace layers of TinyNet: torch\.compile has already"):
        replace_norm_act(compiled, partial(evo_norm, "s0"))  # type: ignore[arg-type]
    torch.compiler.reset()
    assert type(net.norm) is nn.BatchNorm2d


@pytest.mark.parametrize("affine", [True, False])
def test_new_parameters_have_names_where_the_optimizer_keeps_them(affine: bool) -> None:
    whole = nn.ModuleDict({"net": TinyNet()})
    whole.net.norm = nn.BatchNorm2d(4, affine=affine)
    optimizer = AdamW(whole.named_parameters())
    (group,) = optimizer.param_groups
    before = list(group["param_names"])
    report = replace_norm_act(whole.net, partial(evo_norm, "s0"), optimizers=[optimizer])
    own = {id(p): name for name, p in whole.named_parameters()}
    if affine:
        assert group["param_names"] == [own[id(p)] for p in group["params"]]
        assert group["param_names"][-1] == "net.norm.v"
    assert len(group["param_names"]) == len(group["params"])
    report.undo()
    assert group["param_names"] == before
    assert len(group["params"]) == len(before)


# --- the callback -----------------------------------------------------------------------------------------------------


class Fails(Callback):
    """Its setup raises, after that of surgery."""

    def setup(self, *_: Any) -> Any:
        raise AttachError("not me")


def test_an_attach_that_fails_leaves_the_network_as_it_was() -> None:
    net = TinyNet()
    optimizer = SGD(net.parameters(), lr=0.1)
    with pytest.raises(AttachError, match="not me"):
        attach(net, optimizer, EvoNorm(), Fails(), total_steps=1)
    assert type(net.norm) is nn.BatchNorm2d
    assert type(net.act) is nn.ReLU
    assert len(optimizer.param_groups[0]["params"]) == len(list(net.parameters()))
    with pytest.raises(AttachError, match="EvoNorm: cannot see the layers"):
        attach(nn.Sequential(nn.Embedding(3, 3), nn.BatchNorm2d(3)), None, EvoNorm(), total_steps=1)


def test_the_callback_reports_and_its_layers_stay_once_trained() -> None:
    net, callback = TinyNet(), EvoNorm("b0")
    optimizer = SGD(net.parameters(), lr=0.1)
    attached = attach(net, optimizer, callback, EMA(), total_steps=3)
    assert repr(callback) == "EvoNorm('b0', groups=32)"
    assert [(site.name, site.activation) for site in callback.report.sites] == [("norm", "act")]
    assert type(net.norm).__name__ == "EvoNormB0"
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    attached.remove()
    assert type(net.norm).__name__ == "EvoNormB0"
    with pytest.raises(ValueError, match="the checkpoint has EvoNorm-b0 layers, not s0"):
        EvoNorm("s0").load_state_dict(callback.state_dict())


def test_no_batchnorm_is_a_warning_of_attach() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    with pytest.warns(NoEffectWarning, match="VisionTransformer was replaced: it has no BatchNorm2d"):
        attach(model, SGD(model.parameters(), lr=0.1), EvoNorm(), total_steps=1)


def test_nothing_is_said_where_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_norm_act(TinyNet(), partial(evo_norm, "s0"), example=torch.randn(2, 3, 8, 8))


def test_what_was_frozen_stays_frozen() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
    )
    model[1].requires_grad_(False)
    replace_norm_act(model, partial(evo_norm, "s0"), example=torch.randn(1, 3, 8, 8))
    assert not any(p.requires_grad for p in model[1].parameters())
    assert len(list(model[1].parameters())) == 3
    assert all(p.requires_grad for p in model[4].parameters())
