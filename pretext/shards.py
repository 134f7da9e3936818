"""Tensors on disk that are computed once: safetensors files, whole or not at all, that know what they were made by."""

import os
import shutil
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def open_shard(path: Path) -> Any:
    """The file, memory-mapped.

    Raises:
        ValueError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it, and what it holds is computed again"
        ) from error


def save_shard(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write a file under a temporary name and rename it."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({key: value.cpu() for key, value in tensors.items()}, temporary, metadata=dict(notes))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_space(folder: Path, tensors: Mapping[str, Tensor], n: int, total: int) -> None:
    """Is there room for all of it?

    Args:
        folder: where it goes.
        tensors: of n images.
        n, total: images.

    Raises:
        OSError: there is not.
    """
    needed = sum(value.nbytes for value in tensors.values()) * total / n
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{total} images need {needed / 2**30:.1f} GiB; {folder} has {free / 2**30:.1f}")


def fingerprint(module: nn.Module) -> str:
    """Of all weights, whatever their device."""
    return digest(module.state_dict())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names and bytes."""
    found = blake2b(digest_size=16)
    for name, value in tensors.items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
