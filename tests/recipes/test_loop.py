"""The loop: exact resume, whatever ends it; what it logs; and what it refuses."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from recipe_programs import (
    LAUNCH,
    TINY,
    TWO,
    kill_all,
    log_of,
    run,
    same_tensors,
    start,
    wait_for_line,
    wait_until_gone,
)

from leaven.recipes.common.checkpoint import CheckpointError, listing, load
from leaven.recipes.common.flags import UserError
from leaven.recipes.common.loop import NonFiniteLoss
from leaven.recipes.common.progress import Progress

Recipe = Callable[[Path], ModuleType]
SHORT = ["--epochs", "3", "--batch-size", "32", "--limit-batches", "5"]
WORKERS = [*SHORT, "--workers", "2"]


def final(folder: Path) -> dict[str, Any]:
    """Weights, EMA and progress at the end of a run."""
    state: dict[str, Any] = torch.load(folder / "final.pt", weights_only=True)
    return state


def equal_runs(a: Path, b: Path) -> bool:
    return log_of(a) == log_of(b) and same_tensors(final(a), final(b))


@pytest.fixture
def tiny(recipe: Recipe) -> Callable[..., Path]:
    """Runs the stand-in recipe in this process: name of the run folder, flags -> folder."""
    from accelerate.state import AcceleratorState, GradientState

    module = recipe(TINY)

    def main(name: str, *flags: str) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        module.main([*SHORT, "--workers", "0", "--output-dir", name, *flags])
        return Path(name)

    return main


@pytest.fixture
def whole(tiny: Callable[..., Path]) -> Path:
    """A run that nothing interrupted."""
    return tiny("whole")


# --- what a run is -----------------------------------------------------------------------------------------------


def test_a_run_logs_every_update_and_keeps_its_settings(tiny: Callable[..., Path], whole: Path) -> None:
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert rows[4]["epoch"] == 1.0
    measured = ("grad_norm", "step_s", "data_s", "images_per_s", "peak_memory_mib")
    for name in ("loss", "hidden", "lr", "weight_decay", *measured):
        assert all(isinstance(row[name], float) for row in rows), name
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(row["images_per_s"] == pytest.approx(32 / row["step_s"]) for row in rows)
    again = tiny("again", "--config", "whole/config.yaml")
    assert equal_runs(whole, again)


def test_another_seed_is_another_run(tiny: Callable[..., Path], whole: Path) -> None:
    assert not equal_runs(whole, tiny("other", "--seed", "1"))


def test_workers_change_nothing(tiny: Callable[..., Path], whole: Path) -> None:
    assert equal_runs(whole, tiny("workers", "--workers", "2"))


def test_masks_are_keyed_by_update_micro_step_and_process() -> None:
    from leaven.recipes.common.loop import keyed_generator

    keys = [(s, u, m, p) for s in (0, 1) for u in (0, 1) for m in (0, 1) for p in ("process 0", "process 1")]
    draws = [torch.rand(4, generator=keyed_generator(*key)).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)
    assert draws == [torch.rand(4, generator=keyed_generator(*key)).tolist() for key in keys]


def test_the_loop_asks_for_masks_by_those_keys(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from leaven.recipes.common import loop

    asked: list[tuple[Any, ...]] = []
    original = loop.keyed_generator
    monkeypatch.setattr(loop, "keyed_generator", lambda *key: (asked.append(key), original(*key))[1])
    monkeypatch.setattr(loop.Accelerator, "process_index", property(lambda self: 7), raising=False)
    tiny("keys", "--seed", "3", "--epochs", "1", "--limit-batches", "4", "--grad-accum-steps", "2")
    assert asked == [(3, update, micro, "process 7") for update in (0, 1) for micro in (0, 1)]


def test_accumulation_is_the_mean_over_its_batches(tiny: Callable[..., Path]) -> None:
    """At learning rate zero the gradient norm of an update of two batches follows from theirs, batch by batch."""
    flags = ("--opt", "sgd", "--lr", "0", "--weight-decay", "0", "--epochs", "1", "--limit-batches", "4")
    two = log_of(tiny("two", *flags, "--grad-accum-steps", "2"))
    one = log_of(tiny("one", *flags))
    assert len(two) == 2
    # Masks and dropout differ between the runs (they are keyed by update): the losses agree in the mean only.
    for update, row in enumerate(two):
        single = [one[2 * update]["loss"], one[2 * update + 1]["loss"]]
        assert row["loss"] == pytest.approx(sum(single) / 2, rel=0.1)
        norms = [one[2 * update]["grad_norm"], one[2 * update + 1]["grad_norm"]]
        assert 0.7 * min(norms) < row["grad_norm"] < 1.1 * max(norms)  # a sum would be about twice as large


def test_gradients_are_clipped_to_the_limit(tiny: Callable[..., Path]) -> None:
    """SGD with momentum 0.9: the first step is lr x the clipped gradient."""
    flags = ("--opt", "momentum", "--weight-decay", "0", "--epochs", "1", "--limit-batches", "1")
    lr = 1e-3
    free = final(tiny("free", *flags, "--lr", str(lr)))["model"]
    clipped = final(tiny("clipped", *flags, "--lr", str(lr), "--clip-grad", "0.01"))["model"]
    start = final(tiny("start", *flags, "--lr", "0"))["model"]
    weights = [name for name in start if name.endswith(("weight", "bias"))]

    def moved(end: dict[str, torch.Tensor]) -> float:
        return float(torch.cat([(end[name] - start[name]).flatten() for name in weights]).norm())

    assert moved(clipped) == pytest.approx(lr * 0.01, rel=1e-2)
    assert moved(free) == pytest.approx(lr * log_of(Path("free"))[0]["grad_norm"], rel=1e-2)


def test_trackers_get_every_row(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import tracking
    from accelerate.tracking import GeneralTracker

    from leaven.recipes.common import start as start_module

    seen: list[tuple[Any, dict[str, Any]]] = []

    class Recorder(GeneralTracker):  # type: ignore[misc]
        name, requires_logging_directory, main_process_only = "tensorboard", False, True

        tracker = None

        def __init__(self, run_name: str) -> None:
            super().__init__()

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            seen.append((None, values))

        def log(self, values: dict[str, Any], step: int | None, **_: Any) -> None:
            seen.append((step, values))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    for module in (tracking, start_module):
        monkeypatch.setattr(module, "get_available_trackers", lambda: [tracking.LoggerType.TENSORBOARD])
    tiny("tracked", "--log-with", "tensorboard")
    assert seen[0][1]["epochs"] == "3"
    assert [step for step, _ in seen[1:]] == list(range(1, 16))
    assert seen[1][1]["loss"] == log_of(Path("tracked"))[0]["loss"]


def test_bf16_and_channels_last_train(tiny: Callable[..., Path]) -> None:
    rows = log_of(tiny("bf16", "--mixed-precision", "bf16", "--channels-last"))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert final(Path("bf16"))["model"]["backbone.0.weight"].dtype == torch.float32


def test_a_trained_objective_is_judged_in_the_precision_that_it_was_judged_in_before(
    tiny: Callable[..., Path], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, made = recipe(TINY), []
    plain = module.Tiny.__init__

    def init(self: Any) -> None:
        plain(self)
        made.append(self)

    monkeypatch.setattr(module.Tiny, "__init__", init)
    tiny("bf16", "--mixed-precision", "bf16")
    seen: list[torch.dtype] = []
    made[0].backbone[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    made[0](torch.ones(2, 3, 16, 16), mask=torch.ones(2, 1, 16, 16, dtype=torch.bool))
    assert seen == [torch.float32]


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly(tiny: Callable[..., Path]) -> None:
    flags = ("--compile", "--epochs", "2", "--limit-batches", "3")
    tiny("compiled", *flags)
    with pytest.raises(SystemExit):
        tiny("broken", *flags, "--kill-at", "2")
    assert equal_runs(Path("compiled"), tiny("broken", *flags, "--resume", "auto"))
    assert list(final(Path("compiled"))["model"]) == list(final(tiny("eager", "--epochs", "1"))["model"])


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    row = {"step": 8, "epoch": 0.5, "loss": 0.25, "lr": 1e-3, "images_per_s": 100.0}
    with Progress(total=16, done=7, show=True) as progress:
        progress(row)
    said, bar = capsys.readouterr()
    assert ("8/16" in bar and "loss=0.2500" in bar) == terminal
    assert (said == "update 8/16  epoch 0.50  loss 0.2500  lr 1.00e-03  100 images/s\n") != terminal
    with Progress(total=16, done=7, show=False) as progress:
        progress(row)
    assert capsys.readouterr() == ("", "")


# --- signals and resume ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", [1, 5, 8, 15])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_at_any_update_then_resume_is_the_uninterrupted_run(
    tiny: Callable[..., Path], whole: Path, name: str, update: int
) -> None:
    with pytest.raises(SystemExit) as stopped:
        tiny("broken", "--kill-at", str(update), "--kill-signal", name)
    assert stopped.value.code == 128 + getattr(signal, name)
    assert listing(Path("broken/checkpoints"))[0].name == f"update-{update:09d}.pt"
    assert len(log_of(Path("broken"))) == update
    assert equal_runs(whole, tiny("broken", "--resume", "auto"))


def test_a_signal_while_the_last_checkpoint_is_written_is_heard(
    tiny: Callable[..., Path], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leaven.recipes.common import checkpoint

    plain = checkpoint.save

    def save(folder: Path, update: int, *rest: Any) -> Path:
        if update == 15:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(folder, update, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(SystemExit) as stopped:
            tiny("broken")
    assert stopped.value.code == 143
    assert not Path("broken/final.pt").exists()
    assert equal_runs(whole, tiny("broken", "--resume", "auto"))


def test_the_checkpoint_knows_the_position_in_the_data(tiny: Callable[..., Path], whole: Path) -> None:
    with pytest.raises(SystemExit):
        tiny("broken", "--kill-at", "8")
    for folder, epoch, position in ((whole, 3, 0), (Path("broken"), 1, 3)):
        sampler = load(listing(folder / "checkpoints")[0])["sampler"]
        assert (sampler["epoch"], sampler["position"]) == (epoch, position)


def test_many_interruptions_are_as_good_as_none(tiny: Callable[..., Path], whole: Path) -> None:
    for update in (3, 4, 10):
        with pytest.raises(SystemExit):
            tiny("broken", "--resume", "auto", "--kill-at", str(update))
    assert equal_runs(whole, tiny("broken", "--resume", "auto"))


def test_resume_by_folder_needs_no_other_flag(
    recipe: Recipe, tiny: Callable[..., Path], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tiny("broken", "--kill-at", "7")
    assert capsys.readouterr().out.strip().endswith("is saved; go on with --resume broken")
    recipe(TINY).main(["--resume", "broken"])
    assert equal_runs(whole, Path("broken"))


def test_a_finished_run_is_left_as_it_is(tiny: Callable[..., Path], whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_text(), final(whole)
    tiny("whole", "--resume", "auto")
    assert (whole / "metrics.jsonl").read_text() == before[0]
    assert same_tensors(before[1], final(whole))


def test_log_lines_after_the_checkpoint_are_written_once(tiny: Callable[..., Path], whole: Path) -> None:
    """As after kill -9: the log is ahead of the newest checkpoint."""
    with pytest.raises(SystemExit):
        tiny("broken", "--kill-at", "13")
    newest, older = listing(Path("broken/checkpoints"))
    assert older.name == "update-000000010.pt"
    newest.unlink()
    assert equal_runs(whole, tiny("broken", "--resume", "auto"))


def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(
    tiny: Callable[..., Path], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tiny("broken", "--kill-at", "13")
    newest = listing(Path("broken/checkpoints"))[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(
        CheckpointError, match=r"update-000000013.pt.*delete it to continue from update-000000010.pt"
    ):
        tiny("broken", "--resume", "broken")
    capsys.readouterr()
    tiny("broken", "--resume", "auto")
    said = capsys.readouterr().out
    assert "warning: cannot read checkpoint broken/checkpoints/update-000000013.pt" in said
    assert "resumed from broken/checkpoints/update-000000010.pt" in said
    assert equal_runs(whole, Path("broken"))


def test_a_run_that_died_before_its_first_checkpoint_starts_again(
    tiny: Callable[..., Path], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ZeroDivisionError):
        tiny("broken", "--crash-at", "3")
    tiny("broken", "--resume", "auto")
    assert "no checkpoint in broken yet, starting from the beginning" in capsys.readouterr().out
    assert equal_runs(whole, Path("broken"))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--batch-size", "16"], "batch_size 32 -> 16"),
        (["--seed", "5"], "seed 0 -> 5"),
        (["--lr", "0.5"], "lr 0.001 -> 0.5"),
        (["--epochs", "4"], "epochs 3 -> 4"),
    ],
)
def test_resume_with_other_settings_is_refused_by_name(
    tiny: Callable[..., Path], flags: list[str], named: str
) -> None:
    with pytest.raises(SystemExit):
        tiny("broken", "--kill-at", "7")
    before = Path("broken/config.yaml").read_text(), Path("broken/metrics.jsonl").read_text()
    with pytest.raises(UserError, match=f"^cannot resume .* exactly: {named}; .*--resume-changed"):
        tiny("broken", "--resume", "auto", *flags)
    assert (Path("broken/config.yaml").read_text(), Path("broken/metrics.jsonl").read_text()) == before


def test_resume_with_another_data_length_or_world_size_is_refused(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        tiny("broken", "--kill-at", "7")
    path = listing(Path("broken/checkpoints"))[0]
    for name, value in (("images", 5000), ("processes", 2)):
        state = torch.load(path, weights_only=True)
        now = state["identity"][name]
        state["identity"][name] = value
        torch.save(state, path)
        with pytest.raises(UserError, match=f"{name} {value} -> {now}"):
            tiny("broken", "--resume", "auto")
        state["identity"][name] = now
        torch.save(state, path)


def test_what_does_not_change_the_numbers_may_change(tiny: Callable[..., Path], whole: Path) -> None:
    with pytest.raises(SystemExit):
        tiny("broken", "--kill-at", "7")
    assert equal_runs(
        whole, tiny("broken", "--resume", "auto", "--workers", "1", "--keep", "1", "--save-every", "2")
    )


def test_resume_changed_goes_on_where_the_epochs_stand(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tiny("broken", "--kill-at", "8")  # 1.6 epochs
    with pytest.warns(UserWarning, match=r"total_steps"):
        tiny("broken", "--resume", "auto", "--resume-changed", "--batch-size", "16", "--limit-batches", "10")
    said = capsys.readouterr().out
    assert "not bit-equal: batch_size 32 -> 16, limit_batches 5 -> 10" in said
    assert "16 of 30 updates done" in said
    assert log_of(Path("broken"))[-1]["step"] == 30
    assert final(Path("broken"))["callbacks"]["progress"]["step"] == 30


def test_resume_changed_takes_the_new_betas(tiny: Callable[..., Path]) -> None:
    with pytest.raises(SystemExit):
        tiny("broken", "--kill-at", "8")
    tiny("broken", "--resume", "auto", "--resume-changed", "--betas", "0.5,0.75")
    groups = load(listing(Path("broken/checkpoints"))[0])["optimizer"]["param_groups"]
    assert [group["betas"] for group in groups] == [(0.5, 0.75)] * 2


def test_another_optimizer_or_model_cannot_be_resumed(
    tiny: Callable[..., Path], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        tiny("broken", "--kill-at", "7")
    with pytest.raises(UserError, match=r"another optimizer: opt adamw -> lamb"):
        tiny("broken", "--resume", "auto", "--resume-changed", "--opt", "lamb")
    path = listing(Path("broken/checkpoints"))[0]
    state = torch.load(path, weights_only=True)
    del state["model"]["backbone.0.weight"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"does not fit this model") as error:
        tiny("broken", "--resume", "auto")
    assert "\n" not in str(error.value)


# --- what must not happen ----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_weights_take_it(
    tiny: Callable[..., Path], whole: Path
) -> None:
    with pytest.raises(NonFiniteLoss, match=r"^loss is nan at update 8 of 15; .*checkpoints are untouched"):
        tiny("broken", "--nan-at", "8")
    assert [path.name for path in listing(Path("broken/checkpoints"))] == ["update-000000005.pt"]
    assert log_of(Path("broken")) == log_of(whole)[:7]


def test_infinite_gradients_stop_it_too(tiny: Callable[..., Path]) -> None:
    with pytest.raises(NonFiniteLoss, match=r"gradient norm is (nan|inf) at update 1 of"):
        tiny("broken", "--mixed-precision", "no", "--inf-gradient-at", "1")


@pytest.mark.parametrize("kind", ["crash", "nan"])
def test_workers_that_ignore_signals_do_not_outlive_an_error(tmp_path: Path, kind: str) -> None:
    done = run([sys.executable, TINY, *WORKERS, "--output-dir", "out", f"--{kind}-at", "3"], tmp_path)
    if kind == "crash":
        assert "ZeroDivisionError" in done.stderr
    else:
        assert done.returncode == 2
        lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: This DataLoader")]
        assert len(lines) == 1  # torch warns of two workers on one core
        assert lines[0].startswith("error: loss is nan at update 3 of 15")
    wait_until_gone(tmp_path, 20)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a program in a process group of its own and leaves nothing of it behind."""
    processes = []

    def begin(*command: Any) -> Any:
        processes.append(start(command, tmp_path))
        return processes[-1]

    yield begin
    for process in processes:
        kill_all(process)


