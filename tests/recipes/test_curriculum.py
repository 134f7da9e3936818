"""EfficientTrain in the recipes: batches, accumulation, learning rate, loader, replay, exact resume, errors."""

import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from recipe_programs import SPARK, TRAIN, rows, same_tensors
from torch import Tensor

from leaven.callbacks import ResumeWarning
from leaven.curricula import ET, ET_PP, EfficientTrain, Schedule, Stage
from leaven.curricula.replay import ReplayBuffer
from leaven.recipes.common.augment import TrainTransform, random_box
from leaven.recipes.common.checkpoint import listing, load
from leaven.recipes.common.curriculum import CurriculumPlan, CurriculumSettings, follow
from leaven.recipes.common.data import KeyedDataset, make_loader
from leaven.recipes.common.decode import decode
from leaven.recipes.common.flags import UserError, run_main
from leaven.recipes.common.sampler import Key, KeyedBatchSampler
from leaven.recipes.common.schedule import Plan, cosine, learning_rate
from leaven.recipes.common.sources import ArraySource

Recipe = Callable[[Path], ModuleType]
THREE = Schedule((Stage(0.4, 32, 2, 2), Stage(0.7, 48, 2), Stage(1.0, 64)), "steps", (0.0, 0.5, 1.0))


def plan(
    schedule: Schedule = THREE, *, epochs: int = 5, batches: int = 8, accumulation: int = 2, **changes: Any
) -> CurriculumPlan:
    curriculum = EfficientTrain(schedule, image_size=64)
    wishes: dict[str, Any] = {"batch_size": 4, "by_loader": True, "buffer": None, **changes}
    return CurriculumPlan(epochs, batches, accumulation, 1.0, curriculum=curriculum, **wishes)


# --- what a plan says ---------------------------------------------------------------------------------------


def test_every_update_has_as_many_images_and_looks_as_the_schedule_says() -> None:
    """By walking: 20 updates of 8 images; the loader's batches are asked for in order, the loop's counted."""
    p = plan()
    assert p.total == 20
    for epoch in range(p.epochs):
        taken = 0
        for within in range(p.updates_per_epoch):
            update = epoch * p.updates_per_epoch + within
            stage = THREE.at(update / 20)
            images = 0
            for _ in range(p.micro_steps(update)):
                spec = p.spec(epoch, taken)
                assert spec.size == (stage.size, stage.size)
                assert spec.strength == THREE.strength(update / 20)
                assert spec.batch_size == 4 * stage.batches
                taken += spec.batch_size
                images += spec.batch_size
            assert images == 8
        # Batches that are left over look as the last update's.
        assert p.spec(epoch, taken) == p.spec(epoch, taken - 1)


def test_batches_grow_only_as_far_as_accumulation_allows() -> None:
    assert [plan(accumulation=1).micro_steps(u) for u in (0, 39)] == [1, 1]
    assert plan(accumulation=1).spec(0, 0).batch_size == 4
    assert [plan(accumulation=4).micro_steps(u) for u in (0, 9)] == [2, 4]
    assert [plan(accumulation=3).micro_steps(u) for u in (0, 9)] == [3, 3]


