"""What studies share: many trials on splits of a table or on a backbone's features; resuming and stopping them."""

import json
import math
import os
import signal
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from leaven.backbones import resolve as known_backbone
from leaven.bayes.deep_kernel_machine import normalised
from leaven.journal import JournalError
from leaven.recipes.common.batches import Images, build_backbone, find_data, user_errors
from leaven.recipes.common.card import command
from leaven.recipes.common.data import Data, KeyedLoader
from leaven.recipes.common.decode import SUFFIXES
from leaven.recipes.common.few_labels import keep_few
from leaven.recipes.common.flags import SHUFFLE_BUFFER, ImageSettings, UserError, flag, to_yaml
from leaven.recipes.common.launcher import set_threads
from leaven.recipes.common.probes import labelled_features, recalibrate
from leaven.recipes.common.run_folder import RunFolder, open_run, writing
from leaven.recipes.common.signals import exit_code
from leaven.recipes.common.tables import open_table
from leaven.trials import Outcome, TrialsError, run_trials

_THREADS = torch.get_num_threads()  # of a fresh process
Trial = Callable[..., dict[str, Any]]
Inputs = Callable[[nn.Module, KeyedLoader], tuple[Tensor, Tensor]]


@dataclass
class StudySettings(ImageSettings):
    """Trials on a table, or with --backbone on images."""

    backbone: str = flag("none", "none: the data is a table; otherwise as in the other recipes")
    data: str = flag("diabetes", "a .csv or .parquet file, a folder of UCI splits; with --backbone, images")
    target: str | None = flag(None, "column of the table to learn, or several, comma-separated")
    splits: int = flag(1, "train/test splits of the table")
    seeds: int = flag(1, "trainings of every split, from --seed on")
    labels: str | None = flag(None, "learn from N images of each class or P%; none: from all")
    recalibrate: bool = flag(True, "take BatchNorm's statistics anew from whole training images first")
    ood: str | None = flag(None, "other images, to be told from the known ones by the entropy")
    jobs: int = flag(1, "trials at a time, in processes of their own")
    dask: str | None = flag(
        None, "address of a Dask scheduler whose workers do the trials, --jobs of them at a time"
    )
    time_limit: float | None = flag(
        None, "seconds for one trial, after which it has failed; needs --jobs 2 or more"
    )
    resume: str | None = flag(None, "auto: go on in --output-dir, or else in the newest such run of runs/")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backbone != "none" and self.data == "diabetes":
            self.data = "digits"
        for name in ("splits", "seeds", "jobs"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("init", "labels", "ood") if self.backbone == "none" else ("target",):
            if getattr(self, name) is not None:
                kind = "images: add --backbone" if self.backbone == "none" else "tables"
                raise UserError(f"--{name} is of {kind}")
        if self.time_limit is not None and self.jobs < 2 and self.dask is None:
            raise UserError("--time-limit needs processes of their own: add --jobs 2")


def conduct(recipe: str, settings: StudySettings, on_table: Trial, on_images: Trial, inputs: Inputs) -> None:
    """A whole study, from flags to results.json.

    Args:
        recipe: its name, for the run folder.
        settings: the flags.
        on_table, on_images: one trial, called as ``f(settings, folder, split=k, seed=s)`` with the run folder's path.
        inputs: what `on_images` finds in ``folder/inputs.pt``, see `collect`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"recipes/{recipe}.py starts its own processes: leave the launcher out, use --jobs")
    notes = about(settings)
    table = settings.backbone == "none"
    name = Path(settings.data).stem if table else settings.backbone
    run = open_run(recipe, name, output_dir=settings.output_dir, resume=settings.resume)
    print("\n".join([set_threads(settings.jobs), *notes]))
    refuse_changes(run, settings)
    refuse_other_data(run, notes)
    run.write(run.config, to_yaml(replace(settings, resume=None, output_dir=None)))
    if not table:
        collect(settings, run.path / "inputs.pt", inputs)
    trial = partial(numbers_of, on_table if table else on_images, settings, str(run.path.resolve()))
    trials = {
        f"split {k}, seed {settings.seed + s}": {"split": k, "seed": settings.seed + s}
        for k in range(settings.splits)
        for s in range(settings.seeds)
    }
    report(run_study(trial, trials, settings, run), run, notes)


def numbers_of(trial: Trial, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The trial's result; what is not a number is a failure.

    Raises:
        FloatingPointError: a NaN is among it.
    """
    result = trial(*args, **kwargs)
    for what, value in result.items():
        if isinstance(value, float) and math.isnan(value):
            raise FloatingPointError(f"{what} is not a number")
    return result


def about(settings: StudySettings) -> list[str]:
    """What is learnt from; an error before anything is made."""
    if settings.backbone == "none":
        try:
            table = open_table(settings.data, settings.target, settings.seed)
        except UserError as error:
            named = settings.data == "digits" or settings.data.startswith(("tv:", "hf:"))
            if named or _holds_images(settings.data):
                raise UserError(
                    f"--data {settings.data} is of images: add --backbone, whose features are learnt from"
                ) from error
            raise
        if table.splits and settings.splits > table.splits:
            raise UserError(f"--splits {settings.splits}: {settings.data} has {table.splits}")
        smoke = (
            ["diabetes is a smoke test of the recipe and no evidence"] if settings.data == "diabetes" else []
        )
        for name, column in zip(table.targets, table.y.T, strict=True):
            if column.min() == column.max():
                raise UserError(f"--target {name}: it is {column[0]:g} in every row")
        same = [
            name
            for name, column in zip(table.columns, table.x.T, strict=True)
            if column.min() == column.max()
        ]
        constant = [f"constant inputs, which tell nothing: {', '.join(same)}"] if same else []
        return [f"{table}, digest {table.digest}", *constant, *smoke]
    if settings.splits != 1:
        raise UserError("--splits is of tables; images are split as they lie, see --seeds")
    known_backbone(settings.backbone)
    return keep_few(images_of(settings, settings.data), settings.labels, settings.seed).notes


def images_of(settings: StudySettings, spec: str) -> Data:
    """The images of --data or --ood; the flags of hf: are for those of the two that are hf:."""
    others = any(each is not None and each.startswith("hf:") for each in (settings.data, settings.ood))
    if others and not spec.startswith("hf:"):
        plain: dict[str, Any] = {"image_column": None, "label_column": None, "shuffle_buffer": SHUFFLE_BUFFER}
        settings = replace(settings, **plain)
    return find_data(replace(settings, data=spec))


def _holds_images(folder: str) -> bool:
    """Whether it is a folder with images in it or in a folder of it."""
    found = (path for pattern in ("*", "*/*") for path in Path(folder).glob(pattern))
    return any(path.name.lower().endswith(SUFFIXES) for path in found)


def share_threads(jobs: int) -> None:
    """In a trial: a process's share of the threads, however many trials it has had."""
    torch.set_num_threads(max(1, _THREADS // jobs))


def run_study(
    trial: Trial, trials: dict[str, dict[str, Any]], settings: StudySettings, run: RunFolder
) -> dict[str, Outcome]:
    """All trials: in this process, in others, or on a cluster."""
    how: dict[str, Any] = {"journal": run.path / "journal.jsonl", "time_limit": settings.time_limit}
    with user_errors(TrialsError, JournalError), stopping("study", run), ExitStack() as stack:
        if settings.dask is not None:
            client = stack.enter_context(connected(settings.dask))
            how |= {"executor": lambda workers: client.get_executor(), "workers": settings.jobs}
        elif settings.jobs > 1:
            pool = partial(ProcessPoolExecutor, mp_context=get_context("spawn"))
            how |= {"executor": pool, "workers": settings.jobs}
        return run_trials(trial, trials, **how)


def connected(address: str) -> Any:
    """A client of a Dask scheduler."""
    try:
        import distributed
    except ImportError as error:
        raise UserError('--dask needs Dask: pip install "leaven[cluster]"') from error
    try:
        module: Any = distributed
        return module.Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise UserError(f"--dask {address}: no scheduler answers there ({error})") from error


def collect(settings: StudySettings, cache: Path, what: Inputs) -> None:
    """Write what a frozen backbone makes of training, held-out and other images ("train", "val", "ood"), and labels.

    Args:
        settings: the flags.
        cache: file for it; nothing is done if it is there.
        what: makes tensors (N, ...) and labels (N,) of the backbone, without classifier, and a loader.
    """
    if cache.is_file():
        return
    data = keep_few(images_of(settings, settings.data), settings.labels, settings.seed)
    size = settings.image_size or data.image_size
    torch.manual_seed(settings.seed)
    backbone = build_backbone(settings, size, classes=0)
    images = Images.of(data, settings, size, backbone)
    if settings.recalibrate:
        print("\n".join(recalibrate({settings.backbone: backbone}, images)))
    parts = {"train": (images, data.train), "val": (images, data.val)}
    if settings.ood is not None:
        other = images_of(settings, settings.ood)
        parts["ood"] = (replace(images, data=other), other.val)
    found = {name: what(backbone, source.whole(part, len(part))) for name, (source, part) in parts.items()}
    temporary = cache.with_suffix(".tmp")
    with writing(cache):
        torch.save(found, temporary)
        temporary.replace(cache)


def features(backbone: nn.Module, loader: KeyedLoader) -> tuple[Tensor, Tensor]:
    """Of mean square 1, and labels."""
    x, y = labelled_features(backbone, loader)
    return normalised(x), y


def report(outcomes: dict[str, Outcome], run: RunFolder, notes: list[str]) -> None:
    """Means and standard errors over trials, in words and as results.json."""
    for name, outcome in outcomes.items():
        words = outcome.failure or ", ".join(
            f"{what} {value:.4f}" if isinstance(value, float) else f"{what} {value}"
            for what, value in outcome.result.items()
        )
        print(f"{name}: {words}")
    done = [outcome.result for outcome in outcomes.values() if outcome.failure is None]
    if not done:
        raise UserError(f"no trial of {len(outcomes)} came to an end; see {run.path / 'journal.jsonl'}")
    summary = {}
    for what in (key for key, value in done[0].items() if isinstance(value, float)):
        values = [result[what] for result in done]
        known = len(values) > 1 and all(map(math.isfinite, values))  # a likelihood may be infinite
        error = statistics.stdev(values) / math.sqrt(len(values)) if known else math.nan
        summary[what] = {
            "mean": statistics.mean(values),
            "standard error": None if math.isnan(error) else error,
        }
        spread = "" if math.isnan(error) else f" ± {error:.4f} (standard error over {len(values)} trials)"
        print(f"{what}: {summary[what]['mean']:.4f}{spread}")
    trials = {name: vars(outcome) for name, outcome in outcomes.items()}
    body = {"command": command(), "data": notes, "summary": summary, "trials": trials}
    run.write(run.path / "results.json", json.dumps(_words_for_infinity(body), indent=1, allow_nan=False))
    print(f"run folder: {run.path} (results.json, config.yaml, journal.jsonl)")


def _words_for_infinity(value: Any) -> Any:
    """With "inf" and "-inf" in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _words_for_infinity(each) for key, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def stopping(what: str, run: RunFolder) -> Iterator[None]:
    """SIGTERM and Ctrl-C end a study and its processes with one line; the journal has what was finished."""
    received: list[int] = []

    def stop(signum: int, frame: object) -> None:
        received.append(signum)
        raise KeyboardInterrupt

    previous = {wanted: signal.signal(wanted, stop) for wanted in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        signum = received[0] if received else int(signal.SIGINT)
        print(
            f"{what} stopped by signal {signum}: what was trained is kept; go on with the same flags and "
            f"--output-dir {run.path} --resume auto"
        )
        sys.exit(exit_code(signum))
    finally:
        for wanted, handler in previous.items():
            signal.signal(wanted, handler)


def refuse_changes(run: RunFolder, settings: ImageSettings, may_grow: str | None = None) -> None:
    """The journal knows trials by name, and not what they were tried with: that must be what it was.

    Args:
        run: the folder to go on in.
        settings: of now.
        may_grow: name of a number that may have become larger.

    Raises:
        UserError: a setting that decides the numbers differs from the folder's.
    """
    if not run.config.is_file():
        return
    before, now = (
        yaml.safe_load(text) for text in (run.config.read_text(encoding="utf-8"), to_yaml(settings))
    )
    changed = [
        f"{name} {before.get(name)} -> {value}"
        for name, value in now.items()
        if name not in ("resume", "output_dir", "jobs", "dask", "time_limit") and before.get(name) != value
        if name != may_grow or value < before.get(name, 0)
    ]
    if changed:
        raise UserError(
            f"cannot resume {run.path} exactly: {', '.join(changed)}; go back to the old values, or take another "
            "--output-dir"
        )


def refuse_other_data(run: RunFolder, notes: list[str]) -> None:
    """What the folder's trials have learnt from must be what the next ones will.

    Raises:
        UserError: the data has changed since.
    """
    known = run.path / "data.txt"
    text = "\n".join(notes) + "\n"
    before = known.read_text(encoding="utf-8") if known.is_file() else text
    if before != text:
        raise UserError(
            f"cannot resume {run.path} exactly: its trials learnt from other data ({before.strip()}); "
            "take another --output-dir"
        )
    run.write(known, text)
