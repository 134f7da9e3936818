"""The Fourier crop against numpy's transforms, closed forms and its own algebra (float64)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leaven.curricula import FourierCrop, fourier_crop, fourier_matrix, fourier_pad

SIZES = [(24, 32), (16, 33), (17, 32), (15, 33), (31, 32), (1, 8), (2, 7), (160, 224)]
WAYS = [("center", "periodic"), ("corner", "periodic"), ("center", "reflect")]
both = pytest.mark.parametrize(("align", "boundary"), WAYS)
each_size = pytest.mark.parametrize(("size", "full"), SIZES)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_transform(x: np.ndarray, size: int, align: str) -> np.ndarray:
    """One axis cropped by definition: every kept frequency of numpy's transform, evaluated where the samples stand."""
    full = len(x)
    spectrum = np.fft.fft(x) / full
    shift = 0.5 if align == "center" else 0.0
    # Old sample p stands at p + shift, new sample n at (n + shift) full / size.
    places = (np.arange(size) + shift) * full / size - shift
    result = np.zeros(size, dtype=complex)
    for k in range(-(size // 2), size // 2 + 1):
        weight = 0.5 if 2 * abs(k) == size and size > 0 else 1.0
        result += weight * spectrum[k % full] * np.exp(2j * np.pi * k * places / full)
    assert np.abs(result.imag).max() < 1e-12 * max(1.0, np.abs(x).max())
    return result.real


def upstream(x: np.ndarray, size: int) -> np.ndarray:
    """The paper's code in numpy: the middle of the shifted spectrum, back, real part. Square images, even sizes."""
    full, half = x.shape[-1], size // 2
    spectrum = np.fft.fftshift(np.fft.fft2(x), axes=(-2, -1))
    kept = slice(full // 2 - half, full // 2 + half)
    kept_spectrum = np.fft.ifftshift(spectrum[..., kept, kept] * (size / full) ** 2, axes=(-2, -1))
    return np.fft.ifft2(kept_spectrum).real


# --- against other implementations --------------------------------------------------------------------------


@each_size
@pytest.mark.parametrize("align", ["center", "corner"])
def test_rows_are_the_transform_evaluated_at_the_new_samples(size: int, full: int, align: str) -> None:
    x = images(full).numpy()
    matrix = fourier_matrix(size, full, align).numpy()
    np.testing.assert_allclose(matrix @ x, by_transform(x, size, align), atol=1e-12)


@each_size
def test_reflect_is_the_truncated_cosine_transform_of_scipy(size: int, full: int) -> None:
    from scipy.fft import dct, idct

    x = images(full).numpy()
    expected = idct(dct(x, norm="ortho")[:size], norm="ortho") * np.sqrt(size / full)
    np.testing.assert_allclose(
        fourier_matrix(size, full, boundary="reflect").numpy() @ x, expected, atol=1e-12
    )


@pytest.mark.parametrize(("size", "full"), [(24, 32), (16, 33), (160, 224), (96, 224), (2, 9)])
def test_upstream_is_the_papers_code(size: int, full: int) -> None:
    x = images(2, 3, full, full)
    found = fourier_crop(x, size, align="corner", nyquist="upstream")
    np.testing.assert_allclose(found, upstream(x.numpy(), size), atol=1e-12)
    in_single = fourier_crop(x.float(), size, align="corner", nyquist="upstream")
    np.testing.assert_allclose(in_single, upstream(x.numpy(), size), atol=1e-5)


def test_upstream_differs_by_a_checkerboard_alone() -> None:
    x = images(1, 1, 32, 32)
    symmetric, paper = (fourier_crop(x, 24, align="corner", nyquist=n) for n in ("symmetric", "upstream"))
    difference = (symmetric - paper)[0, 0]
    assert difference.abs().max() > 1e-4
    n = torch.arange(24, dtype=torch.float64)
    board = (-1.0) ** (n[:, None] + n[None, :])
    torch.testing.assert_close(difference, difference[0, 0] * board)


# --- its algebra --------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("n", [1, 2, 7, 8, 33])
def test_the_full_size_is_the_identity(n: int, align: str, boundary: str) -> None:
    torch.testing.assert_close(
        fourier_matrix(n, n, align, boundary), torch.eye(n, dtype=torch.float64), atol=1e-13, rtol=0
    )
    x = images(1, 1, n, n)
    assert fourier_crop(x, n, align, boundary=boundary) is x


@both
@each_size
def test_the_mean_is_kept(size: int, full: int, align: str, boundary: str) -> None:
    matrix = fourier_matrix(size, full, align, boundary)
    torch.testing.assert_close(matrix.sum(1), torch.ones(size, dtype=torch.float64), atol=1e-12, rtol=0)
    constant = torch.full((1, 1, full, full), 3.0, dtype=torch.float64)
    cropped = fourier_crop(constant, size, align, boundary=boundary)
    torch.testing.assert_close(cropped, torch.full_like(cropped, 3.0))


@each_size
def test_rows_are_orthogonal_but_for_the_highest_frequency(size: int, full: int) -> None:
    """R R^T = (B/H) I for odd B; for even B < H less half of the highest frequency; of reflect for every B."""
    eye = torch.eye(size, dtype=torch.float64)
    v = (-1.0) ** torch.arange(size, dtype=torch.float64) / size**0.5
    even = eye - torch.outer(v, v) / 2 if size % 2 == 0 else eye
    corner = fourier_matrix(size, full, "corner")
    torch.testing.assert_close(corner @ corner.T, even * size / full, atol=1e-12, rtol=0)
    cosine = fourier_matrix(size, full, boundary="reflect")
    torch.testing.assert_close(cosine @ cosine.T, eye * size / full, atol=1e-12, rtol=0)


@both
@pytest.mark.parametrize("sizes", [(224, 160, 96), (33, 17, 8), (32, 31, 15)])
def test_cropping_twice_is_cropping_once(sizes: tuple[int, int, int], align: str, boundary: str) -> None:
    first, second, once = (
        fourier_matrix(b, a, align, boundary) for a, b in (sizes[:2], sizes[1:], (sizes[0], sizes[2]))
    )
    torch.testing.assert_close(second @ first, once, atol=1e-12, rtol=0)


@pytest.mark.parametrize("align", ["center", "corner"])
@pytest.mark.parametrize(("size", "full"), [(24, 32), (17, 32)])
def test_low_frequencies_are_resampled_exactly_and_high_ones_vanish(size: int, full: int, align: str) -> None:
    shift = 0.5 if align == "center" else 0.0
    old, new = (torch.arange(n, dtype=torch.float64) + shift for n in (full, size))
    matrix = fourier_matrix(size, full, align)
    for k in range(full // 2 + 1):
        for phase in (0.0, 0.7):
            found = matrix @ torch.cos(2 * torch.pi * k * old / full + phase)
            # Of the highest one, both of whose signs count half, half remains.
            amplitude = 1.0 if 2 * k < size else 0.5 if 2 * k == size else 0.0
            expected = amplitude * torch.cos(2 * torch.pi * k * new / size + phase)
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("boundary", ["periodic", "reflect"])
@pytest.mark.parametrize("size", [12, 13])
def test_centre_aligned_crops_commute_with_flips_and_quarter_turns(size: int, boundary: str) -> None:
    x = images(2, 3, 20, 20)
    for turn in (lambda t: t.flip(-1), lambda t: t.flip(-2), lambda t: torch.rot90(t, 1, (-2, -1))):
        a, b = fourier_crop(turn(x), size, boundary=boundary), turn(fourier_crop(x, size, boundary=boundary))
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)
    corner = fourier_crop(x.flip(-1), size, "corner") - fourier_crop(x, size, "corner").flip(-1)
    assert corner.abs().max() > 0.1


@settings(max_examples=40)
@given(
    height=st.integers(2, 24),
    width=st.integers(2, 24),
    data=st.data(),
    way=st.sampled_from(WAYS),
    seed=st.integers(0, 99),
)
def test_rectangles_are_two_axes_linear_and_channel_by_channel(
    height: int, width: int, data: st.DataObject, way: tuple[str, str], seed: int
) -> None:
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    x, y = images(2, 3, height, width, seed=seed), images(2, 3, height, width, seed=seed + 100)
    align, boundary = way
    crop = lambda t: fourier_crop(t, (h, w), align, boundary=boundary)  # noqa: E731
    rows, columns = fourier_matrix(h, height, align, boundary), fourier_matrix(w, width, align, boundary)
    expected = torch.stack([torch.stack([rows @ c @ columns.T for c in image]) for image in x])
    assert crop(x).shape == (2, 3, h, w)
    torch.testing.assert_close(crop(x), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(crop(2 * x - y), 2 * crop(x) - crop(y), atol=1e-12, rtol=0)
    mean, std = (
        torch.tensor([0.1, 0.5, 0.9])[:, None, None].double(),
        torch.tensor([0.2, 0.3, 0.4])[:, None, None].double(),
    )
    torch.testing.assert_close(crop((x - mean) / std), (crop(x) - mean) / std, atol=1e-11, rtol=0)


@both
def test_padding_is_the_scaled_adjoint_and_undone_by_cropping(align: str, boundary: str) -> None:
    x, y = images(1, 2, 20, 15), images(1, 2, 9, 7, seed=1)
    scale = 20 * 15 / (9 * 7)
    left = (fourier_crop(x, (9, 7), align, boundary=boundary) * y).sum()
    right = (x * fourier_pad(y, (20, 15), align, boundary)).sum() / scale
    torch.testing.assert_close(left, right)
    again = fourier_crop(fourier_pad(y, (20, 15), align, boundary), (9, 7), align, boundary=boundary)
    torch.testing.assert_close(again, y, atol=1e-12, rtol=0)


def test_the_period_shows_at_the_border_and_the_mirror_does_not() -> None:
    ramp = torch.linspace(0, 1, 32, dtype=torch.float64).expand(1, 1, 32, 32)
    periodic, mirrored = (fourier_crop(ramp, 16, boundary=b)[0, 0, 8] for b in ("periodic", "reflect"))
    assert (periodic[0] - 1 / 64).abs() > 0.05
    torch.testing.assert_close(mirrored, (torch.arange(16) + 0.5).double() / 16, atol=0.02, rtol=0)


# --- as an operator of torch --------------------------------------------------------------------------------


def test_gradients() -> None:
    x = images(1, 2, 6, 7).requires_grad_()
    for arguments in ({}, {"align": "corner", "nyquist": "upstream"}, {"boundary": "reflect"}):
        assert torch.autograd.gradcheck(lambda t, a=arguments: fourier_crop(t, (4, 4), **a), x)
        assert torch.autograd.gradcheck(lambda t: fourier_pad(t, (9, 8)), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_type_and_memory_format_are_kept(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = images(2, 3, 16, 16).to(dtype).contiguous(memory_format=layout)
    for found in (fourier_crop(x, 12), fourier_pad(x, 20)):
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=layout)
    exact = fourier_crop(x.double(), 12)
    torch.testing.assert_close(
        fourier_crop(x, 12).double(),
        exact.to(dtype).double(),
        atol=1e-2 if dtype.itemsize == 2 else 1e-6,
        rtol=0,
    )


def test_autocast_does_not_cost_precision() -> None:
    x = images(2, 3, 64, 64).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fourier_crop(x, 48)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), fourier_crop(x.double(), 48), atol=1e-5, rtol=0)


def test_one_graph_per_size_when_compiled() -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(fourier_crop, backend=counter, fullgraph=True, dynamic=False)
    x = images(2, 3, 32, 32)
    for size in (16, 24, 16, 24, 31):
        torch.testing.assert_close(compiled(x, size), fourier_crop(x, size))
    assert counter.frame_count == 3
    torch.compiler.reset()


def test_as_a_module_and_as_a_transform() -> None:
    from torchvision.transforms import v2

    x = images(3, 20, 20)
    crop = FourierCrop(12, align="corner", nyquist="upstream")
    expected = fourier_crop(x, 12, "corner", "upstream")
    assert torch.equal(crop(x), expected)
    assert torch.equal(v2.Compose([v2.Identity(), crop])(x), expected)
    assert "12" in repr(crop)
    assert "corner" in repr(crop)


def test_bad_input_is_one_line() -> None:
    x = images(1, 1, 8, 8)
    for call, message in (
        (lambda: fourier_crop(x, 9), "cannot crop images of 8x8 to 9x9: the size must not be larger"),
        (lambda: fourier_crop(x, (9, 4)), "8x8 to 9x4"),
        (lambda: fourier_crop(x, 0), "between 1 and 8"),
        (lambda: fourier_crop(x, 4, "corner", boundary="reflect"), "aligned by centres"),
        (lambda: fourier_crop(x, 4, nyquist="upstream", boundary="reflect"), "periodic"),
        (lambda: fourier_pad(x, 7), "must not be smaller"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    for function in (fourier_crop, fourier_pad):
        with pytest.raises(TypeError, match="normalise them first"):
            function((x * 100).to(torch.uint8), 8)


def test_misspelt_settings_are_refused() -> None:
    x = torch.randn(1, 3, 8, 8)
    for how, message in (
        ({"align": "centre"}, "align must be one of center, corner, not 'centre'"),
        ({"nyquist": "x"}, "nyquist must be one of symmetric, upstream, not 'x'"),
        ({"boundary": "zero"}, "boundary must be one of periodic, reflect, not 'zero'"),
        ({"boundary": "reflect", "align": "corner"}, "aligned by centres"),
        ({"boundary": "reflect", "nyquist": "upstream"}, "of the periodic crop"),
    ):
        for call in (lambda how=how: fourier_crop(x, 4, **how), lambda how=how: FourierCrop(4, **how)):
            with pytest.raises(ValueError, match=message):
                call()
    with pytest.raises(ValueError, match="align must be one of"):
        fourier_pad(x, 16, align="centre")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a size is at least 1"):
        FourierCrop(0)
    for size in (4.0, (4, 4, 4), "4"):
        with pytest.raises(TypeError, match="a size is a whole number of pixels or two of them"):
            fourier_crop(x, size)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs a tensor of images, not a ndarray"):
        fourier_crop(x.numpy(), 4)  # type: ignore[arg-type]
    assert torch.equal(fourier_crop(x, np.int64(4)), fourier_crop(x, 4))


def test_what_inference_has_cached_serves_training() -> None:
    x = torch.randn(1, 3, 29, 29)
    with torch.inference_mode():
        fourier_crop(x, 19)
    asks = x.clone().requires_grad_()
    fourier_crop(asks, 19).square().sum().backward()
    assert asks.grad is not None
