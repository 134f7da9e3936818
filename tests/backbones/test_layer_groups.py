"""Depths of parameters, against the tables of SparK's fine-tuning code written out by hand."""

import pytest
import torch
from torch import Tensor, nn

from leaven.backbones import create, layer_groups


def spark_resnet(name: str, blocks_per_group: tuple[int, int], groups: tuple[int, int]) -> int:
    """keyu-tian/SparK, downstream_imagenet/models: ids of a timm ResNet's parameters."""
    second, third = groups
    if name.startswith("fc."):
        return 3 + second + third
    if not name.startswith("layer"):
        return 0
    stage, block = int(name[5]), int(name.split(".")[1])
    firsts = {1: 1, 2: 2 + block // blocks_per_group[0], 3: 2 + second + block // blocks_per_group[1]}
    return firsts.get(stage, 2 + second + third)


def spark_convnext(name: str, groups: int) -> int:
    if name.startswith("stem"):
        return 0
    if name.startswith("head"):
        return groups + 1
    stage = int(name.split(".")[1])
    if stage < 2:
        return stage + 1
    if stage == 3:
        return groups
    return 3 + (int(name.split(".")[3]) // 3 if ".blocks." in name else 0)


@pytest.mark.parametrize(
    ("name", "blocks", "groups"),
    [
        ("resnet50", (2, 3), (2, 2)),
        ("resnet101", (2, 3), (2, 8)),
        ("resnet152", (4, 4), (2, 9)),
        ("resnet200", (4, 4), (6, 9)),
    ],
)
def test_resnets_are_grouped_as_in_the_paper(
    name: str, blocks: tuple[int, int], groups: tuple[int, int]
) -> None:
    with torch.device("meta"):
        model = create(name, num_classes=10)
    found = layer_groups(model)
    assert found == {key: spark_resnet(key, blocks, groups) for key, _ in model.named_parameters()}
    assert max(found.values()) == 3 + sum(groups)


@pytest.mark.parametrize(("name", "groups"), [("convnext_t", 6), ("convnext_s", 12)])
def test_convnexts_are_grouped_as_in_the_paper(name: str, groups: int) -> None:
    with torch.device("meta"):
        model = create(name, num_classes=10)
    assert layer_groups(model) == {key: spark_convnext(key, groups) for key, _ in model.named_parameters()}


def test_a_network_that_declares_nothing_is_grouped_alike() -> None:
    """torchvision's ResNet-50 has timm's names, and is traced."""
    ours, theirs = (create(name, num_classes=10) for name in ("resnet50", "tv:resnet50"))
    assert not hasattr(theirs, "group_matcher")
    assert layer_groups(theirs, 64) == layer_groups(ours)


def test_a_convnext_that_declares_nothing() -> None:
    found = layer_groups(create("tv:convnext_tiny", num_classes=10), 64)
    modules = {".".join(name.split(".")[:3]): depth for name, depth in found.items()}
    by_hand = {"features.0.0": 0, "features.0.1": 0, "classifier.0.weight": 6, "classifier.2.weight": 7}
    by_hand |= {f"features.1.{i}": 1 for i in range(3)} | {f"features.3.{i}": 2 for i in range(3)}
    by_hand |= {f"features.5.{i}": 3 + i // 3 for i in range(9)} | {f"features.7.{i}": 6 for i in range(3)}
    by_hand |= {f"features.{layer}.{i}": group for layer, group in ((2, 2), (4, 3), (6, 6)) for i in (0, 1)}
    assert {name: modules[name] for name in by_hand} == by_hand


def test_a_transformers_blocks_are_groups_by_themselves() -> None:
    for name, block in (("test_vit", "blocks.{}."), ("tv:vit_b_16", "encoder.layers.encoder_layer_{}.")):
        model = create(name, num_classes=10)
        found = layer_groups(model)
        depth = (max(found.values())) - 1
        assert depth == (6 if name == "test_vit" else 12)
        for i in range(depth):
            assert {d for key, d in found.items() if key.startswith(block.format(i))} == {i + 1}
        tokens = [
            d for key, d in found.items() if "class_token" in key or "cls_token" in key or "pos_embed" in key
        ]
        assert tokens
        assert set(tokens) == {0}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x).relu())


class Stage(nn.Module):
    """Stages of one's own, registered in an order that is not the order in which they run."""

    def __init__(self, inside: int, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.down = nn.Conv2d(inside, width, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.down(x))


class Own(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.fc = nn.Linear(16, num_classes)
        self.norm = nn.BatchNorm2d(16)
        self.late = Stage(8, 16, 2)
        self.early = Stage(4, 8, 5)
        self.stem = nn.Conv2d(3, 4, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.late(self.early(self.stem(x)))).mean((2, 3)))


def test_the_order_is_that_in_which_modules_run() -> None:
    model = Own()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = layer_groups(model)
    expected = {
        "stem": 0,
        "early.down": 1,
        "late.down": 3,
        "late.blocks.0": 3,
        "late.blocks.1": 3,
        "norm": 3,
        "fc": 4,
    }
    # Five blocks: three, then two.
    expected |= {f"early.blocks.{i}": 1 + i // 3 for i in range(5)}
    for name, depth in expected.items():
        assert {d for key, d in found.items() if key.startswith(f"{name}.")} == {depth}, name
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize(
    "name", ["tv:vgg11_bn", "tv:mobilenet_v3_small", "tv:squeezenet1_1", "swin_t", "test_convnext"]
)
def test_depth_grows_from_stem_to_classifier(name: str) -> None:
    model = create(name, num_classes=10)
    depths = list(layer_groups(model, 224).values())
    assert depths == sorted(depths)  # these register their modules in the order in which they run
    assert depths[0] == 0
    assert set(depths) == set(range(max(depths) + 1))
    assert max(depths) > 3