@pytest.mark.parametrize(
    ("who", "launch"),
    [
        pytest.param("process", [sys.executable], marks=pytest.mark.slow),
        ("group", [sys.executable]),
        ("launcher", LAUNCH),
        pytest.param("group", LAUNCH, marks=pytest.mark.slow),
        pytest.param("launcher", TWO, marks=pytest.mark.slow),
    ],
)
def test_a_real_sigterm_to_whom_it_may_reach(
    tmp_path: Path, whole: Path, started: Callable[..., Any], who: str, launch: list[str]
) -> None:
    """The signal comes while the run waits in update 8; workers are alive and have prefetched."""
    command = [*launch, TINY, *WORKERS, "--output-dir", "broken"]
    process = started(*command, "--hang-at", "8")
    wait_for_line(process, "waiting")
    (os.killpg if who == "group" else os.kill)(process.pid, signal.SIGTERM)
    if launch == LAUNCH:
        process.wait(60)  # its death is what sends the signal on
    elif launch == TWO:
        time.sleep(5)  # it hands the signal on in its own time, and stays
    (tmp_path / "go").touch()
    process.communicate(timeout=60)
    wait_until_gone(tmp_path)
    if launch == [sys.executable]:
        assert process.returncode == 143
    assert listing(tmp_path / "broken/checkpoints")[0].name == "update-000000008.pt"
    assert run([*command, "--resume", "auto"], tmp_path).returncode == 0
    if launch != TWO:
        assert equal_runs(whole, tmp_path / "broken")


