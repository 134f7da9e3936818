"""T6: the standardised target, the masked mean and its gradient, by hand."""

import numpy as np
import pytest
import torch

from leaven.pretext.spark.loss import masked_loss, moments, patchify, reconstruction, unpatchify
from leaven.pretext.spark.masking import sample_mask, upsample_mask


def _example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 8, 12, generator=generator)
    prediction = torch.randn(2, 3, 8, 12, generator=generator)
    return images, prediction, sample_mask(2, (2, 3), 0.5, generator)


def test_patch_order_is_row_column_channel() -> None:
    images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = patchify(images, 2)
    by_hand = [images[1, c, 2 + i, 4 + j].item() for i in range(2) for j in range(2) for c in range(3)]
    assert patches[1, 1, 2].tolist() == by_hand
    assert torch.equal(unpatchify(patches, 2), images)


def test_loss_equals_a_loop_in_float64() -> None:
    images, prediction, mask = _example()
    total, hidden = 0.0, 0
    for b in range(2):
        for y in range(2):
            for x in range(3):
                if mask[b, y, x]:
                    continue
                block = images[b, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].double().numpy()
                target = (block - block.mean()) / np.sqrt(block.var(ddof=1) + 1e-6)
                guess = prediction[b, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].double().numpy()
                total, hidden = total + ((guess - target) ** 2).mean(), hidden + 1
    assert masked_loss(prediction, images, mask).item() == pytest.approx(total / hidden, rel=1e-6)
    # The 1e-8 that guards against a mask without hidden patches is all that differs in float64.
    wide = masked_loss(prediction.double(), images.double(), mask)
    assert wide.item() == pytest.approx(total / hidden, rel=1e-8 / hidden * 2)


def test_deviation_is_unbiased() -> None:
    patch = torch.tensor([[0.0, 0.0, 3.0]])
    assert moments(patch)[1].item() == pytest.approx((3 + 1e-6) ** 0.5)  # biased: sqrt(2)


def test_no_gradient_on_visible_patches() -> None:
    images, prediction, mask = _example()
    prediction.requires_grad_()
    masked_loss(prediction, images, mask).backward()
    assert prediction.grad is not None
    visible = upsample_mask(mask, (8, 12)).expand_as(prediction)
    assert prediction.grad[visible].eq(0).all()
    assert prediction.grad[~visible].ne(0).all()


def test_the_standardised_image_itself_has_no_loss_and_reconstructs() -> None:
    images, _, mask = _example()
    patches = patchify(images, 4)
    mean, std = moments(patches)
    perfect = unpatchify((patches - mean) / std, 4)
    assert masked_loss(perfect, images, mask) < 1e-12
    assert torch.allclose(reconstruction(perfect, images, mask), images, atol=1e-5)
    zeros = reconstruction(torch.zeros_like(images), images, mask)
    visible = upsample_mask(mask, (8, 12)).expand_as(images)
    assert torch.equal(zeros[visible], images[visible])
    assert torch.allclose(patchify(zeros, 4)[~mask], mean.expand_as(patches)[~mask])


def test_half_precision_predictions_are_compared_in_single() -> None:
    images, prediction, mask = _example()
    low = masked_loss(prediction.bfloat16(), images, mask)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(masked_loss(prediction.bfloat16().float(), images, mask).item())
