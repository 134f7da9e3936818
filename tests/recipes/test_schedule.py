"""Learning rate and weight decay of every update, against the formulas of the paper's recipe."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from leaven.recipes.common.flags import UserError
from leaven.recipes.common.optimizer import layer_scales, make_optimizer
from leaven.recipes.common.schedule import Plan, cosine, learning_rate, set_schedule, weight_decay
from leaven.recipes.common.start import LoopSettings

PLAN = Plan(epochs=10, batches=7, accumulation=2, warmup_epochs=2)


def test_an_incomplete_update_at_the_end_of_an_epoch_is_left_out() -> None:
    assert PLAN.updates_per_epoch == 3
    assert PLAN.total == 30
    assert PLAN.warmup == 6


def test_warm_up_is_linear_from_half_a_percent() -> None:
    rates = [learning_rate(t, PLAN, 2.0) for t in range(PLAN.warmup + 1)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[PLAN.warmup] == pytest.approx(2.0)
    steps = [b - a for a, b in pairwise(rates)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_cosine_reaches_a_thousandth_at_the_last_update() -> None:
    # As keyu-tian/SparK computes it: peak * (end + (1 - end) * (1 + cos(pi p)) / 2)
    for t in range(PLAN.warmup, PLAN.total):
        p = (t - PLAN.warmup) / (PLAN.total - 1 - PLAN.warmup)
        expected = 2.0 * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * p)))
        assert learning_rate(t, PLAN, 2.0) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(PLAN.total - 1, PLAN, 2.0) == pytest.approx(0.002)


def test_constant_stays_at_the_peak() -> None:
    assert learning_rate(0, PLAN, 2.0, shape="constant") == pytest.approx(0.01)
    assert {learning_rate(t, PLAN, 2.0, shape="constant") for t in range(PLAN.warmup, PLAN.total)} == {2.0}


def test_weight_decay_ignores_the_warm_up() -> None:
    decays = [weight_decay(t, PLAN, 0.04, 0.2) for t in range(PLAN.total)]
    assert decays[0] == pytest.approx(0.04)
    assert decays[-1] == pytest.approx(0.2)
    assert decays == sorted(decays)
    assert decays[10] == pytest.approx(0.2 - 0.16 * 0.5 * (1 + math.cos(math.pi * 10 / 29)))


def test_a_warm_up_that_is_longer_than_the_run_is_told() -> None:
    assert PLAN.about_warmup == []
    (line,) = Plan(epochs=2, batches=3, warmup_epochs=20).about_warmup
    assert line == "--warmup-epochs 20 is longer than the run of 2 epochs: 5 of its 6 updates are warm-up"


def test_cosine_stays_within_its_ends() -> None:
    assert cosine(1.0, 0.0, -1.0) == 1.0
    assert cosine(1.0, 0.0, 2.0) == pytest.approx(0.0)


@pytest.mark.parametrize("epochs", [1, 2])
def test_shortest_runs_have_finite_rates(epochs: int) -> None:
    plan = Plan(epochs=epochs, batches=1, warmup_epochs=5)
    assert plan.warmup == epochs - 1  # a run is never all warm-up
    rates = [learning_rate(t, plan, 1.0) for t in range(plan.total)]
    assert all(0 < rate <= 1 for rate in rates)
    assert weight_decay(0, plan, 0.1, 0.2) == pytest.approx(0.1)


def test_an_epoch_shorter_than_an_update_is_refused() -> None:
    with pytest.raises(UserError, match="--grad-accum-steps 8"):
        Plan(epochs=1, batches=7, accumulation=8)


def test_groups_without_decay_keep_none_and_scaled_groups_their_share() -> None:
    weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    groups = [
        {"params": [weight], "weight_decay": 0.2, "lr_scale": 0.5},
        {"params": [bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    for decay in (0.1, 0.0, 0.3):  # the decay may pass through zero
        set_schedule(optimizer, 0.01, decay)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [decay, 0.0]
        assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.01]


def test_layers_learn_at_their_share_of_every_rate() -> None:
    """Three depths by hand; weight decay stays where it was, and every parameter is in exactly one group."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    depths = {"0.weight": 0, "0.bias": 0, "1.weight": 1, "1.bias": 1, "2.weight": 2, "2.bias": 2}
    scales = layer_scales(depths, 0.7)
    assert scales["0.weight"] == pytest.approx(0.49)
    assert layer_scales(depths, 1.0, "net.") == {f"net.{name}": 1.0 for name in depths}
    for opt in ("adamw", "lamb", "sgd"):
        optimizer = make_optimizer(net, LoopSettings(opt=opt, weight_decay=0.1), scales)
        set_schedule(optimizer, 2.0, 0.05)
        names = {id(parameter): name for name, parameter in net.named_parameters()}
        found = {
            names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]
        }
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
        shares = {0: 0.49, 1: 0.7, 2: 1.0}
        for name, depth in depths.items():
            decay = 0.05 if name in ("0.weight", "2.weight") else 0.0
            assert found[name] == pytest.approx((2 * shares[depth], decay)), (opt, name)


def test_a_layers_share_reaches_its_weights() -> None:
    """The first step of SGD with plain momentum is the rate times the gradient."""
    net = nn.Linear(2, 2)
    optimizer = make_optimizer(
        net, LoopSettings(opt="momentum", weight_decay=0.0), {"weight": 0.25, "bias": 1.0}
    )
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net(torch.ones(1, 2)).sum().backward()
    set_schedule(optimizer, 0.1, 0.0)
    optimizer.step()
    assert torch.allclose(before["weight"] - net.weight, torch.full((2, 2), 0.025))
    assert torch.allclose(before["bias"] - net.bias, torch.full((2,), 0.1))
