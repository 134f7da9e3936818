"""A teacher's targets, computed once for images that stay as they are, kept on disk and read by index."""

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leaven.pretext.scalekd.scalekd import ScaleKD
from leaven.pretext.scalekd.tail import Call, NoTail, Targets, TeacherTail
from leaven.pretext.shards import check_space, fingerprint, open_shard, save_shard

_TOLERANCE = 1e-3  # of the marks of normalised images, for those of bfloat16


def write_targets(
    folder: str | os.PathLike[str],
    objective: ScaleKD,
    batches: Iterable[Tensor],
    total: int,
    dtype: torch.dtype | None = None,
) -> int:
    """Pass every image through the teacher once, and write what `ScaleKD` needs of it: a file for each batch.

    Images must be those of the training to come: no random views, or views that are drawn once. What was stopped goes
    on where it was, file by file.

    Args:
        folder: for the files ``00000.safetensors`` and so on; made if missing.
        objective: on the device of its teacher.
        batches: images (B, C, H, W) as the objective gets them, all of one size, in the order they are asked for by.
        total: of the images, for the size to be known before it is written.
        dtype: of what is written; None: as the teacher gives it.

    Returns:
        Bytes of all files.

    Raises:
        FileExistsError: the folder has targets of another teacher, of other images, or of another dtype.
        NoTail: layers of the tail get arguments that depend on the images.
        OSError: the disk is too small for all of it.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"targets are floating-point numbers, not {dtype}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    device = next(objective.parameters()).device
    teacher, written, done = fingerprint(objective.tail.teacher), 0, 0
    blank: Targets | None = None
    for number, images in enumerate(batches):
        path = folder / f"{number:05}.safetensors"
        marks = _marks(images)
        notes = {"teacher": teacher, "size": "x".join(map(str, images.shape[1:])), "dtype": str(dtype)}
        if path.is_file():
            _same(path, notes, marks)
        else:
            found = objective.tail.targets(objective.for_teacher(images.to(device)))
            blank = blank or objective.tail.targets(
                objective.for_teacher(torch.zeros_like(images[:1], device=device))
            )
            _check_calls(objective.tail, blank.calls, found.calls)
            rows = _rows(objective.tail, found, dtype) | {"marks": marks}
            if number == 0:
                check_space(folder, rows, len(images), total)
            save_shard(path, rows, notes)
        written += path.stat().st_size
        done += len(images)
    if done != total:
        raise ValueError(f"{total} images were announced and {done} came: {folder} is not complete")
    return written


class CachedTargets:
    """The targets of `write_targets`, memory-mapped: what the third argument of `ScaleKD` is made by.

        cached = CachedTargets("targets", objective)
        objective(images, labels, cached(indices, images)).loss.backward()

    Args:
        folder: see `write_targets`.
        objective: with the teacher that the targets are of.

    Raises:
        FileNotFoundError: no targets there.
        ValueError: they are another teacher's, or a file is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], objective: ScaleKD) -> None:
        # By number: by name, 100000 comes before 99999.
        paths = sorted(Path(folder).glob("[0-9]*.safetensors"), key=lambda path: int(path.stem))
        if not paths:
            raise FileNotFoundError(f"no cached targets in {folder}: write_targets makes them")
        self._paths, self._files = paths, [open_shard(path) for path in paths]
        self._tail = objective.tail
        if self._files[0].metadata()["teacher"] != fingerprint(objective.tail.teacher):
            raise ValueError(f"the targets in {folder} are another teacher's: write them again")
        ends = accumulate(file.get_slice("marks").get_shape()[0] for file in self._files)
        self._starts: list[int] = [0, *ends]
        size = map(int, self._files[0].metadata()["size"].split("x"))
        first = next(iter(objective.parameters()))
        blank = torch.zeros(1, *size, device=first.device, dtype=first.dtype)
        self._blank = self._tail.targets(objective.for_teacher(blank))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_files": None}  # open files stay in their process

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._files = [open_shard(path) for path in self._paths]

    def __len__(self) -> int:
        return self._starts[-1]

    def __call__(self, indices: Tensor, images: Tensor) -> Targets:
        """Targets of images.

        Args:
            indices: (B,), counted as they were written.
            images: (B, C, H, W), the very images: other views are refused.

        Raises:
            IndexError: no such image.
            ValueError: other images than those that the teacher saw.
        """
        rows: dict[str, list[Tensor]] = {}
        for index in indices.tolist():
            if not 0 <= index < len(self):
                raise IndexError(f"image {index} of {len(self)} cached ones")
            number = bisect_right(self._starts, index) - 1
            row = index - self._starts[number]
            for key in self._files[number].keys():  # noqa: SIM118 (not a mapping)
                rows.setdefault(key, []).append(self._files[number].get_slice(key)[row : row + 1])
        found = {key: torch.cat(parts).to(images.device, non_blocking=True) for key, parts in rows.items()}
        if not _close(found["marks"], _marks(images)):
            raise ValueError(
                "not the images that the targets were made of: cached targets need views that stay"
            )
        calls = [self._of_batch(i, call, len(images)) for i, call in enumerate(self._blank.calls)]
        entry = found.get("prefix", found["map"])
        return Targets(found.get("logits"), found["map"], entry, self._blank.grid, calls)

    def _of_batch(self, number: int, call: Call, n: int) -> Call:
        args, kwargs = call

        def grown(key: int | str, value: Any) -> Any:
            return value.expand(n, *value.shape[1:]) if self._tail.goes_with_images(number, key) else value

        return tuple(grown(i, a) for i, a in enumerate(args)), {k: grown(k, v) for k, v in kwargs.items()}


