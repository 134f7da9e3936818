"""benchmarks/dkm_head.py in small, on features that are made up: how heads choose, and what they give."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import dkm_head


@pytest.mark.parametrize("head", dkm_head.HEADS)
def test_every_head_chooses_what_is_likeliest(
    head: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All values are as accurate, and one is surer than the others."""
    values, asked = dkm_head.CHOICES[head], []
    best = values[len(values) // 2]

    def predicted(
        head: str, value: float | None, x: Tensor, y: Tensor, tests: list[Tensor], *more: int
    ) -> list[Tensor]:
        asked.append((value, len(x)))
        return [torch.softmax(test * (5 if value == best else 1), 1) for test in tests]

    monkeypatch.setattr(dkm_head, "predicted", predicted)
    y = torch.arange(40) % 2
    x, cache = torch.eye(2)[y], tmp_path / "features.pt"
    torch.save({"train": (x, y), "val": (x, y), "ood": (x, y)}, cache)
    threads = torch.get_num_threads()
    scores = dkm_head.trial({"cifar SparK": str(cache)}, "cifar", "SparK", "all", 0, head)
    torch.set_num_threads(threads)
    json.dumps(scores)
    assert asked == [*([(value, 32) for value in values] if len(values) > 1 else []), (best, 40)]
    assert scores["chosen"] == str(best)
    assert scores["accuracy"] == 1


@pytest.mark.parametrize("head", dkm_head.HEADS)
def test_heads_give_probabilities_of_all_classes(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dkm_head, "STEPS", 8)
    monkeypatch.setattr(dkm_head, "INDUCING", 6)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    for value in dkm_head.CHOICES[head][::3]:
        for probs in dkm_head.predicted(head, value, x, torch.arange(40) % 2, [x[:5], x[5:7]], 3, 0):
            assert probs.shape[1] == 3
            torch.testing.assert_close(probs.sum(1), torch.ones(len(probs)).to(probs))
