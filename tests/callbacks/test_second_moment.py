"""What the mathematics of TrAct refuses; that it is right is in test_tract.py."""

import pytest
import torch
from torch import nn

from leaven.callbacks import patch_second_moment, tract_gradient


@pytest.mark.parametrize(
    ("layer", "shape", "line"),
    [
        (nn.Conv2d(3, 4, 3), (2, 4, 8, 8), r"takes 3 channels and 2 axes of space, not \(2, 4, 8, 8\)"),
        (nn.Conv2d(3, 4, 3), (2, 3, 8), r"takes 3 channels and 2 axes of space, not \(2, 3, 8\)"),
        (
            nn.Conv2d(3, 4, 5),
            (2, 3, 8, 4),
            r"inputs of \(8, 4\), with padding, are smaller than a patch of \(5, 5\)",
        ),
        (nn.Conv1d(3, 4, 3, dilation=4), (2, 3, 8), r"smaller than a patch of \(9,\)"),
        (nn.Linear(9, 4), (4, 18), r"takes \(..., 9\), not \(4, 18\)"),
    ],
)
def test_an_input_that_the_layer_does_not_take_is_named(
    layer: nn.Module, shape: tuple[int, ...], line: str
) -> None:
    with pytest.raises(ValueError, match=line):
        patch_second_moment(torch.randn(shape), layer)


def test_a_layer_without_a_weight_yet_is_named() -> None:
    with pytest.raises(TypeError, match="the weight of this LazyConv2d is not there yet: call the model"):
        patch_second_moment(torch.randn(1, 3, 8, 8), nn.LazyConv2d(4, 3))


@pytest.mark.parametrize("shape", [(26, 26), (3, 27, 27), (27, 26), (27,), (1, 1, 27, 27)])
def test_a_moment_of_other_inputs_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a gradient \(4, 3, 3, 3\) is \(27, 27\), or that for each group"):
        tract_gradient(torch.randn(4, 3, 3, 3), torch.zeros(shape), lam=0.1)
