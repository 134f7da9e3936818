"""Scores of calibration against scikit-learn, closed forms, and forecasts that are calibrated by construction."""

import math
from pathlib import Path

import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from leaven.bayes.calibration import (
    auroc,
    brier,
    calibration,
    expected_calibration_error,
    nll,
    reliability_plot,
)


def forecasts(n: int = 500, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(n, classes, generator=generator).mul(1.5).softmax(1)
    return probs, torch.multinomial(probs, 1, generator=generator).squeeze(1)


def test_against_scikit_learn() -> None:
    probs, labels = forecasts()
    assert nll(probs, labels) == pytest.approx(log_loss(labels, probs.double().numpy()), rel=1e-6)
    onehot = torch.eye(4)[labels]
    assert brier(probs, labels) == pytest.approx(float(((probs - onehot) ** 2).sum(1).mean()), rel=1e-5)
    inside, outside = probs[:200, 0], probs[200:, 1] + 0.1
    truth = [0] * 200 + [1] * 300
    assert auroc(inside, outside) == pytest.approx(roc_auc_score(truth, torch.cat([inside, outside])))
    assert auroc(torch.zeros(3), torch.ones(4)) == 1


def test_the_calibration_error_by_hand() -> None:
    probs = torch.tensor([[0.55, 0.45], [0.6, 0.4], [0.95, 0.05], [0.05, 0.95]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1])
    error, bins = expected_calibration_error(probs, labels, bins=10)
    assert error == pytest.approx(2 / 4 * abs(0.5 - 0.575) + 2 / 4 * abs(1 - 0.95))
    assert [each.images for each in bins] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 2]
    assert (bins[5].low, bins[5].high) == (0.5, 0.6)
    assert math.isnan(bins[0].accuracy)


def test_a_confidence_on_a_bound_is_in_the_bin_below() -> None:
    for bins in (10, 15, 25, 50):
        for i in range(bins // 2 + 1, bins + 1):
            probs = torch.tensor([[i / bins, 1 - i / bins]], dtype=torch.float64)
            _, found = expected_calibration_error(probs, [0], bins)
            assert [each.images for each in found].index(1) == i - 1


def test_what_is_calibrated_scores_near_zero_and_what_is_sure_of_itself_does_not() -> None:
    probs, labels = forecasts(40_000)
    fair, sure = calibration(probs, labels), calibration((3 * probs.log()).softmax(1), labels)
    assert fair.ece < 0.015
    assert sure.ece > 0.1
    assert sure.accuracy == fair.accuracy
    assert sure.nll > fair.nll
    assert sure.brier > fair.brier
    assert str(fair).startswith(f"accuracy {fair.accuracy:.2%}, NLL")
    perfect = calibration(torch.eye(3, dtype=torch.float64), torch.arange(3))
    assert (perfect.accuracy, perfect.nll, perfect.brier, perfect.ece) == (1, 0, 0, 0)


def test_scores_with_gradients() -> None:
    """As a head gives them outside of no_grad."""
    probs, labels = forecasts()
    logits = probs.log().requires_grad_()
    assert calibration(logits.softmax(1), labels).nll == pytest.approx(nll(probs, labels), rel=1e-5)
    entropy = torch.special.entr(logits.softmax(1)).sum(1)
    assert auroc(entropy[:200], entropy[200:]) == auroc(entropy[:200].detach(), entropy[200:].detach())


def test_half_precision() -> None:
    probs, labels = forecasts()
    rough, fine = calibration(probs.bfloat16(), labels), calibration(probs, labels)
    assert rough.nll == pytest.approx(fine.nll, rel=0.01)


def test_the_plot(tmp_path: Path) -> None:
    reliability_plot(calibration(*forecasts()), tmp_path / "reliability.png", "a head")
    assert (tmp_path / "reliability.png").read_bytes()[1:4] == b"PNG"


def test_arrays_and_lists_give_the_same_scores() -> None:
    probs, labels = forecasts(50)
    probs = probs.double()
    for other in ((probs.numpy(), labels.numpy().astype("uint8")), (probs.tolist(), labels.tolist())):
        assert str(calibration(*other)) == str(calibration(probs, labels))
        assert (nll(*other), brier(*other)) == (nll(probs, labels), brier(probs, labels))
    inside, outside = probs.max(1).values[:20], probs.max(1).values[20:]
    for known, strange in ((inside.numpy(), outside.numpy()), (inside.tolist(), outside.tolist())):
        assert auroc(known, strange) == auroc(inside, outside)
    for wrong in ((probs, inside), ([], inside), (inside * math.nan, outside)):
        with pytest.raises(ValueError, match=r"scores \(N,\) and \(M,\) are needed|NaN or infinity"):
            auroc(*wrong)


def test_lists_are_not_rounded_to_float32() -> None:
    assert auroc([1 - 2e-9, 1 - 1e-9], [1 - 2e-10, 1 - 1e-10]) == 1  # in float32 all of them are 1
    assert nll([[1e-50, 1.0]], [0]) == pytest.approx(50 * math.log(10))


def test_wrong_input() -> None:
    probs, labels = forecasts(10)
    for a, b, message in (
        (probs, labels[:5], "are needed, not"),
        (probs[:0], labels[:0], "are needed, not"),
        (probs.log(), labels, "rows must be probabilities"),
        ([[1.5, -0.5], [0.2, 0.8]], [0, 1], "rows must be probabilities"),
        (probs, labels + 4, "class indices from 0 to 3"),
        (probs, labels - 1, "class indices from 0 to 3"),
        (probs, labels.double(), "class indices from 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            calibration(a, b)
    with pytest.raises(ValueError, match="bins must be at least 1"):
        calibration(probs, labels, bins=0)
