"""Crops, mirrors and normalisation: what is drawn, what is cut, and that the device path cuts the same."""

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import v2

from leaven.recipes.common.augment import (
    DeviceAugment,
    TrainTransform,
    covering_size,
    eval_transform,
    normalise,
    random_box,
)
from leaven.recipes.common.data import KeyedDataset, make_loader
from leaven.recipes.common.sampler import Key, KeyedBatchSampler
from leaven.recipes.common.sources import ArraySource

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
UNIT = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
RATIO = (3 / 4, 4 / 3)


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def smooth(height, width, seed=0):
    """Something like a photo: no detail finer than about 8 pixels."""
    coarse = noise(3, height // 8 + 2, width // 8 + 2, seed=seed)
    return v2.functional.resize(coarse, [height, width], interpolation=v2.InterpolationMode.BICUBIC)


def keys(n):
    return [Key(3, 1, i) for i in range(n)]


# The box


@pytest.mark.parametrize(
    ("stored", "scale"), [((40, 40), (0.08, 1.0)), ((30, 60), (0.3, 0.7)), ((300, 20), (0.03, 0.2))]
)
def test_boxes_are_distributed_as_in_torchvision(stored, scale):
    """The last image is so narrow that some of its boxes are the central fall-back."""
    torch.manual_seed(0)
    n = 3000
    image = torch.empty(1, *stored)
    reference = [v2.RandomResizedCrop(8, scale=scale, ratio=RATIO).make_params([image]) for _ in range(n)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in reference])
    ours = np.array([random_box(key, stored, (8, 8), scale, RATIO, 0.5)[:4] for key in keys(n)])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column], method="asymp").pvalue > 0.001
    areas = [boxes[:, 2] * boxes[:, 3] for boxes in (ours, theirs)]
    assert stats.ks_2samp(*areas, method="asymp").pvalue > 0.001
    corners = [np.corrcoef(boxes[:, 0], boxes[:, 1])[0, 1] for boxes in (ours, theirs)]
    assert abs(corners[0] - corners[1]) < 0.08


@given(
    index=st.integers(0, 10**9),
    stored=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    low=st.floats(0.01, 1.0),
)
def test_boxes_lie_in_the_image(index, stored, size, low):
    top, left, height, width, _ = random_box(Key(0, 0, index), stored, size, (low, 1.0), RATIO, 0.5)
    assert 0 <= top <= top + height <= stored[0]
    assert 0 <= left <= left + width <= stored[1]
    assert height > 0
    assert width > 0


def test_a_wide_output_is_cut_from_wide_boxes():
    """The aspect is drawn around the output's own, so a 96x128 picture is not squeezed."""
    boxes = [random_box(key, (500, 500), (96, 128), (0.1, 0.3), RATIO, 0.0) for key in keys(800)]
    aspects = np.log([box.width / box.height for box in boxes])
    assert abs(aspects.mean() - math.log(128 / 96)) < 0.02
    assert np.exp(aspects.min()) > 128 / 96 * 0.74
    assert np.exp(aspects.max()) < 128 / 96 * 1.35


@pytest.mark.parametrize("hflip", [0.0, 0.3, 1.0])
def test_the_coin_is_fair_and_not_tied_to_the_box(hflip):
    boxes = [random_box(key, (64, 64), (8, 8), (0.2, 1.0), RATIO, hflip) for key in keys(2000)]
    flips = np.array([box.flip for box in boxes])
    assert abs(flips.mean() - hflip) < 0.04
    if 0 < hflip < 1:
        assert abs(np.corrcoef(flips, [box.left for box in boxes])[0, 1]) < 0.08


# The transforms


