"""TrAct against ridge regression by lstsq, brute-force patches, one process against two, one batch against many.

Run as a script, this file is one of two processes.
"""

import copy
import itertools
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from callback_toys import run_twice
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

from leaven.callbacks import (
    AttachError,
    NoEffectWarning,
    TrAct,
    attach,
    patch_second_moment,
    remove_tract,
    tract,
    tract_gradient,
)

LAM = 0.1


def net(seed: int = 0, **conv: Any) -> nn.Sequential:
    """float64: convolution of 3 channels, no norm layers, three classes."""
    torch.manual_seed(seed)
    stem = nn.Conv2d(3, 4, **({"kernel_size": 3, "stride": 2, "padding": 1} | conv))
    return nn.Sequential(stem, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)).double()


def images(n: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 9, 8, generator=generator, dtype=torch.float64) * scale
    return x, torch.randint(3, (n,), generator=generator)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss_of(model, x, y).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def attached(model: nn.Module, **how: Any) -> Any:
    how = {"lam": LAM, "layers": ["0"]} | how
    return attach(model, SGD(model.parameters(), lr=0.0), TrAct(**how), total_steps=1000)


# --- the mathematics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [5, 40])
def test_equals_the_ridge_regression_by_least_squares(inputs: int) -> None:
    """min over D of |dZ - X D|^2 + lam b |D|^2, dZ = -b dL/dZ: stacked and handed to lstsq; n = 12."""
    torch.manual_seed(0)
    x, dz = torch.randn(inputs, 12).double(), torch.randn(inputs, 7).double()
    system = torch.cat([x, (LAM * inputs) ** 0.5 * torch.eye(12).double()])
    target = torch.cat([-inputs * dz, torch.zeros(12, 7).double()])
    step = torch.linalg.lstsq(system, target).solution.T
    found = -tract_gradient(dz.T @ x, x.T @ x / inputs, LAM)
    torch.testing.assert_close(found, step, rtol=1e-10, atol=1e-10)


def test_small_damping_makes_the_preactivations_move_as_proposed() -> None:
    """With at most as many inputs as weights, and lam to 0: the change of z = W x is the step on z itself."""
    torch.manual_seed(0)
    x, dz = torch.randn(5, 12).double(), torch.randn(5, 7).double()
    step = -tract_gradient(dz.T @ x, x.T @ x / 5, 1e-9)
    torch.testing.assert_close(x @ step.T, -5 * dz, rtol=1e-6, atol=1e-6)
    x, dz = torch.randn(40, 12).double(), torch.randn(40, 7).double()
    step = -tract_gradient(dz.T @ x, x.T @ x / 40, 1e-9)
    onto = x @ torch.linalg.pinv(x)  # the projection on what x can change
    torch.testing.assert_close(x @ step.T, -40 * onto @ dz, rtol=1e-6, atol=1e-6)


def test_large_damping_gives_the_plain_gradient_over_lam() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(40, 12).double(), torch.randn(7, 12).double()
    torch.testing.assert_close(1e9 * tract_gradient(g, x.T @ x / 40, 1e9), g, rtol=1e-7, atol=1e-7)


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.floats(1e-4, 1e3))
def test_descends_turns_with_the_inputs_and_vanishes_with_the_gradient(seed: int, lam: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (9, 4))
    moment = x.T @ x / 9
    step = tract_gradient(g, moment, lam)
    assert (step * g).sum() > 0
    q, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(tract_gradient(g @ q, q.T @ moment @ q, lam), step @ q, rtol=1e-7, atol=1e-7)
    assert not tract_gradient(torch.zeros_like(g), moment, lam).any()
    torch.testing.assert_close(3 * step, tract_gradient(3 * g, moment, lam))


@pytest.mark.parametrize("n", [12, 300])
def test_the_solve_is_exact_whatever_the_dtype_of_the_gradient(n: int) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(2 * n, n), torch.randn(8, n)
    moment = x.T @ x / (2 * n)
    exact = g.double() @ torch.linalg.inv(moment.double() + LAM * torch.eye(n).double())
    torch.testing.assert_close(tract_gradient(g, moment, LAM).double(), exact, rtol=1e-4, atol=1e-4)
    half = tract_gradient(g.bfloat16(), moment, LAM)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, rtol=5e-2, atol=5e-2)


def test_groups_have_a_system_each() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(2, 40, 12).double(), torch.randn(6, 3, 2, 2).double()
    found = tract_gradient(g, x.mT @ x / 40, LAM)
    for group in range(2):
        rows = slice(3 * group, 3 * group + 3)
        alone = tract_gradient(g[rows], x[group].T @ x[group] / 40, LAM)
        torch.testing.assert_close(found[rows], alone)


