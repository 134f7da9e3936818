"""``leaven doctor``: what is installed, which devices there are, and what works here or why not."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import leaven

# Distribution -> the module it is imported as, where the two differ.
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "PyYAML": "yaml"}
SPARK_BACKENDS = ("packed", "dense", "spconv")
_SPARK_STEP = """
import torch
from leaven.pretext.spark import SparK
SparK("resnet10t", decoder_width=32, backend={backend!r})(torch.randn(2, 3, 64, 64)).loss.backward()
"""
# A folder of that name hides what pip installed for development, which is found last, and not a usual installation.
_FROM_HERE = "import sys; sys.path.insert(0, ''); import leaven; leaven.__version__"


def doctor() -> int:
    """Print the report; returns 1 if something that is installed, or that every user needs, does not work, else 0."""
    print(f"leaven {leaven.__version__} in {Path(leaven.__file__).parent}")
    print(f"Python {platform.python_version()} ({sys.executable}) on {platform.platform()}")
    core, extras = requirements()
    programs = {name: f"import {MODULES.get(name, name)}" for name in core}
    has_spconv = any(
        name.startswith("spconv") for name in installed_packages()
    )  # spconv-cu126 is another one
    backends = [backend for backend in SPARK_BACKENDS if backend != "spconv" or has_spconv]
    programs |= {f"SparK {backend}": _SPARK_STEP.format(backend=backend) for backend in backends}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failures = dict(zip(programs, pool.map(failure, programs.values()), strict=True))

    problems = []
    print("\nPackages")
    for name in core:
        version, failed = installed_version(name), failures[name]
        print(f"  {name:<13} {version or '-':<14} {failed or 'ok'}")
        if failed:
            verdict = "is missing" if version is None else f"{version} cannot be imported ({failed})"
            problems.append(f"{name} {verdict}: pip install --upgrade {name}")
    if mismatch := torchvision_mismatch():
        problems.append(mismatch)
    if (Path.cwd() / "leaven").is_dir() and failure(_FROM_HERE):
        problems.append(
            f"the folder {Path.cwd() / 'leaven'} hides the package from Python programs started here: "
            "start them elsewhere, or rename it"
        )

    print("\nDevices and threads")
    for line in ["unknown: torch cannot be imported"] if failures["torch"] else devices():
        print(f"  {line}")

    print("\nExtras: pip install 'leaven[NAME]'")
    for extra, names in extras.items():
        missing = [name for name in names if installed_version(name) is None]
        print(f"  {extra:<13} {'missing: ' + ', '.join(missing) if missing else 'installed'}")

    print("\nSparK backends: one training step tried")
    for backend in backends:
        failed = failures[f"SparK {backend}"]
        print(f"  {backend:<13} {failed or 'ok'}")
        if failed:
            problems.append(f"SparK's backend {backend!r} does not work: {failed}")
    if not has_spconv:
        print("  spconv        not installed: pip install 'leaven[spconv]' (NVIDIA GPU: spconv-cu126)")

    print(f"\n{len(problems)} to fix:" if problems else "\nNo problem found.")
    for problem in problems:
        print(f"  {problem}")
    return 1 if problems else 0


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """What leaven asks for: distributions needed by all, and by each extra."""
    try:
        lines = importlib.metadata.requires("leaven") or []
    except importlib.metadata.PackageNotFoundError:  # a plain clone, used through PYTHONPATH=src
        project = tomllib.loads(
            (Path(leaven.__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
        )["project"]
        lines = list(project["dependencies"])
        for extra, names in project["optional-dependencies"].items():
            lines += [f'{name}; extra == "{extra}"' for name in names]
    core: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in lines:
        name = re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]
        marker = re.search(r"""extra == ['"](.+?)['"]""", line)
        (extras.setdefault(marker[1], []) if marker else core).append(name)
    return core, extras


def installed_version(distribution: str) -> str | None:
    """The version that pip knows, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_packages() -> set[str]:
    """Distributions that pip knows."""
    return {str(found.metadata["Name"]) for found in importlib.metadata.distributions()}


def torchvision_mismatch() -> str | None:
    """One line if torchvision asks for another torch than the installed one, else None."""
    torch, torchvision = installed_version("torch"), installed_version("torchvision")
    if torch is None or torchvision is None or installed_version("packaging") is None:
        return None  # each is reported elsewhere; without `packaging` importing torchvision is the only test
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires("torchvision") or []:
        needed = Requirement(line)
        if needed.name == "torch" and not needed.specifier.contains(torch, prereleases=True):
            return (
                f"torchvision {torchvision} needs torch{needed.specifier}, but torch {torch} is installed: "
                "pip install --upgrade torch torchvision (both from the same index)"
            )
    return None


def failure(program: str) -> str | None:
    """Run Python source in its own process (a broken binary may kill it): None, or the error's last line."""
    command = [sys.executable, "-P", "-c", program]  # without the current folder, which may shadow packages
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return "no answer within 300 s"
    if done.returncode == 0:
        return None
    lines = done.stderr.split("\n") if done.returncode == 1 else []
    return next(
        (line.strip() for line in reversed(lines) if line.strip()), f"died with code {done.returncode}"
    )


def devices() -> Iterator[str]:
    """Accelerators as torch sees them, cores and threads."""
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(i).total_memory / 2**30
            yield f"cuda:{i} {torch.cuda.get_device_name(i)}, {memory:.0f} GiB"
    elif torch.backends.mps.is_available():
        yield "mps (Apple GPU)"
    else:
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU or driver"
        yield f"cpu only: {why}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    chosen = os.environ.get("OMP_NUM_THREADS", "not set")
    yield f"{cores} usable cores; torch uses {torch.get_num_threads()} threads; OMP_NUM_THREADS {chosen}"