def test_train_transform_cuts_resizes_mirrors_and_normalises():
    image = noise(3, 37, 51)
    transform = TrainTransform((16, 24), (0.3, 0.9), 0.5, MEAN, STD)
    flipped = 0
    for key in keys(20):
        top, left, height, width, flip = random_box(key, (37, 51), (16, 24), (0.3, 0.9), RATIO, 0.5)
        crop = image[:, top : top + height, left : left + width]
        resize = v2.Resize((16, 24), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        expected = resize(crop).numpy() / 255.0
        expected = (expected - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
        expected = expected[..., ::-1] if flip else expected
        np.testing.assert_allclose(transform(image, key).numpy(), expected, atol=2e-6)
        flipped += flip
    assert 0 < flipped < 20


def test_a_crop_of_everything_at_the_stored_size_changes_nothing():
    image = noise(3, 20, 30)
    out = TrainTransform((20, 30), (1.0, 1.0), 0.0, MEAN, STD, ratio=(1.0, 1.0))(image, Key(0, 0, 0))
    torch.testing.assert_close(out, normalise(image, MEAN, STD), rtol=0, atol=0)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("size", [(8, 8), (96, 128)])
def test_small_and_large_outputs_of_any_stored_size(size):
    for stored in [(8, 8), (30, 200), (200, 30), (96, 128)]:
        image = noise(3, *stored)
        for transform in (
            TrainTransform(size, (0.67, 1.0), 0.5, MEAN, STD),
            eval_transform(size, 0.9, MEAN, STD),
        ):
            out = transform(image, Key(0, 0, 1))
            assert out.shape == (3, *size)
            assert out.isfinite().all()


def test_shrinking_is_antialiased():
    """A checkerboard of single pixels, shrunk eight times, is grey."""
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255).to(torch.uint8).expand(3, 64, 64)
    for transform in (TrainTransform((8, 8), (0.9, 1.0), 0.5, **UNIT), eval_transform((8, 8), 1.0, **UNIT)):
        assert (transform(board, Key(0, 0, 0)) - 0.5).abs().max() < 0.02


def test_the_size_in_the_key_wins_and_the_strength_has_nothing_to_act_on():
    image = noise(3, 30, 30)
    transform = TrainTransform((16, 16), (0.5, 1.0), 0.5, MEAN, STD)
    assert transform(image, Key(0, 0, 0, (8, 12))).shape == (3, 8, 12)
    assert eval_transform((16, 16), 1.0, MEAN, STD)(image, Key(0, 0, 0, (8, 12))).shape == (3, 8, 12)
    assert torch.equal(transform(image, Key(0, 0, 0, None, 0.1)), transform(image, Key(0, 0, 0)))


@pytest.mark.parametrize("stored", [(50, 50), (47, 83), (83, 47), (20, 31)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
def test_eval_transform_is_the_usual_protocol(stored, crop_pct):
    """Resize the shorter side, crop the centre: what torchvision's and timm's published accuracies use."""
    image = noise(3, *stored)
    reference = v2.Compose(
        [
            v2.Resize(math.floor(32 / crop_pct), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(32),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    out = eval_transform((32, 32), crop_pct, MEAN, STD)(image, Key(0, 0, 0))
    torch.testing.assert_close(out, reference(image), rtol=0, atol=2e-6)


@given(
    stored=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
)
def test_the_covering_size_covers_just_so_and_keeps_the_aspect(stored, size):
    height, width = covering_size(stored, size)
    assert height >= size[0]
    assert width >= size[1]
    assert height == size[0] or width == size[1]
    exact = max(size[0] / stored[0], size[1] / stored[1])
    assert abs(height - exact * stored[0]) < 1 + 1e-6
    assert abs(width - exact * stored[1]) < 1 + 1e-6


def test_transforms_travel_to_spawned_workers():
    image, key = noise(3, 20, 20), Key(0, 0, 0)
    for transform in (
        TrainTransform((8, 8), (0.5, 1.0), 0.5, MEAN, STD),
        eval_transform((8, 8), 1.0, MEAN, STD),
    ):
        copy = pickle.loads(pickle.dumps(transform))
        assert torch.equal(copy(image, key), transform(image, key))
    augment = DeviceAugment((8, 8), (0.5, 1.0), 0.5, MEAN, STD)
    copy = pickle.loads(pickle.dumps(augment.draw))
    assert torch.equal(copy(image, key)[1], augment.draw(image, key)[1])


# On the device


def both(images, size, scale=(0.3, 1.0), interpolation="bilinear", stored=None):
    """The same keys through the loader's transform and through the device's: two (N, 3, h, w) in [0, 1]."""
    loader = TrainTransform(size, scale, 0.5, **UNIT, interpolation=interpolation)
    device = DeviceAugment(size, scale, 0.5, **UNIT, interpolation=interpolation, stored=stored)
    pairs = list(zip(images, keys(len(images)), strict=True))
    drawn = [device.draw(image, key) for image, key in pairs]
    pixels, boxes = (torch.stack(part) for part in zip(*drawn, strict=True))
    return torch.stack([loader(image, key) for image, key in pairs]), device(pixels, boxes)


def test_device_equals_loader_where_nothing_shrinks():
    """To the rounding to uint8 that the loader's resize ends with."""
    one, other = both([noise(3, 20, 28, seed=i) for i in range(24)], (32, 40))
    assert (one - other).abs().max() < 1.01 / 255
    flipped, _ = both([noise(3, 20, 28, seed=i).flip(-1) for i in range(24)], (32, 40))
    assert (flipped - other).abs().max() > 0.1  # the comparison sees a mirrored image


def test_device_is_close_to_loader_in_bicubic():
    """Torch's antialiased bicubic kernel has a = -0.5, its sampling kernel a = -0.75."""
    one, other = both([smooth(40, 40, seed=i) for i in range(24)], (64, 64), interpolation="bicubic")
    assert (one - other).abs().max() < 0.05
    assert (one - other).abs().mean() < 0.005


def test_device_is_close_to_loader_where_images_shrink():
    one, other = both([smooth(120, 90, seed=i) for i in range(24)], (32, 32))
    assert (one - other).abs().max() < 0.12
    assert (one - other).abs().mean() < 0.01


def test_device_shrinks_with_antialiasing():
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255).to(torch.uint8).expand(3, 64, 64)
    one, other = both([board] * 8, (16, 16), scale=(0.6, 1.0))
    assert (one - 0.5).abs().max() < 0.05
    assert (other - 0.5).abs().max() < 0.05


def test_images_of_several_sizes_are_stored_alike_and_cut_alike():
    images = [smooth(60 + 9 * i, 100 - 5 * i, seed=i) for i in range(8)]
    one, other = both(images, (32, 32), stored=(64, 64))
    assert (one - other).abs().mean() < 0.015
    mirrored, _ = both([image.flip(-1) for image in images], (32, 32), stored=(64, 64))
    assert (mirrored - other).abs().mean() > 0.05


def test_device_path_from_loader_to_batch():
    source = ArraySource(noise(24, 3, 16, 16), np.arange(24))
    augment = DeviceAugment((24, 24), (0.5, 1.0), 0.5, MEAN, STD)
    loader = make_loader(KeyedDataset(source, augment.draw), KeyedBatchSampler(24, 6, 1), workers=1)
    plain = TrainTransform((24, 24), (0.5, 1.0), 0.5, MEAN, STD, interpolation="bicubic")
    others = make_loader(KeyedDataset(source, plain), KeyedBatchSampler(24, 6, 1))
    for ((pixels, boxes), labels), (images, same) in zip(loader, others, strict=True):
        assert pixels.dtype == torch.uint8
        assert torch.equal(labels, same)
        out = augment(pixels, boxes)
        assert out.shape == images.shape == (6, 3, 24, 24)
        assert out.dtype == torch.float32
        assert (out - images).abs().mean() < 0.15
        assert augment(pixels, boxes, (8, 12)).shape == (6, 3, 8, 12)


def test_kornia_is_not_imported_on_the_loader_path():
    code = (
        "import sys, torch\n"
        "from leaven.recipes.common.augment import *\n"
        "from leaven.recipes.common.data import Key, open_data\n"
        "data = open_data('digits')\n"
        "TrainTransform((8, 8), (0.5, 1.0), 0.5, data.mean, data.std)(data.train.image(0), Key(0, 0, 0))\n"
        "print('kornia' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
