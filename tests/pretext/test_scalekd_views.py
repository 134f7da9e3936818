"""The two views against scipy's cosine transform and closed forms."""

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leaven.pretext.scalekd import frequency_view_loss, remove_dc, spatial_view_loss


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["ortho", "backward"]))
def test_removing_the_mean_is_removing_a_cosine_coefficient(h: int, w: int, norm: str) -> None:
    x = maps(2, 3, h, w) + 2
    spectrum = scipy.fft.dctn(x.numpy(), axes=(2, 3), norm=norm)
    spectrum[:, :, 0, 0] = 0
    back = scipy.fft.idctn(spectrum, axes=(2, 3), norm=norm)
    assert np.abs(remove_dc(x).numpy() - back).max() < 1e-12


def test_the_spatial_loss_is_two_minus_two_cosines_and_bounded() -> None:
    s, t = maps(3, 8, 7, 5), maps(3, 8, 7, 5, seed=1)
    cosines = torch.nn.functional.cosine_similarity(s, t, dim=1)
    expected = (2 - 2 * cosines).sum((1, 2)).mean()
    torch.testing.assert_close(spatial_view_loss(s, t), expected)
    torch.testing.assert_close(spatial_view_loss(s, -s), torch.tensor(4.0 * 35).double())
    assert spatial_view_loss(s, s) == 0
    torch.testing.assert_close(spatial_view_loss(s, t, "per_49"), expected * 49 / 35)


def test_what_either_loss_does_not_see() -> None:
    s, t = maps(3, 8, 4, 5), maps(3, 8, 4, 5, seed=1)
    scale, shift = maps(3, 1, 4, 5, seed=2).exp(), maps(3, 8, 1, 1, seed=3)
    torch.testing.assert_close(spatial_view_loss(s * scale, t), spatial_view_loss(s, t))
    torch.testing.assert_close(frequency_view_loss(s + shift, t - shift), frequency_view_loss(s, t))
    assert not torch.allclose(spatial_view_loss(s + shift, t), spatial_view_loss(s, t))
    for loss in (spatial_view_loss, frequency_view_loss):
        torch.testing.assert_close(loss(s, t), loss(t, s))


def test_a_single_position_has_no_frequencies() -> None:
    s, t = maps(3, 8, 1, 1).requires_grad_(), maps(3, 8, 1, 1, seed=1)
    loss = frequency_view_loss(s, t)
    loss.backward()
    assert loss == 0
    assert s.grad is not None
    assert torch.equal(s.grad, torch.zeros_like(s))


def test_gradients_and_low_precision() -> None:
    s, t = maps(2, 3, 2, 3).requires_grad_(), maps(2, 3, 2, 3, seed=1)
    for loss in (spatial_view_loss, frequency_view_loss):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, t), (s,))
        half = loss(s.bfloat16(), t.bfloat16())
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.double(), loss(s, t), rtol=2e-2, atol=2e-2)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"not \(2, 3, 4, 4\) and \(2, 3, 4, 5\)"):
        spatial_view_loss(maps(2, 3, 4, 4), maps(2, 3, 4, 5))
    with pytest.raises(ValueError, match="reduction must be"):
        spatial_view_loss(maps(2, 3, 4, 4), maps(2, 3, 4, 4), "mean")  # type: ignore[arg-type]
