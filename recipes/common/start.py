"""Before training: the settings that the loop adds, processes, threads, precision, trackers, run folder."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    LoggerType,
    ProjectConfiguration,
    broadcast_object_list,
    parse_flag_from_env,
    set_seed,
)
from torch import nn

from leaven.backbones import resolve as known_backbone
from leaven.recipes.common.checkpoint import identity_of, listing
from leaven.recipes.common.flags import CommonSettings, UserError, flag, parse
from leaven.recipes.common.launcher import asked_processes, find_launcher, set_threads
from leaven.recipes.common.run_folder import RunFolder, open_run

# What a launcher can ask for that splits the model.
_SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}

T = TypeVar("T")
S = TypeVar("S", bound="LoopSettings")
M = TypeVar("M", bound=nn.Module)


@dataclass
class LoopSettings(CommonSettings):
    """The common flags and those of the loop."""

    lr_base: float | None = flag(None, "peak learning rate per 256 images of an update, in place of --lr")
    global_batch_size: int | None = flag(None, "images per update on all processes, in place of --batch-size")
    weight_decay_end: float | None = flag(None, "weight decay of the last update (cosine); none: constant")
    betas: tuple[float, float] | None = flag(None, "the optimizer's betas; none: its own")
    resume: str | None = flag(
        None, "auto: newest checkpoint of --output-dir, or else of runs/; or a run folder"
    )
    resume_changed: bool = flag(False, "resume although settings, data or processes changed: NOT bit-equal")
    output_dir: str | None = flag(None, "run folder; none: runs/RECIPE-BACKBONE-TIME")

    # What may differ between a run and its resumption without changing a bit of it. Recipes add to this.
    FREE: ClassVar[frozenset[str]] = frozenset(
        {"workers", "resume", "resume_changed", "output_dir", "log_with", "save_every", "keep", "dry_run"}
    )

    def trajectory(self) -> dict[str, Any]:
        """The settings that decide the numbers."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.FREE}


def read_settings(
    settings_class: type[S],
    argv: Sequence[str] | None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    recipe: str = "",
) -> S:
    """`parse`; with ``--resume FOLDER`` the folder's own config.yaml lies below the flags."""
    argv = list(sys.argv[1:] if argv is None else argv)
    resume = _resumed(argv) or parse(settings_class, argv, presets=presets).resume
    if resume not in (None, "auto"):
        config = Path(resume) / "config.yaml"
        if config.is_file():
            known = RunFolder(config.parent).made_by
            made = known[0] if known else recipe
            if recipe and made != recipe:
                raise UserError(f"--resume {resume} is a run of recipes/{made}.py, and this is {recipe}.py")
            argv = ["--config", str(config), *argv]
    return parse(settings_class, argv, presets=presets)


def _resumed(argv: Sequence[str]) -> str | None:
    """The ``--resume`` of a command line whose flags need not make sense without the settings of that folder."""
    given = None
    for word, following in zip(argv, [*argv[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if name == "--resume":
            given = value if equals else following
    return given


def start(settings: S, recipe: str) -> tuple[Accelerator, RunFolder, S]:
    """Join the other processes, open the run folder, seed everything.

    Returns:
        The accelerator, the run folder (the same on all processes), and the settings in final numbers for
        this many processes.

    Raises:
        UserError: a setting cannot be had here.
    """
    # Not by the state's type, which turns to FSDP only when the Accelerator is made.
    for variable, name in _SHARDED.items():
        if parse_flag_from_env(variable):
            raise _not_ddp(name)
    # Without cpu=True accelerate does not join processes that have no GPU: each would train by itself.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu)
    if not state.distributed_type.value.startswith(("NO", "MULTI_")):
        raise _not_ddp(state.distributed_type.value)
    if state.num_processes != int(os.environ.get("WORLD_SIZE", state.num_processes)):
        started = os.environ["WORLD_SIZE"]
        raise UserError(
            f"{started} processes were started, but accelerate joined {state.num_processes} of them"
        )
    launcher = find_launcher()
    asked = asked_processes(launcher.command) if launcher else None
    if asked is not None and asked != state.num_processes:
        raise UserError(
            f"accelerate launch was asked for {asked} processes and started {state.num_processes}: "
            f"use `accelerate launch --multi_gpu --num_processes {asked}`, on CPUs too, and no --cpu"
        )
    settings = resolve(settings, state.num_processes, os.environ)
    known_backbone(settings.backbone)  # before a run folder is made for a typo
    if settings.mixed_precision == "fp16" and state.device.type == "cpu":
        raise UserError("--mixed-precision fp16 needs a GPU; on this machine use bf16 or no")
    trackers = tracker_names(settings.log_with)
    run = on_main(
        lambda: open_run(recipe, settings.backbone, output_dir=settings.output_dir, resume=settings.resume)
    )
    on_main(lambda: refuse_changes(run, settings))
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=settings.mixed_precision,
        log_with=trackers or None,
        project_config=ProjectConfiguration(
            project_dir=str(run.path), logging_dir=str(run.path / "trackers")
        ),
    )
    # The loop counts micro-batches itself: a count inside accelerate would have to be resumed too.
    accelerator.gradient_accumulation_steps = 1
    accelerator.print(set_threads(int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))))
    if trackers:
        config = {name: str(value) for name, value in settings.trajectory().items()}
        accelerator.init_trackers(recipe, config=config)
    set_seed(settings.seed)
    return accelerator, run, settings


