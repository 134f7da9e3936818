"""Every example runs as a script, in its short mode, from any folder; the notebooks are those of the scripts."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("[0-9]*.py"))
BY_DEFAULT = ("01_", "02_", "08_")  # the others take as long each, and are run with the slow tests
LARGEST = 400_000  # bytes of a notebook

one_by_one = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem.startswith(BY_DEFAULT) else pytest.mark.slow)
        for path in EXAMPLES
    ],
)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "SMOKE": "1", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout
    assert list(tmp_path.glob("*.png")), "an example leaves something to look at"


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(notebook.read_text())["cells"]
    return cells


@one_by_one
def test_notebook_is_that_of_its_script(example: Path) -> None:
    read_cells = runpy.run_path(str(FOLDER / "make_notebooks.py"))["read_cells"]
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in cells_of(example.with_suffix(".ipynb"))]
    assert found == read_cells(example.read_text()), f"run: python examples/make_notebooks.py {example.name}"


@one_by_one
def test_notebook_was_run_and_nothing_failed(example: Path) -> None:
    notebook = example.with_suffix(".ipynb")
    code = [cell for cell in cells_of(notebook) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", ()) for output in outputs), "no picture"
    figures = [
        output
        for output in outputs
        if "".join(output.get("data", {}).get("text/plain", "")).startswith("<Figure")
    ]
    assert all("image/png" in output["data"] for output in figures), "a figure without axes is not shown"
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert notebook.stat().st_size < LARGEST


def test_there_are_examples_and_no_notebook_without_a_script() -> None:
    assert EXAMPLES
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in EXAMPLES}


def test_cells_are_read_as_written(tmp_path: Path) -> None:
    read_cells = runpy.run_path(str(FOLDER / "make_notebooks.py"))["read_cells"]
    text = "# %% [markdown]\n# # Title\n#\n# Words.\n\n# %%\nx = 1  # %% no cell\n\n\n# %%\ny = 2\n"
    assert read_cells(text) == [
        ("markdown", "# Title\n\nWords."),
        ("code", "x = 1  # %% no cell"),
        ("code", "y = 2"),
    ]
