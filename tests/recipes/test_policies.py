"""Automatic augmentation, erasing and mixing: keyed, without a trace, and what their papers say."""

import numpy as np
import pytest
import torch
from torch import Tensor

from leaven.recipes.common.augment import TrainTransform
from leaven.recipes.common.loop import keyed_generator
from leaven.recipes.common.policies import auto_augment, mixing, random_erasing
from leaven.recipes.common.sampler import Key

IMAGE = torch.randint(0, 256, (3, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def keys(n: int, **other: int) -> list[Key]:
    return [Key(**({"seed": 1, "epoch": 2, "index": i} | other)) for i in range(n)]


@pytest.mark.parametrize("policy", ["trivial", "randaugment"])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_is_a_function_of_the_key(policy, channels: int) -> None:
    image = IMAGE[:channels]
    state = torch.get_rng_state()
    first = [auto_augment(image, key, policy) for key in keys(30)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)  # where the global generator stands does not matter
    again = [auto_augment(image, key, policy) for key in reversed(keys(30))]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    assert all(a.dtype == torch.uint8 and a.shape == image.shape for a in first)
    assert len({a.numpy().tobytes() for a in first}) > 15
    for other in ({"seed": 5}, {"epoch": 3}):
        others = [auto_augment(image, key._replace(**other), policy) for key in keys(30)]
        assert sum(torch.equal(a, b) for a, b in zip(first, others, strict=True)) < 15
    assert auto_augment(image, keys(1)[0], "none") is image


def test_randaugment_follows_the_strength() -> None:
    """Weaker keys change less: by strength 0 the images are the same but for operations without a magnitude."""
    change = [
        np.mean(
            [
                float(
                    (auto_augment(IMAGE, key._replace(strength=s), "randaugment").float() - IMAGE)
                    .abs()
                    .median()
                )
                for key in keys(60)
            ]
        )
        for s in (0.0, 1.0, 3.0)
    ]
    assert change[0] < change[1] < change[2]


def test_erasing_replaces_one_rectangle_by_normal_noise() -> None:
    image, shares, values = torch.full((3, 40, 40), 9.0), [], []
    state = torch.get_rng_state()
    for key in keys(300):
        erased = random_erasing(image, key, 0.25)
        assert torch.equal(erased, random_erasing(image, key, 0.25))
        hole = (erased != 9).any(0)
        if hole.any():
            rows, columns = hole.any(1).nonzero(), hole.any(0).nonzero()
            assert hole.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
            shares.append(float(hole.float().mean()))
            values.append(erased[:, hole])
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(len(shares) / 300 - 0.25) < 5 * (0.25 * 0.75 / 300) ** 0.5
    assert 0.015 < min(shares) < max(shares) < 0.34
    noise = torch.cat(values, 1)
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05
    assert random_erasing(image, keys(1)[0], 0.0) is image


def test_the_transform_puts_them_in_order() -> None:
    """Crop, flip, augment on uint8; normalise; erase, with noise of the normalised image's size."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    plain = TrainTransform((16, 16), (0.5, 1.0), 0.5, mean, std)
    both = TrainTransform((16, 16), (0.5, 1.0), 0.5, mean, std, aa="trivial", reprob=1.0)
    augmented = TrainTransform((16, 16), (0.5, 1.0), 0.5, mean, std, aa="trivial")
    key = keys(1)[0]
    assert torch.equal(both(IMAGE, key), random_erasing(augmented(IMAGE, key), key, 1.0))
    differ = [not torch.equal(plain(IMAGE, k), augmented(IMAGE, k)) for k in keys(20)]
    assert sum(differ) > 10


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.arange(n).float().view(n, 1, 1, 1).expand(n, 3, 8, 8).clone(), torch.arange(n)


def test_mixup_is_a_function_of_the_generator_and_leaves_no_trace() -> None:
    mix = mixing(0.8, 1.0, 0.1, 6)
    assert mix is not None
    images, labels = batch()
    before = images.clone()
    seen = set()
    for update in range(40):
        one, soft = mix(images, labels, keyed_generator(0, update, 0, "process 0"))
        np.random.rand(3)  # noqa: NPY002
        two, again = mix(images, labels, keyed_generator(0, update, 0, "process 0"))
        assert torch.equal(one, two)
        assert torch.equal(soft, again)
        assert torch.allclose(soft.sum(1), torch.ones(6))
        seen.add(one.numpy().tobytes())
    assert len(seen) > 30
    assert torch.equal(images, before)
    np.random.seed(7)  # noqa: NPY002
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    mix(images, labels, keyed_generator(0, 0, 0, "process 0"))
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_mixup_mixes_images_and_targets_by_one_share() -> None:
    mix = mixing(0.8, 0.0, 0.12, 6)
    assert mix is not None
    images, labels = batch()
    shares = []
    for update in range(200):
        mixed, soft = mix(images, labels, keyed_generator(0, update, 0, "process 0"))
        # Image 0 is all 0 and its partner, the last, all 5.
        lam = 1 - float(mixed[0, 0, 0, 0]) / 5
        assert torch.allclose(mixed, lam * images + (1 - lam) * images.flip(0), atol=1e-5)
        hard = lam * torch.eye(6) + (1 - lam) * torch.eye(6).flip(0)
        assert torch.allclose(soft, hard * 0.88 + 0.12 / 6, atol=1e-5)
        shares.append(lam)
    assert abs(np.mean(shares) - 0.5) < 0.1
    assert abs(np.var(shares) - 1 / (4 * 2.6)) < 0.03  # of Beta(.8, .8)


def test_cutmix_pastes_a_box_and_counts_its_pixels() -> None:
    mix = mixing(0.0, 1.0, 0.0, 6)
    assert mix is not None
    images, labels = batch()
    for update in range(30):
        mixed, soft = mix(images, labels, keyed_generator(0, update, 0, "process 0"))
        pasted = float((mixed[0] == 5).float().mean())
        assert ((mixed[0] == 0) | (mixed[0] == 5)).all()
        assert soft[0].tolist() == pytest.approx([1 - pasted, 0, 0, 0, 0, pasted], abs=1e-6)


def test_without_alphas_there_is_nothing_to_do() -> None:
    assert mixing(0.0, 0.0, 0.1, 10) is None
