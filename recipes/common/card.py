"""The model card: README.md of a run folder, for whoever finds the weights without the run."""

import inspect
import platform
import shlex
import subprocess
import sys
from ast import literal_eval
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import nn

from leaven import __version__
from leaven.backbones import create, metadata
from leaven.backbones.build import AUXILIARY
from leaven.backbones.names import import_factory
from leaven.recipes.common.launcher import PROGRAMS, find_launcher
from leaven.recipes.common.run_folder import RunFolder

_PACKAGES = ("torch", "torchvision", "timm", "accelerate")


def write_card(
    run: RunFolder,
    backbone: str,
    method: str,
    paper: str,
    *,
    data: Sequence[str],
    how: Sequence[str],
    results: Sequence[tuple[str, str]],
    in_chans: int = 3,
    num_classes: int = 0,
) -> None:
    """Write README.md.

    Args:
        run: the folder; pictures in its plots/ are shown.
        backbone: resolved name, as `leaven.backbones.create` takes it.
        method, paper: what was done, and where it comes from.
        data: lines about the data, with what must be known before the results are believed.
        how: lines about training and evaluation; all settings are in config.yaml.
        results: (what, value), in the order to show.
        in_chans: channels that the backbone reads.
        num_classes: of its classifier, 0 for none.

    Raises:
        UserError: it cannot be written.
    """
    pictures = sorted(path.name for path in run.plots.glob("*.png"))
    versions = ", ".join([f"Python {platform.python_version()}", *(f"{p} {_version(p)}" for p in _PACKAGES)])
    lines = [
        f"# {backbone}, {method}",
        "",
        f"Backbone weights from {method} ({paper}), trained with leaven {__version__}.",
        "",
        "## Use",
        "",
        "```python",
        *lines_of_use(run.backbone, backbone, in_chans, num_classes),
        "```",
        "",
        "## Results",
        "",
        "| | |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in results),
        "",
        *(f"![{picture.removesuffix('.png')}](plots/{picture})\n" for picture in pictures),
        "## Data",
        "",
        *(f"- {line}" for line in data),
        "",
        "## How it was made",
        "",
        f"    {run.made_by[1] if run.made_by else command()}",
        "",
        *(f"- {line}" for line in how),
        "- all settings: config.yaml; log: metrics.jsonl",
        f"- {versions}; {platform.system()} {platform.machine()}{_commit()}",
        "",
    ]
    run.write(run.card, "\n".join(lines))


def lines_of_use(weights: Path, backbone: str, in_chans: int = 3, num_classes: int = 0) -> list[str]:
    """Lines of Python that build the backbone of a run and load its weights, without leaven where that can be.

    Args:
        weights: the run's backbone.safetensors.
        backbone, in_chans, num_classes: as for `write_card`.
    """
    notes = metadata(weights) if weights.is_file() else {}
    name, size = backbone.removeprefix("tv:"), literal_eval(notes.get("image_size", "None"))
    channels = "" if in_chans == 3 else f", in_chans={in_chans}"
    classes = f", num_classes={num_classes}" if num_classes else ""
    if ":" in backbone and not backbone.startswith(("tv:", "hf-hub:", "hf_hub:", "local-dir:")):
        package, plain = backbone.split(":")[0], backbone.replace(":", ".")
        factory = import_factory(backbone)
        if not isinstance(factory, nn.Module):
            takes_it = size and "image_size" in inspect.signature(factory).parameters
            plain += f"({(channels + classes + (f', image_size={size}' if takes_it else ''))[2:]})"
    elif backbone.startswith("tv:"):
        side = (
            f", image_size={size[0]}"
            if _goes_by_size(weights, backbone, size, num_classes=num_classes)
            else ""
        )
        plainly = ", aux_logits=False, init_weights=False" if backbone in AUXILIARY else ""
        package, plain = "torchvision", f"torchvision.models.get_model({name!r}{classes}{side}{plainly})"
    else:
        how = {"num_classes": num_classes, "in_chans": in_chans}
        side = f", img_size={size}" if _goes_by_size(weights, backbone, size, **how) else ""
        package, plain = "timm", f"timm.create_model({name!r}, num_classes={num_classes}{channels}{side})"
    lines = [f"import {package}", "from safetensors.torch import load_file", "", f"backbone = {plain}"]
    if (kind := notes.get("evonorm")) is not None:
        lines += [
            "from functools import partial",
            "from leaven.callbacks import evo_norm, replace_norm_act",
            f'replace_norm_act(backbone, partial(evo_norm, "{kind}"))',
        ]
    return [*lines, 'backbone.load_state_dict(load_file("backbone.safetensors"))']


def _goes_by_size(weights: Path, backbone: str, size: tuple[int, int] | None, **how: int) -> bool:
    """Whether the weights are of other shapes than a backbone that is not told the size of its images."""
    from safetensors import safe_open

    if size is None:
        return False
    state = create(backbone, **how).state_dict()  # type: ignore[arg-type]
    with safe_open(weights, framework="pt") as file:
        known = [key for key in file.keys() if key in state]  # noqa: SIM118
        return any(tuple(file.get_slice(key).get_shape()) != tuple(state[key].shape) for key in known)


def command() -> str:
    """The command line of this process, to be pasted into a shell; its launcher's where it has one."""
    launcher = find_launcher()
    launched = [word for word in launcher.command if word] if launcher is not None else []
    names = [Path(word).name for word in launched]
    start = next((i for i, name in enumerate(names) if name in PROGRAMS), None)
    if start is not None:
        return shlex.join([names[start], *launched[start + 1 :]])
    return shlex.join(["python", *(launched[1:] or sys.argv)])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of the checkout that this file runs from; nothing for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "src" / "leaven").is_dir():  # installed, perhaps inside somebody else's repository
        return ""
    git = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return ""
    return f"; leaven commit {found.stdout.strip()}" if found.returncode == 0 else ""
