"""benchmarks/dkm_uci.py in small: do its rivals train as the deep kernel machine does?"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import dkm_uci


@pytest.mark.parametrize("model", ["exact", "SVGP", "DSPP"])
def test_rivals_find_small_noise_in_float64(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In as many updates; gpytorch's floor of 1e-4 under the noise would hide what there is to find."""
    monkeypatch.setattr(dkm_uci, "STEPS", 7)
    monkeypatch.setattr(dkm_uci, "INDUCING", 5)
    made, updates, gaussian, step = [], [], dkm_uci.gaussian, torch.optim.Adam.step

    def small() -> object:
        made.append(gaussian())
        made[-1].noise = 1e-6
        return made[-1]

    monkeypatch.setattr(dkm_uci, "gaussian", small)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a: (updates.append(1), step(self, *a))[1])
    x = torch.linspace(-1, 1, 30).unsqueeze(1)
    if model == "exact":
        mean, variance, weights = dkm_uci.exact(x, x, x, 0)
    else:
        mean, variance, weights = dkm_uci.variational(x, x, x, {"SVGP": None, "DSPP": 0.05}[model], 0)
    assert mean.dtype == variance.dtype == torch.float64
    assert float(made[0].noise.detach()) < 1e-4
    assert len(updates) == (200 if model == "exact" else 7)
    assert float(weights.double().exp().sum().detach()) == pytest.approx(1, abs=1e-6)
    assert dkm_uci.density((mean, variance, weights.detach()), x[:, 0].double()).shape == (30,)
