"""Make the notebooks of this folder from its scripts, with what they print and draw.

    python examples/make_notebooks.py                       # all of them, about ten minutes on one core
    python examples/make_notebooks.py examples/04_tract.py

Needs `pip install -e ".[examples]"`. A notebook holds nothing that changes by itself from one run to the
next: no times, no random names, no path of this machine.
"""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def scripts() -> list[Path]:
    return sorted(FOLDER.glob("[0-9]*.py"))


def read_cells(text: str) -> list[tuple[str, str]]:
    """("markdown" or "code", source) of every cell of a script in percent format."""
    cells = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        header, _, body = part.partition("\n")
        if header.strip() == "[markdown]":
            cells.append(("markdown", re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE)))
        else:
            cells.append(("code", body.strip()))
    return cells


def make(script: Path) -> None:
    """Run a script as a notebook and write it beside the script.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
        RuntimeError: a cell writes to stderr; a reader need not see a warning that we could mend.
    """
    import nbformat
    from nbclient import NotebookClient

    new: Any = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    cells = [
        new[kind](source, id=f"cell-{number}")
        for number, (kind, source) in enumerate(read_cells(script.read_text()))
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=None,
            record_timing=False,
            coalesce_streams=True,  # or a cell's lines are cut up by chance
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    for cell in cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise RuntimeError(f"{script.name} writes to stderr: {output['text']}")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    path = script.with_suffix(".ipynb")
    nbformat.write(notebook, path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    os.environ.pop("MPLBACKEND", None)  # pictures belong into the notebook
    # gpytorch's own use of torch.jit.
    os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning:torch.jit._script"
    for script in map(Path, sys.argv[1:]) if sys.argv[1:] else scripts():
        make(script)


if __name__ == "__main__":
    main()
