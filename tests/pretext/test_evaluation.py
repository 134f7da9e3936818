"""kNN and the linear probe against brute force and sklearn; features against plain forward passes."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from leaven.pretext import evaluation
from leaven.pretext.evaluation import (
    extract_features,
    few_label_probe,
    few_protocol,
    knn,
    knn_protocol,
    linear_probe,
    linear_protocol,
    recalibrate_batchnorm,
)


def blobs(
    n: int, classes: int = 5, dim: int = 16, spread: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Overlapping Gaussian classes: neither trivially right nor at chance."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    return centres[y] + spread * torch.randn(n, dim, generator=generator), y


def brute_force_knn(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, k: int, temperature: float
) -> list[int]:
    """Loops, float64, no shortcuts."""
    predictions = []
    for query in test_x.double():
        similarity = [
            float(query @ row) / (float(query.norm()) * float(row.norm())) for row in train_x.double()
        ]
        nearest = sorted(range(len(similarity)), key=lambda i: -similarity[i])[:k]
        votes = dict.fromkeys(range(int(train_y.max()) + 1), 0.0)
        for i in nearest:
            votes[int(train_y[i])] += math.exp(similarity[i] / temperature)
        predictions.append(max(votes, key=lambda label: votes[label]))
    return predictions


# --- kNN


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0), (150, 0.3)])
def test_knn_equals_brute_force(k: int, temperature: float) -> None:
    train_x, train_y = blobs(150, spread=2.0)
    test_x, _ = blobs(80, spread=2.0, seed=1)
    expected = torch.tensor(brute_force_knn(train_x, train_y, test_x, k, temperature))
    # Against the oracle's predictions as labels the accuracy is 1 only if every single one agrees.
    assert knn(train_x, train_y, test_x, expected, k, temperature) == 1.0
    assert knn(train_x, train_y, test_x, (expected + 1) % 5, k, temperature) == 0.0


def test_knn_temperature_decides_the_vote() -> None:
    """One very near neighbour of class 0 against two farther ones of class 1: sharp weights follow it."""
    train_x = torch.tensor([[1.0, 0.0], [1.0, 0.5], [1.0, 0.5]])
    train_y, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.01]])
    assert knn(train_x, train_y, query, torch.tensor([0]), k=3, temperature=0.07) == 1.0
    assert knn(train_x, train_y, query, torch.tensor([1]), k=3, temperature=1.0) == 1.0


@pytest.mark.parametrize("k", [1, 7, 31])
def test_knn_with_uniform_weights_is_sklearn(k: int) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    train_x, train_y = blobs(200, classes=2, spread=2.0)  # two classes and odd k: no ties
    test_x, test_y = blobs(100, classes=2, spread=2.0, seed=1)
    model = KNeighborsClassifier(k, metric="cosine").fit(train_x.double(), train_y)
    predictions = torch.as_tensor(model.predict(test_x.double()))
    assert knn(train_x, train_y, test_x, predictions, k, math.inf) == 1.0
    assert knn(train_x, train_y, test_x, test_y, k, math.inf) == pytest.approx(
        model.score(test_x.double(), test_y)
    )


@pytest.mark.parametrize("numbers", [1, 350, 1000])
def test_knn_chunks_do_not_change_the_result(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train_x, train_y = blobs(150, spread=2.0)
    test_x, test_y = blobs(83, spread=2.0, seed=1)
    whole = knn(train_x, train_y, test_x, test_y)
    assert 0.3 < whole < 0.99
    monkeypatch.setattr(
        evaluation, "_CHUNK", numbers
    )  # 1, 2 and 6 rows at a time; 83 is divided by none but 1
    assert knn(train_x, train_y, test_x, test_y) == whole


def test_knn_ignores_the_length_of_features_and_survives_a_tiny_temperature() -> None:
    train_x, train_y = blobs(100)
    test_x, test_y = blobs(50, seed=1)
    scale = torch.rand(100, 1) * 100 + 0.1
    assert knn(train_x * scale, train_y, test_x * 7, test_y) == knn(train_x, train_y, test_x, test_y)
    # exp(1 / 1e-4) overflows; the limit is the single nearest neighbour
    assert knn(train_x, train_y, test_x, test_y, 20, 1e-4) == knn(train_x, train_y, test_x, test_y, 1)


def test_knn_accepts_a_class_that_only_one_side_has_and_half_precision() -> None:
    train_x, train_y = blobs(60, classes=3)
    assert knn(train_x, train_y, train_x, torch.full((60,), 8), k=1) == 0.0
    assert knn(train_x.bfloat16(), train_y, train_x.bfloat16(), train_y, k=1) == 1.0


# --- linear probe


def test_linear_probe_on_separable_data_is_right() -> None:
    train_x, train_y = blobs(200, spread=0.1)
    test_x, test_y = blobs(100, spread=0.1, seed=1)
    assert linear_probe(train_x, train_y, test_x, test_y) == 1.0


def test_linear_probe_on_random_labels_is_chance() -> None:
    """20 features that know nothing of 4 balanced classes: .25 within five standard errors."""
    generator = torch.Generator().manual_seed(0)
    train_x, test_x = torch.randn(2, 1000, 20, generator=generator)
    train_y, test_y = torch.randint(4, (2, 1000), generator=generator)
    accuracy = linear_probe(train_x, train_y, test_x, test_y)
    assert abs(accuracy - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 1000)


def test_linear_probe_is_invariant_to_each_features_scale_and_shift() -> None:
    """Lost without standardisation: the informative features here are 1e4 times smaller than the noise."""
    train_x, train_y = blobs(200, dim=6)
    test_x, test_y = blobs(200, dim=6, seed=1)
    scale, shift = torch.logspace(-3, 3, 6), torch.linspace(-5, 5, 6)
    moved = linear_probe(train_x * scale + shift, train_y, test_x * scale + shift, test_y)
    assert moved == pytest.approx(linear_probe(train_x, train_y, test_x, test_y), abs=0.011)


def test_linear_probe_uses_train_statistics_only() -> None:
    """One test feature alone is classified as it is in company."""
    train_x, train_y = blobs(200, spread=3.0)
    test_x, test_y = blobs(30, spread=3.0, seed=1)
    together = linear_probe(train_x, train_y, test_x, test_y)
    alone = [linear_probe(train_x, train_y, test_x[i : i + 1], test_y[i : i + 1]) for i in range(30)]
    assert 0 < together < 1
    assert sum(alone) / 30 == pytest.approx(together)


def test_linear_probe_chooses_its_penalty_on_the_held_out_part_and_refits_on_all() -> None:
    """Against the same selection written out; one informative feature among 60, few examples, noisy."""
    from sklearn.linear_model import LogisticRegression

    def accuracy(l2: float, fit: Tensor, fit_y: Tensor, on: Tensor, on_y: Tensor) -> float:
        model = LogisticRegression(C=1 / (l2 * len(fit)), max_iter=2000).fit(fit, fit_y)
        return float(model.score(on, on_y))

    regret = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1080, 60, generator=generator)
        y = ((2 * x[:, 0] + torch.randn(1080, generator=generator)) > 0).long()
        z = (x - x[:80].mean(0)) / x[:80].std(0, correction=0)
        held_out = torch.from_numpy(evaluation._held_out(y[:80].numpy(), seed=0))
        (fit, fit_y), (check, check_y) = ((z[:80][part], y[:80][part]) for part in (~held_out, held_out))
        validation = [accuracy(l2, fit, fit_y, check, check_y) for l2 in evaluation._L2_GRID]
        final = [accuracy(l2, z[:80], y[:80], z[80:], y[80:]) for l2 in evaluation._L2_GRID]
        chosen = max(range(len(final)), key=lambda i: validation[i])
        assert linear_probe(x[:80], y[:80], x[80:], y[80:]) == pytest.approx(final[chosen])
        regret.append(max(final) - final[chosen])
    assert max(regret) > 0.002  # choosing on the test set would have been seen


def test_a_constant_feature_of_many_images_is_one() -> None:
    train_x, train_y = blobs(3000)
    test_x, test_y = blobs(400, seed=1)
    expected = linear_probe(train_x, train_y, test_x, test_y)
    constant = torch.full((3000, 1), 0.1)
    found = linear_probe(
        torch.cat([train_x, constant], 1), train_y, torch.cat([test_x, constant[:400] + 0.5], 1), test_y
    )
    assert found == expected
    # A large mean does not hide a small spread.
    x = 100 + torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 1000
    (scaled, _) = evaluation._standardised(x.float().numpy(), x[:1].float().numpy())
    assert scaled.std(dtype=np.float64) == pytest.approx(1, abs=1e-3)
    assert x.float().double().std() == pytest.approx(1e-3, rel=0.01)


def test_linear_probe_is_deterministic_and_ignores_constant_features() -> None:
    train_x, train_y = blobs(150, spread=2.0)
    test_x, test_y = blobs(150, spread=2.0, seed=1)
    first = linear_probe(train_x, train_y, test_x, test_y, seed=3)
    assert linear_probe(train_x, train_y, test_x, test_y, seed=3) == first
    dead = torch.zeros(150, 1)
    # The last bits of this one tell the class; they are rounding, and must not be scaled up to information.
    rounding = [1000 + 6.1e-5 * y[:, None] for y in (train_y, test_y)]
    assert len(rounding[0].unique()) > 1
    padded_train, padded_test = (
        torch.cat([x, dead, noise], 1) for x, noise in zip((train_x, test_x), rounding, strict=True)
    )
    assert linear_probe(padded_train, train_y, padded_test, test_y, seed=3) == pytest.approx(first, abs=0.01)


def test_held_out_part_has_a_fifth_of_every_class_and_spares_singletons() -> None:
    y = torch.cat([torch.full((n,), label) for label, n in enumerate([50, 10, 6, 2, 1])]).numpy()
    held_out = evaluation._held_out(y, seed=0)
    assert [int(held_out[y == label].sum()) for label in range(5)] == [10, 2, 2, 1, 0]
    assert (held_out != evaluation._held_out(y, seed=1)).any()


# --- logistic regression, a second time


def full_batch_regression(x: Tensor, y: Tensor, l2: float, steps: int = 300) -> tuple[Tensor, Tensor]:
    """Weights (D, classes) and intercepts by plain gradient descent with momentum, float64, on mean loss + penalty."""
    classes = int(y.max()) + 1
    weights, bias = torch.zeros(x.shape[1], classes).double(), torch.zeros(classes).double()
    target = F.one_hot(y, classes).double()
    # The loss is smooth with constant |x|^2 / 2: Nesterov's method with that step needs no search.
    step = 1 / (float(torch.linalg.matrix_norm(x, 2)) ** 2 / (2 * len(x)) + 0.5 + l2)
    ahead, ahead_bias = weights.clone(), bias.clone()
    for number in range(steps):
        error = ((x @ ahead + ahead_bias).softmax(1) - target) / len(x)
        new, new_bias = ahead - step * (x.T @ error + l2 * ahead), ahead_bias - step * error.sum(0)
        momentum = number / (number + 3)
        ahead, ahead_bias = new + momentum * (new - weights), new_bias + momentum * (new_bias - bias)
        weights, bias = new, new_bias
    return weights, bias


def standardise(x: Tensor, other: Tensor) -> Tensor:
    return (other.double() - x.double().mean(0)) / x.double().std(0, correction=0)


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-3])
def test_two_implementations_agree_on_probabilities(l2: float) -> None:
    train_x, train_y = blobs(300, spread=2.0)
    test_x, test_y = blobs(400, spread=2.0, seed=1)
    x, queries = standardise(train_x, train_x), standardise(train_x, test_x)
    ours = evaluation._regression(l2, x.numpy(), train_y.numpy())
    weights, bias = full_batch_regression(x, train_y, l2, steps=3000)
    theirs = (queries @ weights + bias).softmax(1)
    assert np.abs(ours.predict_proba(queries.numpy()) - theirs.numpy()).max() < 5e-3
    accuracy = float((theirs.argmax(1) == test_y).float().mean())
    assert ours.score(queries.numpy(), test_y.numpy()) == pytest.approx(accuracy, abs=0.005)
    assert 0.4 < accuracy < 0.95  # neither at chance nor solved


def test_the_linear_probe_is_that_of_a_second_implementation() -> None:
    """The whole protocol by plain gradient descent: standardise, choose the penalty, fit again, score."""
    train_x, train_y = blobs(300, spread=2.0)
    test_x, test_y = blobs(500, spread=2.0, seed=1)

    def accuracy(x: Tensor, y: Tensor, on: Tensor, on_y: Tensor, l2: float) -> float:
        weights, bias = full_batch_regression(x, y, l2, steps=3000)
        return float(((on @ weights + bias).argmax(1) == on_y).float().mean())

    x, queries = standardise(train_x, train_x), standardise(train_x, test_x)
    held_out = torch.from_numpy(evaluation._held_out(train_y.numpy(), seed=0))
    scores = [
        accuracy(x[~held_out], train_y[~held_out], x[held_out], train_y[held_out], l2)
        for l2 in evaluation._L2_GRID
    ]
    best = evaluation._L2_GRID[scores.index(max(scores))]
    expected = accuracy(x, train_y, queries, test_y, best)
    assert linear_probe(train_x, train_y, test_x, test_y) == pytest.approx(expected, abs=0.005)


def test_where_nothing_can_be_learnt_both_are_at_chance() -> None:
    """No step, a learning rate of zero; scikit-learn, which always steps, is held at zero by the penalty."""
    train_x, train_y = blobs(5000, spread=0.1)
    train_x, train_y = (
        torch.cat([part[train_y == label][:100] for label in range(5)]) for part in (train_x, train_y)
    )
    test_x, test_y = blobs(500, spread=0.1, seed=1)
    x, queries = standardise(train_x, train_x), standardise(train_x, test_x)
    assert linear_probe(train_x, train_y, test_x, test_y) == 1.0  # what there is to learn
    weights, bias = full_batch_regression(x, train_y, 1e-2, steps=0)
    assert np.allclose((queries @ weights + bias).softmax(1), 0.2)
    held = evaluation._regression(1e9, x.numpy(), train_y.numpy())
    assert np.allclose(held.predict_proba(queries.numpy()), 0.2, atol=1e-4)


# --- few labels


def test_few_labels_are_fitted_on_the_chosen_alone_and_standardised_on_all() -> None:
    train_x, train_y = blobs(300, spread=1.5)
    test_x, test_y = blobs(400, spread=1.5, seed=1)
    chosen = [int((train_y == label).nonzero()[i]) for label in range(5) for i in range(4)]
    x, queries = standardise(train_x, train_x), standardise(train_x, test_x)
    weights, bias = full_batch_regression(x[chosen], train_y[chosen], evaluation._L2_FEW, steps=3000)
    expected = float(((queries @ weights + bias).argmax(1) == test_y).float().mean())
    found = few_label_probe(train_x, train_y, test_x, test_y, chosen)
    assert found == pytest.approx(expected, abs=0.005)
    # The other labels are not looked at.
    wrong = (train_y + 1) % 5
    wrong[chosen] = train_y[chosen]
    assert few_label_probe(train_x, wrong, test_x, test_y, chosen) == found
    # Features of any scale: the statistics are those of all images.
    scale = torch.logspace(-3, 3, 16)
    assert few_label_probe(train_x * scale, train_y, test_x * scale, test_y, chosen) == pytest.approx(
        found, abs=0.005
    )
    with pytest.raises(ValueError, match="at least two classes"):
        few_label_probe(train_x, train_y, test_x, test_y, chosen[:4])


# --- both, on real images


def test_digits_are_nearly_solved_by_their_pixels() -> None:
    """Why the digits are a smoke test and no evidence: raw pixels leave hardly anything to learn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(digits.data).float()[order], torch.from_numpy(digits.target)[order]
    parts = (x[:1400], y[:1400], x[1400:], y[1400:])
    assert knn(*parts) > 0.96
    assert linear_probe(*parts) > 0.93


