"""The audit on images whose leak is known, and the order of transforms in every library's spelling."""

import io
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from leaven.pretext import CueAudit, Rotate4, check_order, cue_audit, rotate4, rotate_random, rotation_cues

CLEAN = {"texture": 0.25, "border": 0.25, "wrap": 0.25, "grid": 0.25}


def field(n: int, side: int, seed: int = 0) -> Tensor:
    """Windows (n, 1, side, side) of 1/f noise, which looks the same from every side and wraps at none."""
    generator = torch.Generator().manual_seed(seed)
    size = 4 * side
    frequency = torch.fft.fftfreq(size).square()
    amplitude = 1 / (frequency[:, None] + frequency[None] + 1 / size**2).sqrt()
    spectrum = torch.fft.fft2(torch.randn(n, 1, size, size, generator=generator, dtype=torch.float64))
    return torch.fft.ifft2(spectrum * amplitude).real[:, :, :side, :side].contiguous()


def fourier_crop(x: Tensor, size: int, centre: bool) -> Tensor:
    """The lowest `size` frequencies (odd: symmetric), summed up at corner-aligned or pixel-centred positions."""
    k = torch.arange(size, dtype=torch.float64) - size // 2
    half = 0.5 if centre else 0.0
    source = torch.exp(-2j * torch.pi * k[:, None] * (torch.arange(x.shape[-1]) + half) / x.shape[-1])
    target = torch.exp(2j * torch.pi * k * (torch.arange(size)[:, None] + half) / size) / x.shape[-1]
    matrix = target @ source
    return (matrix @ x.to(torch.complex128) @ matrix.T).real


