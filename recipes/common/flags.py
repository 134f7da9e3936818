"""Flags from a dataclass of settings, a YAML file below them, and one-line errors.

A recipe writes its settings once, as a dataclass that extends `CommonSettings`, or `ImageSettings` if it does not
train: names, types, defaults and help texts are taken from there.
Precedence: default < preset < `--config FILE.yaml` < flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml

from leaven.recipes.common.convert import convert, did_you_mean, without_none

S = TypeVar("S")
T = TypeVar("T")


SHUFFLE_BUFFER = 1000


class UserError(Exception):
    """Something that the user can put right: one line that says what is wrong and what to do."""

    on_every_rank = True  # False: one process alone met it, and has to say so itself


def flag(default: T, help: str) -> T:
    """A settings field with a default and the help text of its flag."""
    # The dataclass wants to see a field here, and the type checker the default's type.
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class ImageSettings:
    """The flags of every recipe: a backbone, and images for it."""

    backbone: str = flag(
        "convnext_t",
        "timm name, tv:NAME for torchvision, or package.module:factory, a function that builds your own network (and "
        "takes num_classes where a classifier is trained)",
    )
    data: str = flag(
        "digits",
        "digits, tv:NAME@ROOT for a torchvision data set, hf:NAME[:SPLIT] for one of the Hugging Face hub or local "
        "Parquet files, or a folder of images",
    )
    image_column: str | None = flag(None, "hf: which column has the images; none: the only one of that type")
    label_column: str | None = flag(
        None, "hf: which column has the classes, numbers or text; none: the only ClassLabel"
    )
    shuffle_buffer: int = flag(
        SHUFFLE_BUFFER, "hf: about how far an image may move from its neighbours when rows are shuffled"
    )
    image_size: tuple[int, int] | None = flag(None, "N or HxW in pixels; none: what suits the data")
    in_chans: int = flag(3, "channels that the images are read with: 1 grey, 3 RGB")
    max_bad_images: int = flag(10, "unreadable images per split to name and skip before giving up")
    val_from_train: str | None = flag(
        None,
        "judge on this share (20%) of the training images, kept out of training; the held-out part stays closed",
    )
    workers: int = flag(2, "processes that load data; 0: load in the main process")
    batch_size: int = flag(64, "images per step on each process")
    init: str | None = flag(None, "weights to start from: a .safetensors file, or `pretrained`")
    seed: int = flag(0, "seed of everything random")
    output_dir: str | None = flag(None, "run folder; none: runs/RECIPE-BACKBONE-DATA")

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name, None)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        if self.image_size is not None and not 8 <= min(self.image_size) <= max(self.image_size) <= 8192:
            raise UserError("--image-size must be from 8 to 8192 pixels, as in 224 or 96x128")
        if self.seed >= 2**32:  # what numpy and scikit-learn take
            raise UserError(f"--seed must be below {2**32}, got {self.seed}")
        if getattr(self, "clip_grad", None) == 0:
            raise UserError("--clip-grad 0 would leave nothing of any gradient; none is for no clipping")
        if self.in_chans not in (1, 3):
            raise UserError(f"--in-chans must be 1 or 3, got {self.in_chans}")


@dataclasses.dataclass
class CommonSettings(ImageSettings):
    """The flags that every training recipe has; a recipe extends this with its own and may change defaults."""

    augment_on: Literal["loader", "device"] = flag(
        "loader", "where crop and flip run; device: on the GPU, by kornia"
    )
    epochs: int = flag(10, "passes over the training images")
    grad_accum_steps: int = flag(1, "batches per optimizer update")
    lr: float = flag(1e-3, "peak learning rate")
    weight_decay: float = flag(0.05, "weight decay")
    warmup_epochs: float = flag(1.0, "epochs of linear warm-up")
    opt: str = flag("adamw", "optimizer, by timm's name")
    sched: Literal["cosine", "constant"] = flag("cosine", "learning rate after the warm-up")
    clip_grad: float | None = flag(None, "largest gradient norm; none: no clipping")
    mixed_precision: Literal["no", "bf16", "fp16"] = flag("no", "precision of the forward pass")
    channels_last: bool = flag(False, "channels_last memory format")
    grad_checkpointing: bool = flag(False, "less memory for more time, where the backbone offers it")
    compile: bool = flag(False, "torch.compile the model")
    resume: str | None = flag(None, "auto: newest checkpoint in --output-dir; or a checkpoint folder")
    log_with: str | None = flag(None, "accelerate trackers, comma-separated: tensorboard,wandb")
    save_every: int = flag(1, "epochs between checkpoints")
    keep: int = flag(2, "checkpoints to keep")
    limit_batches: int | None = flag(None, "stop each epoch after this many batches")
    dry_run: bool = flag(False, "two updates, checkpoint, reload, export: does it all work here?")


_LEAST: dict[str, float] = {
    **dict.fromkeys(("epochs", "batch_size", "grad_accum_steps", "save_every", "keep", "limit_batches"), 1),
    **dict.fromkeys(
        (
            "global_batch_size",
            "probe_images",
            "probe_width",
            "decoder_width",
            "mask_cell",
            "shuffle_buffer",
            "eval_every",
        ),
        1,
    ),
    **dict.fromkeys(
        ("workers", "seed", "lr", "lr_base", "weight_decay", "warmup_epochs", "clip_grad", "max_bad_images"),
        0,
    ),
}


def parse(
    settings_class: type[S],
    argv: Sequence[str] | None = None,
    *,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> S:
    """Settings from the command line.

    Args:
        settings_class: a dataclass whose fields all have defaults.
        argv: without the program's name; None: `sys.argv[1:]`.
        presets: name -> overrides; gives the flag `--preset NAME`.

    Raises:
        UserError: unknown flag, key or preset (a near one is named), or a value that does not fit.
        SystemExit: with code 0, after `--help`.
    """
    presets = presets or {}
    parser = _parser(settings_class, presets)
    argv = [_hyphens(word) for word in (sys.argv[1:] if argv is None else argv)]
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].split("=")[0]
        flags = [option for action in parser._actions for option in action.option_strings]
        what = "unknown flag" if word.startswith("-") else "unexpected argument"
        raise UserError(f"{what} {word}{did_you_mean(word, flags)}; --help lists the flags")
    given = vars(known)
    file = given.pop("config", None)
    config = _read_config(file) if file else {}
    of_file = config.pop("preset", None)
    preset = given.pop("preset", None) or of_file
    if preset is not None and preset not in presets:
        raise UserError(
            f"unknown preset {preset}{did_you_mean(str(preset), presets)}; "
            f"there are: {', '.join(presets) or 'none'}"
        )
    chosen = dict(presets[preset]) if preset else {}
    return _build(settings_class, chosen | _fields_of(settings_class, config, file) | given)


def to_yaml(settings: Any) -> str:
    """All settings as YAML that `from_yaml`, and `--config`, read back to equal settings."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    # Unescaped, PyYAML would fold the line breaks of other scripts (U+0085, U+2028) into blanks.
    readable = json.dumps(plain, ensure_ascii=False).isprintable()
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=readable)


