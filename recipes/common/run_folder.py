"""The run folder: where a run writes, how it is found again, and what must not be overwritten.

runs/spark-convnext_t-20260101-120000/
    config.yaml          recipe, command and settings; `--config` reads it back
    metrics.jsonl        one line per optimizer update
    checkpoints/         update-000000123.pt
    backbone.safetensors the result
    README.md            the model card
    plots/
"""

import atexit
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from leaven.recipes.common.checkpoint import listing
from leaven.recipes.common.flags import UserError


class RunFolder:
    """Paths of one run, and its log."""

    def __init__(self, path: Path, recipe: str = "") -> None:
        self.path = path
        self.recipe = recipe
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.backbone = path / "backbone.safetensors"
        self.card = path / "README.md"
        self.plots = path / "plots"

    @property
    def made_by(self) -> tuple[str, str] | None:
        """The recipe and the command line that began the run, where config.yaml tells."""
        lines = self.config.read_text(encoding="utf-8").splitlines() if self.config.is_file() else []
        if len(lines) < 2 or not (lines[0].startswith("# ") and lines[1].startswith("# ")):
            return None
        return lines[0][2:], lines[1][2:]

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; on the disk's side of our buffers when this returns."""
        with writing(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The log so far; a last line that a kill cut short is left out."""
        rows = []
        if self.metrics.exists():
            for line in self.metrics.read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return rows

    def forget_after(self, step: int) -> None:
        """Drop log lines of updates that a resumed run will do again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        self.write(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, path: Path, text: str) -> None:
        """Write a small text file, whole or not at all.

        Raises:
            UserError: if it cannot be written.
        """
        temporary = path.with_name(f".{path.name}.tmp")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError (full disk, no permission) into one line that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def open_run(recipe: str, backbone: str, *, output_dir: str | None, resume: str | None) -> RunFolder:
    """Choose and create the run folder, before anything expensive happens.

    Args:
        recipe, backbone: for the default name.
        output_dir: ``--output-dir``.
        resume: ``--resume``: None, "auto" or a run folder.

    Raises:
        UserError: the folder cannot be written, is not empty though nothing is resumed, or has nothing to resume.
    """
    if resume not in (None, "auto"):
        path = Path(str(resume))
        if output_dir is not None and Path(output_dir).resolve() != path.resolve():
            raise UserError(f"--resume {resume} goes on in that folder; drop --output-dir {output_dir}")
        if _left_off(path) is None:
            raise UserError(f"--resume {resume}: no checkpoint in {path / 'checkpoints'}")
        return _writable(RunFolder(path, recipe))
    if output_dir is not None:
        path = Path(output_dir)
        if path.exists() and not path.is_dir():
            raise UserError(f"--output-dir {output_dir} is not a folder")
        if resume is None and path.is_dir() and any(path.iterdir()):
            raise UserError(
                f"--output-dir {output_dir} is not empty; choose another, "
                "or continue the run in it with --resume auto"
            )
        return _writable(RunFolder(path, recipe))
    stem = f"{recipe}-{re.sub(r'[^A-Za-z0-9_.]+', '_', backbone)}"
    if resume == "auto":
        runs = [(_left_off(path), path) for path in Path("runs").glob(f"{stem}-[0-9]*")]
        earlier = [(when, path) for when, path in runs if when is not None]
        if earlier:
            return _writable(RunFolder(max(earlier)[1], recipe))
    path = Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    while path.exists():
        path = path.with_name(f"{path.name}b")
    return _writable(RunFolder(path, recipe))


def _left_off(path: Path) -> float | None:
    """When a run wrote what it can go on from, its newest checkpoint or its journal of trials; None: it has neither."""
    found = [*listing(path / "checkpoints")[:1], *path.glob("journal*.jsonl")]
    return max((each.stat().st_mtime for each in found), default=None)


# What there is of a run before its first step: how it was set up, and nothing that it found.
_BEFORE = ("config.yaml", "data.txt", "trackers", "plots", "checkpoints")


def remove_if_unused(path: Path, made: Sequence[Path]) -> None:
    """Empty a run folder that holds nothing but settings, and remove the folders that were made for it.

    Args:
        path: the run folder, empty when the run began.
        made: it and the folders above it, as far as the run has made them, the innermost first.
    """
    found = list(path.iterdir()) if path.is_dir() else []
    metrics = path / "metrics.jsonl"
    if any(each.name not in (*_BEFORE, metrics.name) for each in found):
        return
    files = [each for name in ("plots", "checkpoints") for each in (path / name).glob("*")]
    if files or (metrics.is_file() and metrics.stat().st_size):
        return
    with suppress(OSError):
        for each in found:
            shutil.rmtree(each) if each.is_dir() else each.unlink()
        for each in made:
            each.rmdir()


def _writable(run: RunFolder) -> RunFolder:
    """Create the folder and try it: permission bits do not tell (read-only mounts, root)."""
    probe = run.path / f".writable-{os.getpid()}"
    made = [path for path in (run.path, *run.path.parents) if not path.exists()]
    if made or not any(run.path.iterdir()):
        # A run that is refused before its first step, for its backbone say, should leave nothing behind.
        atexit.register(remove_if_unused, run.path.absolute(), [path.absolute() for path in made])
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"\0" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to the run folder {run.path}: {error.strerror}; choose another with --output-dir"
        ) from error
    return run
