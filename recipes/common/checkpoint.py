"""Checkpoints: one file each, written whole or not at all, verified before it is trusted.

Why not `Accelerator.save_state`: it matches custom objects by position, reads them and the random states with
``weights_only=False`` (a checkpoint could run code), spreads one state over many files that a crash can tear
apart, and knows nothing of the position in the data. Here one dict of tensors and plain types is written by
``torch.save`` and read with ``weights_only=True``.
"""

import os
import pickle
import random
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leaven.recipes.common.flags import UserError

_NAME = re.compile(r"update-(\d{9})\.pt")


class CheckpointError(UserError):
    """A checkpoint cannot be written or read; one line says which and what to do."""


def save(folder: Path, update: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write ``folder/update-000000123.pt``, then delete all but the newest ``keep``, and those of later updates.

    Later ones are damaged and were passed over, or count updates as before ``--resume-changed``: the next resumption
    would take them for the newest. The file appears under its name only when all of it is on the disk, so that neither
    a kill nor a full disk can damage an older checkpoint or leave a half-written one.

    Raises:
        CheckpointError: if it cannot be written; earlier checkpoints are untouched.
    """
    path = folder / f"update-{update:09d}.pt"
    temporary = folder / ".unfinished"  # one name, so that what a killed process left is overwritten
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        temporary.unlink(missing_ok=True)
        kept = listing(folder)
        before = f"the one of update {_update(kept[0])} is intact" if kept else "there is no earlier one"
        raise CheckpointError(
            f"cannot write the checkpoint of update {update} to {folder}: {cause.strerror}; {before}; "
            "make room and continue with --resume"
        ) from error
    found = listing(folder)
    later = [other for other in found if _update(other) > update]
    for old in later + found[len(later) + max(1, keep) :]:
        old.unlink(missing_ok=True)
    return path


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint, every byte of it checked against its checksum.

    Raises:
        CheckpointError: if it is missing, truncated or damaged.
    """
    try:
        # torch.load does not verify the CRCs that torch.save writes: a flipped bit would load in silence.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"checkpoint {path} is damaged (checksum of {damaged} does not match)")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        if isinstance(error, CheckpointError):
            raise
        what = error.strerror if isinstance(error, OSError) else "it is truncated or not a checkpoint"
        raise CheckpointError(f"cannot read checkpoint {path}: {what}") from error
    if not isinstance(state, dict) or not {"update", "identity", "model", "optimizer"} <= state.keys():
        raise CheckpointError(f"cannot read checkpoint {path}: it holds no training state of this loop")
    return state


def identity_of(path: Path) -> dict[str, Any]:
    """What a checkpoint says about its run, without reading its tensors; empty where it cannot be told."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError):
        return {}  # `load` will say what is wrong
    return dict(state.get("identity", {})) if isinstance(state, dict) else {}


def listing(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, newest first, without files that were never finished."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def load_newest(folder: Path, *, fall_back: bool) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest checkpoint, its content and lines to print; None if there is none.

    Args:
        folder: where the checkpoints lie.
        fall_back: go to the previous one when one is damaged (each is named in the lines) instead of raising.

    Raises:
        CheckpointError: if the newest (with ``fall_back``: every one) is damaged.
    """
    notes: list[str] = []
    paths = listing(folder)
    for path in paths:
        try:
            return path, load(path), notes
        except CheckpointError as error:
            if not fall_back:
                older = paths[paths.index(path) + 1 :]
                hint = f"; delete it to continue from {older[0].name}" if older else ""
                raise CheckpointError(f"{error}{hint}") from error
            notes.append(f"{error}: skipped")
    if paths:
        raise CheckpointError(
            f"all {len(paths)} checkpoints in {folder} are damaged: {'; '.join(notes)}; "
            "start anew with another --output-dir"
        )
    return None


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of this process's global generators (Python, NumPy, torch, device) in plain types."""
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
    state = {
        "python": random.getstate(),
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `random_state` returned."""
    random.setstate(state["python"])
    key = state["numpy"]["key"].numpy().astype(np.uint32)
    rest = (state["numpy"]["pos"], state["numpy"]["has_gauss"], state["numpy"]["gauss"])
    np.random.set_state(("MT19937", key, *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"])


def _update(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; Windows cannot open folders and needs no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an exception: torch's writer turns a full disk into a RuntimeError."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