def test_what_is_not_finite() -> None:
    g, moment = torch.randn(4, 6), torch.eye(6)
    broken = g.clone()
    broken[1, 2] = float("inf")
    assert not torch.isfinite(tract_gradient(broken, moment, LAM)[1]).all()
    moment[0, 0] = float("nan")
    assert torch.equal(tract_gradient(g, moment, LAM), g)


# --- patches ---------------------------------------------------------------------------------------------------


def brute_force(x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, int]:
    """Patch by patch, by F.unfold of what torch's own padding gives."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode)
    totals, count = [], 0
    for part in padded.chunk(conv.groups, 1):
        patches = F.unfold(part, conv.kernel_size, conv.dilation, 0, conv.stride).movedim(1, 2).flatten(0, 1)
        totals.append(sum(torch.outer(u, u) for u in patches))
        count = len(patches)
    return torch.stack(totals), count


@settings(max_examples=60)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 4),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    channels_last=st.booleans(),
)
def test_patches_are_those_of_the_convolution(
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    mode: Any,
    channels_last: bool,
) -> None:
    conv = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups, padding_mode=mode).double()
    x = torch.randn(3, 4, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, count = brute_force(x, conv)
    given_x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    found, found_count = patch_second_moment(given_x, conv)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert found_count == count == conv(x)[:, 0].numel()


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str) -> None:
    conv = nn.Conv2d(3, 4, (4, 3), padding=padding, dilation=2).double()
    x, _ = images(3)
    torch.testing.assert_close(patch_second_moment(x, conv)[0], brute_force(x, conv)[0])


def test_a_layer_that_was_changed_after_it_was_made_counts_as_it_is() -> None:
    """A 7x7 stem with stride 2 made one for small images, attribute by attribute."""
    stem, x = nn.Conv2d(3, 4, 7, 2, 3, bias=False).double(), images(3)[0]
    stem.weight = nn.Parameter(stem.weight[:, :, 2:5, 2:5].detach().clone())
    small = nn.Conv2d(3, 4, 3, 1, 1, bias=False).double()
    small.weight = stem.weight
    for one in (1, (1, 1)):
        stem.stride = stem.padding = stem.dilation = one  # type: ignore[assignment]
        assert torch.equal(stem(x), small(x))
        (found, count), (expected, expected_count) = (patch_second_moment(x, each) for each in (stem, small))
        assert count == expected_count
        torch.testing.assert_close(found, expected)


def test_convolutions_of_other_dimensions_are_those_of_two() -> None:
    x = torch.randn(3, 4, 11).double()
    line, plane = nn.Conv1d(4, 5, 3, 2, 1).double(), nn.Conv2d(4, 5, (1, 3), (1, 2), (0, 1)).double()
    for left, right in zip(
        patch_second_moment(x, line), patch_second_moment(x.unsqueeze(2), plane), strict=True
    ):
        assert torch.equal(torch.as_tensor(left), torch.as_tensor(right))
    x, space = torch.randn(2, 4, 5, 6, 7).double(), nn.Conv3d(4, 5, (2, 3, 1), 1, (1, 0, 0)).double()
    total, count = patch_second_moment(x, space)
    unit = torch.zeros(24, 4, 2, 3, 1).double()
    unit.flatten(1).fill_diagonal_(1)
    patches = F.conv3d(x, unit, padding=(1, 0, 0)).movedim(1, 4).reshape(-1, 24)
    torch.testing.assert_close(total[0], patches.T @ patches)
    assert count == len(patches)


def test_linear_layers_flatten_all_axes_but_the_last() -> None:
    x = torch.randn(2, 5, 6).double().transpose(0, 1)
    total, count = patch_second_moment(x, nn.Linear(6, 3))
    rows = x.reshape(-1, 6)
    torch.testing.assert_close(total[0], rows.T @ rows)
    assert count == 10


def test_an_unbatched_image_is_a_batch_of_one() -> None:
    conv, x = nn.Conv2d(3, 4, 3).double(), images(1)[0]
    assert torch.equal(patch_second_moment(x[0], conv)[0], patch_second_moment(x, conv)[0])


@pytest.mark.parametrize("part", [1, 27 * 4, 27 * 12, 27 * 40, 1 << 40])
def test_parts_and_blocks_of_any_size_are_as_one(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from leaven.callbacks import second_moment

    for conv in (nn.Conv2d(3, 4, 3, 2, 1).double(), nn.Conv2d(3, 4, 4, 4).double()):
        x, _ = images(7)
        expected, count = brute_force(x, conv)
        monkeypatch.setattr(second_moment, "_PART", {"cpu": part})
        for blocks_from in (1, 10**6):
            monkeypatch.setattr(second_moment, "_BLOCKS_FROM", blocks_from)
            found, found_count = patch_second_moment(x, conv)
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
            assert torch.equal(found, found.mT)
            assert found_count == count


def test_timms_same_convolution_pads_by_the_size_of_the_image() -> None:
    from timm.layers import Conv2dSame

    conv = Conv2dSame(3, 4, 3, stride=2).double()
    x, _ = images(3)
    unit = torch.zeros(27, 3, 3, 3).double()
    unit.flatten(1).fill_diagonal_(1)
    wide = Conv2dSame(3, 27, 3, stride=2, bias=False).double()
    wide.weight.data = unit
    patches = wide(x).movedim(1, 3).reshape(-1, 27)
    torch.testing.assert_close(patch_second_moment(x, conv)[0][0], patches.T @ patches)


def test_low_precision_is_summed_in_float32_whatever_autocast_says() -> None:
    x = torch.randn(4, 3, 16, 16)
    conv = nn.Conv2d(3, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = patch_second_moment(x, conv)
    assert torch.equal(total, patch_second_moment(x, conv)[0])
    half, _ = patch_second_moment(x.bfloat16(), conv)
    assert half.dtype == torch.float32
    assert torch.equal(half, patch_second_moment(x.bfloat16().float(), conv)[0])


# --- in a network ------------------------------------------------------------------------------------------------


def by_hand(model: nn.Sequential, x: Tensor, plain: Tensor, lam: float = LAM) -> Tensor:
    """The gradient of the stem as the paper's code has it: unfold, inverse, product."""
    conv = model[0]
    patches = (
        F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).movedim(1, 2).flatten(0, 1)
    )
    moment = patches.T @ patches / len(patches)
    inverse = torch.linalg.inv(moment + lam * torch.eye(len(moment), dtype=moment.dtype))
    return (plain.flatten(1) @ inverse).view_as(plain)