def from_yaml(settings_class: type[S], text: str) -> S:
    """The settings that `to_yaml` wrote.

    Raises:
        UserError: not YAML, an unknown key, or a value that does not fit.
    """
    return _build(settings_class, _fields_of(settings_class, _mapping(text, "settings"), "settings"))


def run_main(main: Callable[[], Any], *errors: type[Exception]) -> None:
    """Run a recipe's `main`. An error that the user can put right is one line on stderr, and exit code 2.

    Such errors are `UserError`, the named errors of backbones and SparK, and a loader's worker that was killed.
    Anything else is a defect and keeps its traceback. Ctrl-C outside of the training, which saves first, is exit code
    130 and one line.

    Args:
        main: called without arguments.
        errors: more exceptions to treat so.
    """
    from leaven.backbones import NoStages, UnknownBackbone, WeightsMismatch
    from leaven.pretext.spark import SparseUnsupported

    warnings.formatwarning = _one_line
    sys.path.append(os.getcwd())  # last, so that it shadows nothing: for --backbone my_module:factory
    named = (UserError, UnknownBackbone, NoStages, WeightsMismatch, SparseUnsupported)
    known: tuple[type[Exception], ...] = named + errors
    caught: tuple[type[Exception], ...] = (*known, RuntimeError)
    try:
        main()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except caught as error:
        line = " ".join(str(error).split())
        if not isinstance(error, known):
            # torch raises it wherever the training is at that moment, and has no type for it.
            if not line.startswith("DataLoader worker (pid"):
                raise
            line = (
                f"a process that loads data was lost ({line}); memory may be short: lower --workers or --batch-size, "
                "and go on with --resume auto where a checkpoint was saved"
            )
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print(f"error: {line}", file=sys.stderr)
        elif not isinstance(error, known) or not getattr(error, "on_every_rank", True):
            print(f"error: {line} (rank {rank})", file=sys.stderr)
        else:
            # The launcher ends all ranks as soon as it sees one fail: leave rank 0 the time to say why.
            time.sleep(10)
        sys.exit(2)


