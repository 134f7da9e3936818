"""The other ways to shrink, and targets that go along, against Pillow, torchvision and moved content."""

import numpy as np
import pytest
import torch
from PIL import Image

from leaven.curricula import fourier_crop, resize
from leaven.curricula.resize import OPS, lanczos_matrix, rescale_boxes, rescale_masks

PILLOW = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


@pytest.mark.parametrize("op", PILLOW)
@pytest.mark.parametrize("size", [(20, 30), (33, 69), (7, 5)])
def test_it_is_pillows(op: str, size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    found = resize(x, size, op)
    for image, small in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        expected = np.array(Image.fromarray(image.numpy()).resize(size[::-1], PILLOW[op]))
        np.testing.assert_allclose(small, expected, atol=2e-5)


@pytest.mark.parametrize("op", OPS)
def test_every_op_keeps_constants_flips_type_and_layout(op: str) -> None:
    x = torch.randn(2, 3, 20, 24, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    found = resize(x, (12, 16), op)
    assert found.shape == (2, 3, 12, 16)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert resize(x, (20, 24), op) is x
    y = torch.randn(1, 2, 20, 20, dtype=torch.float64)
    torch.testing.assert_close(resize(y.flip(-1), 13, op), resize(y, 13, op).flip(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        resize(torch.full_like(y, 2.0), 13, op), torch.full((1, 2, 13, 13), 2.0).double(), atol=1e-6, rtol=0
    )


def test_lanczos_rows_sum_to_one() -> None:
    assert torch.allclose(lanczos_matrix(7, 19).sum(1), torch.ones(7, dtype=torch.float64))


def test_bad_input_is_one_line() -> None:
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(
        ValueError, match="op must be one of fourier, lanczos, bicubic, bilinear, not 'nearest'"
    ):
        resize(x, 4, "nearest")  # type: ignore[arg-type]
    for op in OPS:
        with pytest.raises(ValueError, match="must not be larger"):
            resize(x, 9, op)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="normalise"):
            resize(x.to(torch.uint8), 4, op)  # type: ignore[arg-type]


@pytest.mark.parametrize("align", ["center", "corner"])
def test_boxes_follow_the_content(align: str) -> None:
    """The centre of mass of a soft blob moves as the middle of its box does."""
    old, new = (64, 96), (40, 48)
    y, x = torch.arange(64.0).double()[:, None], torch.arange(96.0).double()[None, :]
    middle = torch.tensor([51.3, 22.8])  # x, y in pixels, the first pixel's centre at 0.5
    blob = torch.exp(-((x + 0.5 - middle[0]) ** 2 + (y + 0.5 - middle[1]) ** 2) / (2 * 4.0**2))
    small = fourier_crop(blob[None, None], new, align)[0, 0]
    mass = small / small.sum()
    found = torch.stack(
        [(mass * (torch.arange(48) + 0.5)).sum(), (mass * (torch.arange(40) + 0.5)[:, None]).sum()]
    )
    box = torch.tensor([[middle[0] - 6, middle[1] - 4, middle[0] + 6, middle[1] + 4]])
    moved = rescale_boxes(box, old, new, align)[0]
    torch.testing.assert_close((moved[:2] + moved[2:]) / 2, found.float(), atol=0.01, rtol=0)
    torch.testing.assert_close(moved[2:] - moved[:2], torch.tensor([6.0, 5.0]))


def test_masks_are_taken_at_the_nearest_centre() -> None:
    import torch.nn.functional as F

    masks = torch.randint(0, 255, (3, 20, 31), dtype=torch.uint8)
    expected = F.interpolate(masks[None].float(), (13, 17), mode="nearest-exact")[0].to(torch.uint8)
    assert torch.equal(rescale_masks(masks, (13, 17)), expected)
    assert torch.equal(rescale_masks(masks, (20, 31)), masks)
