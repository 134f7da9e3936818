"""Weights go into a network with another classifier, or none, and nothing else may differ."""

import pytest
import timm
import torch
import torchvision.models
from torch import nn

from leaven.backbones import WeightsMismatch, classifier_names, create, load_around_classifier, save


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet10t", ("fc",)),
        ("convnext_atto", ("head.fc",)),
        ("test_vit", ("head",)),
        ("test_efficientnet", ("classifier",)),
        ("tv:resnet18", ("fc",)),
        ("tv:mobilenet_v3_small", ("classifier.3",)),
        ("tv:squeezenet1_1", ("classifier.1",)),
    ],
)
@pytest.mark.parametrize("classes", [0, 7])
def test_the_classifier_is_found_with_and_without_one(
    name: str, expected: tuple[str, ...], classes: int
) -> None:
    assert classifier_names(create(name, num_classes=classes)) == expected


def test_a_classifier_of_several_parts() -> None:
    """LeViT's is a norm and a linear layer, and a second pair for distillation."""
    names = classifier_names(timm.create_model("levit_128s", num_classes=7))
    assert {"head.linear", "head_dist.linear"} <= set(names)


@pytest.mark.parametrize(
    "name", ["resnet10t", "convnext_atto", "test_vit", "tv:resnet18", "tv:mobilenet_v3_small"]
)
def test_a_headless_file_leaves_the_classifier_alone_fresh(tmp_path, name: str) -> None:
    """As SparK writes it: timm's network without classifier, torchvision's with one of 1000 classes."""
    path = tmp_path / "w.safetensors"
    trained = create(name)
    save(trained, path, name=name)
    model = create(name, num_classes=7)
    before = state(model)
    fresh = load_around_classifier(model, path)
    (head,) = classifier_names(model)
    assert fresh == [f"{head}.weight", f"{head}.bias"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in fresh else trained.state_dict()[key]), key


def test_a_file_with_a_classifier(tmp_path) -> None:
    """It is taken where it fits, left out where the network has none, and left fresh where it has another."""
    path = tmp_path / "w.safetensors"
    trained = create("resnet10t", num_classes=7)
    save(trained, path, name="resnet10t")
    same, none, other = (create("resnet10t", num_classes=n) for n in (7, 0, 5))
    assert load_around_classifier(same, path) == []
    assert torch.equal(same.state_dict()["fc.weight"], trained.state_dict()["fc.weight"])
    assert load_around_classifier(none, path) == []
    assert load_around_classifier(other, path) == ["fc.weight", "fc.bias"]
    for model in (same, none, other):
        assert torch.equal(model.state_dict()["conv1.0.weight"], trained.state_dict()["conv1.0.weight"])


def test_anything_else_must_agree(tmp_path) -> None:
    path = tmp_path / "w.safetensors"
    save(create("resnet10t"), path, name="resnet10t")
    wider = create("resnet14t", num_classes=7)
    before = state(wider)
    with pytest.raises(
        WeightsMismatch, match=r"written from resnet10t\) does not fit ResNet: it lacks layer1"
    ) as error:
        load_around_classifier(wider, path)
    assert "fc." not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in wider.state_dict().items())
    grey = create("resnet10t", in_chans=1, num_classes=7)
    with pytest.raises(WeightsMismatch, match=r"shapes differ: conv1\.0\.weight"):
        load_around_classifier(grey, path)


class Own(nn.Module):
    """A network of one's own: its classifier is the last linear layer."""

    def __init__(self, num_classes: int = 3, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, width), nn.Linear(width, width))
        self.out = nn.Linear(width, num_classes)


def test_a_network_of_ones_own(tmp_path) -> None:
    save(Own(), tmp_path / "w.safetensors", name=None)
    assert load_around_classifier(Own(5), tmp_path / "w.safetensors") == ["out.weight", "out.bias"]
    with pytest.raises(WeightsMismatch, match=r"shapes differ: body\.0\.weight"):
        load_around_classifier(Own(5, width=6), tmp_path / "w.safetensors")


def test_pretrained_weights_of_torchvision_with_another_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision itself refuses; the download is replaced by a network of known weights."""
    donor = torchvision.models.get_model("resnet18")
    monkeypatch.setattr(
        "torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: donor.state_dict()
    )
    model = create("tv:resnet18", pretrained=True, num_classes=7)
    assert model.fc.weight.shape == (7, 512)
    for key, value in model.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, donor.state_dict()[key])
