"""T1-T4 and T8 of SparK's encoders on the table of networks, both backends, against the plain networks (float64)."""

import copy
from functools import lru_cache
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from torch import Tensor, nn

from leaven.backbones import Stage, create, features, stages
from leaven.pretext.spark import SparK, SparseUnsupported
from leaven.pretext.spark.sparse_map import SparseMap
from tests.pretext.spark_networks import CASTS_INSIDE, DEFAULT, EXACT, MORE, REFUSED
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

# The default suite runs cells of 32 px (one position at reduction 32), the slow one all networks at 64.
BACKENDS = ("dense", "packed")
NAN = float("nan")


def case(name: str, *values: Any, slow: bool) -> Any:
    shown = [str(v) for v in (name, *values) if not isinstance(v, str) or v in BACKENDS or v == name]
    marks = [pytest.mark.slow] if slow else []
    if name == "cspnext_tiny":
        old = Version(timm.__version__) < Version("1.0.31")
        marks.append(pytest.mark.skipif(old, reason="older timm does not have this network"))
    return pytest.param(name, *values, marks=marks, id="-".join(shown))


# Visible columns, training. The first two on every network, all of them on DEFAULT.
SETTINGS = ((1, True), (2, False), (1, False), (2, True))
CROPS = [case(n, 32, *how, b, slow=False) for n in DEFAULT for how in SETTINGS[:2] for b in BACKENDS]
CROPS += [
    case(n, 64, *how, b, slow=True)
    for n in EXACT
    for how in SETTINGS[: 4 if n in DEFAULT else 2]
    for b in BACKENDS
]
CROPS += [case(n, 64, *how, b, slow=True) for n, served in MORE.items() for how in SETTINGS for b in served]
STEPS = [case(n, 32, b, slow=False) for n in DEFAULT for b in BACKENDS]
STEPS += [case(n, 64, b, slow=True) for n in EXACT for b in BACKENDS]
REFUSALS = [
    case(name, backend, reason, slow=slow)
    for name, (slow, *reasons) in REFUSED.items()
    for backend, reason in zip(BACKENDS, reasons, strict=True)
    if reason
]


def encoder(model: nn.Module, backend: str, cell: int) -> tuple[Encode, SparK]:
    """The encoder under test, for `model` itself (no copy)."""
    wanted = [stage.reduction for stage in stages(model) if stage.reduction in (4, 8, 16, 32)]
    spark = SparK(
        model, decoder_width=max(wanted, default=32), backend=backend, stages=wanted or None, mask_cell=cell
    )
    return spark.encode, spark


@lru_cache(maxsize=2)
def network(name: str, cell: int) -> tuple[nn.Module, tuple[Stage, ...]]:
    """A plain network with random norms, and its maps from reduction 4 on. Never changed: tests copy it."""
    torch.manual_seed(0)
    model = without_drops(create(name))
    maps = tuple(stage for stage in stages(model) if stage.reduction in (4, 8, 16, 32))
    return randomise(model, torch.randn(4, 3, 2 * cell, 2 * cell, dtype=torch.float64)), maps


@lru_cache(maxsize=4)
def expected(name: str, cell: int, columns: int, training: bool) -> tuple[Crops, Pass]:
    model, maps = network(name, cell)
    crops = one_block(cell, columns, hidden=NAN)
    return crops, plain_pass(copy.deepcopy(model), crops.crops, maps, training)


@pytest.mark.parametrize(("name", "cell", "columns", "training", "backend"), CROPS)
def test_crop_equivalence(
    name: str, cell: int, columns: int, training: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T1 and T3: features, gradients and running moments are those of the network on the visible block alone.

    Hidden pixels are NaN, so that reading one of them anywhere shows up everywhere.
    """
    if name in CASTS_INSIDE:
        for kind in (Tensor, SparseMap):
            monkeypatch.setattr(kind, "float", lambda values: values)
    plain, maps = network(name, cell)
    crops, wanted = expected(name, cell, columns, training)
    model = copy.deepcopy(plain)
    encode, _ = encoder(model, backend, cell)
    found = masked_pass(model, encode, crops, training)
    wrong = disagreements(found, wanted, lambda: rounding(copy.deepcopy(plain), crops.crops, maps, training))
    assert not wrong, wrong[:5]


@pytest.mark.parametrize(("name", "cell", "backend"), STEPS)
def test_training_step_and_round_trip(name: str, cell: int, backend: str) -> None:
    """T2, T4 and T8: a training step with everything visible is the plain network's, and the weights are plain again.

    Then, under a mask: zeros at every hidden position of every map.
    """
    plain, maps = network(name, cell)
    model, twin = copy.deepcopy(plain), copy.deepcopy(plain)
    encode, spark = encoder(model, backend, cell)
    images = one_block(cell).images
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
        largest = float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(state[key], value, rtol=1e-8, atol=1e-9 * largest, msg=key)
    again = create(name).double().eval()
    again.load_state_dict(state, strict=True)
    with torch.no_grad():
        for a, b in zip(features(again, images, maps), features(model.eval(), images, maps), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "backend", "reason"), REFUSALS)
def test_refused(name: str, backend: str, reason: str) -> None:
    """Whatever has no exact sparse form is refused when SparK is built, in one line that names the module."""
    with pytest.raises(SparseUnsupported, match=reason) as caught:
        encoder(create(name), backend, 64)
    assert "\n" not in str(caught.value)
