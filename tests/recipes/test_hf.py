"""`--data hf:NAME`: Parquet files, read in blocks."""

import io
import itertools
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipe_programs import SPARK, TRAIN, refusal, rows, run, same_tensors
from safetensors.torch import load_file

from leaven.recipes.common import parquet
from leaven.recipes.common.batches import Part
from leaven.recipes.common.checkpoint import listing, load
from leaven.recipes.common.data import Data, KeyedDataset, make_loader, open_data
from leaven.recipes.common.few_labels import hold_out, keep_few
from leaven.recipes.common.flags import UserError
from leaven.recipes.common.sampler import LANES, KeyedBatchSampler, block_permutation, lane_order
from leaven.recipes.common.sources import BadImageWarning, LostData, TooManyBadImages

datasets = pytest.importorskip("datasets")

CLASSES = ["cat", "dog", "elk"]


def png(number: int, side: int = 12) -> bytes:
    """A picture that tells its number."""
    from PIL import Image

    image = Image.new("RGB", (side, side), (number % 256, number // 256, 7))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def number_of(image: Any) -> int:
    return int(image[0, 0, 0]) + 256 * int(image[1, 0, 0])


def write(path: Path, numbers: Sequence[int], group: int = 7, **columns: Any) -> None:
    """A Parquet file as datasets writes it, in row groups of `group` rows; label: number modulo 3."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    content: dict[str, Any] = {
        "image": [{"bytes": png(n), "path": None} for n in numbers],
        "label": [n % 3 for n in numbers],
    }
    for name, (feature, values) in columns.items():
        features[name], content[name] = feature, values
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    made.to_parquet(str(path), batch_size=group)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """96 training images in three files of five row groups, 24 held out."""
    folder = tmp_path / "set"
    for shard in range(3):
        write(folder / f"train-{shard:05d}-of-00003.parquet", range(32 * shard, 32 * shard + 32))
    write(folder / "test-00000-of-00001.parquet", range(200, 224))
    return folder


def as_is(image: Any, key: Any) -> tuple[int, int]:
    return number_of(image), key.index


def epoch_of(data: Data, rank: int, world: int, workers: int, epoch: int = 0, position: int = 0) -> list[Any]:
    """(number in the picture, index of its key, label) of all samples of a rank, batch by batch."""
    sampler = KeyedBatchSampler(
        len(data.train), 8, 0, rank, world, epoch, position, blocks=data.train.blocks, buffer=16
    )
    loader = make_loader(KeyedDataset(data.train, as_is), sampler, workers)
    return [
        list(zip(*(part.tolist() for part in (*numbers, labels)), strict=True)) for numbers, labels in loader
    ]


# --- what is found


def test_splits_columns_and_classes_are_found(stored: Path) -> None:
    data = open_data(f"hf:{stored}")
    assert (data.kind, data.name, data.classes) == ("hf", "set", tuple(CLASSES))
    assert (len(data.train), len(data.val)) == (96, 24)
    assert [number_of(data.train.image(i)) for i in range(96)] == list(range(96))
    assert [data.train.label(i) for i in range(96)] == [i % 3 for i in range(96)]
    assert [number_of(data.val.image(i)) for i in range(24)] == list(range(200, 224))
    assert data.image_size == (64, 64)
    assert "96 images in 15 row groups of 3 Parquet files, 24 held out (test)" in data.notes[0]
    assert data.notes[1].endswith("of which the workers of a process keep up to 0 MiB in memory")
    assert open_data(f"hf:{stored}", in_chans=1).train.image(3).shape == (1, 12, 12)


def test_another_split_and_a_pattern(stored: Path) -> None:
    assert number_of(open_data(f"hf:{stored}:test").train.image(0)) == 200
    data = open_data(f"hf:{stored}/train*.parquet")
    assert (len(data.train), len(data.val)) == (86, 10)
    assert "10 of them held out (seed 0), as no other split is there to judge on" in data.notes[0]
    both = [number_of(part.image(i)) for part in (data.train, data.val) for i in range(len(part))]
    assert sorted(both) == list(range(96))


def test_of_many_row_groups_whole_ones_are_held_out(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", range(100), group=5)
    data = open_data(f"hf:{tmp_path}")
    held = sorted(number_of(data.val.image(i)) for i in range(len(data.val)))
    assert held == sorted(5 * start + i for start in {n // 5 for n in held} for i in range(5))
    assert data.train.blocks.tolist() == [5] * 18


def test_unlabelled_images(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image()})
    content = {"image": [{"bytes": png(n), "path": None} for n in range(30)]}
    datasets.Dataset.from_dict(content, features=features).to_parquet(str(tmp_path / "a.parquet"))
    data = open_data(f"hf:{tmp_path}")
    assert (data.classes, data.train.label(0)) == ((), None)


def test_what_is_easily_missed_is_said(stored: Path, tmp_path: Path) -> None:
    """Columns that may be the classes, held-out files that a pattern trains on, and a folder of Parquet files."""
    feature = (datasets.Value("string"), ["x", "y"] * 15)
    write(tmp_path / "text" / "a.parquet", range(30), label=feature)
    (line,) = [note for note in open_data(f"hf:{tmp_path / 'text'}").notes if "--label-column" in note]
    assert line == "no column is of classes: name one of label with --label-column if it is"
    notes = open_data(f"hf:{stored}/*.parquet").notes
    assert f"files named test are trained on too: give the folder, hf:{stored}, for splits" in notes
    assert not any("trained on too" in note for note in open_data(f"hf:{stored}").notes)
    assert not any("trained on too" in note for note in open_data(f"hf:{stored}/train*.parquet").notes)
    with pytest.raises(
        UserError, match=f"holds no images .*; for its Parquet files give --data hf:{stored}$"
    ):
        open_data(str(stored))


def test_hidden_labels_are_no_labels(stored: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = stored / "test-00000-of-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, table.schema.field("label"), pa.array([-1] * 24)), path)
    data = open_data(f"hf:{stored}")
    assert "test is not used: its label is empty" in data.notes
    assert len(data.train) + len(data.val) == 96


def plain(path: Path, group: int = 7, **columns: Any) -> None:
    """A Parquet file as pyarrow writes it, without the types of Hugging Face."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = columns.pop("image", [{"bytes": png(n), "path": None} for n in range(30)])
    pq.write_table(pa.table({"image": pa.array(pictures, kind), **columns}), path, row_group_size=group)


def test_pictures_of_plain_pyarrow_are_found(tmp_path: Path) -> None:
    plain(tmp_path / "a.parquet", label=[n % 2 for n in range(30)])
    assert number_of(open_data(f"hf:{tmp_path}").train.source.image(5)) == 5  # type: ignore[attr-defined]
    assert open_data(f"hf:{tmp_path}", label_column="label").classes == ("0", "1")


@pytest.mark.parametrize("hidden", [None, -1])
def test_rows_without_a_class_are_counted_and_named(tmp_path: Path, hidden: int | None) -> None:
    """In a later row group than the first."""
    plain(tmp_path / "a.parquet", label=[hidden if n in (17, 20) else n % 3 for n in range(30)])
    data = open_data(f"hf:{tmp_path}", label_column="label")
    said = f"label is null or negative in 2 of 30 rows, first in row 17 of {tmp_path}/a.parquet"
    assert data.notes[-1] == f"{said}: taken as unlabelled"
    assert (data.classes, data.train.label(0)) == ((), None)
    with pytest.raises(UserError, match=f"{said}; leave out what has no class"):
        keep_few(data, None, 0)


def test_classes_may_be_text(tmp_path: Path) -> None:
    names = ["elk", "cat", "dog"]
    plain(tmp_path / "train.parquet", label=[names[n % 3] for n in range(30)])
    plain(tmp_path / "test.parquet", label=[names[n % 3] for n in range(30)])
    data = open_data(f"hf:{tmp_path}", label_column="label")
    assert data.classes == ("cat", "dog", "elk")
    assert [data.train.label(i) for i in range(3)] == [2, 0, 1]
    assert data.train.labels.tolist() == [2, 0, 1] * 10  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(data.val))
    assert [again.label(i) for i in range(3)] == [2, 0, 1]
    plain(tmp_path / "test.parquet", label=["cat"] * 9 + ["cow"] + ["dog"] * 20)
    with pytest.raises(
        UserError, match=r"text that is no class of the training part in row 9 of .*3 classes$"
    ):
        open_data(f"hf:{tmp_path}", label_column="label")


def test_columns_that_clash_are_one_line(tmp_path: Path) -> None:
    one, two = tmp_path / "train-00000-of-00002.parquet", tmp_path / "train-00001-of-00002.parquet"
    write(one, range(30))
    for columns, words in (
        ({}, "has no column label, but image"),
        ({"label": ["x"] * 30}, "has string in label, and other files numbers"),
    ):
        plain(two, **columns)
        with pytest.raises(UserError, match=f"{two.name} {words}; all files of a set need the same columns"):
            open_data(f"hf:{tmp_path}")
    two.write_bytes(b"")
    with pytest.raises(UserError, match=r"^cannot read .*-00001-.* 0 bytes\)$"):  # nothing to resume
        open_data(f"hf:{tmp_path}")
    write(two, range(30))
    write(tmp_path / "test.parquet", range(30), number=(datasets.Value("int32"), [1] * 29 + [9]))
    for path in (one, two):
        write(path, range(30), number=(datasets.Value("int32"), [n % 3 for n in range(30)]))
    with pytest.raises(UserError, match=r"number has class 9 in row 29 of .*there are 3 classes"):
        open_data(f"hf:{tmp_path}", label_column="number")


def test_paths_without_pictures_are_told(tmp_path: Path) -> None:
    pictures = [{"bytes": None, "path": f"{n}.png"} for n in range(30)]
    plain(tmp_path / "a.parquet", image=pictures)
    words = r"more than --max-bad-images 10: row 0 of .* \(the file holds no image here but the path 0.png\), row 1"
    with pytest.raises(TooManyBadImages, match=words):
        open_data(f"hf:{tmp_path}")


def test_other_columns_by_name(tmp_path: Path) -> None:
    fine = datasets.ClassLabel(names=["a", "b"]), [n % 2 for n in range(30)]
    count = datasets.Value("int32"), [n % 5 for n in range(30)]
    write(tmp_path / "a.parquet", range(30), fine=fine, count=count)
    with pytest.raises(UserError, match=r"has the labels label, fine: name one with --label-column$"):
        open_data(f"hf:{tmp_path}")
    assert open_data(f"hf:{tmp_path}", label_column="fine").classes == ("a", "b")
    assert open_data(f"hf:{tmp_path}", label_column="count").classes == ("0", "1", "2", "3", "4")


def test_few_labels_and_another_split(stored: Path) -> None:
    data = keep_few(open_data(f"hf:{stored}"), "4", 0)
    assert (len(data.train), int(np.sum(data.train.blocks))) == (12, 12)
    assert np.bincount([data.train.label(i) for i in range(12)]).tolist() == [4, 4, 4]
    judged = hold_out(open_data(f"hf:{stored}"), "25%")
    assert (len(judged.train), len(judged.val)) == (72, 24)


def test_a_channel_that_is_constant_is_not_divided_by_zero(stored: Path) -> None:
    assert open_data(f"hf:{stored}").std[2] == pytest.approx(1 / 255)


# --- the order


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_each_image_once_per_epoch_over_ranks_and_workers(stored: Path, world: int, workers: int) -> None:
    data = open_data(f"hf:{stored}")
    seen = [
        sample for rank in range(world) for batch in epoch_of(data, rank, world, workers) for sample in batch
    ]
    assert sorted(seen) == [(n, n, n % 3) for n in range(96)]


def test_batches_do_not_depend_on_workers_nor_on_what_was_read_before(stored: Path) -> None:
    data = open_data(f"hf:{stored}")
    whole = epoch_of(data, 1, 2, 0, epoch=3)
    assert whole == epoch_of(data, 1, 2, 2, epoch=3)
    assert whole[4:] == epoch_of(data, 1, 2, 2, epoch=3, position=4)
    assert whole != epoch_of(data, 1, 2, 0, epoch=4)
    assert [n for batch in whole for n, _, _ in batch] != sorted(n for batch in whole for n, _, _ in batch)


def test_blocks_come_whole_and_in_another_order_each_epoch() -> None:
    blocks = [3, 1, 4, 0, 2]
    orders = [block_permutation(0, epoch, blocks).tolist() for epoch in range(20)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) > 10
    for order in orders:
        for start, size in zip([0, 3, 4, 8], [3, 1, 4, 2], strict=True):
            at = order.index(start)
            assert order[at : at + size] == list(range(start, start + size))


def test_a_lane_is_a_piece_shuffled_within_the_buffer() -> None:
    n, batch, buffer = 8 * 16 * 50 + 5, 16, 100
    order = lane_order(0, 0, 0, n, batch, buffer)
    assert sorted(order.tolist()) == list(range(n))
    assert order[-5:].tolist() == list(range(n - 5, n))
    batches = order[:-5].reshape(-1, batch)
    for lane in range(LANES):
        mine = batches[lane::LANES].ravel()
        piece = np.arange(lane * 800, (lane + 1) * 800)
        assert sorted(mine.tolist()) == piece.tolist()
        assert 10 < np.abs(mine - piece).mean() < abs(mine - piece).max() <= buffer


def test_a_buffer_of_all_is_a_uniform_shuffle() -> None:
    """Where sample 0 of a lane of 40 goes, over many epochs."""
    places = [
        lane_order(0, e, 0, 320, 4, 100_000).reshape(-1, 4)[::LANES].ravel().tolist().index(0)
        for e in range(4000)
    ]
    counts = np.bincount(places, minlength=40)
    assert (abs(counts - 100) < 5 * 10).all()


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_a_worker_reads_its_share_of_the_row_groups_once(workers: int) -> None:
    sizes = np.full(400, 10)
    sampler = KeyedBatchSampler(4000, 20, 0, blocks=sizes, buffer=50)
    batches = [[key.index // 10 for key in keys] for keys in sampler]
    reads = [
        len({block for batch in batches[worker::workers] for block in batch}) for worker in range(workers)
    ]
    assert sum(reads) <= 400 + 2 * LANES


def test_two_ranks_share_no_row_group_but_one() -> None:
    sizes = np.full(40, 10)
    mine = [
        {key.index // 10 for keys in KeyedBatchSampler(400, 5, 0, rank, 2, blocks=sizes) for key in keys}
        for rank in range(2)
    ]
    assert len(mine[0] & mine[1]) <= 1


def test_repeated_augmentation_draws_anew_for_each_copy() -> None:
    sampler = KeyedBatchSampler(80, 4, 0, blocks=np.full(8, 10), buffer=20, repeats=2)
    keys = [key for batch in sampler for key in batch]
    assert len({(key.epoch, key.index) for key in keys}) == 80
    assert len({key.index for key in keys}) == 40


def test_parts_of_blocks_are_read_in_runs(stored: Path, tmp_path: Path) -> None:
    source = open_data(f"hf:{stored}").train
    part = Part(source, 40)
    assert (np.diff(part.indices) == 1).sum() >= 38
    assert [part.label(i) for i in range(40)] == part.labels.tolist()
    pieces = [Part(source, 1000, (rank, 3)).indices.tolist() for rank in range(3)]
    assert list(itertools.chain(*pieces)) == list(range(96))


# --- unreadable images and files


def spoil(path: Path, row: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    images = table["image"].to_pylist()
    images[row] = {"bytes": b"not a picture", "path": None}
    column = pa.array(images, table.schema.field("image").type)
    pq.write_table(table.set_column(0, table.schema.field("image"), column), path, row_group_size=7)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_replaced_with_its_label_and_named(stored: Path, workers: int) -> None:
    spoil(stored / "train-00001-of-00003.parquet", 4)
    data = open_data(f"hf:{stored}")
    with pytest.warns(
        BadImageWarning, match=r"replaced row 4 of .*train-00001-of-00003.parquet .*not an image"
    ):
        seen = [sample for batch in epoch_of(data, 0, 1, workers) for sample in batch]
    assert sorted(seen) == sorted((n, i, n % 3) for i in range(96) for n in [37 if i == 36 else i])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore::leaven.recipes.common.sources.BadImageWarning")
def test_too_many_unreadable_images(stored: Path, workers: int) -> None:
    spoil(stored / "train-00000-of-00003.parquet", 4)
    spoil(stored / "train-00000-of-00003.parquet", 6)
    data = open_data(f"hf:{stored}")
    data.train._status.zero_()  # found when the statistics were taken
    data.train.max_bad_images = 1
    with pytest.raises(
        TooManyBadImages, match=r"^2 unreadable images, more than --max-bad-images 1: row 4 of"
    ):
        epoch_of(data, 0, 1, workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_goes_missing_is_one_line(stored: Path, workers: int) -> None:
    data = open_data(f"hf:{stored}")
    data.train._forget()
    (stored / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(LostData, match=r"^cannot read .*train-00001-of-00003.parquet \(.*resume auto$"):
        epoch_of(data, 0, 1, workers)


def test_a_network_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read() -> int:
        asked.append(1)
        if len(asked) < 3:
            raise OSError("connection reset")
        return 5

    assert parquet.patiently(read, "https://x/a.parquet", waits=(0, 0, 0)) == 5
    asked.clear()
    with pytest.raises(LostData, match="connection reset"):
        parquet.patiently(read, "a.parquet")
    assert len(asked) == 1


def test_files_on_another_file_system(stored: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for path in stored.glob("train*.parquet"):
        memory.pipe(f"/there/{path.name}", path.read_bytes())
    data = open_data("hf:memory://there/*.parquet")
    assert len(data.train) + len(data.val) == 96
    assert number_of(data.train.image(0)) == int(data.train.indices[0])


def test_a_source_goes_to_a_spawned_worker(stored: Path) -> None:
    source = open_data(f"hf:{stored}").train
    again = pickle.loads(pickle.dumps(source))
    assert number_of(again.image(40)) == 40


# --- refusals


def test_what_is_refused(stored: Path, tmp_path: Path) -> None:
    for spec, options, words in (
        ("hf:", {}, "expected hf:NAME"),
        (f"hf:{stored}:dev", {}, "there is no split dev; there are train, test"),
        (f"hf:{tmp_path / 'nowhere'}", {}, "nowhere"),
        (f"hf:{tmp_path}/*.parquet", {}, "there are no files"),
        (f"hf:{stored}", {"image_column": "picture"}, "--image-column picture: .* has image, label"),
        (f"hf:{stored}", {"image_column": "label"}, "--image-column label holds ClassLabel"),
        (
            f"hf:{stored}",
            {"label_column": "image"},
            "--label-column image holds Image.*to integers or to text",
        ),
        ("digits", {"shuffle_buffer": 5}, "--shuffle-buffer is of --data hf:NAME"),
        ("digits", {"label_column": "label"}, "--label-column is of --data hf:NAME"),
        (str(tmp_path), {"label_column": "label"}, "--label-column is of --data hf:NAME"),
    ):
        with pytest.raises(UserError, match=words):
            open_data(spec, **options)  # type: ignore[arg-type]


def test_other_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        UserError, match=r"train.csv, and only Parquet can be read from any row; .*to_parquet"
    ):
        open_data(f"hf:{tmp_path}")
    import pyarrow as pa
    import pyarrow.parquet as pq

    other = tmp_path / "other"
    other.mkdir()
    pq.write_table(pa.table({"a": [1, 2, 3]}), other / "a.parquet")
    with pytest.raises(UserError, match=r"has no images, but a: name one with --image-column"):
        open_data(f"hf:{other}")


def test_a_missing_extra_is_one_line(
    recipe: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    module = recipe(SPARK)
    said = refusal(lambda: module.main(["--data", "hf:some/where"]), capsys)
    assert said.endswith('needs Hugging Face datasets: pip install "leaven[hf]"')


def test_a_wrong_name_is_one_line(
    recipe: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    module = recipe(TRAIN)
    said = refusal(lambda: module.main(["--data", "hf:no_such_name_anywhere"]), capsys)
    assert "hf:no_such_name_anywhere" in said
    assert not Path("runs").exists()


# --- recipes

FLAGS = (
    "--backbone",
    "resnet10t",
    "--image-size",
    "32",
    "--epochs",
    "2",
    "--batch-size",
    "8",
    "--workers",
    "1",
)


@pytest.mark.parametrize("program", [TRAIN, pytest.param(SPARK, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(stored: Path, tmp_path: Path, program: Path) -> None:
    command = [sys.executable, program, *FLAGS, "--data", f"hf:{stored}", "--shuffle-buffer", "16"]
    if program == SPARK:
        command += ["--stages", "4,8", "--decoder-width", "16"]
    whole = run([*command, "--output-dir", "whole"], tmp_path, timeout=300)
    assert whole.returncode == 0, whole.stderr
    stop = tmp_path / "stop.py"
    stop.write_text(STOP.format(signum=int(signal.SIGTERM), program=str(program)))
    stopped = run([sys.executable, stop, *command[2:], "--output-dir", "broken"], tmp_path, timeout=300)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert load(listing(tmp_path / "broken/checkpoints")[0])["sampler"]["position"] == 5
    go_on = [w if w != "1" else "2" for w in command]  # other workers
    assert run([*go_on, "--output-dir", "broken", "--resume", "auto"], tmp_path, timeout=300).returncode == 0
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    ends = [load(listing(tmp_path / name / "checkpoints")[0]) for name in ("whole", "broken")]
    assert same_tensors(ends[0], ends[1])
    # Not the files' bytes: safetensors writes metadata in any order.
    weights = [load_file(tmp_path / name / "backbone.safetensors") for name in ("whole", "broken")]
    assert same_tensors(*weights)


# A signal when four updates are in the log: the fifth is finished, then the run is saved.
STOP = """
import os, runpy, sys
from leaven.recipes.common.run_folder import RunFolder
log = RunFolder.log
def noticed(self, row):
    log(self, row)
    if row["step"] == 4:
        os.kill(os.getpid(), {signum})
RunFolder.log = noticed
sys.argv = sys.argv[1:]
sys.argv = ["{program}", *sys.argv]
runpy.run_path("{program}", run_name="__main__")
"""