def before(step: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda x: rotate4(step(x))


def test_the_crop_of_this_test_samples_waves_where_it_says() -> None:
    """A wave of 3 periods over 48 px, cropped to 31: its values at n 48 / 31, or half pixels aligned."""
    n, p = torch.arange(31, dtype=torch.float64), torch.arange(48, dtype=torch.float64)
    for centre, half in ((True, 0.5), (False, 0.0)):
        wave = torch.cos(2 * torch.pi * 3 * (p + half) / 48).expand(1, 1, 48, 48)
        expected = torch.cos(2 * torch.pi * 3 * (n + half) / 31).expand(1, 1, 31, 31)
        torch.testing.assert_close(fourier_crop(wave, 31, centre), expected)


def test_images_without_an_up_give_nothing_away() -> None:
    audit = cue_audit(field(96, 32))
    assert audit.pipeline == CLEAN
    assert all(abs(value - 0.25) < 0.08 for value in audit.as_given.values())


def test_a_corner_aligned_crop_before_the_rotation_is_found_and_a_centred_one_is_clean() -> None:
    x = field(96, 56)
    corner = cue_audit(x, rotate=before(lambda x: fourier_crop(x, 25, centre=False)))
    assert corner.pipeline["wrap"] > 0.85
    assert corner.as_given["wrap"] > 0.85
    centred = cue_audit(x, rotate=before(lambda x: fourier_crop(x, 25, centre=True)))
    assert centred.pipeline == CLEAN
    assert centred.as_given["wrap"] < 0.4


def test_a_corner_aligned_crop_after_the_rotation_is_the_same_for_all_labels() -> None:
    def rotate(x: Tensor) -> tuple[Tensor, Tensor]:
        copies, labels = rotate4(x)
        return fourier_crop(copies, 25, centre=False), labels

    assert cue_audit(field(64, 56), rotate=rotate).pipeline == CLEAN


def test_padding_on_two_sides_is_found_at_the_border() -> None:
    x = field(64, 31)
    audit = cue_audit(x - x.min(), rotate=before(lambda x: F.pad(x, (0, 1, 0, 1))))
    assert audit.pipeline["border"] > 0.9


def test_noise_along_the_rows_of_a_sensor_tells_the_axis() -> None:
    """Two turns look alike, so that one half of the answers is right."""

    def noisy(x: Tensor) -> Tensor:
        return x + x.std() * torch.randn(len(x), 1, x.shape[2], 1, dtype=x.dtype)

    audit = cue_audit(field(64, 32), rotate=before(noisy))
    assert abs(audit.pipeline["texture"] - 0.5) < 0.06


def test_what_the_images_bring_along_is_no_fault_of_the_pipeline() -> None:
    """Ramps that end in an edge at their top: a 3x3 filter sees which way they fall."""
    ramps = field(64, 32) / 50 - torch.arange(32.0).remainder(8).view(1, 1, 32, 1)
    audit = cue_audit(ramps)
    assert audit.as_given["texture"] > 0.95
    assert audit.pipeline["texture"] == 0.25


def test_blocks_of_jpeg_files_are_found_by_their_phase() -> None:
    """42 px: blocks begin at 0, 8, ... from the left and at 2, 10, ... from the right."""
    from PIL import Image

    def compressed(image: Tensor) -> Tensor:
        levels = (128 + 40 * (image - image.mean()) / image.std()).clamp(0, 255)
        file = io.BytesIO()
        Image.fromarray(levels[0].byte().numpy()).save(file, "JPEG", quality=20)
        return torch.from_numpy(np.array(Image.open(file)))[None]

    x = torch.stack([compressed(image) for image in field(64, 48)])
    cut, whole = cue_audit(x[:, :, :42, :42]), cue_audit(x)
    assert cut.as_given["grid"] > 0.6
    assert whole.as_given["grid"] < 0.35
    assert cut.pipeline["grid"] == 0.25


def test_statistics_turn_with_the_image_and_ignore_brightness_and_contrast() -> None:
    """Turned images give the same numbers in another order, or the audit would favour a side."""
    x = field(6, 32)
    for name in ("texture", "border", "wrap"):
        cue = rotation_cues._CUES[name]
        upright = cue(x, 0)
        for turned in (torch.rot90(x, y, (2, 3)) for y in range(1, 4)):
            torch.testing.assert_close(cue(turned, 0).sort(1).values, upright.sort(1).values)
            assert not torch.allclose(cue(turned, 0), upright)
    for cue in rotation_cues._CUES.values():
        torch.testing.assert_close(cue(3 * x + 50, 0), cue(x, 0))


def test_a_random_turn_each_can_be_audited() -> None:
    audit = cue_audit(field(96, 24), rotate=rotate_random)
    assert all(abs(value - 0.25) < 0.1 for value in audit.pipeline.values())


def test_the_seed_decides_everything_and_the_global_state_nothing() -> None:
    def noisy(x: Tensor) -> tuple[Tensor, Tensor]:
        return rotate4(x + torch.randn_like(x))

    x = field(40, 24)
    first = cue_audit(x, rotate=noisy, seed=1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert cue_audit(x, rotate=noisy, seed=1) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert cue_audit(x, rotate=noisy, seed=2) != first


def test_tensors_of_any_dtype_and_loaders_alike() -> None:
    x = (field(40, 24) * 10).to(torch.int16)
    expected = cue_audit(x, limit=30)
    assert isinstance(expected, CueAudit)
    loader = DataLoader(TensorDataset(x, torch.zeros(40)), batch_size=8)
    state = torch.get_rng_state()
    for images in (loader, [x[:20], x[20:]], x[:30]):
        assert cue_audit(images, limit=30) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_too_few_or_too_small_images_are_refused() -> None:
    for images in (field(7, 24), []):
        with pytest.raises(ValueError, match="8 images or more"):
            cue_audit(images)
    with pytest.raises(ValueError, match=r"24 px or more, not \(23, 23\)"):
        cue_audit(field(8, 23))


# --- the order


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def flips() -> list[object]:
    import torchvision.transforms as v1
    import torchvision.transforms.v2 as v2
    from torchvision.transforms.v2 import functional as tv

    return [
        v1.RandomHorizontalFlip(),
        v1.RandomVerticalFlip(0.1),
        v1.RandomApply([v1.RandomHorizontalFlip()]),
        v1.RandomRotation(90),
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
        v2.RandomAffine(180),
        v2.Compose([Doubled(), v2.RandomChoice([Doubled(), v2.RandomHorizontalFlip()])]),
        nn.Sequential(Doubled(), v2.RandomHorizontalFlip()),
        tv.horizontal_flip,
        partial(torch.flip, dims=(3,)),
        partial(torch.rot90, dims=(2, 3)),
        *(type(name, (), {})() for name in ("D4", "Transpose", "GroupMirror")),  # albumentations and others
        Rotate4(),
    ]


@pytest.mark.parametrize("index", range(16))
def test_whatever_turns_or_mirrors_after_the_rotation_is_refused(index: int) -> None:
    import torchvision.transforms.v2 as v2

    offender = flips()[index]
    for rotation in (Rotate4(), partial(rotate_random, generator=torch.Generator())):
        with pytest.raises(
            ValueError, match=r"comes after (Rotate4|rotate_random).*75 %.*before the rotation$"
        ):
            check_order([Doubled(), rotation, Doubled(), offender])
        with pytest.raises(ValueError, match="comes after"):
            check_order(v2.Compose([v2.Compose([rotation]), v2.Compose([offender])]))
        if not isinstance(offender, Rotate4):
            check_order([offender, Doubled(), rotation, Doubled()])
    if not isinstance(offender, Rotate4):
        check_order([offender, offender])  # without a rotation there is no label to undo


def test_any_order_counts_as_the_worst() -> None:
    import torchvision.transforms.v2 as v2

    with pytest.raises(ValueError, match="RandomHorizontalFlip comes after Rotate4"):
        check_order(v2.RandomOrder([v2.RandomHorizontalFlip(), Rotate4()]))


def test_kornias_flips_are_known_and_small_rotations_of_policies_pass() -> None:
    import kornia.augmentation as K
    import torchvision.transforms.v2 as v2
    from kornia.augmentation.auto import RandAugment

    check_order([Rotate4(), v2.RandAugment(), v2.Normalize([0.5], [0.5]), RandAugment(2, 9)])
    for offender in (K.RandomHorizontalFlip(), K.RandomVerticalFlip(), K.RandomRotation90((1, 2))):
        with pytest.raises(ValueError, match=f"{type(offender).__name__} comes after Rotate4"):
            check_order(K.ImageSequential(Rotate4(), K.RandomGaussianBlur((3, 3), (0.1, 2.0)), offender))


def test_rotate4_stands_at_the_end_of_a_composition() -> None:
    import torchvision.transforms.v2 as v2

    x = field(2, 8)
    pipeline = v2.Compose([v2.RandomHorizontalFlip(1.0), Rotate4()])
    check_order(pipeline)
    copies, labels = pipeline(x)
    assert torch.equal(copies, rotate4(x.flip(3))[0])
    assert labels.tolist() == [0, 1, 2, 3] * 2
