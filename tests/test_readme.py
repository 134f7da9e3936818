"""README.md tells the truth: its snippets run, its commands parse, and its links lead somewhere."""

import re
import shlex
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_snippets_run_in_order(reader: dict[str, Any]) -> None:
    snippets = blocks("python")
    assert len(snippets) == 5
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), reader)
    assert [update for update, _ in reader["probe"].history] == [2, 4]


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