def test_only_the_gradient_of_the_weight_changes() -> None:
    model, (x, y) = net(), images(6)
    asks = x.clone().requires_grad_()
    plain = gradients(model, asks, y)
    input_gradient, output, keys = asks.grad, model(x), list(model.state_dict())
    asks.grad = None
    with attached(model):
        under = gradients(model, asks, y)
        assert torch.equal(model(x), output)
        assert list(model.state_dict()) == keys
    assert torch.equal(asks.grad, input_gradient)
    assert all(map(torch.equal, under[1:], plain[1:]))  # biases, classifier
    torch.testing.assert_close(under[0], by_hand(model, x, plain[0]), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(under[0], plain[0], rtol=0.1)
    assert all(map(torch.equal, gradients(model, x, y), plain))  # taken off


def test_channels_last_has_the_same_gradient_in_its_own_layout() -> None:
    model, (x, y) = net(), images(6)
    with attached(model):
        expected = gradients(model, x, y)[0]
    model = net().to(memory_format=torch.channels_last)
    with attached(model):
        found = gradients(model, x.contiguous(memory_format=torch.channels_last), y)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert model[0].weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_two_passes_before_one_backward_share_a_moment() -> None:
    model, (x, y), (x2, y2) = net(), images(6), images(4, seed=1)
    plain = gradients(model, torch.cat([x, x2]), torch.cat([y, y2]))[0]
    model.zero_grad()
    with attached(model):
        (0.6 * loss_of(model, x, y) + 0.4 * loss_of(model, x2, y2)).backward()
    torch.testing.assert_close(model[0].weight.grad, by_hand(model, torch.cat([x, x2]), plain))


@pytest.mark.parametrize("when", ["backward", "step"])
def test_every_backward_pass_of_an_update_has_a_moment(when: str) -> None:
    """Two losses on one forward pass, two passes before two backward passes, gradients that are only looked at."""
    model, (x, y), (x2, y2) = net(), images(6), images(4, seed=1)
    plain = gradients(model, x, y)[0]
    both = 0.6 * plain + 0.4 * gradients(model, x2, y2)[0]
    with attached(model, when=when), warnings.catch_warnings():
        warnings.simplefilter("error")
        model.zero_grad()
        loss = loss_of(model, x, y)
        (looked,) = torch.autograd.grad(loss, [model[0].weight], retain_graph=True)
        torch.testing.assert_close(looked, by_hand(model, x, plain))
        (0.25 * loss).backward(retain_graph=True)
        (0.75 * loss).backward()
        torch.testing.assert_close(model[0].weight.grad, by_hand(model, x, plain))
        model.zero_grad()
        first, second = 0.6 * loss_of(model, x, y), 0.4 * loss_of(model, x2, y2)
        first.backward()
        second.backward()
        expected = by_hand(model, torch.cat([x, x2]), both)  # as one batch
        if when == "backward":
            expected = by_hand(model, x, 0.6 * plain) + by_hand(model, x2, both - 0.6 * plain)
        torch.testing.assert_close(model[0].weight.grad, expected)


def test_replicas_of_data_parallel_share_a_moment() -> None:
    """What DataParallel makes for each device, called here in turn: their weights are tensors, no parameters."""
    model, (x, y) = net(), images(6)
    stem, rest = model[0], model[1:]
    plain = gradients(model, x, y)[0]
    model.zero_grad()
    with attached(model):
        outputs = []
        for part in (x[:4], x[4:]):
            replica = stem._replicate_for_data_parallel()
            replica.weight, replica.bias = stem.weight.clone(), stem.bias.clone()
            outputs.append(replica(part))
        F.cross_entropy(rest(torch.cat(outputs)), y).backward()
    torch.testing.assert_close(stem.weight.grad, by_hand(model, x, plain))


def test_checkpointing_does_not_change_the_moment() -> None:
    from torch.utils.checkpoint import checkpoint

    model, (x, y) = net(), images(6)
    with attached(model):
        expected = gradients(model, x, y)[0]
        for reentrant in (False, True):
            model.zero_grad()
            asks = x.clone().requires_grad_()
            F.cross_entropy(checkpoint(model, asks, use_reentrant=reentrant), y).backward()
            torch.testing.assert_close(model[0].weight.grad, expected)


@pytest.mark.parametrize("zero", ["to none", "in place"])
def test_micro_batches_of_a_step_are_one_batch(zero: str) -> None:
    """Two updates of three micro-batches; .grad is right after each of them."""
    model, (x, y) = net(), images(12)
    plain = [gradients(model, x[:n], y[:n])[0] for n in (4, 8, 12)]
    model.zero_grad()
    with attached(model, when="step"):
        for _ in range(2):
            for k in range(3):
                part = slice(4 * k, 4 * k + 4)
                (loss_of(model, x[part], y[part]) / 3).backward()
                n = 4 * k + 4
                expected = by_hand(model, x[:n], plain[k]) * n / 12
                torch.testing.assert_close(model[0].weight.grad, expected, rtol=1e-10, atol=1e-12)
            model.zero_grad(set_to_none=zero == "to none")


def test_gradients_that_are_looked_at_between_micro_batches_do_not_count() -> None:
    model, (x, y) = net(), images(12)
    plain = gradients(model, x, y)[0]
    model.zero_grad()
    with attached(model, when="step"):
        for k in range(3):
            loss = loss_of(model, x[4 * k : 4 * k + 4], y[4 * k : 4 * k + 4]) / 3
            torch.autograd.grad(loss, [model[0].weight], retain_graph=True)
            loss.backward()
        torch.testing.assert_close(model[0].weight.grad, by_hand(model, x, plain))


def test_every_backward_has_its_own_moment_by_default() -> None:
    model, (x, y) = net(), images(8)
    parts = [slice(0, 4), slice(4, 8)]
    expected = sum(by_hand(model, x[p], gradients(model, x[p], y[p])[0]) for p in parts)
    model.zero_grad()
    with attached(model):
        for p in parts:
            loss_of(model, x[p], y[p]).backward()
    torch.testing.assert_close(model[0].weight.grad, expected)


def test_a_step_that_gradscaler_skipped_leaves_nothing_behind() -> None:
    model, (x, y) = net().float(), images(4)
    x = x.float()
    optimizer = SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    with attach(model, optimizer, TrAct(LAM, ["0"], when="step"), total_steps=9):
        expected = gradients(model, x, y)[0]
        for set_to_none in (True, False):
            optimizer.zero_grad(set_to_none)
            scaler.scale(loss_of(model, x, y) * float("inf")).backward()
            scaler.step(optimizer)
            scaler.update(8.0)
            assert not torch.isfinite(model[0].weight.grad).all()
            optimizer.zero_grad(set_to_none)
            scaler.scale(loss_of(model, x, y)).backward()
            scaler.unscale_(optimizer)
            torch.testing.assert_close(model[0].weight.grad, expected)
            scaler.step(optimizer)
            scaler.update(8.0)


def test_bf16_autocast_is_close_to_float32() -> None:
    model, (x, y) = net().float(), images(32)
    x = x.float()
    with attached(model):
        exact = gradients(model, x, y)[0]
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, x, y)
        loss.backward()
    assert ((model[0].weight.grad - exact).norm() / exact.norm()) < 2e-2


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def count(x: Tensor, layer: nn.Module) -> tuple[Tensor, int]:
        calls.append(len(x))
        return patch_second_moment(x, layer)

    monkeypatch.setattr(sys.modules["leaven.callbacks.first_layer"], "patch_second_moment", count)
    return calls


