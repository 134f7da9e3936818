"""RotNet against numpy's rot90, losses added up by hand, and images whose answer is known."""

import copy
import math
import pickle

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from leaven.backbones import create
from leaven.callbacks import AttachError, attach
from leaven.curricula import EfficientTrain, Schedule, Stage
from leaven.pretext import (
    Auxiliary,
    RotNet,
    SparK,
    Supervised,
    clockwise_head,
    extract_features,
    rotate4,
    rotate_random,
    rotation_ood_score,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int = 3, channels: int = 3, side: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, channels, side, side, generator=seeded(seed), dtype=torch.float64)


def turned(x: Tensor, times: int) -> Tensor:
    """Counter-clockwise quarter turns by numpy, on arrays (H, W, C)."""
    images = [np.rot90(image.transpose(1, 2, 0), times).transpose(2, 0, 1).copy() for image in x.numpy()]
    return torch.from_numpy(np.stack(images))


class Flat(nn.Module):
    """A user's backbone: pixels are its features, with a BatchNorm to disturb and a weight to train."""

    def __init__(self, side: int = 5, channels: int = 3) -> None:
        super().__init__()
        self.image_size = side
        self.norm = nn.BatchNorm2d(channels)
        self.mix = nn.Conv2d(channels, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.mix(self.norm(images)).flatten(1)


def flat(**kwargs) -> RotNet:
    torch.manual_seed(0)
    return RotNet(Flat().double(), **kwargs)


# --- the rotation

DTYPES = [torch.uint8, torch.int16, torch.int64, torch.bool, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_are_numpys_rot90_in_image_order(dtype: torch.dtype) -> None:
    x = (noise(4) * 50).to(dtype)
    copies, labels = rotate4(x)
    assert copies.dtype == dtype
    for i in range(4):
        for y in range(4):
            assert torch.equal(copies[4 * i + y], turned(x[i : i + 1], y)[0])
    assert torch.equal(labels, torch.arange(4).repeat(4))


def test_bfloat16_and_channels_last_are_kept_and_exact() -> None:
    x = noise(4).bfloat16()
    expected, _ = rotate4(x.double())
    assert torch.equal(rotate4(x)[0].double(), expected)
    for layout in (torch.contiguous_format, torch.channels_last):
        laid = x.contiguous(memory_format=layout)
        for found in (rotate4(laid)[0], rotate_random(laid, seeded())[0]):
            assert found.is_contiguous(memory_format=layout)
        assert torch.equal(rotate4(laid)[0].double(), expected)
        assert torch.equal(rotate_random(laid, seeded())[0], rotate_random(x, seeded())[0])
    assert torch.equal(rotate4(x.transpose(2, 3))[0], rotate4(x.transpose(2, 3).contiguous())[0])


def test_turns_are_a_group_and_move_every_pixel_once() -> None:
    x = noise(2)
    turns = rotate4(x)[0].unflatten(0, (2, 4))
    for a in range(4):
        for b in range(4):
            again = rotate4(turns[:, a])[0].unflatten(0, (2, 4))[:, b]
            assert torch.equal(again, turns[:, (a + b) % 4])
        assert torch.equal(turns[:, a].flatten().sort().values, x.flatten().sort().values)


def test_images_that_are_not_square_are_refused_in_one_line() -> None:
    for bad in (torch.zeros(2, 3, 32, 48), torch.zeros(3, 32, 32)):
        for rotate in (rotate4, lambda x: rotate_random(x, seeded())):
            with pytest.raises(ValueError, match=r"square images.*crop or resize them first$") as error:
                rotate(bad)
            assert "\n" not in str(error.value)


def test_random_turns_are_the_ones_their_labels_say_reproducible_and_uniform() -> None:
    from scipy.stats import chisquare

    x = noise(4000, 1, 3)
    state = torch.get_rng_state()
    images, labels = rotate_random(x, seeded(5))
    assert torch.equal(torch.get_rng_state(), state)
    for y in range(4):
        assert torch.equal(images[labels == y], turned(x[labels == y], y))
    again, same = rotate_random(x, seeded(5))
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    assert not torch.equal(labels, rotate_random(x, seeded(6))[1])
    assert chisquare(labels.bincount(minlength=4)).pvalue > 1e-3
    pairs = labels[:-1] * 4 + labels[1:]  # and one draw says nothing about the next
    assert chisquare(pairs.bincount(minlength=16)).pvalue > 1e-3


# --- the loss


def test_the_loss_is_added_up_by_hand() -> None:
    objective, x = flat().eval(), noise()
    total, right = 0.0, 0
    for i in range(3):
        for y in range(4):
            logits = objective.head(objective.backbone(turned(x[i : i + 1], y)))[0].tolist()
            total += math.log(sum(map(math.exp, logits))) - logits[y]
            right += logits[y] == max(logits)
    output = objective(x)
    assert output.loss.item() == pytest.approx(total / 12, rel=1e-12)
    assert output.logs.keys() == {"rotation_accuracy"}
    assert output.logs["rotation_accuracy"].item() == pytest.approx(right / 12)
    assert 0 < right < 12


def test_random_mode_is_the_same_loss_on_one_copy_each() -> None:
    objective, x = flat(mode="random").eval(), noise(6)
    copies, labels = rotate_random(x, seeded(3))
    expected = F.cross_entropy(objective.head(objective.backbone(copies)), labels)
    assert objective(x, seeded(3)).loss.item() == expected.item()
    torch.manual_seed(1)
    drawn = objective(x).loss
    torch.manual_seed(1)
    assert drawn == objective(x).loss
    with pytest.raises(ValueError, match="unknown mode 'some': all or random"):
        flat(mode="some")


@pytest.mark.parametrize("r", [1, 2, 3])
def test_turning_the_input_permutes_the_copies_cyclically(r: int) -> None:
    objective, x = flat().eval(), noise()
    logits = objective.logits(rotate4(turned(x, r))[0])
    shifted = (rotate4(x)[1] + r) % 4
    assert F.cross_entropy(logits, shifted).item() == pytest.approx(objective(x).loss.item(), rel=1e-12)


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        # a fixed order of summation, or rounding would tell the copies apart
        return self.scale * images.flatten(2).sort(2).values.mean(2)


def test_a_backbone_blind_to_rotation_has_log_4_as_its_optimum() -> None:
    objective, x = RotNet(Mean()), noise(32)
    assert objective(x).logs["rotation_accuracy"] == 0.25  # whatever its head says
    assert objective(x).loss > math.log(4)
    optimizer = torch.optim.LBFGS(
        objective.head.parameters(), max_iter=200, tolerance_grad=1e-10, tolerance_change=0
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(x).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    assert objective(x).loss.item() == pytest.approx(math.log(4), abs=1e-9)
    assert objective(x).logs["rotation_accuracy"] == 0.25


def test_micro_batches_of_whole_images_add_up_to_the_same_gradient() -> None:
    objective, x = flat().eval(), noise(6)
    whole = torch.autograd.grad(objective(x).loss, list(objective.parameters()))
    parts = [torch.autograd.grad(objective(p).loss, list(objective.parameters())) for p in x.split(2)]
    for full, *pieces in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(pieces) / 3, full, rtol=1e-10, atol=1e-14)


# --- any backbone


@pytest.mark.parametrize(
    ("name", "side", "unused"),
    [
        ("test_resnet", 64, []),
        ("test_convnext", 64, []),
        ("test_vit", 64, []),
        ("tv:resnet18", 64, ["backbone.fc.weight", "backbone.fc.bias"]),
        (
            "tv:mobilenet_v3_small",
            64,
            [f"backbone.classifier.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")],
        ),
        pytest.param(
            "tv:vit_b_32",
            32,
            ["backbone.heads.head.weight", "backbone.heads.head.bias"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_features_are_those_that_probes_judge(name: str, side: int, unused: list[str]) -> None:
    torch.manual_seed(0)
    objective = RotNet(name, image_size=side if "tv:vit" in name else None)
    images = torch.randn(2, 3, side, side)
    expected = objective.head(extract_features(objective.backbone, images))
    torch.testing.assert_close(objective.eval().logits(images), expected, rtol=1e-4, atol=1e-4)
    objective.train()(images).loss.backward()
    without = [n for n, p in objective.named_parameters() if p.grad is None]
    assert sorted(without) == sorted(unused) == sorted(objective._ddp_params_and_buffers_to_ignore)


def test_building_leaves_no_trace_in_the_backbone() -> None:
    backbone = timm.create_model("test_resnet", num_classes=3)
    backbone.layer1.eval()
    modes = [module.training for module in backbone.modules()]
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    objective = RotNet(backbone, head=nn.Linear(1, 1).requires_grad_(False).requires_grad_(True))
    assert objective.backbone is backbone
    torch.set_rng_state(state)
    head = nn.Linear(96, 4)
    state = torch.get_rng_state()
    assert RotNet(backbone, head=head).head is head
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_a_backbone_that_does_not_run_is_one_line() -> None:
    class Picky(Flat):
        def forward(self, images: Tensor) -> Tensor:
            assert images.shape[-1] == 7, "seven pixels"
            return super().forward(images)

    picky = Picky()
    picky.image_size = None
    with pytest.raises(ValueError, match=r"^Picky did not run on a test image; pass image_size: seven"):
        RotNet(picky)
    assert RotNet(picky, image_size=7)(torch.randn(2, 3, 7, 7)).loss > 0


def test_a_copy_trains_its_own_backbone() -> None:
    """The averaged copy of an EMA must not read the network it was copied from."""
    x = noise()
    for made in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        for objective, inputs in (
            (flat(), (x,)),
            (auxiliary(), (x, torch.tensor([0, 1, 2]))),
        ):
            twin = made(objective.eval())
            expected = objective(*inputs).loss
            assert twin(*inputs).loss == expected
            with torch.no_grad():
                twin.backbone.mix.weight.mul_(3)
            assert objective(*inputs).loss == expected
            assert twin(*inputs).loss != expected
            assert len(list(twin.parameters())) == len(list(objective.parameters()))


@pytest.mark.parametrize("autocast", [True, False])
def test_the_loss_of_half_precision_logits_is_taken_in_single(autocast: bool) -> None:
    objective, x = RotNet(Flat()).eval(), noise(8).float()
    single = objective(x).loss.item()
    if not autocast:
        objective, x = objective.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), torch.no_grad():
        output, logits = objective(x), objective.logits(rotate4(x)[0])
        score = rotation_ood_score(objective, x)
    assert logits.dtype == torch.bfloat16
    assert output.loss.dtype == score.dtype == torch.float32
    expected = F.cross_entropy(logits.double(), torch.arange(4).repeat(8)).item()
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert score.sum().item() == pytest.approx(32 * expected, rel=1e-5)
    assert single == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("kind", ["all", "random", "auxiliary"])
def test_compiles_to_one_graph(kind: str) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    backbone = timm.create_model("test_resnet", num_classes=3)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    if kind == "auxiliary":
        objective, inputs = Auxiliary(Supervised(backbone), RotNet(backbone)), (x, y)
    else:
        objective, inputs = RotNet(backbone, mode=kind), (x,)
    counter = CompileCounter()
    compiled = torch.compile(objective.eval(), backend=counter, fullgraph=True)
    torch.manual_seed(0)
    found = compiled(*inputs).loss
    torch.manual_seed(0)
    torch.testing.assert_close(found, objective(*inputs).loss)
    assert counter.frame_count == 1


def test_distributed_training_reaches_every_parameter(tmp_path) -> None:
    """DistributedDataParallel raises in the second step if a parameter got no gradient in the first."""
    import torch.distributed as dist

    store = f"file://{tmp_path}/meet"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        y = torch.tensor([0, 1])
        for name in ("tv:mobilenet_v3_small", "test_resnet"):
            backbone = create(name, num_classes=2)
            rotnet, x = RotNet(backbone), torch.randn(2, 3, 64, 64)
            spark = SparK(backbone, decoder_width=64) if name == "test_resnet" else None
            for objective, inputs in (
                (rotnet, (x,)),
                (Auxiliary(Supervised(backbone), rotnet), (x, y)),
                *(((Auxiliary(spark, rotnet), (x,)),) if spark is not None else ()),
            ):
                model = nn.parallel.DistributedDataParallel(objective)
                for _ in range(2):
                    model(*inputs).loss.backward()
    finally:
        dist.destroy_process_group()


# --- weights


def test_exported_weights_load_strictly_and_note_the_direction(tmp_path) -> None:
    RotNet("test_resnet").export(tmp_path / "a.safetensors", epochs=3)
    state = load_file(tmp_path / "a.safetensors")
    timm.create_model("test_resnet", num_classes=0).load_state_dict(state)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        notes = file.metadata()
    assert notes["rotation_direction"] == "ccw"
    assert (notes["backbone"], notes["method"], notes["epochs"]) == ("test_resnet", "RotNet", "3")
    assert "backbone.pos_embed" in RotNet("test_vit").no_weight_decay()


def test_a_clockwise_head_serves_a_network_that_counts_the_other_way() -> None:
    from torchvision.transforms.v2.functional import rotate

    objective, x = flat().eval(), noise()
    clockwise = torch.cat([rotate(image[None], -90.0 * y) for image in x for y in range(4)])
    theirs = F.cross_entropy(
        objective.logits(clockwise), torch.arange(4).repeat(3)
    )  # trained with such labels
    objective.head = clockwise_head(objective.head)
    assert objective(x).loss.item() == pytest.approx(theirs.item(), rel=1e-12)
    assert not objective.head.weight.equal(clockwise_head(objective.head).weight)
    no_bias = nn.Linear(2, 4, bias=False)
    assert clockwise_head(no_bias).weight.equal(no_bias.weight[[0, 3, 2, 1]])


# --- beside another objective


class Classifier(Flat):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(50, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(super().forward(images))


def auxiliary(weight: float = 0.5) -> Auxiliary:
    torch.manual_seed(0)
    supervised = Supervised(Classifier().double())
    return Auxiliary(supervised, RotNet(supervised.backbone), weight)


def test_both_losses_and_gradients_add_up() -> None:
    both, x, y = auxiliary(0.3).eval(), noise(4), torch.tensor([0, 1, 2, 0])
    parameters = list(both.parameters())
    main, rotation = both.objective(x, y), both.rotnet(x)
    output = both(x, y)
    assert output.loss.item() == pytest.approx(main.loss.item() + 0.3 * rotation.loss.item(), rel=1e-12)
    assert output.logs == {**main.logs, **rotation.logs, "rotation_loss": rotation.loss}
    assert output.logs.keys() == {"top1", "rotation_accuracy", "rotation_loss"}
    assert not output.logs["rotation_loss"].requires_grad
    found = torch.autograd.grad(output.loss, parameters)
    of_main, of_rotation = (
        torch.autograd.grad(part.loss, parameters, allow_unused=True) for part in (main, rotation)
    )
    assert any(g is None for g in of_main)  # the rotation head
    assert any(g is None for g in of_rotation)  # the classifier
    for total, a, b in zip(found, of_main, of_rotation, strict=True):
        expected = (0 if a is None else a) + (0 if b is None else 0.3 * b)
        torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-14)


def test_the_trunk_is_there_once() -> None:
    both = auxiliary()
    backbone = sum(p.numel() for p in both.backbone.parameters())
    assert sum(p.numel() for p in both.parameters()) == backbone + sum(
        p.numel() for p in both.head.parameters()
    )
    assert both.backbone is both.objective.backbone is both.rotnet.backbone
    state = both.state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    other = auxiliary()
    torch.nn.init.ones_(other.head.weight)
    other.load_state_dict(state)
    assert other.rotnet.head.weight.equal(both.head.weight)
    both.eval()
    assert not both.rotnet.backbone.training


def test_pooled_features_come_from_before_the_classifier() -> None:
    backbone = timm.create_model("test_vit", num_classes=3)
    objective = RotNet(backbone)
    assert objective.head.in_features == backbone.num_features
    assert objective._ddp_params_and_buffers_to_ignore == ["backbone.head.weight", "backbone.head.bias"]
    both = Auxiliary(Supervised(backbone), objective)
    assert both._ddp_params_and_buffers_to_ignore == []
    assert "objective.backbone.pos_embed" in both.no_weight_decay()


def test_auxiliary_exports_as_its_objective_and_checks_its_parts(tmp_path) -> None:
    supervised = Supervised(timm.create_model("test_resnet", num_classes=3))
    Auxiliary(supervised, RotNet(supervised.backbone)).export(tmp_path / "a.safetensors", name="test_resnet")
    assert load_file(tmp_path / "a.safetensors").keys() == supervised.backbone.state_dict().keys()
    with pytest.raises(ValueError, match=r"different backbones; build RotNet\(objective\.backbone\)$"):
        Auxiliary(supervised, RotNet("test_resnet"))
    with pytest.raises(ValueError, match=r"must not be negative, not -1$"):
        Auxiliary(supervised, RotNet(supervised.backbone), weight=-1)


def test_a_curriculum_asks_the_objective_for_its_sizes_when_it_is_attached() -> None:
    """And not after hours of training, at the first update of a stage whose size SparK's masks do not divide."""
    backbone = create("test_resnet")
    both = Auxiliary(SparK(backbone, decoder_width=32), RotNet(backbone))
    curriculum = EfficientTrain(Schedule((Stage(0.5, 64), Stage(0.8, 80), Stage(1.0, 96))), image_size=96)
    with pytest.raises(
        AttachError, match=r"does not take images of 80x80 .*not a multiple of the mask cell 32"
    ):
        attach(both, torch.optim.SGD(both.parameters(), 0.1), curriculum, total_steps=9)
    auxiliary().check_image_size(80, 80)  # an objective without sizes of its own takes any


# --- from end to end


def oriented(n: int, seed: int) -> Tensor:
    """Bright at the top, by a ramp that is the mirror image of itself, under noise."""
    ramp = torch.linspace(1, -1, 12).view(1, 1, 12, 1)
    return ramp + torch.randn(n, 1, 12, 12, generator=seeded(seed))


def turned_by_chance(n: int, seed: int) -> Tensor:
    return rotate_random(oriented(n, seed), seeded(seed + 1000))[0]


def one_layer() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 6), nn.ReLU())


def trained(images: Tensor, after=lambda x: x) -> RotNet:
    torch.manual_seed(0)
    objective = RotNet(one_layer())
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    for step in range(120):
        copies, labels = rotate4(images[(step * 32) % len(images) :][:32])
        loss = F.cross_entropy(objective.logits(after(copies)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return objective


def flipped_by_chance(x: Tensor) -> Tensor:
    coins = torch.rand(len(x), 1, 1, 1) < 0.5
    return torch.where(coins, x.flip(3), x)


def test_learns_what_up_is_where_there_is_an_up() -> None:
    objective = trained(oriented(512, 0))
    assert objective(oriented(500, 1)).logs["rotation_accuracy"] > 0.95
    upright, blank = oriented(100, 2), torch.randn(100, 1, 12, 12, generator=seeded(3))
    scores = [rotation_ood_score(objective, images) for images in (upright, blank)]
    assert (scores[1][:, None] > scores[0]).double().mean() > 0.95  # area under the ROC curve


def test_stays_at_chance_where_there_is_none() -> None:
    objective = trained(turned_by_chance(512, 0))
    assert abs(float(objective(turned_by_chance(1000, 1)).logs["rotation_accuracy"]) - 0.25) < 0.03
    x = oriented(50, 2)
    symmetric = (torch.stack([torch.rot90(x, y, (2, 3)) for y in range(4)]) * 64).round().sum(0)
    assert trained(oriented(512, 0))(symmetric).logs["rotation_accuracy"] == 0.25


def test_flips_after_the_rotation_cap_the_accuracy_at_three_quarters() -> None:
    torch.manual_seed(0)
    objective = trained(oriented(512, 0), after=flipped_by_chance)
    copies, labels = rotate4(oriented(1000, 1))
    right = objective.logits(flipped_by_chance(copies)).argmax(1) == labels
    assert abs(right.double().mean() - 0.75) < 0.03
    assert right[labels % 2 == 0].double().mean() > 0.95


def test_a_mirrored_left_turn_is_a_right_turn() -> None:
    """h r1 = r3 h and v r1 = r3 v, v = r2 h: the identities behind `check_order`, and the ceiling counted out."""
    x = noise()
    for axis in (3, 2):
        assert torch.equal(turned(x, 1).flip(axis), turned(x.flip(axis), 3))
    assert torch.equal(x.flip(2), turned(x.flip(3), 2))
    symmetric = x + x.flip(3)
    for after, ceiling in ((True, 0.75), (False, 1.0)):
        seen: dict[bytes, list[int]] = {}
        for flip in (False, True):
            before = symmetric.flip(3) if flip and not after else symmetric
            for copy_, label in zip(*rotate4(before), strict=True):
                image = copy_.flip(2) if flip and after else copy_
                seen.setdefault(image.numpy().tobytes(), [0] * 4)[int(label)] += 1
        assert sum(map(max, seen.values())) / 24 == ceiling  # the best guess for each image that can occur


def test_the_score_is_minus_the_summed_log_probability_of_the_right_turns() -> None:
    objective, x = flat().train(), noise()
    objective.backbone.mix.eval()
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    score = rotation_ood_score(objective, x)
    assert objective.training
    assert not objective.backbone.mix.training
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())
    assert score.shape == (3,)
    assert not score.requires_grad
    objective.eval()
    for i in range(3):
        logs = [
            objective.head(objective.backbone(turned(x[i : i + 1], y))).log_softmax(1)[0, y] for y in range(4)
        ]
        assert score[i].item() == pytest.approx(-sum(logs).item(), rel=1e-12)
