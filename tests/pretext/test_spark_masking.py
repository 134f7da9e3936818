"""T5: exact counts, uniform over cells, seedable, and defined limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from leaven.pretext.spark.geometry import Geometry
from leaven.pretext.spark.masking import sample_mask, upsample_mask, visible_count, visible_ids


def test_paper_counts() -> None:
    assert visible_count(49, 0.6) == 20  # 224 px, reduction 32
    assert visible_count(4, 0.6) == 2  # half of a 2x2 grid: the realised ratio is 0.5
    assert visible_count(10, 0.75) == 2  # 2.5 rounds half to even


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.05, 0.95), st.integers(1, 5))
@settings(max_examples=60)
def test_exact_count_in_every_image(fh: int, fw: int, ratio: float, batch: int) -> None:
    keep = round(fh * fw * (1 - ratio))
    if not 0 < keep < fh * fw:
        with pytest.raises(ValueError, match=r"leaves \d+ of \d+ cells visible"):
            sample_mask(batch, (fh, fw), ratio)
        return
    mask = sample_mask(batch, (fh, fw), ratio)
    assert mask.shape == (batch, fh, fw)
    assert mask.dtype == torch.bool
    assert mask.flatten(1).sum(1).tolist() == [keep] * batch


def test_uniform_over_cells_and_independent_of_each_other() -> None:
    """Chi-square of single cells and of pairs at level 1e-4; a mask of runs or of a fixed pattern fails it."""
    draws, grid, keep = 6000, (3, 5), 6
    mask = sample_mask(draws, grid, 0.6, torch.Generator().manual_seed(0)).flatten(1).double()
    cells = mask.shape[1]
    counts = mask.sum(0)
    expected = draws * keep / cells
    # Sampling without replacement has variance p(1-p)(cells/(cells-1)) in the sum of squares.
    statistic = ((counts - expected) ** 2).sum() / (expected * (1 - keep / cells) * cells / (cells - 1))
    assert statistic < chi2.ppf(1 - 1e-4, cells - 1)
    pairs = (mask.T @ mask)[torch.triu_indices(cells, cells, 1).unbind()]
    p = keep * (keep - 1) / (cells * (cells - 1))
    assert ((pairs / draws - p).abs() < 5 * (p * (1 - p) / draws) ** 0.5).all()


def test_generator_decides_and_global_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    first = sample_mask(4, (7, 7), 0.6, torch.Generator().manual_seed(3))
    again = sample_mask(4, (7, 7), 0.6, torch.Generator().manual_seed(3))
    other = sample_mask(4, (7, 7), 0.6, torch.Generator().manual_seed(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 0.999])
def test_ratios_that_show_all_or_nothing_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="some must be visible and some hidden"):
        sample_mask(2, (4, 4), ratio)


def test_visible_ids_are_row_major_and_ascending() -> None:
    mask = sample_mask(5, (4, 6), 0.5)
    ids = visible_ids(mask)
    for image, cells in zip(mask, ids, strict=True):
        assert cells.tolist() == image.flatten().nonzero().flatten().tolist()
    assert torch.equal(visible_ids(mask, 12), ids)


def test_visible_ids_refuse_what_has_no_static_shape() -> None:
    mask = torch.zeros(2, 2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least one"):
        visible_ids(mask)
    mask[0, 0, 0] = mask[1] = True
    with pytest.raises(ValueError, match="got 1 to 4"):
        visible_ids(mask)
    with pytest.raises(ValueError, match="must be bool"):
        visible_ids(mask.float())
    with pytest.raises(RuntimeError, match="must have 2 visible"):
        visible_ids(mask, 2)


def test_scatter_and_gather_are_inverse_and_their_gradients_exact() -> None:
    mask = sample_mask(3, (2, 3), 0.5, torch.Generator().manual_seed(1))
    geo = Geometry(visible_ids(mask), (2, 3))
    dense = torch.randn(3, 4, 4, 6, dtype=torch.double)
    values = geo.gather(dense, 2)
    assert torch.equal(geo.scatter(values, 2), dense * upsample_mask(mask, (4, 6)))
    assert torch.equal(
        geo.scatter(values, 2, -5.0)[:, :1][~upsample_mask(mask, (4, 6))], torch.full((36,), -5.0).double()
    )
    for inputs, function in ((values, geo.scatter), (dense, geo.gather)):
        probe = inputs.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda v, f=function: f(v, 2), probe)
        assert torch.autograd.gradgradcheck(lambda v, f=function: f(v, 2), probe)