def test_nothing_is_computed_in_eval_without_gradient_or_for_a_frozen_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = counted(monkeypatch)
    model, (x, y) = net(), images(4)
    plain = gradients(model, x, y)
    callbacks = attached(model)
    model.eval()
    model(x)
    model.train()
    with torch.no_grad():
        model(x)
    model[0].weight.requires_grad_(False)
    assert all(map(torch.equal, gradients(model, x, y), plain[1:]))
    assert calls == []
    model[0].weight.requires_grad_(True)
    gradients(model, x, y)
    assert calls == [4]
    with callbacks.paused():
        assert all(map(torch.equal, gradients(model, x, y), plain))
    assert calls == [4]


def test_a_gradient_without_a_moment_is_left_alone_and_named() -> None:
    model, (x, y) = net(), images(4)
    plain = gradients(model, x, y)
    with attached(model):
        model.eval()
        with pytest.warns(NoEffectWarning, match=r"leaves a gradient of 0 as it is: .*eval mode"):
            assert all(map(torch.equal, gradients(model, x, y), plain))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradients(model, x, y)  # said once
            model.train()
            gradients(model, x, y)
            model.eval()  # has nothing of the pass before
            assert all(map(torch.equal, gradients(model, x, y), plain))


@pytest.mark.parametrize("when", ["backward", "step"])
def test_forward_passes_that_no_gradient_comes_back_from_do_not_count(when: Any) -> None:
    """What is thrown away, labels by the model itself, gradients of the images alone, a backward pass that failed."""
    model, (x, y) = net(), images(4)
    expected = by_hand(model, x, gradients(model, x, y)[0])

    def fail(_: Tensor) -> None:
        raise RuntimeError("out of memory")

    def failing() -> None:
        late = model[0](3 * x)
        late.register_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            late.sum().backward()

    def attacked() -> None:
        asks = (9 * x).requires_grad_()
        torch.autograd.grad(loss_of(model, asks, y), asks)

    with attached(model, when=when):
        for other in (lambda: model(100 * x), lambda: model(x + 1).detach(), attacked, failing):
            other()
            model.zero_grad()
            torch.testing.assert_close(gradients(model, x, y)[0], expected)
            model.zero_grad()