TWO_FLAGS = [*WORKERS, "--grad-accum-steps", "2"]


@pytest.fixture(scope="module")
def whole_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing interrupted."""
    folder = tmp_path_factory.mktemp("two")
    done = run([*TWO, TINY, *TWO_FLAGS, "--output-dir", "whole"], folder)
    assert done.returncode == 0, done.stderr
    return folder / "whole"


@pytest.mark.parametrize(
    "update", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(6, marks=pytest.mark.slow)]
)
def test_two_processes_agree_where_to_stop_and_resume_exactly(
    tmp_path: Path, whole_by_two: Path, update: int
) -> None:
    """Accumulation 2, persistent workers, dropout on each; only the first process gets the signal."""
    command = [*TWO, TINY, *TWO_FLAGS, "--output-dir", "broken"]
    stopped = run([*command, "--kill-at", str(update)], tmp_path)
    assert stopped.returncode != 0
    assert f"update {update} of 6 is saved" in stopped.stdout
    assert run([*command, "--resume", "auto"], tmp_path).returncode == 0
    assert equal_runs(whole_by_two, tmp_path / "broken")


@pytest.mark.slow
def test_two_processes_see_other_images_than_one(tmp_path: Path, whole_by_two: Path) -> None:
    done = run([sys.executable, TINY, *TWO_FLAGS, "--output-dir", "one"], tmp_path)
    assert done.returncode == 0
    assert log_of(tmp_path / "one")[0]["loss"] != log_of(whole_by_two)[0]["loss"]


def test_kill_9_loses_at_most_what_came_after_the_last_checkpoint(tmp_path: Path, whole: Path) -> None:
    command = [sys.executable, TINY, *WORKERS, "--output-dir", "broken"]
    assert (
        run([*command, "--kill-at", "13", "--kill-signal", "SIGKILL"], tmp_path).returncode == -signal.SIGKILL
    )
    assert listing(tmp_path / "broken/checkpoints")[0].name == "update-000000010.pt"
    assert run([*command, "--resume", "auto"], tmp_path).returncode == 0
    assert equal_runs(whole, tmp_path / "broken")
    wait_until_gone(tmp_path, 20)


def test_a_killed_worker_is_one_line_and_the_last_checkpoint_goes_on(
    tmp_path: Path, whole: Path, started: Callable[..., Any]
) -> None:
    """As when memory is short."""
    command = [sys.executable, TINY, *WORKERS, "--output-dir", "broken"]
    process = started(*command, "--hang-at", "8")
    wait_for_line(process, "waiting")
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: a process that loads data was lost (DataLoader worker (pid")
    assert line.endswith("go on with --resume auto where a checkpoint was saved")
    assert listing(tmp_path / "broken/checkpoints")[0].name == "update-000000005.pt"
    assert run([*command, "--resume", "auto"], tmp_path).returncode == 0
    assert equal_runs(whole, tmp_path / "broken")
