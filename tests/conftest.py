"""What every test shares."""

import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

# One thread: sums come out in the same order on every machine, so that bit-equality tests mean something, and
# the tiny tensors of this suite run faster without threads to wake.
torch.set_num_threads(1)

# Time says how busy the machine is, not whether the code is right.
hypothesis.settings.register_profile(
    "calm", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("calm")


@pytest.fixture(scope="session")
def leaven_data() -> Path:
    """The folder of real data that LEAVEN_DATA names; tests that ask for it are skipped without it."""
    folder = os.environ.get("LEAVEN_DATA")
    if not folder:
        pytest.skip("needs real data: set LEAVEN_DATA to the folder that holds cifar10-exact/, uci/, ...")
    path = Path(folder)
    assert path.is_dir(), f"LEAVEN_DATA={folder} is not a folder"
    return path


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the snippets of README.md and docs/ take from their reader, as docs/index.md says; in an empty folder."""
    import timm

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 64, 64), torch.arange(16) % 4
    model = timm.create_model("resnet10t", num_classes=4)
    return {
        "torch": torch,
        "loader": [(images[:8], labels[:8]), (images[8:], labels[8:])],
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "train_images": images,
        "train_labels": labels,
        "val_images": images[:8],
        "val_labels": labels[:8],
    }