# --- refusals


@pytest.mark.parametrize("judge", [knn, linear_probe])
def test_arrays_and_lists_are_as_good_as_tensors(judge) -> None:
    x, y = blobs(30)
    expected = judge(x, y, x, y)
    assert judge(x.numpy(), y.numpy(), x.numpy(), y.numpy()) == expected
    assert judge(x.tolist(), y.tolist(), x.tolist(), y.tolist()) == expected


@pytest.mark.parametrize("judge", [knn, linear_probe])
def test_bad_input_is_refused(judge) -> None:
    x, y = blobs(30)
    for arguments, message in [
        ((x, y[:-1], x, y), "train features must be (N, D) and labels (N,)"),
        ((x, y, x[:, :, None], y), "test features must be (N, D)"),
        ((x, y, x[:0], y[:0]), "with N > 0"),
        ((x, y, x[:, :3], y), "train features have 16 dimensions, test features 3"),
        ((x.log(), y, x, y), "train features contain NaN or infinity"),
        ((x, y, x, y - 1), "test labels must be class indices from 0"),
        ((x, y.float(), x, y), "train labels must be class indices of an integer type, not torch.float32"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            judge(*arguments)


def test_k_and_temperature_out_of_range_are_refused() -> None:
    x, y = blobs(30)
    with pytest.raises(ValueError, match="k must be between 1 and the 30 training features, not 31"):
        knn(x, y, x, y, k=31)
    with pytest.raises(ValueError, match="temperature must be positive"):
        knn(x, y, x, y, temperature=0)


def test_linear_probe_refuses_what_it_cannot_validate() -> None:
    x, _ = blobs(4)
    for labels in ([0, 0, 0, 0], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="at least two classes"):
            linear_probe(x, torch.tensor(labels), x, torch.tensor(labels))


def test_protocols_name_every_choice() -> None:
    assert knn_protocol(k=7, temperature=0.1, split="digits train to val", crop="32x32") == (
        "kNN: k=7, votes weighted by exp(cosine / 0.1), features L2-normalised, norm layers in eval, "
        "split: digits train to val, crop: 32x32, no augmentation"
    )
    line = linear_protocol(split="train to val", crop="centre 224")
    for part in (
        "standardised",
        "held-out fifth",
        "norm layers in eval",
        "split: train to val",
        "crop: centre 224",
    ):
        assert part in line
    assert "0.07" in knn_protocol()
    assert "all training images, L2 0.01" in few_protocol()


def test_protocols_keep_what_their_names_promise() -> None:
    """To change a default is to change the name: knn-v1 printed with two results must mean one thing."""
    assert (evaluation.KNN, evaluation.LINEAR, evaluation.FEW) == ("knn-v1", "linear-v1", "few-v1")
    same = {"split": "S", "crop": "C"}
    assert knn_protocol(**same) == (
        "kNN: k=20, votes weighted by exp(cosine / 0.07), features L2-normalised, norm layers in eval, "
        "split: S, crop: C, no augmentation"
    )
    assert linear_protocol(**same) == (
        "linear probe: logistic regression on frozen features standardised with train statistics, L2 from 0.0001 "
        "to 1 chosen on a held-out fifth of train, refitted on all, norm layers in eval, split: S, crop: C, "
        "no augmentation"
    )
    assert few_protocol(**same) == (
        "few labels: logistic regression on frozen features of the chosen images, standardised with the statistics "
        "of all training images, L2 0.01 for the mean loss, norm layers in eval, split: S, crop: C, no augmentation"
    )


# --- features


class Tiny(nn.Module):
    """A user's network with all that behaves differently in training: BatchNorm, dropout, a frozen norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.frozen = nn.BatchNorm2d(6).eval()
        self.drop = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.drop(self.frozen(self.norm(self.conv(images)))).mean((2, 3))


def test_extract_features_runs_in_eval_and_restores_every_mode() -> None:
    model, images = Tiny().train(), torch.randn(10, 3, 8, 8)
    model.frozen.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = extract_features(model, images, "cpu", batch_size=4)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert modes == {"": True, "conv": True, "norm": True, "frozen": False, "drop": True}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, model.eval()(images).detach())


def test_modes_come_back_after_an_error() -> None:
    model = Tiny().train()
    model.frozen.eval()
    with pytest.raises(RuntimeError):
        extract_features(model, torch.randn(2, 5, 8, 8))
    assert model.training
    assert model.norm.training
    assert not model.frozen.training


def test_extract_features_takes_tensors_loaders_and_lists_alike() -> None:
    model, images, labels = Tiny().eval(), torch.randn(10, 3, 8, 8), torch.arange(10)
    expected = model(images).detach()
    loader = DataLoader(TensorDataset(images, labels), batch_size=3)
    for given in (images, loader, [images[:6], images[6:]], ((batch, None) for batch in images.split(5))):
        torch.testing.assert_close(extract_features(model, given, "cpu"), expected)


def test_the_global_random_state_is_untouched() -> None:
    """A loader draws a seed from the global generator whenever it is iterated."""
    images = torch.randn(10, 3, 8, 8)
    loader = DataLoader(TensorDataset(images), batch_size=5)
    model = Tiny()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    extract_features(model, loader)
    recalibrate_batchnorm(model, loader)
    assert torch.equal(torch.rand(3), expected)


class Maps(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 5, 1)


class Tokens(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("kind", [Maps, Tokens])
def test_maps_and_tokens_are_averaged_over_positions(kind: type[nn.Conv2d]) -> None:
    model, images = kind().eval(), torch.randn(4, 3, 6, 6)
    expected = F.conv2d(images, model.weight, model.bias).mean((2, 3)).detach()
    torch.testing.assert_close(extract_features(model, images), expected)


def test_bad_images_and_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"normalised floating-point tensors.*uint8"):
        extract_features(Tiny(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"normalised floating-point tensors.*str"):
        extract_features(Tiny(), ["image.png"])
    with pytest.raises(ValueError, match="no images"):
        extract_features(Tiny(), [])
    with pytest.raises(ValueError, match="the backbone must return features"):
        extract_features(nn.Flatten(0), torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "mobilenetv3_small_050"]
)
def test_timm_features_are_the_ones_of_a_model_without_classifier(name: str) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    size = 224 if "vit" in name else 64
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(extract_features(model, images), model(images))
    classifier = timm.create_model(name, num_classes=7).eval()
    classifier.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(extract_features(classifier, images), extract_features(model, images))


def test_a_convolutional_network_gives_its_last_map_not_what_its_head_makes_of_it() -> None:
    body = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 7)]
    model, images = nn.Sequential(*body, *head).eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(extract_features(model, images), model[:4](images).mean((2, 3)).detach())


def test_features_of_a_half_precision_network_are_fp32() -> None:
    found = extract_features(Maps().bfloat16(), torch.randn(2, 3, 4, 4, dtype=torch.bfloat16))
    assert found.dtype == torch.float32


def test_a_final_linear_layer_is_left_out() -> None:
    """Logits out: the features are what the classifier reads, and its hooks are gone afterwards."""
    model = nn.Sequential(Tokens(), nn.AdaptiveAvgPool2d((1, 5)), nn.Flatten(), nn.Linear(5, 1000)).eval()
    images = torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(extract_features(model, images), model[:3](images).detach())
    assert not model[3]._forward_hooks
    with_activation = nn.Sequential(*model, nn.ReLU()).eval()
    torch.testing.assert_close(extract_features(with_activation, images), with_activation(images).detach())


def test_torchvision_transformers_give_their_class_token() -> None:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 48, 64).eval()
    images, read = torch.randn(2, 3, 32, 32), []
    model.heads.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        assert not model(images).any()  # its classifier starts at zero: logits would say nothing
    torch.testing.assert_close(extract_features(model, images), read[0])


def test_torchvision_features_are_what_its_classifier_pools() -> None:
    import torchvision

    torch.manual_seed(0)
    model, images = torchvision.models.resnet18(weights=None).eval(), torch.randn(2, 3, 64, 64)
    pooled = []
    model.avgpool.register_forward_hook(lambda module, args, output: pooled.append(output.flatten(1)))
    with torch.no_grad():
        model(images)
    torch.testing.assert_close(extract_features(model, images), pooled[0])


# --- BatchNorm


def test_recalibrated_statistics_are_those_of_the_images() -> None:
    """First layer, closed form: moments of the convolution's output, batches weighted by their size."""
    model, images = Tiny().train(), torch.randn(10, 3, 8, 8) * 3 + 1
    model.norm.running_mean.fill_(math.nan)  # whatever was there must not matter
    modes = {name: module.training for name, module in model.named_modules()}
    assert recalibrate_batchnorm(model, images, batch_size=4) == 2
    with torch.no_grad():
        parts = [model.conv(part) for part in images.split(4)]
    mean = sum(len(part) * part.mean((0, 2, 3)) for part in parts) / 10
    variance = sum(len(part) * part.var((0, 2, 3)) for part in parts) / 10
    torch.testing.assert_close(model.norm.running_mean, mean)
    torch.testing.assert_close(model.norm.running_var, variance)
    assert model.norm.momentum == 0.1
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_recalibration_makes_eval_agree_with_the_batch_it_saw() -> None:
    """One batch: eval is then train mode on it (up to the unbiased variance), through all layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )
    images = torch.randn(64, 3, 12, 12) * 5
    with torch.no_grad():
        expected = model.train()(images)
    recalibrate_batchnorm(model, [(images, None)], batch_size=64)
    torch.testing.assert_close(model.eval()(images).detach(), expected, atol=1e-2, rtol=1e-2)


def test_recalibration_leaves_other_layers_in_eval_and_weights_alone() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3)).train()
    images = torch.randn(256, 3, 4, 4)
    weights = [parameter.clone() for parameter in model.parameters()]
    recalibrate_batchnorm(model, images)
    torch.testing.assert_close(
        model[1].running_var, torch.ones(3), atol=0.1, rtol=0
    )  # 10 with dropout active
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))


def test_recalibration_passes_over_empty_batches_and_norms_without_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    images = torch.randn(64, 3, 4, 4) + 2
    assert recalibrate_batchnorm(model, [images[:0], images]) == 1
    torch.testing.assert_close(model[0].running_mean, images.mean((0, 2, 3)))


def test_one_image_left_over_is_recalibrated_with_the_batch_before() -> None:
    """The last map of such a network is 1x1: one image alone has one value per channel."""
    model, images = nn.Sequential(nn.Conv2d(3, 4, 4), nn.BatchNorm2d(4)), torch.randn(9, 3, 4, 4)
    with torch.no_grad():
        parts = [model[0](part) for part in (images[:4], images[4:])]
    for batches in (images, DataLoader(TensorDataset(images), batch_size=4)):
        assert recalibrate_batchnorm(model, batches, batch_size=4) == 1
        mean = sum(len(part) * part.mean((0, 2, 3)) for part in parts) / 9
        variance = sum(len(part) * part.var((0, 2, 3)) for part in parts) / 9
        torch.testing.assert_close(model[1].running_mean, mean)
        torch.testing.assert_close(model[1].running_var, variance)


def test_recalibration_without_batchnorm_or_images() -> None:
    assert recalibrate_batchnorm(nn.Conv2d(3, 4, 1), torch.randn(2, 3, 4, 4)) == 0
    model = Tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="no images"):
        recalibrate_batchnorm(model, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_probabilities_of_the_linear_probe_are_those_behind_its_accuracy() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    generator = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 4
    x = torch.randn(120, 6, generator=generator) + torch.eye(6)[y] * 1.5
    train, test = (x[:80], y[:80]), (x[80:], y[80:])
    probs = evaluation.linear_probs(*train, *test)
    assert float((probs.argmax(1) == test[1]).double().mean()) == linear_probe(*train, *test)
    torch.testing.assert_close(probs.sum(1), torch.ones(40, dtype=torch.float64))
    mean, std = train[0].mean(0), train[0].std(0, correction=0)
    scaled = [((part - mean) / std).double().numpy() for part in (train[0], test[0])]
    losses = []
    for l2 in (1.0, 1e-1, 1e-2, 1e-3, 1e-4):  # one of the grid
        model = LogisticRegression(C=1 / (l2 * 80), max_iter=5000).fit(scaled[0], train[1].numpy())
        losses.append(log_loss(test[1].numpy(), model.predict_proba(scaled[1])))
    found = float(-probs.gather(1, test[1].unsqueeze(1)).log().mean())
    assert min(abs(found - each) for each in losses) < 1e-3
    missing = train[0][train[1] != 2], train[1][train[1] != 2]
    assert (evaluation.linear_probs(*missing, *test)[:, 2] == 0).all()
