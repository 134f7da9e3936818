"""EMA: the average itself, when it moves, what it saves, and evaluating with it."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from callback_toys import (
    InvertInput,
    Objective,
    ScaleStem,
    TinyNet,
    assert_same,
    batch,
    snapshot,
    train_step,
)
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from leaven.callbacks import EMA, AttachError, attach


def pair() -> tuple[TinyNet, AdamW]:
    torch.manual_seed(0)
    model = TinyNet()
    return model, AdamW(model.parameters(), lr=0.05)


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_the_recursion_in_float64(warmup: bool) -> None:
    model, optimizer = pair()
    ema = EMA(decay=0.6, warmup=warmup)
    attach(model, optimizer, ema, total_steps=9)
    expected: dict[str, Tensor] = {}
    for step in range(1, 7):
        train_step(model, optimizer, step)
        # timm: the first update copies; warm-up lets the decay grow from there
        decay = 0.0 if step == 1 else 0.6
        if warmup and step > 1:
            decay = min(0.6, 1 - step ** (-2 / 3))
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                before = expected.get(key, value.double())
                expected[key] = decay * before + (1 - decay) * value.double()
            else:
                expected[key] = value.clone()
    for key, value in ema.module.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key].double(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(ema.module.stem.weight, model.stem.weight)


def test_the_closed_form_of_a_constant_gradient() -> None:
    """w_t = -t under lr 1 and gradient 1: with decay d the average is -t + d / (1 - d) * (1 - d ** (t - 1))."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = SGD(model.parameters(), lr=1.0)
    ema = EMA(decay=0.5)
    attach(model, optimizer, ema, total_steps=9)
    for step in range(1, 8):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        assert math.isclose(ema.module.weight.item(), -step + (1 - 0.5 ** (step - 1)), rel_tol=1e-6)


def test_one_update_per_applied_step_and_none_while_accumulating() -> None:
    model, optimizer = pair()
    ema = EMA(decay=0.5)
    attach(model, optimizer, ema, total_steps=9)
    before = snapshot(ema.module)
    for seed in range(3):
        model(batch(seed)[0]).mean().backward()  # BatchNorm's statistics move, the average does not
    assert_same(snapshot(ema.module), before)
    optimizer.step()
    assert_same(snapshot(ema.module), snapshot(model))


def test_it_averages_the_whole_objective_or_on_demand_the_backbone() -> None:
    for binds, kind in (("whole", Objective), ("backbone", TinyNet)):
        objective = Objective()
        ema = EMA()
        ema.binds = binds  # type: ignore[assignment]
        attach(objective, SGD(objective.parameters(), lr=0.1), ema, total_steps=9)
        assert type(ema.module) is kind


def test_hooks_of_other_callbacks_do_nothing_in_the_average() -> None:
    model, optimizer = pair()
    ema = EMA(decay=0.5)
    attach(model, optimizer, ScaleStem(), InvertInput(), ema, total_steps=9)
    for seed in range(3):
        train_step(model, optimizer, seed)
    plain = TinyNet()
    plain.load_state_dict(ema.module.state_dict())
    images, _ = batch(5)
    for mode in (True, False):
        torch.manual_seed(0)
        expected = plain.train(mode)(images)
        torch.manual_seed(0)
        assert torch.equal(ema.module.train(mode)(images), expected)


def test_swapped_evaluates_the_model_with_averaged_weights_and_puts_its_own_back() -> None:
    model, optimizer = pair()
    ema = EMA(decay=0.5)
    attach(model, optimizer, ema, total_steps=9)
    for seed in range(4):
        train_step(model, optimizer, seed)
    own, average, parameters = snapshot(model), snapshot(ema.module), list(model.parameters())
    model.eval()
    images, _ = batch(5)
    plain = model(images)
    with ema.swapped() as swapped:
        assert swapped is model
        assert torch.equal(model(images), ema.module(images))
        assert not torch.equal(model(images), plain)
    assert_same(snapshot(model), own)
    assert_same(snapshot(ema.module), average)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    with pytest.raises(ZeroDivisionError), ema.swapped():
        raise ZeroDivisionError
    assert_same(snapshot(model), own)