def test_the_learning_rate_falls_with_computation() -> None:
    p = plan(ET_PP, epochs=10, batches=20, accumulation=1)
    plain = Plan(10, 20, 1, 1.0)
    done, costs = 0.0, [(ET_PP.at(u / 200).size / 224) ** 2 for u in range(200)]
    for update in range(200):
        assert p.position(update) / 200 == pytest.approx(done / sum(costs), abs=0.01)
        expected = learning_rate(p.position(update), plain, 1.0)
        assert learning_rate(p.position(update), p, 1.0) == expected
        done += costs[update]
    assert learning_rate(p.position(100), p, 1.0) > 1.2 * learning_rate(100, plain, 1.0)
    assert plan(ET).position(7) == 7  # by epochs
    assert cosine(1, 0, 0.5) == 0.5


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("buffer", [None, ReplayBuffer(50)])
def test_the_loader_changes_size_at_the_very_update(workers: int, buffer: ReplayBuffer | None) -> None:
    p = plan(buffer=buffer)
    source = ArraySource(torch.randint(0, 256, (70, 3, 70, 70), dtype=torch.uint8), None)
    sampler = KeyedBatchSampler(70, 4, 0)  # 17 batches of 4; 8 make an epoch
    sampler.schedule = p.spec
    loader = make_loader(
        KeyedDataset(source, TrainTransform((64, 64), (0.5, 1), 0.5, [0.5] * 3, [0.2] * 3)), sampler, workers
    )
    for epoch in range(p.epochs):
        batches = iter(loader)
        for within in range(p.updates_per_epoch):
            update = epoch * p.updates_per_epoch + within
            stage = p.stage(update)
            for images, _ in islice(batches, p.micro_steps(update)):
                assert images.shape == (4 * stage.batches // stage.replay, 3, stage.size, stage.size)
        batches.close()
        sampler.next_epoch()


def test_the_curriculum_needs_no_state_of_the_sampler() -> None:
    p = plan()
    whole = KeyedBatchSampler(70, 4, 0, epoch=1)
    whole.schedule = p.spec
    again = KeyedBatchSampler(70, 4, 0, epoch=1, position=3)
    again.schedule = p.spec
    assert list(again) == list(whole)[3:]


# --- the replay buffer --------------------------------------------------------------------------------------


def test_the_buffer_keeps_the_newest_and_draws_from_them_alone() -> None:
    buffer, generator = ReplayBuffer(10), torch.Generator().manual_seed(0)
    for step in range(6):
        new = torch.arange(4) + 4 * step
        images = new.float().view(4, 1, 1, 1).expand(4, 3, 2, 2)
        extended, labels = buffer.extend([images, new], 3, generator)
        assert torch.equal(labels[:4], new)
        assert len(labels) == 12
        assert torch.equal(extended[:, 0, 0, 0], labels.float())  # pairs stay together
        newest = max(0, 4 * (step + 1) - 10)
        assert set(labels[4:].tolist()) <= set(range(newest, 4 * (step + 1)))
        assert len(buffer) == min(10, 4 * (step + 1))
    batch = [torch.zeros(4, 3, 2, 2), torch.zeros(4)]
    assert buffer.extend(batch, 1, generator) is batch
    assert len(buffer) == 0


def test_draws_are_uniform_and_keyed() -> None:
    counts = torch.zeros(8)
    for seed in range(300):
        buffer = ReplayBuffer(8)
        _, labels = buffer.extend(
            (torch.zeros(8, 1), torch.arange(8)), 3, torch.Generator().manual_seed(seed)
        )
        counts += torch.bincount(labels[8:], minlength=8)
        _, again = ReplayBuffer(8).extend(
            (torch.zeros(8, 1), torch.arange(8)), 3, torch.Generator().manual_seed(seed)
        )
        assert torch.equal(labels, again)
    expected = counts.sum() / 8
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 degrees, 0.1 %


def test_another_size_empties_the_buffer() -> None:
    buffer = ReplayBuffer(100)
    buffer.extend([torch.zeros(4, 3, 8, 8), torch.zeros(4)], 2, torch.Generator())
    extended, _ = buffer.extend([torch.ones(4, 3, 9, 9), torch.zeros(4)], 2, torch.Generator())
    assert torch.equal(extended, torch.ones(8, 3, 9, 9))
    with pytest.raises(ValueError, match="at least one"):
        ReplayBuffer(0)


# --- JPEGs decoded smaller ----------------------------------------------------------------------------------


def jpeg(size: tuple[int, int], orientation: int | None = None) -> bytes:
    from PIL import Image

    h, w = size
    y, x = np.mgrid[:h, :w] / max(size)
    pixels = np.stack([128 + 100 * np.sin(6 * y), 128 + 100 * np.cos(5 * x), 255 * x * y / (x * y).max()], -1)
    image, file = Image.fromarray(pixels.astype(np.uint8)), io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", [None, 6])
def test_a_reduced_jpeg_is_the_image_by_so_much_smaller(factor: int, orientation: int | None) -> None:
    import torch.nn.functional as F

    data, asked = jpeg((240, 360), orientation), []

    def reduction(stored: tuple[int, int]) -> int:
        asked.append(stored)
        return factor

    whole, small = decode(data), decode(data, 3, reduction)
    upright = (240, 360) if orientation is None else (360, 240)
    assert asked == [upright]
    assert whole.shape[1:] == upright
    assert small.shape[1:] == (upright[0] // factor, upright[1] // factor)
    mean = F.avg_pool2d(whole.float(), factor)
    assert (small.float() - mean).abs().mean() < 2


def test_only_what_the_crop_does_not_need_is_left_out() -> None:
    transform = TrainTransform((224, 224), (0.35, 1.0), 0.5, [0.5] * 3, [0.2] * 3)
    for index in range(50):
        key = Key(0, 0, index, (96, 96))
        factor = transform.reduction((600, 800), key)
        assert factor in (1, 2, 4)
        box = random_box(key, (600, 800), (96, 96), (0.35, 1.0), (3 / 4, 4 / 3), 0.5)
        assert min(box.height, box.width) / factor >= 96 or factor == 1
        assert min(box.height, box.width) / (2 * factor) < 96
        assert transform.reduction((600, 800), key._replace(size=None)) == 1
    assert transform.reduction((90, 90), Key(0, 0, 0, (96, 96))) == 1


def test_a_png_comes_whole() -> None:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(file, "PNG")
    assert decode(file.getvalue(), 3, lambda stored: 2).shape == (3, 64, 64)


# --- whole runs ---------------------------------------------------------------------------------------------

FLAGS = [
    "--workers",
    "0",
    "--epochs",
    "3",
    "--limit-batches",
    "8",
    "--batch-size",
    "8",
    "--grad-accum-steps",
    "2",
]
FLAGS += ["--image-size", "64", "--backbone", "test_resnet", "--callbacks", "efficienttrain"]
TRAINING = [*FLAGS, "--hflip", "0", "--aa", "randaugment", "--curriculum", "et_pp", "--eval-every", "9"]
MASKED = [*FLAGS, "--image-size", "128", "--curriculum", "0.5:64,0.75:96,1:128", "--batch-size", "4"]
MASKED += ["--decoder-width", "32", "--probe-images", "20"]


@pytest.mark.parametrize("op", ["fourier", pytest.param("bilinear", marks=pytest.mark.slow)])
def test_resume_in_every_stage_is_the_uninterrupted_run(
    run: Callable[..., Path], op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM within the batch loop of an update of each stage, two of them before a border."""
    import leaven.recipes.common.loop as loop

    flags = [*TRAINING, "--curriculum-op", op]
    whole = run(TRAIN, "whole", *flags)
    sizes = [row["size"] for row in rows(whole)]
    expected = [float(EfficientTrain(ET_PP, image_size=64).size_at(t / 12)[0]) for t in range(12)]
    assert sizes == expected
    assert len(set(sizes)) == 3
    borders = [i for i in range(1, 12) if sizes[i] != sizes[i - 1]]
    for cut in (1, *borders):
        plain = loop._gradients

        def gradients(*args: Any, cut: int = cut, plain: Any = plain) -> Any:
            if args[4] == cut - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(*args)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "_gradients", gradients)
            with pytest.raises(SystemExit):
                run(TRAIN, f"broken{cut}", *flags)
        broken = run(TRAIN, f"broken{cut}", *flags, "--resume", "auto")
        assert rows(whole) == rows(broken)
        ends = [load(listing(folder / "checkpoints")[0]) for folder in (whole, broken)]
        assert same_tensors(ends[0]["model"], ends[1]["model"])
    assert "EfficientTrain (et_pp): [(32, 32), (48, 48), (64, 64)] by " + op in capsys.readouterr().out


@contextmanager
def ended_in(update: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run within is told to end while it computes this update."""
    import leaven.recipes.common.loop as loop

    plain = loop._gradients

    def gradients(*args: Any) -> Any:
        if args[4] == update:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_gradients", gradients)
        with pytest.raises(SystemExit):
            yield


def test_resume_with_changes_goes_on_at_the_right_batch(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update has one batch here, not two. What is changed has no say in the numbers."""
    flags = [*TRAINING, "--curriculum", "et"]
    whole = run(TRAIN, "whole", *flags)
    with ended_in(2, monkeypatch):
        run(TRAIN, "broken", *flags)
    broken = run(TRAIN, "broken", *flags, "--resume", "auto", "--resume-changed", "--max-bad-images", "11")
    assert rows(whole) == rows(broken)


def test_resume_with_longer_epochs_goes_on_at_the_right_size(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Already at the first update: 16 of 24, which was 8 of 12."""
    flags = [*TRAINING, "--curriculum", "0.5:32,1:64"]
    with ended_in(7, monkeypatch):
        run(TRAIN, "broken", *flags)
    with pytest.warns(ResumeWarning):
        broken = run(TRAIN, "broken", *flags, "--resume", "auto", "--resume-changed", "--limit-batches", "16")
    sizes = {row["step"]: row["size"] for row in rows(broken)}
    assert [sizes[step] for step in range(17, 25)] == [64] * 8


@pytest.mark.slow
def test_spark_under_the_curriculum(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    from leaven.pretext.spark import SparK

    plain = SparK.forward

    def forward(self: SparK, images: Tensor, mask: Tensor | None = None) -> Any:
        if self.training:
            assert mask is not None
            assert mask.shape[1:] == (images.shape[2] // 32, images.shape[3] // 32)
            seen.append((len(images), images.shape[-1]))
        return plain(self, images, mask)

    SparK.forward = forward  # type: ignore[method-assign]
    try:
        folder = run(SPARK, "out", *MASKED)
    finally:
        SparK.forward = plain  # type: ignore[method-assign]
    # 12 updates of two batches of 4: 6 at 64, 3 at 96, 3 at 128.
    assert seen == [(4, 64)] * 12 + [(4, 96)] * 6 + [(4, 128)] * 6
    assert "[(64, 64), (96, 96), (128, 128)] by fourier on the device" in (folder / "README.md").read_text()


def test_a_schedule_of_ones_own(run: Callable[..., Path]) -> None:
    folder = run(TRAIN, "out", *TRAINING, "--curriculum", "0.25:40,0.5:56,1:64")
    assert [row["size"] for row in rows(folder)] == [40] * 3 + [56] * 3 + [64] * 6


def test_a_replay_buffer_trains_and_is_declared(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(TRAIN, "out", *TRAINING, "--replay-buffer", "64")
    assert len(rows(folder)) == 12
    assert "refilled on resume, which is then not bit-equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "flags", "parts"),
    [
        (TRAIN, ["--callbacks", "efficient"], ["--callbacks efficient", "efficienttrain, ema"]),
        (TRAIN, ["--callbacks", "ema,ema"], ["once"]),
        (SPARK, ["--callbacks", "tract"], ["--callbacks tract", "efficienttrain"]),
        (TRAIN, ["--curriculum", "et_pp"], ["--curriculum", "add --callbacks efficienttrain"]),
        (TRAIN, [*FLAGS, "--curriculum", "et++"], ["--curriculum et++", "SHARE:SIZE", "et_pp"]),
        (TRAIN, [*FLAGS, "--curriculum", "0.5:64,1:32"], ["--curriculum 0.5:64,1:32", "must not shrink"]),
        (TRAIN, ["--replay-buffer", "9"], ["--replay-buffer", "add --callbacks efficienttrain"]),
        (TRAIN, [*FLAGS, "--replay-buffer", "-1"], ["--replay-buffer"]),
        (
            TRAIN,
            [
                *FLAGS,
                "--replay-buffer",
                "9",
                "--curriculum",
                "et_pp",
                "--batch-size",
                "6",
                "--grad-accum-steps",
                "1",
            ],
            ["--batch-size 6 must divide by 4"],
        ),
        (
            TRAIN,
            [*FLAGS, "--augment-on", "device", "--curriculum-op", "bilinear"],
            ["--augment-on device", "fourier"],
        ),
        (TRAIN, [*FLAGS, "--replay-buffer", "9"], ["--curriculum et replays nothing"]),
        (
            TRAIN,
            [*FLAGS, "--replay-buffer", "9", "--curriculum", "et_pp", "--augment-on", "device"],
            ["--replay-buffer keeps images as they leave the loader", "leave --augment-on device out"],
        ),
        (
            TRAIN,
            [*FLAGS, "--replay-buffer", "1000000000", "--curriculum", "et_pp"],
            ["--replay-buffer 1000000000 is more than the", "images that there are"],
        ),
        (TRAIN, [*FLAGS, "--curriculum", "nan:32,1:64"], ["--curriculum nan:32,1:64", "one after another"]),
        (TRAIN, [*FLAGS, "--backbone", "tv:vit_b_32"], ["does not run on images of 48x48"]),
        (
            SPARK,
            [*FLAGS, "--image-size", "64"],
            ["leaves 0 of 1 cells visible", "choose a larger --image-size"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_wrong_flags(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], program: Path, flags: list[str], parts: list[str]
) -> None:
    module = recipe(program)
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: module.main(["--backbone", "test_resnet", *flags]))
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]


def test_a_dry_run_has_fewer_images_than_the_replay_buffer(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*FLAGS, "--curriculum", "et_pp", "--replay-buffer", "1000", "--dry-run"]
    recipe(TRAIN).main(flags)
    assert "all works here (on noise" in capsys.readouterr().out


def test_without_the_callback_nothing_changes() -> None:
    source = ArraySource(torch.zeros(40, 3, 8, 8, dtype=torch.uint8), None)
    sampler = KeyedBatchSampler(40, 4)
    loader = make_loader(
        KeyedDataset(source, TrainTransform((8, 8), (1, 1), 0, [0.5] * 3, [0.2] * 3)), sampler
    )
    bare = Plan(2, 10)
    assert follow(CurriculumSettings(), bare, loader, (8, 8), 16) == (bare, None, [])
    assert sampler.schedule is None
    batch = object()
    assert bare.extend(batch, 0, torch.Generator) is batch
    settings = CurriculumSettings(
        callbacks=("efficienttrain",), curriculum="et_pp", replay_buffer=4, batch_size=3
    )
    with pytest.raises(UserError, match="must divide"):
        follow(settings, bare, loader, (64, 64), 16)