def test_every_backward_pass_of_several_forward_passes_has_its_own_moment() -> None:
    model, (x, y), (x2, y2) = net(), images(6), images(4, seed=1)
    plain = [gradients(model, *each)[0] for each in ((x, y), (x2, y2))]
    model.zero_grad()
    first, second = by_hand(model, x, plain[0]), by_hand(model, x2, plain[1])
    with attached(model):
        one, two = loss_of(model, x, y), loss_of(model, x2, y2)
        two.backward(retain_graph=True)
        torch.testing.assert_close(model[0].weight.grad, second)
        one.backward()
        torch.testing.assert_close(model[0].weight.grad, first + second)
        two.backward()  # through the same graph again
        torch.testing.assert_close(model[0].weight.grad, first + 2 * second)
    plain = gradients(model, torch.cat([x, x2]), torch.cat([y, y2]))
    model.zero_grad()
    with attached(model, when="step"):
        one, two = loss_of(model, x, y), loss_of(model, x2, y2)
        (0.6 * one).backward()
        (0.4 * two).backward()
        both = torch.cat([x, x2])
        torch.testing.assert_close(model[0].weight.grad, by_hand(model, both, plain[0]))


def test_other_weights_in_the_layer_are_told_and_left_alone() -> None:
    model, (x, y) = net(), images(4)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    loss = F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)
    (plain,) = torch.autograd.grad(loss, [weights["0.weight"]])
    with attached(model):
        with pytest.warns(NoEffectWarning, match="its weight is another than when it was attached"):
            loss = F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)
        (found,) = torch.autograd.grad(loss, [weights["0.weight"]])
    assert torch.equal(found, plain)