def _one_line(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    """Warnings by name, without the place in our code that raised them."""
    return f"warning: {message} ({category.__name__})\n"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def _parser(settings_class: type, presets: Mapping[str, Any]) -> argparse.ArgumentParser:
    doc = (settings_class.__doc__ or "").strip().split("\n")[0]
    parser = _Parser(description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("-c", "--config", metavar="FILE.yaml", help="settings from a file; flags win over it")
    if presets:
        parser.add_argument("--preset", metavar="NAME", help=f"a named set of defaults: {', '.join(presets)}")
    hints = get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        name = f"--{field.name.replace('_', '-')}"
        default = show(field.default, hints[field.name])
        text = f"{_help(settings_class, field.name)} (default: {default})".replace("%", "%%")
        if hints[field.name] is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(name, metavar=_metavar(hints[field.name]), help=text)
    return parser


def _help(settings_class: type, name: str) -> str:
    """The field's help text; a subclass that only changes the default keeps the text of its parent."""
    for cls in settings_class.__mro__:
        field = getattr(cls, "__dataclass_fields__", {}).get(name)
        if field is not None and "help" in field.metadata:
            return str(field.metadata["help"])
    return ""


def _metavar(hint: Any) -> str:
    hint = without_none(hint)
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return "HxW" if get_args(hint) == (int, int) else "A,B"
    return str(hint.__name__).upper()


def show(value: Any, hint: Any) -> str:
    """A setting as its flag takes it."""
    if isinstance(value, tuple):
        return ("x" if get_args(without_none(hint)) == (int, int) else ",").join(map(str, value))
    return "none" if value is None else str(value)


def _hyphens(word: str) -> str:
    """`--batch_size=8` -> `--batch-size=8`."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _read_config(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --config {path}: {getattr(error, 'strerror', None) or error}") from None
    return _mapping(text, path)


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {error}") from None
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{where} must hold `name: value` lines")
    return {str(key): value for key, value in (values or {}).items()}


def _fields_of(settings_class: type, config: dict[str, Any], where: str | None) -> dict[str, Any]:
    """`config` by field name; keys may be written with hyphens."""
    names = [field.name for field in dataclasses.fields(settings_class)]
    for key in config:
        if key.replace("-", "_") not in names:
            raise UserError(f"unknown key {key} in {where}{did_you_mean(key.replace('-', '_'), names)}")
    return {key.replace("-", "_"): value for key, value in config.items()}


def _build(settings_class: type[S], values: Mapping[str, Any]) -> S:
    hints = get_type_hints(settings_class)
    converted = {}
    for name, value in values.items():
        try:
            converted[name] = convert(value, hints[name])
        except ValueError as error:
            raise UserError(f"--{name.replace('_', '-')}: {error}, got {value!r}") from None
    return settings_class(**converted)
