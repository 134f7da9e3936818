"""Backbone weights on disk: safetensors files that load strictly into plain timm and torchvision models."""

import json
import os
from ast import literal_eval
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leaven import __version__
from leaven.backbones.build import create
from leaven.backbones.classifier import around_classifier
from leaven.backbones.names import resolve

# Arguments of `create` that `load` takes from the metadata when it is given a name; a size may be a pair.
_BUILD_ARGUMENTS = ("in_chans", "num_classes", "image_size")


class WeightsMismatch(ValueError):
    """A weights file does not fit a model. The message is one line and names the first differing keys."""


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write the state dict of `model` as safetensors, under a temporary name first and then renamed.

    Equal models with equal notes give equal files.

    Args:
        model: a plain backbone; DDP and ``torch.compile`` wrappers are looked through.
        path: the file; missing folders are made.
        name: what `create` builds it from, resolved and noted in the file; None for a module without a name.
        metadata: further notes. ``in_chans``, ``num_classes`` and ``image_size`` are used again by `load`; ``evonorm``
            is the kind of EvoNorm that took the place of BatchNorm, named where the file does not fit.

    Raises:
        OSError: the file could not be written; an older file of that name is left as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    notes = {"format": "pt", "leaven": __version__, **{k: str(v) for k, v in (metadata or {}).items()}}
    if name is not None:
        notes["backbone"] = resolve(name)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask wants it; safetensors writes for the owner alone
        save_file(_apart(_unwrap(model).state_dict()), temporary, metadata=notes)
        temporary.chmod(mode)
        _sort_notes(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before the data does
        temporary.replace(target)
    except (SafetensorError, OSError) as error:
        raise OSError(f"could not write {target}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sort_notes(path: Path) -> None:
    """Put the metadata in order: safetensors writes it in another order each time."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        if len(text) == length:  # other escapes than safetensors' would move the tensors
            file.seek(8)
            file.write(text)


def load(
    model_or_name: nn.Module | str,
    path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
) -> nn.Module:
    """Load a file written by `save`, strictly: every key and every shape must agree.

    Args:
        model_or_name: a module, which is filled in place, or a name for `create`.
        path: a safetensors file.
        image_size: for `create`: weights of a network that is built for one size fit that size only. None: as noted.

    Returns:
        The module.

    Raises:
        FileNotFoundError: no such file.
        WeightsMismatch: not a safetensors file, or keys or shapes differ. The model is then left as it was.
    """
    state, notes = _read(path)
    if isinstance(model_or_name, str):
        arguments: dict[str, Any] = {
            key: literal_eval(notes[key]) for key in _BUILD_ARGUMENTS if key in notes
        }
        if image_size is not None:
            arguments["image_size"] = image_size
        model = create(model_or_name, **arguments)
        label = model_or_name
    else:
        model, label = model_or_name, type(model_or_name).__name__
    inner = _unwrap(model)
    _check(path, notes, label, inner.state_dict(), state)
    inner.load_state_dict(state)
    return model


def load_around_classifier(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Load a file written by `save`, strictly but for the classifier (see `classifier_names`).

    The file's classifier is taken where it fits. Where it is missing, of another shape, or the model has none, the
    model's own stays as it is: so a headless file goes into a network with a fresh classifier, and the other way.

    Args:
        model: filled in place.
        path: a safetensors file.

    Returns:
        The model's parameters and buffers that stayed as they were, by name.

    Raises:
        FileNotFoundError: no such file.
        WeightsMismatch: not a safetensors file, or it differs elsewhere. The model is then left as it was.
    """
    inner = _unwrap(model)
    state, notes = _read(path)
    needed, taken = around_classifier(inner, state)
    _check(path, notes, type(inner).__name__, needed, taken)
    inner.load_state_dict(taken, strict=False)
    return [key for key in inner.state_dict() if key not in taken]


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The notes in a file written by `save`.

    Raises:
        FileNotFoundError: no such file.
        WeightsMismatch: not a safetensors file.
    """
    return _read(path)[1]


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata."""
    from safetensors import SafetensorError, safe_open

    if Path(path).is_dir():
        inside = sorted(Path(path).glob("*.safetensors"))
        usual = Path(path) / "backbone.safetensors"  # a run folder may have an average beside it
        hint = (
            f"; did you mean {usual if usual in inside else inside[0]}?"
            if inside
            else ", and there is no .safetensors file in it"
        )
        raise FileNotFoundError(f"{path} is a folder{hint}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        hint = ""
        if Path(path).suffix in (".pt", ".pth", ".bin", ".ckpt", ".tar"):
            hint = "; convert pickled weights with safetensors.torch.save_file(torch.load(PATH), 'PATH.safetensors')"
        raise WeightsMismatch(f"{path} is not a complete safetensors file: {error}{hint}") from None


def _check(
    path: str | os.PathLike[str],
    notes: Mapping[str, str],
    label: str,
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> None:
    if differences := _differences(expected, state):
        written = f" (written from {notes['backbone']})" if "backbone" in notes else ""
        hint = ""
        plain = any(key.endswith("running_mean") and key not in state for key in expected)
        if plain and (kind := notes.get("evonorm")):
            hint = (
                f"; it is of a network with EvoNorm-{kind}, so build that first: `from leaven.callbacks import "
                "evo_norm, replace_norm_act` and "
                f"`replace_norm_act(model, functools.partial(evo_norm, '{kind}'))`"
            )
        raise WeightsMismatch(f"{path}{written} does not fit {label}: {'; '.join(differences)}{hint}")


def _differences(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    named = (("it lacks", missing), ("it has unknown", unknown), ("shapes differ:", shapes))
    return [f"{what} {_few(keys)}" for what, keys in named if keys]


def _few(items: Sequence[str], most: int = 3) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory: safetensors refuses tied weights, a strict load wants all."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in state.items():
        value = value.detach().contiguous()
        storage = value.untyped_storage().data_ptr()
        apart[key] = value.clone() if storage in seen else value
        seen.add(storage)
    return apart


def _unwrap(model: nn.Module) -> nn.Module:
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(
        model, "_orig_mod"
    ):
        inner = getattr(model, "_orig_mod", None)
        model = inner if isinstance(inner, nn.Module) else model.get_submodule("module")
    return model
