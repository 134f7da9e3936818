"""KNNProbe: the number is the protocol's, and training does not notice that it was measured."""

import pytest
import torch
from callback_toys import (
    InvertInput,
    Objective,
    ScaleStem,
    TinyNet,
    assert_same,
    batch,
    hook_count,
    snapshot,
    train_step,
)
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from leaven.callbacks import KNNProbe, NoEffectWarning, Progress, attach
from leaven.pretext.evaluation import knn
from leaven.pretext.features import recalibrate_batchnorm

TRAIN, TEST = batch(900, 48), batch(901, 24)


def pair() -> tuple[TinyNet, AdamW]:
    torch.manual_seed(0)
    model = TinyNet()
    return model, AdamW(model.parameters(), lr=0.05)


def by_hand(model: TinyNet, k: int, temperature: float) -> float:
    plain = TinyNet().eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        bank, queries = (plain.forward_features(images).mean((2, 3)) for images, _ in (TRAIN, TEST))
    return knn(bank, TRAIN[1], queries, TEST[1], k=k, temperature=temperature)


def test_it_measures_every_so_many_updates() -> None:
    model, optimizer = pair()
    probe = KNNProbe(TRAIN, TEST, every=2, k=5, temperature=0.1)
    attached = attach(model, optimizer, probe, total_steps=9)
    assert attached.logs() == {}
    expected = []
    for seed in range(5):
        train_step(model, optimizer, seed)
        if seed in (1, 3):
            expected.append((seed + 1, by_hand(model, k=5, temperature=0.1)))
    assert probe.history == expected
    assert attached.logs() == {"knn_top1": expected[-1][1]}
    assert 0.34 < expected[-1][1] <= 1  # learnable: better than chance


def test_a_training_that_is_too_short_for_it_is_told() -> None:
    model, optimizer = pair()
    with pytest.warns(
        NoEffectWarning, match=r"KNNProbe\(every=10, .* measures nothing: the training has 9 updates"
    ):
        attach(model, optimizer, KNNProbe(TRAIN, TEST, every=10, k=5), total_steps=9)


def test_k_and_temperature_reach_the_protocol() -> None:
    model, optimizer = pair()
    probe = KNNProbe(TRAIN, TEST, every=1, k=48, temperature=1e6)
    attach(model, optimizer, probe, total_steps=9)
    majority = TRAIN[1].bincount().argmax()
    assert probe.measure() == pytest.approx((TEST[1] == majority).float().mean().item())


def test_a_loader_of_images_serves_too() -> None:
    model, optimizer = pair()
    tensors = KNNProbe(TRAIN, TEST, every=1, k=5)
    loaders = KNNProbe(
        (DataLoader(TRAIN[0], batch_size=7), TRAIN[1]),
        (DataLoader(TEST[0], batch_size=5), TEST[1]),
        every=1,
        k=5,
    )
    loaders.name = "loaders"
    attach(model, optimizer, tensors, loaders, total_steps=9)
    train_step(model, optimizer, 0)
    assert tensors.history == loaders.history
    assert loaders.logs().keys() == {"loaders_top1"}


def test_loaders_give_their_labels_too_and_may_shuffle() -> None:
    model, _ = pair()
    train, test = (DataLoader(TensorDataset(*part), batch_size=7, shuffle=True) for part in (TRAIN, TEST))
    probe = KNNProbe(train, test, every=1, k=5, temperature=0.1, recalibrate=False)
    probe.setup(model, (), Progress(9))
    assert probe.measure() == by_hand(model, k=5, temperature=0.1)
    as_lists = KNNProbe((TRAIN[0], TRAIN[1].tolist()), list(TEST), every=1, k=5, temperature=0.1)  # type: ignore[arg-type]
    as_lists.setup(model, (), Progress(9))
    assert as_lists.measure() == probe.measure()
    for odd in (TRAIN[0], 3, (TRAIN[0], 3, 4)):
        with pytest.raises(
            TypeError, match=r"KNNProbe: train must be \(images, labels\), or a loader of batches"
        ):
            KNNProbe(odd, TEST, every=1)
    probe = KNNProbe(DataLoader(TRAIN[0], batch_size=8), test, every=1)
    probe.setup(model, (), Progress(9))
    with pytest.raises(TypeError, match=r"a loader alone must give batches \(images, labels\)"):
        probe.measure()


