"""T1-T4 and T8 of SparK's encoders on the table of networks, both backends, against the plain networks (float64)."""

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

from leaven.backbones import Stage, create, features, stages
from leaven.pretext.spark import SparK, SparseUnsupported
from tests.pretext.spark_networks import DEFAULT, EXACT, REFUSED, ROUNDING
from tests.pretext.spark_oracle import (
    GRID,
    Crops,
    Encode,
    Leaks,
    Pass,
    disagreements,
    hidden_values,
    masked_pass,
    one_block,
    plain_pass,
    randomise,
    rounding,
    without_drops,
)

CELL = 64
NAN = float("nan")


def slow_unless_default(name: str, *values: Any, slow: bool = False) -> Any:
    marks = [pytest.mark.slow] if slow or name not in DEFAULT else []
    return pytest.param(name, *values, marks=marks, id="-".join(map(str, (name, *values))))


BOTH = [slow_unless_default(name, backend) for name in EXACT for backend in ("dense", "packed")]


def encoder(model: nn.Module, backend: str, cell: int = CELL) -> tuple[Encode, SparK]:
    """The encoder under test, for `model` itself (no copy)."""
    wanted = [stage.reduction for stage in stages(model) if stage.reduction in (4, 8, 16, 32)]
    spark = SparK(model, decoder_width=wanted[-1], backend=backend, stages=wanted, mask_cell=cell)  # type: ignore[arg-type]
    return spark.encode, spark


@lru_cache(maxsize=2)
def network(name: str) -> tuple[nn.Module, tuple[Stage, ...]]:
    """A plain network with random norms, and its maps from reduction 4 on. Never changed: tests copy it."""
    torch.manual_seed(0)
    model = without_drops(create(name))
    maps = tuple(stage for stage in stages(model) if stage.reduction in (4, 8, 16, 32))
    return randomise(model, torch.randn(4, 3, 2 * CELL, 2 * CELL, dtype=torch.float64)), maps


@lru_cache(maxsize=4)
def expected(name: str, columns: int, training: bool) -> tuple[Crops, Pass]:
    model, maps = network(name)
    case = one_block(CELL, columns, hidden=NAN)
    return case, plain_pass(copy.deepcopy(model), case.crops, maps, training)


@pytest.mark.parametrize(
    ("name", "columns", "training", "backend"),
    [
        slow_unless_default(name, columns, training, backend, slow=columns == 1 + training)
        for name in EXACT
        for columns, training in ((1, True), (2, False), (1, False), (2, True))
        for backend in ("dense", "packed")
    ],
)
def test_crop_equivalence(name: str, columns: int, training: bool, backend: str) -> None:
    """T1 and T3: features, gradients and running moments are those of the network on the visible block alone.

    Hidden pixels are NaN, so that reading one of them anywhere shows up everywhere.
    """
    plain, maps = network(name)
    case, wanted = expected(name, columns, training)
    model = copy.deepcopy(plain)
    encode, _ = encoder(model, backend)
    found = masked_pass(model, encode, case, training)
    wrong = disagreements(found, wanted, lambda: rounding(copy.deepcopy(plain), case.crops, maps, training))
    if name in ROUNDING:
        wrong = [w for w in wrong if float(w.split("off by ")[1].split(",")[0]) > ROUNDING[name]]
    assert not wrong, wrong[:5]


@pytest.mark.parametrize(("name", "backend"), BOTH)
def test_training_step_and_round_trip(name: str, backend: str) -> None:
    """T2, T4 and T8: a training step with everything visible is the plain network's, and the weights are plain again.

    Then, under a mask: zeros at every hidden position of every map.
    """
    plain, maps = network(name)
    model, twin = copy.deepcopy(plain), copy.deepcopy(plain)
    encode, spark = encoder(model, backend)
    images = one_block(CELL).images
    everything = torch.ones(2, *GRID, dtype=torch.bool)
    for net, run in (
        (model, lambda: encode(images, everything)),
        (twin, lambda: features(twin, images, maps)),
    ):
        net.train()
        sum(m.square().mean() for m in run()).backward()  # type: ignore[union-attr]
        torch.optim.SGD(net.parameters(), lr=1e-2).step()
    mask = torch.tensor(
        [[[True, False, True], [False, True, False]], [[False, True, True], [True, False, False]]]
    )
    leaks = Leaks(mask)
    with torch.no_grad(), leaks:
        masked = spark.eval().encode(images, mask)
    assert hidden_values(masked, mask) == 0
    assert leaks.largest == 0
    state, other = model.state_dict(), twin.state_dict()
    assert list(state) == list(create(name).state_dict())
    for key, value in other.items():
        torch.testing.assert_close(
            state[key], value, rtol=1e-8, atol=1e-9 * float(value.abs().max()), msg=key
        )
    again = create(name).double().eval()
    again.load_state_dict(state, strict=True)
    with torch.no_grad():
        for a, b in zip(features(again, images, maps), features(model.eval(), images, maps), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "backend", "reason"),
    [
        slow_unless_default(name, backend, reason)
        for name, (dense, packed) in REFUSED.items()
        for backend, reason in (("dense", dense), ("packed", packed))
        if reason
    ],
)
def test_refused(name: str, backend: str, reason: str) -> None:
    """Whatever has no exact sparse form is refused when SparK is built, in one line that names the module."""
    with pytest.raises(SparseUnsupported, match=reason) as caught:
        encoder(create(name), backend)
    assert "\n" not in str(caught.value)