def refuse_changes(run: RunFolder, settings: LoopSettings) -> None:
    """What `Training.resume` would refuse by the settings alone, before anything expensive runs.

    Raises:
        UserError: a setting differs from the newest checkpoint's, and ``--resume-changed`` was not given.
    """
    newest = listing(run.checkpoints)[:1]
    if settings.resume is None or settings.resume_changed or not newest:
        return
    before, now = identity_of(newest[0]), settings.trajectory()
    if not before:
        return
    if changed := differences({name: before[name] for name in now if name in before}, now):
        raise not_exactly(run, changed)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two runs, in words."""
    names = [*before, *(name for name in now if name not in before)]
    return [f"{n} {before.get(n)} -> {now.get(n)}" for n in names if before.get(n) != now.get(n)]


def not_exactly(run: RunFolder, changed: Sequence[str]) -> UserError:
    """Why a run cannot go on, and what to do."""
    return UserError(
        f"cannot resume {run.path} exactly: {', '.join(changed)}; go back to the old values (--resume {run.path} alone "
        "takes them), or add --resume-changed to go on all the same (not bit-equal)"
    )


def _not_ddp(name: str) -> UserError:
    return UserError(
        f"this loop trains with DDP, not {name}: a checkpoint holds the whole model, as one process has it, and "
        "callbacks hook whole parameters; choose another distributed type in `accelerate config`"
    )


def synchronised(objective: M, accelerator: Accelerator) -> M:
    """BatchNorm over the batches of all GPUs; torch has no such layer for CPUs, where each process keeps its own."""
    import timm.layers

    layers: Any = timm.layers
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        return cast(M, layers.convert_sync_batchnorm(objective))
    return objective


def leave_group(accelerator: Accelerator) -> bool:
    """End the joint work; True on the main process, which evaluates alone while the others may go."""
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()
    return bool(accelerator.is_main_process)


def resolve(settings: S, processes: int, environment: Any) -> S:
    """The settings in final numbers: batch per process, peak learning rate, what the launcher was told.

    Raises:
        UserError: two settings that say the same thing differently, or a batch that cannot be divided.
    """
    for short, plain in (("lr_base", "lr"), ("global_batch_size", "batch_size")):
        default = next(f.default for f in fields(settings) if f.name == plain)
        if getattr(settings, short) is not None and getattr(settings, plain) != default:
            names = [f"--{name.replace('_', '-')}" for name in (short, plain)]
            raise UserError(
                f"{names[0]} and {names[1]} exclude each other; use one ({names[0]} none drops a preset's)"
            )
    changes: dict[str, Any] = {"lr_base": None, "global_batch_size": None}
    if settings.mixed_precision == "no" and environment.get("ACCELERATE_MIXED_PRECISION") in ("bf16", "fp16"):
        changes["mixed_precision"] = environment["ACCELERATE_MIXED_PRECISION"]
    accumulation = settings.grad_accum_steps
    if accumulation == 1:
        accumulation = int(environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1))
        changes["grad_accum_steps"] = accumulation
    batch_size = settings.batch_size
    if settings.global_batch_size is not None:
        batch_size, rest = divmod(settings.global_batch_size, processes * accumulation)
        if rest or not batch_size:
            raise UserError(
                f"--global-batch-size {settings.global_batch_size} does not divide into "
                f"{processes} process(es) x {accumulation} accumulation step(s)"
            )
        changes["batch_size"] = batch_size
    if settings.lr_base is not None:
        changes["lr"] = settings.lr_base * batch_size * processes * accumulation / 256
    return replace(settings, **changes)


def tracker_names(log_with: str | None) -> list[str]:
    """The trackers that ``--log-with`` names.

    accelerate drops one whose package is missing with a debug message; who asked for it wants to know.

    Raises:
        UserError: unknown, or its package is not installed.
    """
    names = [name.strip() for name in (log_with or "").split(",") if name.strip()]
    known = [str(name) for name in LoggerType.list() if str(name) != "all"]
    for name in names:
        if name not in known:
            raise UserError(f"--log-with {name}: accelerate knows {', '.join(known)}")
        if name not in [str(LoggerType(tracker).value) for tracker in get_available_trackers()]:
            raise UserError(f"--log-with {name}: its package is missing; pip install {name}")
    return names


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on the main process; all processes return its result or raise its `UserError`."""
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = error
    if PartialState().num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result