def test_training_does_not_notice() -> None:
    def run(*callbacks: KNNProbe) -> tuple[TinyNet, list[bool], torch.Tensor]:
        torch.manual_seed(0)
        model = TinyNet()
        model.norm.eval()  # a user who trains with frozen BatchNorm
        model.stem.register_forward_hook(lambda *_: None)
        optimizer = SGD(model.parameters(), lr=0.1)
        attach(model, optimizer, ScaleStem(), *callbacks, total_steps=9)
        torch.manual_seed(3)
        for seed in range(3):
            images, _ = batch(seed)
            model(images).square().mean().backward()  # dropout draws from the one global stream
            optimizer.step()
            optimizer.zero_grad()
        assert hook_count(model, optimizer) == 3  # the user's, ScaleStem's, the counter
        return model, [module.training for module in model.modules()], torch.get_rng_state()

    plain, modes, random_state = run()
    loader = DataLoader(TRAIN[0], batch_size=7, shuffle=False)
    probed, probed_modes, probed_random_state = run(KNNProbe((loader, TRAIN[1]), TEST, every=1, k=5))
    assert_same(snapshot(plain), snapshot(probed))
    assert modes == probed_modes
    assert modes != [True] * len(modes)
    assert torch.equal(random_state, probed_random_state)


def test_it_looks_at_an_objectives_backbone_without_hooks() -> None:
    torch.manual_seed(0)
    objective = Objective()
    optimizer = SGD(objective.parameters(), lr=0.1)
    probe, always = KNNProbe(TRAIN, TEST, every=1, k=5), InvertInput()
    always.invert = lambda *_: pytest.fail("a hook ran during the probe")  # type: ignore[method-assign]
    always.binds = "backbone"
    attach(objective, optimizer, probe, always, total_steps=9)
    objective.backbone.stem.weight.grad = torch.zeros(4, 3, 3, 3)
    optimizer.step()
    assert probe.history == [(1, by_hand(objective.backbone, k=5, temperature=0.07))]


def test_history_survives_resume() -> None:
    model, optimizer = pair()
    probe = KNNProbe(TRAIN, TEST, every=1, k=5)
    attached = attach(model, optimizer, probe, total_steps=9)
    train_step(model, optimizer, 0)
    again = KNNProbe(TRAIN, TEST, every=1, k=5)
    attach(model, optimizer, again, total_steps=9).load_state_dict(attached.state_dict())
    assert again.history == probe.history
    assert again.logs() == probe.logs()


def test_it_observes_last() -> None:
    assert KNNProbe.order > 80


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        KNNProbe(TRAIN, TEST, every=0)
    with pytest.raises(ValueError, match=f"test: {len(TEST[0])} images, but {len(TEST[1]) - 1} labels"):
        KNNProbe(TRAIN, (TEST[0], TEST[1][1:]), every=1)
    with pytest.raises(ValueError, match="k=49 neighbours of 48 images: lower k"):
        KNNProbe(TRAIN, TEST, every=1, k=49)


@pytest.mark.parametrize("source", [None, TRAIN[0][:20] * 3 + 1], ids=["bank", "others"])
def test_statistics_taken_anew_are_those_of_a_copy(source: Tensor | None) -> None:
    model, optimizer = pair()
    probe = KNNProbe(TRAIN, TEST, every=2, k=5, recalibrate=True if source is None else source)
    attach(model, optimizer, probe, total_steps=9)
    for seed in range(2):
        train_step(model, optimizer, seed)
    statistics = [buffer.clone() for buffer in model.buffers()]
    found = probe.measure()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), statistics, strict=True))
    assert probe.history == [(2, found)]
    assert recalibrate_batchnorm(model, TRAIN[0] if source is None else source) == 1
    assert found == by_hand(model, k=5, temperature=0.07)
    assert any(not torch.equal(a, b) for a, b in zip(model.buffers(), statistics, strict=True))
