"""What the user sees while training: a bar on a terminal, plain lines elsewhere."""

import shutil
import sys
from collections.abc import Mapping
from typing import Any

import torch
from tqdm import tqdm

# Lines over a whole run when the output is a file: a log of a thousand epochs stays readable.
_LINES = 40


class Progress:
    """Shows rows of metrics.jsonl; silent except on the main process.

    Args:
        total: updates in the run.
        done: updates done before this start.
        show: False on all but one process.
    """

    def __init__(self, total: int, done: int, *, show: bool) -> None:
        self.total, self.every = total, max(1, total // _LINES)
        self.lines = show and not sys.stderr.isatty()
        # Some terminals say that they have no columns at all; shutil then takes 80, tqdm would show nothing.
        columns = shutil.get_terminal_size().columns
        self.bar = tqdm(
            total=total, initial=done, unit="update", disable=not show or self.lines, ncols=columns
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, row: Mapping[str, Any]) -> None:
        self.bar.set_postfix(loss=f"{row['loss']:.4f}", lr=f"{row['lr']:.2e}", refresh=False)
        self.bar.update()
        if held_out := [f"{name} {value:.4f}" for name, value in row.items() if name.startswith("val_")]:
            self.bar.write(f"epoch {row['epoch']:.2f}  {'  '.join(held_out)}")
        if self.lines and (row["step"] % self.every == 0 or row["step"] == self.total):
            print(
                f"update {row['step']}/{self.total}  epoch {row['epoch']:.2f}  loss {row['loss']:.4f}  "
                f"lr {row['lr']:.2e}  {row['images_per_s']:.0f} images/s",
                flush=True,
            )


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process so far in MiB: allocated on the device, or resident on a CPU."""
    module = torch.get_device_module(device) if device.type != "cpu" else None
    if module is not None and hasattr(module, "max_memory_allocated"):
        return float(module.max_memory_allocated(device)) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