def test_a_bfloat16_average_resumes_bit_equal() -> None:
    """timm rounds it at random: the generator's state belongs to the checkpoint."""

    def begin() -> tuple[nn.Module, SGD, EMA, Any]:
        torch.manual_seed(0)
        model = nn.Linear(64, 64).bfloat16()
        optimizer = SGD(model.parameters(), lr=0.1)
        ema = EMA(decay=0.99)
        return model, optimizer, ema, attach(model, optimizer, ema, total_steps=9)

    def step(model: nn.Module, optimizer: SGD, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    model, optimizer, ema, attached = begin()
    file = io.BytesIO()
    for seed in range(6):
        if seed == 3:
            torch.save({"model": model.state_dict(), "attached": attached.state_dict()}, file)
        step(model, optimizer, seed)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer, again, attached = begin()
    model.load_state_dict(saved["model"])
    attached.load_state_dict(saved["attached"])
    for seed in range(3, 6):
        step(model, optimizer, seed)
    assert_same(ema.module.state_dict(), again.module.state_dict())


def test_keys_are_plain_whatever_is_compiled() -> None:
    torch.compiler.reset()
    plain_keys = list(TinyNet().state_dict())
    model, optimizer = pair()
    model.norm = torch.compile(model.norm, backend="eager")  # type: ignore[assignment]
    ema = EMA(decay=0.5)
    attached = attach(torch.compile(model, backend="eager"), optimizer, ema, total_steps=9)
    train_step(model, optimizer, 0)
    train_step(model, optimizer, 1)
    state = attached.state_dict()
    assert list(state["callbacks"]["EMA"]["module"]) == plain_keys
    with ema.swapped():
        assert torch.equal(model.stem.weight, ema.module.stem.weight)
    resumed, optimizer = pair()  # not compiled now
    again = EMA(decay=0.5)
    attach(resumed, optimizer, again, total_steps=9).load_state_dict(copy.deepcopy(state))
    assert_same(list(again.module.state_dict().values()), list(ema.module.state_dict().values()))
    torch.compiler.reset()


def test_it_attaches_to_a_compiled_model_that_was_called() -> None:
    torch.compiler.reset()
    net, optimizer = pair()
    model = torch.compile(net, backend="eager")
    train_step(model, optimizer, 0)  # type: ignore[arg-type]
    ema = EMA(decay=0.5)
    attach(model, optimizer, ema, total_steps=9)  # type: ignore[arg-type]
    train_step(model, optimizer, 1)  # type: ignore[arg-type]
    assert torch.equal(ema.module.stem.weight, net.stem.weight)
    torch.compiler.reset()


def test_the_average_of_an_accelerate_model_computes_with_its_own_weights(accelerator_with: Any) -> None:
    """accelerate replaces `forward` on the instance; a copy must not call the original's."""
    accelerator = accelerator_with(mixed_precision="bf16")
    net, raw = pair()
    model, optimizer = accelerator.prepare(net, raw)
    ema = EMA(decay=0.5)
    attach(model, optimizer, ema, total_steps=9)
    for seed in range(4):
        train_step(model, optimizer, seed)
    plain = TinyNet().eval()
    plain.load_state_dict(ema.module.state_dict())
    images, _ = batch(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(images).float()
    assert torch.equal(ema.module(images), expected)


def test_two_averages_side_by_side() -> None:
    model, optimizer = pair()
    fast, slow = EMA(decay=0.1, name="fast"), EMA(decay=0.9, name="slow")
    attached = attach(model, optimizer, fast, slow, total_steps=9)
    for seed in range(3):
        train_step(model, optimizer, seed)
    assert set(attached.state_dict()["callbacks"]) == {"fast", "slow"}
    distance = [(each.module.stem.weight - model.stem.weight).norm() for each in (fast, slow)]
    assert distance[0] < distance[1]


def test_what_does_not_fit_is_said_in_one_line() -> None:
    for wrong in (1.5, float("nan"), "0.9"):
        with pytest.raises(ValueError, match=f"between 0 and 1, not {wrong!r}"):
            EMA(decay=wrong)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"EMA has no weights yet: attach it"):
        EMA().module  # noqa: B018
    model, optimizer = pair()
    attached = attach(model, optimizer, EMA(), total_steps=9)
    other = TinyNet(classes=1)  # broadcasting would take it
    other_state = attach(other, SGD(other.parameters(), lr=0.1), EMA(), total_steps=9).state_dict()
    with pytest.raises(
        ValueError, match=r"^the checkpoint's EMA is of another model: head.bias does not fit$"
    ):
        attached.load_state_dict(other_state)
    linear = nn.Linear(1, 1)
    state = attach(linear, SGD(linear.parameters(), lr=0.1), EMA(), total_steps=9).state_dict()
    with pytest.raises(ValueError, match=r"^the checkpoint's EMA is of another model: bias does not fit$"):
        attached.load_state_dict(state)


def test_it_observes_last() -> None:
    assert EMA.order > 80


def test_the_weights_outlive_removal() -> None:
    model, optimizer = pair()
    ema = EMA(decay=0.5)
    with attach(model, optimizer, ema, total_steps=9):
        train_step(model, optimizer, 0)
    kept = snapshot(ema.module)
    train_step(model, optimizer, 1)
    assert_same(snapshot(ema.module), kept)


def test_a_head_replaced_after_attach_is_named() -> None:
    for head in (nn.Linear(4, 7), nn.Identity(), nn.Linear(4, 3)):  # the last one has the same shapes
        model, optimizer = pair()
        attached = attach(model, optimizer, EMA(), total_steps=9)
        model.head = head
        with pytest.raises(
            RuntimeError, match=r"^EMA cannot go on averaging TinyNet.*attach again after the change"
        ):
            train_step(model, optimizer, 0) if isinstance(head, nn.Linear) else optimizer.step()
        attached.remove()


def test_a_model_that_cannot_be_copied_is_named() -> None:
    model, optimizer = pair()
    model.stream = (each for each in ())  # type: ignore[assignment]
    with pytest.raises(AttachError, match=r"^EMA averages a copy of TinyNet.*'generator'.*__getstate__"):
        attach(model, optimizer, EMA(), total_steps=9)