def test_lam_may_follow_progress() -> None:
    model, (x, y) = net(), images(4)
    plain = gradients(model, x, y)[0]
    optimizer = SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, TrAct(lambda t: 0.1 + t, ["0"]), total_steps=4):
        for step in range(4):
            torch.testing.assert_close(gradients(model, x, y)[0], by_hand(model, x, plain, 0.1 + step / 4))
            optimizer.step()
    with attach(model, optimizer, TrAct(lambda t: 0.5 - t, ["0"]), total_steps=2):
        gradients(model, x, y)
        optimizer.step()
        with pytest.raises(
            ValueError, match=r"lam must be a number greater than 0, got 0.0 at Progress\(1/2\)"
        ):
            gradients(model, x, y)


def test_images_that_are_not_finite_leave_the_gradient_and_are_reported() -> None:
    model, (x, y) = net(), images(4)
    optimizer = SGD(model.parameters(), lr=0.0)
    callbacks = attach(model, optimizer, TrAct(LAM, ["0"]), total_steps=100)
    x[0, 0, 0, 0] = float("nan")
    gradients(model, x, y)
    assert torch.isnan(model[0].weight.grad).any()
    with pytest.warns(NoEffectWarning, match="its inputs were not finite"):
        optimizer.step()
    callbacks.remove()
    callbacks = attach(model, optimizer, TrAct(LAM, ["0"]), total_steps=100)
    optimizer.step()
    gradients(model, x, y)
    with pytest.warns(NoEffectWarning, match="its inputs were not finite"):
        callbacks.remove()


