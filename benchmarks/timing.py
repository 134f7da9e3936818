"""What the benchmarks share: interleaved timing, and the machine they ran on."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch


def seconds(step: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    steps: Mapping[str, Callable[[], object]], *, base: str, repeats: int, device: str
) -> dict[str, Any]:
    """Medians, spread and ratios to ``base``, each repeat running every variant once; the first two are warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 2):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    times = {name: t[2:] for name, t in times.items()}
    rows: dict[str, Any] = {}
    for name, t in times.items():
        ratios = sorted(a / b for a, b in zip(t, times[base], strict=True))
        rows[name] = {
            "median_s": round(statistics.median(t), 5), "min_s": round(min(t), 5), "max_s": round(max(t), 5),
            f"ratio_to_{base}": round(statistics.median(ratios), 3),
            "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        }  # fmt: skip
    return rows


def machine(device: str) -> dict[str, Any]:
    """Processor, threads, GPU, versions and the day."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line for line in lines if line.startswith("model name")]
    return {
        "processor": models[0].split(":")[1].strip() if models else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "not measured on GPU",
        "python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def result_file(script: str, device: str) -> Path:
    """Where a script's JSON goes: results/NAME-MACHINE.json beside it."""
    where = "gpu" if device == "cuda" else f"{os.cpu_count()}core"
    return Path(script).parent / "results" / f"{Path(script).stem}-{where}.json"