def _rows(tail: TeacherTail, found: Targets, dtype: torch.dtype | None) -> dict[str, Tensor]:
    rows = {"map": found.map}
    if isinstance(found.logits, Tensor):
        rows["logits"] = found.logits
    if tail.prefix:
        rows["prefix"] = found.entry[:, : tail.prefix]
    return {key: value.to("cpu", dtype or value.dtype).contiguous() for key, value in rows.items()}


def _marks(images: Tensor) -> Tensor:
    """(B, 3): mean, and its moments down and across, by which a shifted, flipped or recoloured view is told."""
    grey = images.float().mean(1)
    down, across = (torch.linspace(-1, 1, n, device=images.device) for n in grey.shape[1:])
    return torch.stack([grey.mean((1, 2)), (grey.mean(2) * down).mean(1), (grey.mean(1) * across).mean(1)], 1)


def _close(known: Tensor, marks: Tensor) -> bool:
    known = known.to(marks.device)
    return known.shape == marks.shape and torch.allclose(known, marks, atol=_TOLERANCE, rtol=_TOLERANCE)


def _same(path: Path, notes: dict[str, str], marks: Tensor) -> None:
    with open_shard(path) as file:
        theirs = file.metadata()
        if any(theirs.get(key) != value for key, value in notes.items()) or not _close(
            file.get_tensor("marks"), marks.cpu()
        ):
            raise FileExistsError(
                f"{path} has targets of another teacher, of other images or of another dtype: take an empty folder"
            )


def _check_calls(tail: TeacherTail, blank: list[Call], calls: list[Call]) -> None:
    """The arguments of the layers are made once when cached targets are read: the images must not matter."""
    for number, (one, many) in enumerate(zip(blank, calls, strict=True)):
        for key, value in _arguments(one):
            other = dict(_arguments(many))[key]
            if isinstance(value, Tensor) and not torch.equal(value.expand_as(other), other):
                raise NoTail(
                    f"argument {key!r} of layer {number} of the tail depends on the images: it cannot be cached"
                )


def _arguments(call: Call) -> Iterator[tuple[int | str, Any]]:
    yield from enumerate(call[0])
    yield from call[1].items()