def test_images_that_were_not_normalised_and_cannot_be_solved_with_are_told_from_those() -> None:
    """Patches of 768 numbers in [0, 255]: in float32 the damping is lost beside the largest eigenvalue."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.Flatten(), nn.Linear(32, 3))
    x, y = torch.rand(4, 3, 32, 32) * 255, torch.tensor([0, 1, 2, 0])
    plain = gradients(model, x, y)
    optimizer = SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, TrAct(LAM, ["0"]), total_steps=100):
        assert all(map(torch.equal, gradients(model, x, y), plain))
        with pytest.warns(NoEffectWarning, match="or too large to solve with: give it normalised images"):
            optimizer.step()


def test_an_image_that_is_too_small_is_refused_in_torchs_words() -> None:
    model = net(kernel_size=5, padding=0)
    with attached(model), pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        model(images(2)[0][..., :4, :3])


def test_copies_are_plain() -> None:
    model, (x, y) = net(), images(4)
    plain = gradients(model, x, y)
    with attached(model):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        under = gradients(model, x, y)[0]
    assert not torch.equal(under, plain[0])
    for twin in twins:
        assert all(map(torch.equal, gradients(twin, x, y), plain))


def test_groups_dilation_and_padding_modes_in_a_network() -> None:
    for how in ({"padding_mode": "reflect"}, {"dilation": 2}, {"padding": "same", "stride": 1}):
        model, (x, y) = net(**how), images(4)
        plain = gradients(model, x, y)[0]
        total, count = brute_force(x, model[0])
        with attached(model):
            found = gradients(model, x, y)[0]
        torch.testing.assert_close(found, tract_gradient(plain, total / count, LAM))


def test_weight_decay_and_clipping_come_after() -> None:
    """SGD adds its decay to the changed gradient, undivided; the norm that is clipped is the changed one."""
    model, (x, y) = net(), images(4)
    optimizer = SGD(model.parameters(), lr=1.0, weight_decay=0.5)
    with attach(model, optimizer, TrAct(LAM, ["0"]), total_steps=9):
        before, gradient = model[0].weight.detach().clone(), gradients(model, x, y)[0]
        norm = nn.utils.clip_grad_norm_([model[0].weight], 1e9)
        torch.testing.assert_close(norm, gradient.norm())
        optimizer.step()
    torch.testing.assert_close(model[0].weight, before - gradient - 0.5 * before)


# --- the function --------------------------------------------------------------------------------------------------


def test_tract_is_in_place_and_can_be_undone() -> None:
    model, (x, y) = net(), images(6)
    plain = gradients(model, x, y)
    layer = model[0]
    assert tract(layer, LAM) is layer
    torch.testing.assert_close(gradients(model, x, y)[0], by_hand(model, x, plain[0]))
    assert all(map(torch.equal, gradients(copy.deepcopy(model), x, y), plain))
    with pytest.raises(ValueError, match="a TrAct layer already"):
        tract(layer)
    assert remove_tract(layer) is layer
    assert all(map(torch.equal, gradients(model, x, y), plain))
    assert not layer._forward_hooks
    assert not layer._forward_hooks_with_kwargs
    with pytest.raises(ValueError, match="no TrAct layer"):
        remove_tract(layer)


def test_remove_tract_leaves_other_hooks_alone() -> None:
    layer, seen = net()[0], []

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(kwargs)

    layer.register_forward_hook(hook, with_kwargs=True)
    remove_tract(tract(layer))
    layer(input=images(1)[0])
    assert list(seen[0]) == ["input"]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused_and_nothing_is_left() -> None:
    model = net()
    standardised = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    frozen = net()
    frozen[0].weight.requires_grad_(False)
    cases: list[tuple[nn.Module, Any, str]] = [
        (model, ["stem"], "Sequential has no layer 'stem'"),
        (model, ["0", "1"], r"cannot train Sequential\.1: a Tanh is not a Linear"),
        (
            nn.Sequential(standardised),
            ["0"],
            r"Sequential\.0: .*(is not a Linear|derived from other parameters)",
        ),
        (tied, ["0"], r"its weight is shared \(0.weight, 1.weight\)"),
        (frozen, ["0"], r"the weight of Sequential\.0 is frozen; unfreeze it"),
        (nn.Sequential(nn.Embedding(3, 3)), "auto", r"Sequential.*layers=\[\"embed\"\]"),
        (
            nn.Sequential(nn.MaxPool2d(2)),
            "auto",
            "no convolution or linear layer of Sequential sees the input",
        ),
    ]
    for network, layers, message in cases:
        optimizer = SGD([*network.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)
        with pytest.raises(AttachError, match=message):
            attach(network, optimizer, TrAct(layers=layers), total_steps=1)
        assert not any(module._forward_hooks for module in network.modules())
        assert not any(p._backward_hooks for p in network.parameters())


def test_a_layer_is_trained_once_whoever_asks_for_it() -> None:
    """Attached to a model and to its part, by `tract` too, or named twice: the inverse is taken once."""
    model, (x, y) = net(), images(6)
    plain = gradients(model, x, y)[0]
    whole = nn.ModuleDict({"backbone": model})
    with attached(model, layers=["0", "0"]):
        torch.testing.assert_close(gradients(model, x, y)[0], by_hand(model, x, plain))
        with pytest.raises(AttachError, match=r"TrAct trains Sequential\.0 already: remove"):
            attach(whole, SGD(model.parameters(), lr=0.0), TrAct(layers=["0"]), total_steps=9)
        with pytest.raises(ValueError, match="a TrAct layer already"):
            tract(model[0])
    tract(model[0])
    with pytest.raises(AttachError, match=r"TrAct trains Sequential\.0 already"):
        attached(model)
    remove_tract(model[0])
    with attached(model):
        torch.testing.assert_close(gradients(model, x, y)[0], by_hand(model, x, plain))


def test_a_network_that_takes_keywords_alone_is_named_and_works_by_the_layers_name() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)

        def forward(self, *, pixel_values: Tensor) -> Tensor:
            return self.stem(input=pixel_values).mean((2, 3))

    net = Keywords()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(AttachError, match=r"first layer of Keywords.*1 positional.*name it"):
        attach(net, optimizer, TrAct(), total_steps=1)
    x = torch.randn(4, 3, 8, 8)
    (plain,) = torch.autograd.grad(net(pixel_values=x).square().sum(), [net.stem.weight])
    total, count = patch_second_moment(x, net.stem)
    with attach(net, optimizer, TrAct(layers=["stem"]), total_steps=1):
        net(pixel_values=x).square().sum().backward()
    torch.testing.assert_close(net.stem.weight.grad, tract_gradient(plain, total / count, 0.1))


def test_a_network_that_takes_a_dict_is_named() -> None:
    class Dict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.stem(batch["image"]).mean((2, 3))

    net = Dict()
    with pytest.raises(AttachError, match=r"first layer of Dict, which runs on no image.*name it"):
        attach(net, SGD(net.parameters(), lr=0.1), TrAct(), total_steps=1)


def test_a_layer_replaced_later_is_told_within_fifty_updates() -> None:
    model, (x, y) = net(), images(4)
    optimizer = SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, TrAct(layers=["0"]), total_steps=200):
        gradients(model, x, y)
        model[0] = copy.deepcopy(model[0])
        for _ in range(50):
            optimizer.step()
        for _ in range(49):
            optimizer.step()
        with pytest.warns(NoEffectWarning, match="no gradient of 0 in 50 updates"):
            optimizer.step()


def test_a_layer_replaced_or_a_model_compiled_before_is_told_in_words() -> None:
    model, (x, y) = net(), images(4)
    optimizer = SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, TrAct(layers=["0"]), total_steps=9):
        model[0] = copy.deepcopy(model[0])
        gradients(model, x, y)
        optimizer.step()
        gradients(model, x, y)
        optimizer.step()
        gradients(model, x, y)
        with pytest.warns(
            NoEffectWarning, match="none of its hooks ran.*attach again after a layer is replaced"
        ):
            optimizer.step()


def test_wrong_arguments_are_named() -> None:
    for lam in (0.0, -1.0, float("nan"), float("inf"), "0.1"):
        for call in (lambda lam=lam: TrAct(lam), lambda lam=lam: tract(nn.Linear(2, 2), lam)):
            with pytest.raises(ValueError, match="lam must be a number greater than 0"):
                call()
    for lam in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="lam must be greater than 0"):
            tract_gradient(torch.ones(1, 1), torch.eye(1), lam)
    with pytest.raises(ValueError, match='when must be "backward" or "step"'):
        TrAct(when="later")  # type: ignore[arg-type]
    for layers in ([], [3]):
        with pytest.raises(ValueError, match="layers must be"):
            TrAct(layers=layers)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a Tanh is not"):
        tract(nn.Tanh())
    with pytest.raises(TypeError, match="a Tanh is not"):
        patch_second_moment(torch.ones(1), nn.Tanh())
    with pytest.raises(ValueError, match="frozen"):
        tract(nn.Linear(2, 2).requires_grad_(False))


# --- first layers of real networks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet10t", "conv1.0"),
        ("convnext_atto", "stem.0"),
        ("vit_tiny_patch16_224", "patch_embed.proj"),
        ("tf_mobilenetv3_small_100", "conv_stem"),
        ("repvgg_a0", "stem.conv_1x1.conv, stem.conv_kxk.conv"),
    ],
)
def test_finds_the_first_layers_of_timms_networks(name: str, layers: str) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    optimizer = SGD(model.parameters(), lr=0.1)
    found = TrAct()
    size = 224 if "vit" in name else 64
    x, y = torch.randn(2, 3, size, size), torch.tensor([0, 1])

    def stem_gradients() -> dict[str, Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        loss_of(model, x, y).backward()
        return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}

    plain = stem_gradients()
    with attach(model, optimizer, found, total_steps=9):
        assert repr(found) == f"TrAct(lam=0.1, layers={layers!r}, when='backward')"
        under = stem_gradients()
    changed = [k for k in plain if not torch.allclose(plain[k], under[k], rtol=1e-3)]
    assert set(changed) == {f"{layer}.weight" for layer in layers.split(", ")}


# --- two processes ---------------------------------------------------------------------------------------------------


def worker(out: Path) -> None:
    """Unequal scales on the two processes; the gradient of the stem after DDP's mean, under every setting."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel as DDP

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, y = images(8, scale=1.0)
    x[4:] *= 5
    results = {}
    for sync, when in itertools.product((True, False), ("backward", "step")):
        model = net()
        callbacks = attached(model, sync=sync, when=when)
        wrapped = DDP(model)
        mine = slice(4 * rank, 4 * rank + 4)
        loss_of(wrapped, x[mine], y[mine]).backward()
        results[f"{sync} {when}"] = model[0].weight.grad
        callbacks.remove()
    model = net()
    callbacks = attached(model, when="step")
    wrapped = DDP(model)
    for k in range(2):  # two micro-batches, gradients exchanged after the second
        mine = slice(4 * rank + 2 * k, 4 * rank + 2 * k + 2)
        with wrapped.no_sync() if k == 0 else torch.enable_grad():
            (loss_of(wrapped, x[mine], y[mine]) / 2).backward()
    results["accumulated"] = model[0].weight.grad
    callbacks.remove()
    torch.save(results, out / f"{rank}.pt")
    dist.destroy_process_group()


def two_processes(out: Path) -> list[dict[str, Tensor]]:
    run_twice(__file__, out)
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


def test_two_processes_are_as_one(tmp_path: Path) -> None:
    x, y = images(8)
    x[4:] *= 5
    model = net()
    expected = by_hand(model, x, gradients(model, x, y)[0])
    for found in two_processes(tmp_path):
        for name in ("True backward", "True step", "accumulated"):
            torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)
        for name in ("False backward", "False step"):  # each by its own moment
            assert (found[name] - expected).norm() / expected.norm() > 0.1


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(Path(sys.argv[1]))
