"""The pages tell the truth: snippets run, commands parse, tables agree with signatures and results, the site builds."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {page.relative_to(DOCS).as_posix(): page.read_text("utf-8") for page in sorted(DOCS.rglob("*.md"))}
ROOMS = ("backbones", "pretext", "callbacks", "curricula", "bayes")
COMMAND = re.compile(r"(?:accelerate launch|torchrun|python)(?: [^\n`|]*?)? recipes/(\w+)\.py([^\n`|]*)")


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def with_any(pattern: str) -> list[str]:
    return [name for name, text in PAGES.items() if re.search(pattern, text, flags=re.MULTILINE)]


# --- snippets


@pytest.mark.parametrize("name", with_any("^```python$"))
def test_the_snippets_of_a_page_run_in_order(name: str, reader: dict[str, Any]) -> None:
    for language, snippet in blocks(PAGES[name]):
        if language == "python":
            exec(compile(snippet, name, "exec"), reader)


def test_pages_have_snippets_in_the_language_that_is_run() -> None:
    """A block in another language is shown and never run: Python must not hide there."""
    assert len(with_any("^```python$")) > 12
    for name, text in PAGES.items():
        for language, block in blocks(text):
            assert language in ("", "python", "diff", "bibtex"), name
            assert language or not re.search(r"^\s*(import|from) ", block, flags=re.MULTILINE), name


# --- commands


def settings_class(module: Any) -> type:
    """The one that a recipe's flags come from."""
    (found,) = (
        each
        for each in vars(module).values()
        if isinstance(each, type)
        and each.__module__ == module.__name__
        and each.__name__.endswith("Settings")
    )
    return found


@pytest.mark.parametrize("name", with_any(COMMAND.pattern))
def test_recipe_commands_are_accepted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the recipe's own parser, and by what turns flags into final numbers."""
    from leaven.backbones import resolve
    from leaven.recipes.common.flags import parse
    from leaven.recipes.common.start import LoopSettings
    from leaven.recipes.common.start import resolve as final

    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("decoder_width: 128\n")
    for recipe, flags in COMMAND.findall(PAGES[name]):
        module = importlib.import_module(f"leaven.recipes.{recipe}")
        presets = getattr(module, "PRESETS", None)
        settings: Any = parse(settings_class(module), shlex.split(flags), presets=presets)
        if isinstance(settings, LoopSettings):
            final(settings, 1, {})
        if settings.backbone not in ("none", "anchors"):
            resolve(settings.backbone)


def test_benchmark_commands_name_scripts_that_exist() -> None:
    scripts = [each for text in PAGES.values() for each in re.findall(r"python (benchmarks/\S+?\.py)", text)]
    assert len(scripts) > 10
    for script in scripts:
        assert (ROOT / script).is_file(), script


# --- tables


def tables(marker: str) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Page, the marker's words, and the cells of the table behind it, without its head."""
    pattern = rf"^<!-- {marker}: (.+?) -->\n\n((?:\|.*\n)+)"
    for name, text in PAGES.items():
        for words, table in re.findall(pattern, text, flags=re.MULTILINE):
            rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
            yield name, words.split(), rows[2:]


def defaults(path: str) -> dict[str, str]:
    """Default by name as a table writes it: of a signature in Python, of settings as flags take it."""
    from leaven.recipes.common.flags import show

    found = {}
    for part in path.split("+"):
        module, _, name = part.rpartition(".")
        thing = getattr(importlib.import_module(module), name)
        if dataclasses.is_dataclass(thing) and module.startswith("leaven.recipes"):
            hints, own = get_type_hints(thing), vars(thing)["__annotations__"]
            fields = [each for each in dataclasses.fields(thing) if each.name in own]
            found |= {each.name: show(each.default, hints[each.name]) for each in fields}
            continue
        for each in inspect.signature(thing).parameters.values():
            if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
                found[each.name] = "required" if each.default is each.empty else repr(each.default)
    return found


@pytest.mark.parametrize(("name", "paths", "rows"), list(tables("settings")))
def test_settings_are_those_of_the_signatures(name: str, paths: list[str], rows: list[list[str]]) -> None:
    """All of them, by name and default; the schedule ET is written by its name."""
    import leaven.curricula

    sources = [defaults(path) for path in paths]
    for row in rows:
        assert len(row) == len(paths) + 2, f"{name}: {row}"
        setting = row[0].strip("`")
        assert any(setting in source for source in sources), f"{name}: {paths} have no {setting}"
        for path, source, cell in zip(paths, sources, row[1:-1], strict=True):
            told, right = cell.strip("`"), source.pop(setting, "")
            if told == "ET":
                told = repr(leaven.curricula.ET)
            if right.startswith(("'", '"')):
                told = repr(ast.literal_eval(told))
            assert told == right, f"{name}: {setting} of {path} is {right}, not {told}"
        assert row[-1], f"{name}: {setting} has no meaning"
    assert not any(sources), f"{name} leaves out {sources}"


def test_callbacks_act_in_the_order_and_slot_that_the_page_tells() -> None:
    import leaven.callbacks
    import leaven.curricula

    rows = re.findall(
        r"^\| \[?`(\w+)`\S* \| .+ \| (\d+) \| ([\w-]*) ?\| ", PAGES["callbacks.md"], re.MULTILINE
    )
    assert len(rows) == 5
    for name, order, slot in rows:
        callback = getattr(leaven.callbacks, name, None) or getattr(leaven.curricula, name)
        assert (callback.order, callback.slot or "") == (int(order), slot), name


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


@pytest.mark.parametrize(("name", "files", "rows"), list(tables("numbers")))
def test_numbers_are_those_of_the_results(name: str, files: list[str], rows: list[list[str]]) -> None:
    """Every number of such a table is, rounded, one of the files', as it is or in per cent."""
    known = [
        number
        for file in files
        for number in numbers_in(json.loads((ROOT / "benchmarks/results" / file).read_text("utf-8")))
    ]
    checked = 0
    for row in rows:
        for cell in row[1:]:
            if re.fullmatch(r"[\d. ()to]+", cell):
                for told in re.findall(r"\d+(?:\.\d+)?", cell):
                    digits = len(told.partition(".")[2])
                    near = {round(number * scale, digits) for number in known for scale in (1, 100)}
                    assert float(told) in near, f"{name}: {told} is not in {files}"
                    checked += 1
    assert checked


# --- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strict, without the network."""
    for module in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(module) is None:
            pytest.skip('needs the extra docs: pip install "leaven[docs]"')
    out = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9"}
    environment |= {"https_proxy": "http://127.0.0.1:9"}
    # Not --quiet, under which MkDocs counts no warnings.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_site_builds_strict_and_fetches_nothing(site: Path) -> None:
    html = (site / "index.html").read_text("utf-8")
    fetched = re.findall(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["']?(https?://[^"' >]+)""", html)
    assert not fetched
    assert (site / "results" / "tract_cost-2core.json").is_file()


def test_every_public_name_is_in_the_api(site: Path) -> None:
    """A name that is also that of its module is found below the module."""
    pages = "".join(page.read_text("utf-8") for page in (site / "api").glob("*/index.html"))
    anchors = set(re.findall(r'id="(leaven[\w.]+)"', pages))
    for room in ROOMS:
        for init in (ROOT / room).rglob("__init__.py"):
            package = ".".join(("leaven", *init.parent.relative_to(ROOT).parts))
            for name in importlib.import_module(package).__all__:
                places = {f"{package}.{name}", f"leaven.{room}.{name}", f"{package}.{name}.{name}"}
                assert places & anchors, f"docs/api/{room}.md: {package}.{name}"
