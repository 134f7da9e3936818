"""What benchmarks/backbone_matrix.py found, as the page docs/matrix.md."""

import re
from typing import Any

# What is said of one network, and what it comes to; the first that matches. \1 names the module at fault.
_MASKED = "it has an operation without an exact sparse form, such as attention, in the module named"
_COMES_TO = (
    (
        r"SparK cannot run \S+ in \S+ \((\w+)\): output .* divided by stride .*",
        "a layer without padding crops its map",
    ),
    (r"SparK cannot run \S+ in \S+ \((\w+)\): .*", _MASKED),
    (r"\S+ \((\w+)\).*; choose a backbone without it", _MASKED),
    (
        r"\w+ does not run on \d+x\d+ px: .*",
        "it runs on one size of images only, and not on one and two mask cells",
    ),
    (r"SparK needs feature maps whose reductions .*", "its maps are no powers of two smaller than the image"),
    (
        r".* \((\d+%) of the backbone's parameters\) .*",
        "this share of it, behind the last map, stays as it is; a warning names the layers",
    ),
    (
        r"TrAct cannot train \S+: a (\w+) is not .*",
        "its first layer is no plain convolution or linear layer, so that TrAct would not be exact",
    ),
    (
        r"(\w+) must return logits \(B, N\), not .*",
        "in training it returns more than logits; build it with aux_logits=False",
    ),
    (r"no layer of \w+ was replaced: it has no BatchNorm2d", "it has no BatchNorm2d; a warning says so"),
    (
        r"no layer of \w+ was replaced: all was skipped.*",
        "no BatchNorm2d could be replaced; a warning says why",
    ),
    (
        r"\d+ of \d+ BatchNorm layers are left: .*",
        "some BatchNorm layers are left; the report says which, and why",
    ),
    (
        r"EvoNorm: none of the \d+ BatchNorm layers .*",
        "no BatchNorm has its activation directly behind it, and nothing would be normalised",
    ),
    (
        r"\d+ of the \d+ BatchNorm layers of \w+ that were replaced .*",
        "few of its BatchNorm layers have their activation directly behind them; the others become scale and shift "
        "alone, and a warning says so",
    ),
    (
        r"\w+ does not run on images of \d+x\d+ .*",
        "it runs on one size of images only; resize_back=True serves in Python, and saves nothing",
    ),
    (r"\w+ works on a sequence of tokens .*", "it works on a sequence of tokens and gives no feature maps"),
    (r"\w+ returned no feature map .*", "it works on a sequence of tokens and gives no feature maps"),
    (r"\w+ gives one feature map only; .*", "it gives one feature map only, and two are needed"),
    (
        r"no module of \w+ gives its map .*",
        "none of its modules gives its maps when it is called; stages= names others",
    ),
    (r"no gradient reaches \d+ of its parameters, .*", "some of its parameters have no part in its output"),
)

_HEAD = """\
# Which method works on which backbone

Found by running, not by thinking: `python benchmarks/backbone_matrix.py` builds of every module of timm and of every
family of torchvision the network with the fewest parameters, with random weights, and does one update with each method,
its objective built as the recipe builds it, on two images of noise. So "works" says that it trains, not that it helps.
The last rows are written by hand (`tests/backbones/hand_written.py`) and stand for your own network. All messages are
in [backbone_matrix.json](../benchmarks/results/backbone_matrix.json), and `tests/test_backbone_matrix.py` runs some of
them again.

Sides of the images: 64 px where the network runs on them, else 128, 112 or its own, which is also tried where a
smaller size is refused. What is not "works" is one line that says so, before anything is trained:

- **refused**: an error. Of SparK's, the module that it names is given.
- **no effect**: a warning; training goes on without the method.
"""


def table(report: dict[str, Any]) -> str:
    """The page."""
    methods = max((list(row["cells"]) for row in report["rows"].values()), key=len, default=[])
    notes: dict[str, int] = {}
    lines = [
        "| family | network | parameters | " + " | ".join(methods) + " |",
        "| --- " * (3 + len(methods)) + "|",
    ]
    for name, (family, parameters) in report["models"].items():
        cells = report["rows"].get(name, {"cells": {}})["cells"]
        said = [_short(cells.get(method, "not run yet"), notes) for method in methods]
        size = f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters / 1e6:.2f} M"
        lines.append(f"| {family} | {name.removeprefix('hand_written:')} | {size} | {' | '.join(said)} |")
    machine = report["machine"]
    versions = f"torch {machine['torch']}, timm {machine['timm']}, {machine['date']}, on CPU."
    reasons = [f"{number}. {reason}" for reason, number in notes.items()]
    return "\n".join([_HEAD, *lines, "", "Reasons:", "", *reasons, "", versions, ""])


def _short(cell: str, notes: dict[str, int]) -> str:
    """ "works", or "refused [3]" with the number of its reason."""
    word, _, reason = cell.partition(": ")
    if not reason:
        return word
    module = ""
    for pattern, short in _COMES_TO:
        if found := re.fullmatch(pattern, reason):
            module = "".join(f" ({group})" for group in found.groups())
            reason = short
            break
    return f"{word}{module} [{notes.setdefault(reason, len(notes) + 1)}]"
