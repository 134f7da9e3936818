"""Cached targets: the same loss and gradients as with the teacher's pass, and no other images' or teacher's targets."""

import pickle
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leaven.pretext import ScaleKD
from leaven.pretext.scalekd import CachedTargets, NoTail, TeacherTail, write_targets
from tests.pretext.scalekd_networks import CLASSES, TEACHERS, student_of, teacher_of

SIZE = (64, 96)


def objective(teacher: str = "vit", seed: int = 3) -> ScaleKD:
    torch.manual_seed(seed)
    return ScaleKD(student_of("convnext"), teacher_of(teacher, SIZE), image_size=SIZE)


def pictures(n: int = 7) -> Tensor:
    return torch.randn(n, 3, *SIZE, generator=torch.Generator().manual_seed(5))


def batches(images: Tensor, size: int = 3) -> Iterator[Tensor]:
    yield from images.split(size)


def passes(distil: ScaleKD) -> list[int]:
    """How many images each call of the teacher has had."""
    seen: list[int] = []
    distil.tail.teacher.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("teacher", TEACHERS)
def test_cached_targets_are_those_of_the_teacher(teacher: str, tmp_path: Path) -> None:
    distil, images = objective(teacher), pictures()
    write_targets(tmp_path, distil, batches(images), len(images))
    cached = CachedTargets(tmp_path, distil)
    assert len(cached) == 7
    indices = torch.tensor([6, 0, 4, 2])
    labels = torch.arange(4) % CLASSES
    plain = distil(images[indices], labels)
    plain.loss.backward()
    expected = {name: p.grad.clone() for name, p in distil.named_parameters() if p.grad is not None}
    distil.zero_grad()
    seen = passes(distil)
    output = distil(images[indices], labels, cached(indices, images[indices]))
    output.loss.backward()
    assert seen == []
    torch.testing.assert_close(output.loss, plain.loss, rtol=1e-5, atol=1e-5)
    for name, p in distil.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_writing_goes_on_where_it_was(tmp_path: Path) -> None:
    distil, images = objective(), pictures()

    def cut() -> Iterator[Tensor]:
        yield images[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_targets(tmp_path, distil, cut(), 7)
    seen = passes(distil)
    size = write_targets(tmp_path, distil, batches(images), 7)
    assert seen == [3, 1, 1, 1, 1][: len(seen)]  # the two batches that were missing, and one blank image
    assert sum(seen) == 5
    assert size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert not list(tmp_path.glob(".*"))


def test_more_files_than_five_digits_count_stay_in_order(tmp_path: Path) -> None:
    distil, images = objective(), pictures()
    write_targets(tmp_path, distil, batches(images), 7)
    for number in (2, 1, 0):
        (tmp_path / f"{number:05}.safetensors").rename(tmp_path / f"{number + 99_998:05}.safetensors")
    cached = CachedTargets(tmp_path, distil)(torch.arange(7), images)
    expected = distil.tail.targets(distil.for_teacher(images)).map
    torch.testing.assert_close(cached.map, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_is_half_the_size(tmp_path: Path) -> None:
    distil, images = objective(), pictures()
    labels = torch.arange(7) % CLASSES
    whole = write_targets(tmp_path / "whole", distil, batches(images), 7)
    half = write_targets(tmp_path / "half", distil, batches(images), 7, dtype=torch.float16)
    assert half < 0.6 * whole
    with pytest.raises(FileExistsError, match="of another dtype"):
        write_targets(tmp_path / "whole", distil, batches(images), 7, dtype=torch.float16)
    cached = CachedTargets(tmp_path / "half", distil)(torch.arange(7), images)
    torch.testing.assert_close(
        distil(images, labels, cached).loss, distil(images, labels).loss, rtol=1e-3, atol=1e-3
    )


def test_another_process_and_a_damaged_file(tmp_path: Path) -> None:
    distil, images = objective(), pictures()
    write_targets(tmp_path, distil, batches(images), 7)
    cached = CachedTargets(tmp_path, distil)
    again = pickle.loads(pickle.dumps(cached))
    here, there = (each(torch.arange(7), images) for each in (cached, again))
    assert torch.equal(here.map, there.map)
    assert torch.equal(here.entry, there.entry)
    last = sorted(tmp_path.iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        CachedTargets(tmp_path, distil)
    with pytest.raises(ValueError, match="is damaged"):
        write_targets(tmp_path, distil, batches(images), 7)


@pytest.mark.parametrize("view", ["flipped", "upside down", "brighter", "shifted", "next"])
def test_other_views_are_refused(view: str, tmp_path: Path) -> None:
    distil, images = objective(), pictures()
    images = torch.nn.functional.avg_pool2d(images, 17, 1, 8) * 8  # smooth, as photos are
    write_targets(tmp_path, distil, batches(images), 7)
    cached = CachedTargets(tmp_path, distil)
    other = {
        "flipped": images.flip(3),
        "upside down": images.flip(2),
        "brighter": images + 0.01,
        "shifted": images.roll(4, 3),
        "next": images.roll(1, 0),
    }[view]
    with pytest.raises(ValueError, match="not the images that the targets were made of"):
        cached(torch.arange(7), other)
    cached(torch.arange(7), images.bfloat16())


def test_another_teacher_or_other_images_are_refused(tmp_path: Path) -> None:
    distil, images = objective(), pictures()
    write_targets(tmp_path, distil, batches(images), 7)
    other = objective()
    with torch.no_grad():
        next(other.tail.teacher.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="another teacher's"):
        CachedTargets(tmp_path, other)
    for wrong, data in ((other, images), (distil, images.flip(3))):
        with pytest.raises(FileExistsError, match="take an empty folder"):
            write_targets(tmp_path, wrong, batches(data), 7)
    with pytest.raises(IndexError, match="image 7 of 7"):
        CachedTargets(tmp_path, distil)(torch.tensor([7]), images[:1])
    with pytest.raises(FileNotFoundError, match="no cached targets in"):
        CachedTargets(tmp_path / "nowhere", distil)
    with pytest.raises(ValueError, match="targets are floating-point numbers"):
        write_targets(tmp_path, distil, batches(images), 7, dtype=torch.int8)
    with pytest.raises(ValueError, match="9 images were announced and 7 came"):
        write_targets(tmp_path, distil, batches(images), 9)


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 32x8x12 of the map, 32 of the class token, 5 logits, 3 marks, 4 bytes each
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**20))
    with pytest.raises(OSError, match=r"1000000 images need 11\.6 GiB"):
        write_targets(tmp_path, objective(), batches(pictures()), 1_000_000)
    assert not list(tmp_path.iterdir())


class Modulated(nn.Module):
    """A teacher whose last layer is given something of the image."""

    class Last(nn.Module):
        def forward(self, x: Tensor, light: Tensor) -> Tensor:
            return x * light

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.last, self.norm = nn.Conv2d(3, 8, 16, 16), self.Last(), nn.Identity()
        self.num_classes = 8

    def forward(self, x: Tensor) -> Any:
        light = x.mean((1, 2, 3)).view(-1, 1, 1, 1)
        return self.norm(self.last(self.patches(x), light)).mean((2, 3))


def test_arguments_that_depend_on_the_images_are_refused(tmp_path: Path) -> None:
    teacher = Modulated()
    tail = TeacherTail(teacher, [teacher.last, teacher.norm], "nchw")
    distil = ScaleKD("test_convnext", teacher, tail=tail, image_size=SIZE)
    with pytest.raises(NoTail, match="argument 0 of layer 0 of the tail depends on the images"):
        write_targets(tmp_path, distil, batches(pictures()), 7)
