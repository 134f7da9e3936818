"""README.md tells the truth: its snippets run, its commands parse, and its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_snippets_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what they take from the reader: a loader, a model with its optimizer, labelled images."""
    import timm

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 64, 64), torch.arange(16) % 4
    model = timm.create_model("resnet10t", num_classes=4)
    have = {
        "torch": torch,
        "loader": [(images[:8], labels[:8]), (images[8:], labels[8:])],
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "train_images": images,
        "train_labels": labels,
        "val_images": images[:8],
        "val_labels": labels[:8],
    }
    snippets = blocks("python")
    assert len(snippets) == 5
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), have)
    assert [update for update, _ in have["probe"].history] == [2, 4]


def test_the_recipe_commands_have_flags_that_exist() -> None:
    from leaven.backbones import resolve
    from leaven.recipes.common.flags import parse
    from leaven.recipes.spark import PRESETS, SparkSettings

    commands = re.findall(r"accelerate launch recipes/spark\.py(.*)", README)
    assert len(commands) == 4
    for command in commands:
        arguments = [word for word in shlex.split(command) if word != "--help"]
        if "--config" in arguments:
            at = arguments.index("--config")
            del arguments[at : at + 2]
        resolve(parse(SparkSettings, arguments, presets=PRESETS).backbone)


def test_relative_links_lead_to_files() -> None:
    for document in ROOT.glob("*.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert (ROOT / link).exists(), f"{document.name} links to {link}"
