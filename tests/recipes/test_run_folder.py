"""Which folder a run writes to, and what it refuses to touch."""

import errno
import os
import time
from pathlib import Path

import pytest

from leaven.recipes.common import checkpoint
from leaven.recipes.common.flags import UserError
from leaven.recipes.common.run_folder import RunFolder, open_run, remove_if_unused


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def open_tiny(output_dir: str | None = None, resume: str | None = None) -> RunFolder:
    return open_run("tiny", "tv:resnet18", output_dir=output_dir, resume=resume)


def finished(path: str) -> None:
    checkpoint.save(Path(path) / "checkpoints", 1, {"update": 1}, keep=1)


def test_the_default_name_is_new_every_time() -> None:
    first, second = open_tiny(), open_tiny()
    assert first.path.parent == second.path.parent == Path("runs")
    assert first.path.name.startswith("tiny-tv_resnet18-")
    assert first.path != second.path
    assert first.path.is_dir()


def test_a_folder_with_something_in_it_is_refused() -> None:
    Path("out").mkdir()
    open_tiny("out")
    Path("out/notes.txt").touch()
    with pytest.raises(UserError, match=r"not empty.*--resume auto"):
        open_tiny("out")
    assert open_tiny("out", resume="auto").path == Path("out")


def test_a_run_that_was_refused_leaves_nothing() -> None:
    run = open_tiny("new/out")
    run.write(run.config, "seed: 0")
    run.forget_after(0)
    (run.path / "trackers/tiny").mkdir(parents=True)
    (run.path / "trackers/tiny/events").touch()
    remove_if_unused(run.path, [run.path, run.path.parent])
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "name", ["journal.jsonl", "checkpoints/update-1.pt", "plots/a.png", "mine.txt", "metrics.jsonl"]
)
def test_a_run_that_found_anything_is_kept(name: str) -> None:
    run = open_tiny("out")
    run.write(run.config, "seed: 0")
    run.write(run.path / name, "1")
    remove_if_unused(run.path, [run.path])
    assert run.config.is_file()
    assert (run.path / name).is_file()


def test_auto_without_a_folder_finds_the_newest_run_of_this_recipe_and_backbone() -> None:
    assert open_tiny(resume="auto").path.parent == Path("runs")  # nothing there yet: a new one
    for name in (
        "tiny-tv_resnet18-20240101-000000",
        "tiny-tv_resnet18-20230101-000000",
        "tiny-other-20250101-000000",
    ):
        finished(f"runs/{name}")
        time.sleep(0.02)  # the times of files tell which is newest, not their names
    assert open_tiny(resume="auto").path.name == "tiny-tv_resnet18-20230101-000000"


def test_studies_go_on_from_their_journal_without_a_folder_too() -> None:
    for name in ("tiny-tv_resnet18-20240101-000000", "tiny-tv_resnet18-20230101-000000"):
        Path(f"runs/{name}").mkdir(parents=True)
        Path(f"runs/{name}/journal.jsonl").touch()
        time.sleep(0.02)
    assert open_tiny(resume="auto").path.name == "tiny-tv_resnet18-20230101-000000"
    old = "runs/tiny-tv_resnet18-20240101-000000"
    assert open_tiny(resume=old).path == Path(old)


def test_a_named_folder_must_hold_a_checkpoint_and_be_the_output_folder() -> None:
    with pytest.raises(UserError, match=r"--resume gone: no checkpoint in gone/checkpoints"):
        open_tiny(resume="gone")
    finished("old")
    assert open_tiny(resume="old").path == Path("old")
    assert open_tiny("./old", resume="old").path == Path("old")
    with pytest.raises(UserError, match=r"drop --output-dir new"):
        open_tiny("new", resume="old")


def test_a_folder_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").touch()
    with pytest.raises(UserError, match=r"--output-dir file is not a folder"):
        open_tiny("file")
    with pytest.raises(UserError, match=r"^cannot write to the run folder file/inner: Not a directory"):
        open_tiny("file/inner")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"^cannot write to the run folder new: No space left on device"):
        open_tiny("new")
    assert list(Path("new").iterdir()) == []


def test_the_log_forgets_updates_that_will_be_done_again() -> None:
    run = RunFolder(Path())
    for step in (1, 2, 3):
        run.log({"step": step, "loss": step / 7})
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert [row["step"] for row in run.rows()] == [1, 2, 3]
    run.forget_after(2)
    assert run.rows() == [{"step": 1, "loss": 1 / 7}, {"step": 2, "loss": 2 / 7}]
    run.log({"step": 3, "loss": 0.0})
    assert [row["step"] for row in run.rows()] == [1, 2, 3]


def test_a_full_disk_while_logging_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"^cannot write metrics.jsonl: No space left on device$"):
        RunFolder(Path()).log({"step": 1})


def test_small_files_are_written_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(Path())
    run.write(run.config, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write config.yaml"):
        run.write(run.config, "new")
    assert run.config.read_text() == "old"
