"""Convolutional deep kernel machines against explicit features, loops over patches and the vector machine."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from leaven.bayes.deep_kernel_machine import (
    KERNELS,
    ConvolutionalDKM,
    DeepKernelMachine,
    Grams,
    fit,
    mean_over_positions,
    mix,
    patch_grams,
    unit_norm,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def machine(images: Tensor, *, start: bool = True, **how: Any) -> ConvolutionalDKM:
    torch.manual_seed(0)
    how = {"inducing": (6, 8, 5), "strides": (2, 1), "likelihood": "categorical"} | how
    made = ConvolutionalDKM(images.shape[1], 3, **how).double()
    if start:
        made.init_inducing(images)
    return made.eval()


def scrambled(made: ConvolutionalDKM) -> ConvolutionalDKM:
    with torch.no_grad():
        for index, p in enumerate(made.parameters()):
            if p.requires_grad and p is not made.inducing:
                p += 0.2 * randn(*p.shape, seed=index)
    return made


def of_features(inducing: Tensor, maps: Tensor) -> Grams:
    """Inner products of features (P, F) and maps (B, F, H, W)."""
    return Grams(inducing @ inducing.mT, torch.einsum("bfhw,pf->bhwp", maps, inducing), maps.square().sum(1))


def same(found: Grams, expected: Grams, tolerance: float = 1e-12) -> None:
    for name in Grams._fields:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=tolerance)


@pytest.mark.parametrize("side", [1, 3, 5])
def test_patches_are_those_of_a_loop(side: int) -> None:
    images, inducing = randn(2, 3, 4, 6), randn(5, 3 * side**2, seed=1)
    grams = patch_grams(inducing, images, side)
    padded = F.pad(images, (side // 2,) * 4)
    for b in range(2):
        for row in range(4):
            for column in range(6):
                patch = padded[b, :, row : row + side, column : column + side].flatten()
                length = len(patch)
                assert grams.t[b, row, column] == pytest.approx(float(patch @ patch) / length, abs=1e-12)
                torch.testing.assert_close(grams.ti[b, row, column], inducing @ patch / length)
    torch.testing.assert_close(grams.ii, inducing @ inducing.mT / (3 * side**2))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("side", [1, 3])
def test_mixing_is_a_convolution_of_features(side: int, stride: int) -> None:
    """Patches of explicit features, at the border filled up with 0; a new inducing patch mixes old inducing points."""
    inducing, maps, mixing = randn(4, 7), randn(2, 7, 5, 6, seed=1), randn(6, 4, side, side, seed=2)
    found = mix(of_features(inducing, maps), mixing, stride)
    new = torch.einsum("qpuv,pf->qfuv", mixing, inducing).flatten(1)  # (Q, F * side * side)
    padded = F.pad(maps, (side // 2,) * 4)
    rows = range(0, 5, stride)
    patches = torch.stack(
        [
            torch.stack([padded[:, :, r : r + side, c : c + side].flatten(1) for c in range(0, 6, stride)], 1)
            for r in rows
        ],
        1,
    )  # (B, H', W', F * side * side)
    expected = Grams(new @ new.mT, patches @ new.mT, patches.square().sum(-1))
    same(found, Grams(*(part / side**2 for part in expected)))


def test_the_mean_over_positions_is_that_of_features_the_inducing_points_span() -> None:
    inducing, maps = randn(7, 5), randn(3, 5, 4, 4, seed=1)
    grams = of_features(inducing, maps)
    chol = torch.linalg.cholesky(grams.ii + 1e-12 * torch.eye(7, dtype=torch.float64))
    mean = maps.mean((2, 3))
    expected = Grams(grams.ii, mean @ inducing.mT, mean.square().sum(1))
    same(mean_over_positions(grams, chol), expected, 1e-3)
    few = of_features(inducing[:3], maps)  # the rest is unrelated from position to position
    chol = torch.linalg.cholesky(few.ii)
    spanned = torch.linalg.solve_triangular(chol, few.ti.flatten(0, 2).mT, upper=False).mT.view(3, 16, 3)
    rest = (maps.square().sum(1).flatten(1) - spanned.square().sum(2)).sum(1) / 16**2
    torch.testing.assert_close(
        mean_over_positions(few, chol).t, spanned.mean(1).square().sum(1) + rest, rtol=0, atol=1e-12
    )
    assert (mean_over_positions(few, chol).t <= few.t.mean((1, 2)) + 1e-12).all()


def test_unit_norm_is_that_of_features() -> None:
    inducing, maps = randn(4, 6), randn(2, 6, 3, 3, seed=1)
    maps[0, :, 0, 0] = 0  # nothing there to divide
    expected = of_features(F.normalize(inducing), F.normalize(maps))
    same(unit_norm(of_features(inducing, maps)), expected)


def test_a_black_patch_as_inducing_patch_can_be_learnt() -> None:
    images = torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    images[:, :, :3] = 0
    made = machine(images).float()
    with torch.no_grad():
        made.inducing[2] = 0
    made.loss(images, torch.arange(6) % 3, 6).backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.grad is not None)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_inducing_points_that_are_positions_have_their_rows(kernel: Any, norm: bool) -> None:
    """Pinned, with inducing points that are an image's own patches at every layer: ti is ii, t its diagonal.

    What `mix` makes of them must be the same numbers, whether it comes from inducing points or from positions.
    """
    image = randn(1, 2, 4, 4)
    made = machine(
        image, start=False, inducing=(16, 16, 16), strides=(1, 1), nu=math.inf, kernel=kernel, norm=norm, jitter=0.0
    )  # fmt: skip
    with torch.no_grad():
        made.inducing.copy_(F.unfold(image, 3, padding=1)[0].mT)
        for mixing in made.mixing:
            mixing.zero_()
            for position in range(16):
                for u in range(3):
                    for v in range(3):
                        row, column = position // 4 + u - 1, position % 4 + v - 1
                        if 0 <= row < 4 and 0 <= column < 4:
                            mixing[position, row * 4 + column, u, v] = 1
        layers = made._layers(image)
    for grams in layers:
        torch.testing.assert_close(grams.ti.view(16, 16), grams.ii, rtol=0, atol=1e-9)
        torch.testing.assert_close(grams.t.flatten(), grams.ii.diagonal(), rtol=0, atol=1e-9)


def test_one_pixel_is_the_vector_machine() -> None:
    """Images of one pixel, patches of one: nothing is left but a vector machine, mixing aside."""
    x, y = randn(20, 4), torch.arange(20) % 3
    images = x[:, :, None, None]
    how: dict[str, Any] = {"nu": 2.0, "kernel": "arccos", "likelihood": "categorical"}
    made = machine(images, start=False, inducing=(6, 6, 6), side=1, norm=False, strides=(1, 1), **how)
    plain = DeepKernelMachine(4, 3, 3, 6, **how).double().eval()
    with torch.no_grad():
        made.inducing.copy_(x[:6])
        made.initialised.fill_(True)
        for mixing in made.mixing:
            mixing.copy_(torch.eye(6)[:, :, None, None])
        scrambled(made).inducing.copy_(x[:6])
        for mixing in made.mixing:
            mixing.copy_(torch.eye(6)[:, :, None, None])
    state = {name: value for name, value in made.state_dict().items() if "mixing" not in name}
    plain.load_state_dict(state)
    with torch.no_grad():
        for found, expected in zip(made(images)[:2], plain(x)[:2], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(made.kl(), plain.kl(), rtol=0, atol=1e-9)
    torch.manual_seed(1)
    loss = made.loss(images, y, 20)
    torch.manual_seed(1)
    torch.testing.assert_close(loss, plain.loss(x, y, 20), rtol=0, atol=1e-9)


@pytest.mark.parametrize("how", [{}, {"skr": 4.0}, {"nu": math.inf}, {"norm": False}], ids=str)
def test_images_of_a_batch_do_not_see_each_other(how: dict[str, Any]) -> None:
    images = randn(6, 2, 7, 5)
    made = scrambled(machine(images, **how))
    with torch.no_grad():
        together = made(images)
        for index in range(6):
            alone = made(images[index : index + 1])
            torch.testing.assert_close(alone.mean[0], together.mean[index], rtol=0, atol=1e-10)
            torch.testing.assert_close(alone.variance[0], together.variance[index], rtol=0, atol=1e-10)
    assert (together.variance > 0).all()


def test_inducing_points_are_what_differs_most() -> None:
    """More of the positions' features is seen than by mixtures that are drawn, and functions vary by 1."""
    images = randn(12, 1, 8, 8)
    images = F.avg_pool2d(images, 3, 1, 1)
    drawn, taken = (machine(images, start=False, nu=math.inf, inducing=(8, 12, 12)) for _ in range(2))
    taken.init_inducing(images)
    with torch.no_grad():
        drawn.inducing.copy_(taken.inducing)
        shares = []
        for made in (drawn, taken):
            grams = made._layers(images)[-1]
            chol = torch.linalg.cholesky(grams.ii + 1e-9 * torch.eye(12))
            seen = torch.linalg.solve_triangular(chol, grams.ti.flatten(0, 2).mT, upper=False)
            shares.append(float(seen.square().sum() / grams.t.sum()))
        assert shares[1] > shares[0] + 0.02
        assert shares[1] < 1
        pooled = taken._readout(taken._layers(images)[-1])
        chol = torch.linalg.cholesky(pooled.ii)
        seen = torch.linalg.solve_triangular(chol, pooled.ti.mT, upper=False)
    assert float(seen.var(1, correction=0).sum()) == pytest.approx(1, abs=0.05)
    again = machine(images, start=False, nu=math.inf, inducing=(8, 12, 12))
    again.init_inducing(images)
    for found, expected in zip(again.parameters(), taken.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_gradients() -> None:
    inducing, images = randn(3, 9).requires_grad_(), randn(2, 1, 4, 4, seed=1).requires_grad_()
    mixing = randn(4, 3, 3, 3, seed=2).requires_grad_()

    def all_of_it(inducing: Tensor, images: Tensor, mixing: Tensor) -> tuple[Tensor, ...]:
        mixed = mix(unit_norm(patch_grams(inducing, images, 3)), mixing, 2)
        chol = torch.linalg.cholesky(mixed.ii + torch.eye(4, dtype=torch.float64))
        return tuple(mean_over_positions(mixed, chol))

    assert torch.autograd.gradcheck(all_of_it, (inducing, images, mixing))


def test_weights_come_back_and_grams_can_be_looked_at() -> None:
    images = randn(6, 1, 6, 6)
    made = scrambled(machine(images))
    other = machine(images, start=False)
    other.load_state_dict(made.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other(images).mean, made(images).mean, rtol=0, atol=0)
    assert made.gram(2).shape == (5, 5)
    assert made.gram(0).shape == (6, 6)
    assert made.condition_number(1) < 1e12
    assert made.float()(images.float()).mean.isfinite().all()


def test_it_learns_features_where_the_prior_does_not_fit() -> None:
    """Stripes of two directions at any place and phase, in noise: held to the infinitely wide network, it is worse."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 2
    phase = torch.rand(120, 1, 1, generator=generator) * 6.28
    wave = torch.sin(2.1 * torch.arange(10.0) + phase).expand(120, 10, 10)
    images = torch.where(labels.view(-1, 1, 1) == 0, wave, wave.mT)[:, None]
    images = images + 0.7 * torch.randn(images.shape, generator=generator)
    scores = {}
    for nu in (0.1, math.inf):
        torch.manual_seed(0)
        made = ConvolutionalDKM(1, 2, (12, 16), (2,), nu=nu, likelihood="categorical")
        fit(made, images[:80], labels[:80], steps=60, batch_size=40, lr=0.03)
        with torch.no_grad():
            scores[nu] = float(made.expected_log_prob(made(images[80:]), labels[80:]).mean())
    assert scores[0.1] > scores[math.inf] + 0.02
    assert scores[0.1] > -0.6


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"inducing": ()}, "must be at least 1"),
        ({"inducing": (4, 4), "strides": (1, 1)}, "one fewer of the strides"),
        ({"inducing": (4, 40), "strides": (1,)}, "at most 36 are independent"),
        ({"inducing": (4, 4), "strides": (0,)}, "must be at least 1"),
        ({"side": 2}, "side must be odd"),
        ({"inducing": 16}, r"inducing must be one number for each layer, such as \(64, 128\), not 16"),
        ({"strides": 2}, "strides must be one number for each layer"),
        ({"ard": True}, "ard is for vectors"),
        ({"nu": 0.0}, "greater than 0"),
    ],
)
def test_wrong_arguments(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvolutionalDKM(1, 2, **how)


def test_wrong_images() -> None:
    images = randn(4, 2, 6, 6)
    made = machine(images)
    with pytest.raises(ValueError, match=r"images \(B, 2, H, W\) are needed, not \(4, 3, 6, 6\)"):
        made(randn(4, 3, 6, 6))
    with pytest.raises(ValueError, match="needed, not"):
        made(images.flatten(1))
    with pytest.raises(ValueError, match=r"normalised floats \(B, 2, H, W\), got torch.uint8"):
        made(torch.zeros(4, 2, 6, 6, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="call init_inducing first"):
        machine(images, start=False)(images)
    made = ConvolutionalDKM(2, 2, (4, 20), (6,))
    with pytest.raises(ValueError, match="lower inducing, or give more images"):
        made.init_inducing(images)
    with pytest.raises(RuntimeError, match="call init_inducing first"):  # half of it is none
        made(images)
