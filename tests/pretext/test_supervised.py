"""The supervised objective against torch's own losses and counts done by hand."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from leaven.pretext import Supervised, count_correct


class Logits(nn.Module):
    """Gives back what it is fed, so that a test chooses the logits."""

    def forward(self, images: Tensor) -> Tensor:
        return images


LOGITS = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_indices_and_soft_labels_give_torchs_cross_entropy(smoothing: float) -> None:
    objective = Supervised(Logits(), smoothing)
    expected = F.cross_entropy(LOGITS, LABELS, label_smoothing=smoothing)
    assert objective(LOGITS, LABELS).loss.item() == pytest.approx(expected.item(), rel=1e-12)
    soft = F.one_hot(LABELS, 7).double() * (1 - smoothing) + smoothing / 7
    assert objective(LOGITS, soft).loss.item() == pytest.approx(expected.item(), rel=1e-12)
    mixed = 0.3 * soft + 0.7 * soft.flip(0)
    by_hand = -(mixed * LOGITS.log_softmax(1)).sum() / 9
    assert objective(LOGITS, mixed).loss.item() == pytest.approx(by_hand.item(), rel=1e-12)


def test_binary_cross_entropy_over_every_class() -> None:
    """Soft labels are not smoothed a second time."""
    objective = Supervised(Logits(), 0.1, bce=True)
    logits = LOGITS.float()
    soft = F.one_hot(LABELS, 7) * 0.9 + 0.1 / 7
    by_hand = -(soft * logits.sigmoid().log() + (1 - soft) * (1 - logits.sigmoid()).log()).mean()
    assert objective(logits, LABELS).loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert objective(logits, soft).loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_accuracies_are_logged_for_indices_alone() -> None:
    objective = Supervised(Logits())
    logits = torch.zeros(4, 8)
    for row, place in enumerate([0, 1, 4, 5]):  # the right class comes first, second, fifth, sixth
        order = torch.arange(8).roll(place)
        logits[row] = -order.float()
    right = torch.tensor([0, 0, 0, 0])
    logs = objective(logits, right).logs
    assert logs["top1"] == 0.25
    assert logs["top5"] == 0.75
    assert objective(logits, F.one_hot(right, 8).float()).logs == {}
    assert objective(logits[:, :5], right).logs.keys() == {"top1"}


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^Logits must return logits \(B, N\), not \(2, 3, 4, 4\)$"):
        Supervised(Logits())(torch.zeros(2, 3, 4, 4), torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"soft labels \(9, 6\) for logits \(9, 7\)"):
        Supervised(Logits())(LOGITS, torch.zeros(9, 6))
    for label in (-1, 7, -100):
        with pytest.raises(ValueError, match=f"^class indices must be from 0 to 6, not {label}$"):
            Supervised(Logits())(LOGITS, LABELS.where(LABELS != 3, label))
    for wrong in (LABELS.double(), LABELS[:8], LABELS.view(1, 3, 3)):
        with pytest.raises(
            ValueError, match=r"^class indices \(9,\) of an integer type or soft labels \(9, 7\)"
        ):
            Supervised(Logits())(LOGITS, wrong)
    assert torch.equal(
        Supervised(Logits())(LOGITS, LABELS.byte()).loss, Supervised(Logits())(LOGITS, LABELS).loss
    )
    googlenet = torchvision.models.googlenet(weights=None, num_classes=7, init_weights=False)
    with pytest.raises(
        ValueError, match=r"GoogLeNet must return logits .* not GoogLeNetOutputs: .* aux_logits=False"
    ):
        Supervised(googlenet)(torch.zeros(2, 3, 64, 64), torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"smoothing must be at least 0 and below 1, not 1\.0"):
        Supervised(Logits(), 1.0)


def test_names_without_weight_decay_are_the_objectives() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    names = Supervised(model).no_weight_decay()
    assert "backbone.pos_embed" in names
    assert Supervised(Logits()).no_weight_decay() == set()


def test_exported_weights_are_the_whole_networks(tmp_path) -> None:
    model = timm.create_model("test_resnet", num_classes=3).eval()
    Supervised(model).export(tmp_path / "w.safetensors", name="test_resnet", num_classes=3)
    plain = timm.create_model("test_resnet", num_classes=3).eval()
    plain.load_state_dict(load_file(tmp_path / "w.safetensors"))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain(x), model(x))


class Noisy(nn.Module):
    """In training mode its answers are noise, and it counts what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(7), nn.Dropout(0.9)
        self.frozen = nn.BatchNorm1d(7).eval()

    def forward(self, images: Tensor) -> Tensor:
        torch.rand(3)
        return self.drop(self.norm(images))


def test_counting_leaves_no_trace() -> None:
    model = Noisy()
    images, labels = LOGITS.float(), LABELS
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    counts = count_correct(model, [(images[:5], labels[:5]), (images[5:], labels[5:])])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.drop.training
    assert not model.frozen.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    order = images.argsort(1, descending=True)
    top1 = sum(int(order[i, 0] == labels[i]) for i in range(9))
    top5 = sum(int(labels[i] in order[i, :5]) for i in range(9))
    assert counts.tolist() == [top1, top5, 9]


def test_fewer_than_five_classes_count_as_many_guesses() -> None:
    assert count_correct(Logits(), [(torch.eye(3), torch.tensor([0, 1, 0]))]).tolist() == [2, 3, 3]


@pytest.mark.parametrize("bce", [False, True])
def test_the_loss_of_half_precision_logits_is_taken_in_single(bce: bool) -> None:
    objective = Supervised(nn.Linear(7, 7), 0.1, bce=bce)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(LOGITS.float(), LABELS).loss
        logits = objective.backbone(LOGITS.float())
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    plain = Supervised(Logits(), 0.1, bce=bce)
    assert loss.item() == pytest.approx(plain(logits.float(), LABELS).loss.item(), rel=1e-5)
