"""Checkpoints under the worst of circumstances: killed writers, full disks, flipped bits."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipe_programs import environment

from leaven.recipes.common import checkpoint
from leaven.recipes.common.checkpoint import CheckpointError, listing, load, load_newest, save


def state_of(update: int, **more: Any) -> dict[str, Any]:
    """The least that a checkpoint of the loop holds, and more."""
    return {"update": update, "identity": {}, "model": {}, "optimizer": {}, **more}


STATE = state_of(3, tensor=torch.arange(5000.0), nested={"tuple": (1, None, "x")})


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    state = load(save(tmp_path, 3, STATE, keep=2))
    assert torch.equal(state.pop("tensor"), torch.arange(5000.0))
    assert state == state_of(3, nested={"tuple": (1, None, "x")})


def test_keeps_the_newest(tmp_path: Path) -> None:
    for update in (1, 20, 300, 4000):
        save(tmp_path, update, STATE, keep=2)
    assert [path.name for path in listing(tmp_path)] == ["update-000004000.pt", "update-000000300.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update-000000300.pt", "update-000004000.pt"]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_saved_last_is_the_newest(tmp_path: Path, keep: int) -> None:
    """On four times as many processes the thousandth update is the 250th: what follows must not be taken for older."""
    save(tmp_path, 1000, STATE, keep=2)
    for update in (300, 400):
        path = save(tmp_path, update, state_of(update), keep)
        assert listing(tmp_path)[0] == path
    found = load_newest(tmp_path, fall_back=True)
    assert found is not None
    assert found[1]["update"] == 400
    assert len(listing(tmp_path)) == keep


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(tmp_path: Path) -> None:
    """One bit of every byte in turn. Some carry nothing: padding, dates. What loads must be what was saved."""
    state = state_of(3, nested={"tuple": (1, None, "x")}, tensor=torch.arange(8.0))
    path = save(tmp_path, 1, state, keep=1)
    content = path.read_bytes()
    noticed = 0
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ (0x01, 0x40, 0x80)[at % 3]]) + content[at + 1 :])
        try:
            read = load(path)
        except CheckpointError:
            noticed += 1
        else:
            assert torch.equal(read.pop("tensor"), state["tensor"]), at
            assert read == {name: value for name, value in state.items() if name != "tensor"}, at
    assert noticed > len(content) / 3


def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 1, STATE, keep=1)
    with zipfile.ZipFile(path) as archive:
        entry = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    content = bytearray(path.read_bytes())
    content[entry.header_offset + 4000] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # which is why `load` looks at the checksums itself
    with pytest.raises(CheckpointError, match=r"damaged"):
        load(path)


@pytest.mark.parametrize("size", [0, 10, 1000, -1])
def test_a_truncated_file_is_one_line(tmp_path: Path, size: int) -> None:
    path = save(tmp_path, 1, STATE, keep=1)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        CheckpointError, match=r"^cannot read checkpoint .*update-000000001.pt: it is truncated"
    ):
        load(path)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No such file"):
        load(tmp_path / "update-000000001.pt")


@pytest.mark.parametrize("content", [[1], {"update": 1}, {"weight": torch.ones(2)}])
def test_other_people_s_files_are_one_line(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "update-000000001.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"it holds no training state of this loop"):
        load(path)


class _Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "update-000000001.pt"
    torch.save({"update": _Malicious()}, path)
    with pytest.raises(CheckpointError, match=r"not a checkpoint"):
        load(path)


def test_auto_names_the_damaged_one_and_takes_the_previous(tmp_path: Path) -> None:
    for update in (1, 2):
        save(tmp_path, update, state_of(update), keep=2)
    newest = listing(tmp_path)[0]
    newest.write_bytes(newest.read_bytes()[:-40])
    found = load_newest(tmp_path, fall_back=True)
    assert found is not None
    path, state, notes = found
    assert (path.name, state) == ("update-000000001.pt", state_of(1))
    assert len(notes) == 1
    assert "update-000000002.pt" in notes[0]
    with pytest.raises(CheckpointError, match=r"delete it to continue from update-000000001.pt"):
        load_newest(tmp_path, fall_back=False)


def test_all_damaged_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "nowhere", fall_back=True) is None
    (tmp_path / "update-000000001.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints"):
        load_newest(tmp_path, fall_back=True)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte, for root; others get the next test alone."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if made.returncode != 0:
        pytest.skip(f"cannot mount here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint(tiny_disk: Path) -> None:
    save(tiny_disk, 1, state_of(1, tensor=torch.zeros(150_000)), keep=1)
    with pytest.raises(
        CheckpointError, match=r"No space left on device; the one of update 1 is intact"
    ) as error:
        save(tiny_disk, 2, state_of(2, tensor=torch.zeros(150_000)), keep=1)
    assert "\n" not in str(error.value)
    assert [path.name for path in tiny_disk.iterdir()] == ["update-000000001.pt"]
    assert load(listing(tiny_disk)[0])["update"] == 1


def test_a_full_disk_anywhere_in_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, state_of(1), keep=1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(CheckpointError, match=r"No space left"):
                save(tmp_path, 2, state_of(2), keep=1)
        assert [path.name for path in listing(tmp_path)] == ["update-000000001.pt"]


def test_an_error_that_is_not_the_disk_is_not_dressed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match=r"something else"):
        save(tmp_path, 1, STATE, keep=1)


KILLED = """
import io, os, signal, sys, torch
from pathlib import Path
from leaven.recipes.common import checkpoint
folder, where = Path(sys.argv[1]), sys.argv[2]
state = {"identity": {}, "model": {}, "optimizer": {}, "tensor": torch.zeros(10**6)}
checkpoint.save(folder, 1, {"update": 1, **state}, keep=1)
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if where == "half written":
    class Dying(io.FileIO):
        written = 0
        def write(self, data):
            Dying.written += len(data)
            if Dying.written > 2 * 10**6:
                die()
            return super().write(data)
    checkpoint.Path.open = lambda path, mode: Dying(path, mode)
elif where == "before the rename":
    checkpoint.Path.replace = die
elif where == "after the rename":
    checkpoint._sync_folder = die
checkpoint.save(folder, 2, {"update": 2, **state}, keep=1)
"""


@pytest.mark.parametrize("where", ["half written", "before the rename", "after the rename"])
def test_kill_9_while_writing_loses_nothing_older(tmp_path: Path, where: str) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), where]
    killed = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    found = load_newest(tmp_path, fall_back=False)
    assert found is not None
    assert found[1]["update"] == (2 if where == "after the rename" else 1)
    save(tmp_path, 3, state_of(3), keep=1)  # what the dead process left is in nobody's way
    assert [load(path)["update"] for path in listing(tmp_path)] == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["update-000000003.pt"]


def test_random_states_come_back() -> None:
    device = torch.device("cpu")

    def draws() -> tuple[object, ...]:
        return random.random(), np.random.normal(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    np.random.normal()  # noqa: NPY002  (leaves half a pair of normals in the state)
    state = checkpoint.random_state(device)
    first = draws()
    assert draws() != first
    checkpoint.set_random_state(state, device)
    assert draws() == first


def test_random_states_survive_a_file(tmp_path: Path) -> None:
    device = torch.device("cpu")
    path = save(tmp_path, 1, state_of(1, random=[checkpoint.random_state(device)]), keep=1)
    expected = random.random(), torch.rand(1).item()
    checkpoint.set_random_state(load(path)["random"][0], device)
    assert (random.random(), torch.rand(1).item()) == expected
