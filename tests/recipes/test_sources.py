"""Data sources: what is found in a folder, what is decoded from a file, what happens to broken ones."""

import gzip
import io
import os
import re
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from leaven.recipes.common.augment import TrainTransform
from leaven.recipes.common.data import KeyedDataset, make_loader, open_data, suggested_size
from leaven.recipes.common.decode import BadImage, decode, read_image
from leaven.recipes.common.flags import UserError
from leaven.recipes.common.folders import split_folder
from leaven.recipes.common.sampler import KeyedBatchSampler
from leaven.recipes.common.sources import ArraySource, BadImageWarning, FileSource, Subset, TooManyBadImages
from leaven.recipes.common.torchvision_sets import TorchvisionSource


def picture(height=10, width=14, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, fmt, **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def put(folder, *names, seed=0):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed=seed + i).save(path)
    return folder


def flat(folder, n, suffix=".png"):
    return put(folder, *(f"{i:03d}{suffix}" for i in range(n)))


def raw(image, key):
    """A transform that changes nothing."""
    return image


def paths(source):
    return [os.path.relpath(source.path(i), os.fsdecode(source.root)) for i in range(len(source))]


def error_of(spec, **options):
    with pytest.raises(UserError) as caught:
        open_data(str(spec), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Digits


def test_digits_are_all_there_once_with_balanced_classes():
    from sklearn.datasets import load_digits

    data = open_data("digits", in_chans=1)
    assert (data.kind, data.classes) == ("digits", tuple("0123456789"))
    assert (len(data.train), len(data.val)) == (1437, 360)
    pixels, labels = load_digits(return_X_y=True)
    ours = [
        (tuple(s.image(i).flatten().tolist()), s.label(i))
        for s in (data.train, data.val)
        for i in range(len(s))
    ]
    theirs = [
        (tuple(np.round(x * 255 / 16).astype(int).tolist()), y) for x, y in zip(pixels, labels, strict=True)
    ]
    assert sorted(ours) == sorted(theirs)
    shares = np.bincount([data.val.label(i) for i in range(360)]) / np.bincount(labels)
    assert shares.min() > 0.19
    assert shares.max() < 0.21
    assert any("smoke test" in note for note in data.notes)


def test_digits_statistics_split_and_channels():
    data, grey = open_data("digits"), open_data("digits", in_chans=1)
    assert data.train.image(5).shape == (3, 8, 8)
    assert data.train.image(5).dtype == torch.uint8
    assert torch.equal(data.train.image(5)[1:2], grey.train.image(5))
    pixels = np.stack([grey.train.image(i).numpy() for i in range(len(grey.train))]) / 255
    assert grey.mean == pytest.approx((pixels.mean(),), abs=1e-9)
    assert grey.std == pytest.approx((pixels.std(),), abs=1e-9)
    assert data.mean == pytest.approx(grey.mean * 3)
    same, other = open_data("digits", seed=0), open_data("digits", seed=1)
    assert torch.equal(same.val.images, data.val.images)
    assert not torch.equal(other.val.images, data.val.images)


# Folders: what is found


def test_a_flat_folder_is_unlabelled_with_a_tenth_held_out(tmp_path):
    data = open_data(str(flat(tmp_path, 40)))
    assert (data.kind, data.classes) == ("folder", ())
    assert (len(data.train), len(data.val)) == (36, 4)
    assert sorted(paths(data.train) + paths(data.val)) == [f"{i:03d}.png" for i in range(40)]
    assert data.train.label(0) is None
    assert torch.equal(data.train.image(3), read_image(data.train.path(3)))
    assert "4 of them held out (seed 0)" in data.notes[0]
    assert paths(open_data(str(tmp_path)).val) == paths(data.val)
    assert paths(open_data(str(tmp_path), seed=1).val) != paths(data.val)
    assert data.mean == (0.485, 0.456, 0.406)
    assert open_data(str(tmp_path), in_chans=1).mean == pytest.approx((0.449,))


def test_class_folders_are_held_out_class_by_class(tmp_path):
    put(tmp_path, *(f"{name}/{i}.png" for name, n in (("cat", 30), ("dog", 20)) for i in range(n)))
    put(tmp_path, "dog/deep/er/1.PNG", "loose.png", ".hidden/1.png", "__MACOSX/1.png", "cat/.2.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("x")
    data = open_data(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.val)) == (27 + 19, 3 + 2)
    for source in (data.train, data.val):
        for i, path in enumerate(paths(source)):
            assert source.label(i) == ("cat", "dog").index(path.split("/")[0])
    assert "dog/deep/er/1.PNG" in paths(data.train) + paths(data.val)
    assert any("1 loose images" in note for note in data.notes)
    assert any("empty" in note for note in data.notes)


def test_image_folders_agree_with_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    put(tmp_path, *(f"train/{c}/{i}.png" for c in "zab" for i in range(3)), "train/a/sub/x.png")
    put(tmp_path, *(f"val/{c}/{i}.png" for c in "az" for i in range(2)))
    data = open_data(str(tmp_path))
    theirs = ImageFolder(tmp_path / "train")
    assert list(data.classes) == theirs.classes
    ours = {data.train.path(i): data.train.label(i) for i in range(len(data.train))}
    assert ours == dict(theirs.samples)
    labels = {path: data.val.label(i) for i, path in enumerate(paths(data.val))}
    assert labels == {"val/a/0.png": 0, "val/a/1.png": 0, "val/z/0.png": 2, "val/z/1.png": 2}


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test", "Val"])
def test_a_split_is_taken_as_it_is(tmp_path, val):
    flat(tmp_path / "train", 3)
    flat(tmp_path / val, 2)
    data = open_data(str(tmp_path))
    assert paths(data.train) == [f"train/{i:03d}.png" for i in range(3)]
    assert paths(data.val) == [f"{val}/{i:03d}.png" for i in range(2)]
    assert data.classes == ()


def test_val_comes_before_test_and_what_is_not_used_is_said(tmp_path):
    flat(tmp_path / "train", 3)
    flat(tmp_path / "test", 2)
    flat(tmp_path / "valid", 1)
    put(tmp_path, "extra/1.png", "loose.png")
    data = open_data(str(tmp_path))
    assert paths(data.val) == ["valid/000.png"]
    assert any("not used" in n and "extra/, test/, 1 loose images" in n for n in data.notes)


def test_a_split_with_classes_on_one_side_only_is_unlabelled(tmp_path):
    put(tmp_path, "train/a/1.png", "train/b/1.png", "val/1.png")
    data = open_data(str(tmp_path))
    assert (data.classes, data.train.label(0)) == ((), None)
    assert any("taken as unlabelled" in note for note in data.notes)


def test_classes_named_like_splits_beside_others_are_classes(tmp_path):
    put(tmp_path, *(f"{c}/{i}.png" for c in ("train", "plane") for i in range(4)))
    assert open_data(str(tmp_path)).classes == ("plane", "train")


def test_one_sub_folder_is_no_class(tmp_path):
    put(tmp_path, *(f"holiday/{i}.png" for i in range(4)), "5.png")
    data = open_data(str(tmp_path))
    assert (data.classes, len(data.train) + len(data.val)) == ((), 5)
    assert any("holiday" in note and "not taken for a class" in note for note in data.notes)


def test_links_are_followed_but_not_in_circles(tmp_path):
    flat(tmp_path / "elsewhere", 4)
    flat(tmp_path / "data" / "a" / "deep", 3)
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "deep" / "round").symlink_to(tmp_path / "data" / "a")
    found = split_folder(str(tmp_path / "data"))
    expected = [f"a/deep/{i:03d}.png" for i in range(3)] + [f"b/{i:03d}.png" for i in range(4)]
    assert sorted(found.train.paths + found.val.paths) == expected
    assert found.classes == ("a", "b")


def test_names_in_any_script_and_no_script(tmp_path):
    names = ["ü.png", "猫.png", "a b\nc.png", "x'\".png", os.fsdecode(b"caf\xe9.png")]
    try:
        put(tmp_path, *names)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    data = open_data(str(tmp_path))
    for source in (data.train, data.val):
        for i in range(len(source)):
            assert source.image(i).shape == (3, 10, 14)
            source.name(i).encode("utf-8")


# Folders: what is refused


def test_missing_and_wrong_places(tmp_path):
    assert "is no such folder; give digits, tv:NAME@ROOT, hf:NAME, or a folder" in error_of(tmp_path / "no")
    (tmp_path / "file").write_text("x")
    assert "is a file, not a folder" in error_of(tmp_path / "file")
    assert "is no such folder" in error_of("digit")
    assert "--in-chans 4" in error_of("digits", in_chans=4)


def test_empty_folders(tmp_path):
    assert "holds no images" in error_of(tmp_path)
    assert "nothing" in error_of(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "sub").mkdir()
    assert "only 1 other files, such as a.txt" in error_of(tmp_path)
    put(tmp_path, "1.png")
    assert "holds one image; two are needed" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["train/1.png", "train/2.png"], "no val/, valid/ or test/"),
        (["train/a/1.png", "train/b/2.png", "loose.png"], "no val/, valid/ or test/"),
        (["val/1.png"], "no train/"),
        (["test/1.png", "val/1.png"], "no train/"),
    ],
)
def test_half_a_split_is_refused(tmp_path, names, missing):
    put(tmp_path, *names)
    (tmp_path / "other").mkdir()
    message = error_of(tmp_path)
    assert missing in message
    assert re.search(rf"or give --data {re.escape(str(tmp_path))}/(train|val|test)$", message)


def test_classes_that_training_never_sees_are_refused(tmp_path):
    put(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png")
    assert "val/ has classes that train/ lacks: c" in error_of(tmp_path)


@contextmanager
def without_root():
    """A user that permissions apply to: nobody, where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that any user may enter; pytest's own may be entered by their owner only."""
    if os.name != "posix":
        pytest.skip("needs POSIX permissions")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with without_root():
            reachable = os.access(folder, os.R_OK | os.X_OK, effective_ids=True)
        if not reachable:
            pytest.skip(f"{tempfile.gettempdir()} is closed to other users")
        yield Path(folder)


def test_unreadable_folder_and_unreadable_class(open_folder):
    put(open_folder, *(f"data/{c}/{i}.png" for c in "ab" for i in range(3)))
    (open_folder / "data" / "b").chmod(0)
    (open_folder / "shut").mkdir(mode=0)
    with without_root():
        assert error_of(open_folder / "shut").endswith("shut: Permission denied")
        assert error_of(open_folder / "data").endswith("b: Permission denied")
    (open_folder / "data" / "b").chmod(0o755)


# Files: what is decoded


def exact(image, in_chans=3):
    pixels = np.asarray(image.convert("RGB" if in_chans == 3 else "L"))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).copy()).permute(2, 0, 1)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_every_common_kind_of_file_is_decoded(in_chans):
    image = picture()
    files = {
        "jpeg": encoded(image, "JPEG"),
        "progressive": encoded(image, "JPEG", progressive=True),
        "grey jpeg": encoded(image.convert("L"), "JPEG"),
        "png": encoded(image, "PNG"),
        "grey png": encoded(image.convert("L"), "PNG"),
        "webp": encoded(image, "WEBP", lossless=True),
        "bmp": encoded(image, "BMP"),
        "tiff": encoded(image, "TIFF"),
        "ppm": encoded(image, "PPM"),
        "bits": encoded(image.convert("1"), "PNG"),
        "palette": encoded(image.quantize(16), "PNG"),
        "gif": encoded(image.quantize(16), "GIF"),
    }
    for name, data in files.items():
        out = decode(data, in_chans)
        assert out.shape == (in_chans, 10, 14), name
        assert out.dtype == torch.uint8
        expected = exact(Image.open(io.BytesIO(data)), in_chans)
        assert torch.equal(out, expected), name


def test_cmyk_jpegs_have_the_right_colours():
    """Stored inverted, as Adobe does and as Pillow writes them: red stays red."""
    red = Image.new("RGB", (16, 16), (250, 20, 30)).convert("CMYK")
    out = decode(encoded(red, "JPEG", quality=95)).float().mean((1, 2))
    assert (out - torch.tensor([250.0, 20.0, 30.0])).abs().max() < 6


def test_16_bit_images_keep_their_range():
    values = np.array([[0, 257, 128 * 257], [255 * 257, 100 * 257 + 100, 200 * 257 - 100]], dtype=np.uint16)
    expected = torch.tensor([[0, 1, 128], [255, 100, 200]], dtype=torch.uint8)
    for fmt in ("PNG", "TIFF"):
        assert torch.equal(decode(encoded(Image.fromarray(values), fmt), 1)[0], expected)
        assert torch.equal(decode(encoded(Image.fromarray(values), fmt), 3)[2], expected)


def test_pixels_without_a_range_are_refused():
    for values in (np.ones((4, 4), np.float32), np.full((4, 4), 70000, np.int32)):
        with pytest.raises(BadImage, match="no defined range"):
            decode(encoded(Image.fromarray(values), "TIFF"))


def test_what_is_transparent_is_white():
    """And what is painted below it stays unseen: here a red nobody was to see."""
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[..., 0] = 255
    rgba[:, 3:, 3] = 255
    image = Image.fromarray(rgba)
    palette = image.quantize(4)
    grey = Image.fromarray(np.dstack([np.full((4, 6), 90, np.uint8), rgba[..., 3]]), "LA")
    for file in (encoded(image, "PNG"), encoded(image, "WEBP", lossless=True), encoded(palette, "PNG")):
        out = decode(file)
        assert (out[:, :, :3] == 255).all()
        assert (out[:, :, 3:] == torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]).all()
    assert decode(encoded(grey, "PNG"), 1)[0, 0].tolist() == [255, 255, 255, 90, 90, 90]


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(fmt, orientation):
    """A bright corner at the top left, however the camera was held."""
    upright = np.full((16, 32, 3), 40, np.uint8)
    upright[:8, :8] = 220
    turned = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(turned))
    out = decode(encoded(image, fmt, exif=exif.tobytes(), **({"quality": 95} if fmt != "PNG" else {})))
    assert out.shape == (3, 16, 32)
    assert (out.int() - torch.from_numpy(upright).permute(2, 0, 1)).abs().float().mean() < 4


def test_broken_files_are_bad_images(tmp_path):
    good = encoded(picture(40, 50), "JPEG")
    cases = {b"": "empty file", b"hello": "not an image", good[:300]: ".", good[:-200]: "truncated"}
    cases |= {encoded(picture(40, 50), "PNG")[:500]: ".", good[:-2]: "."}
    for data, reason in cases.items():
        with pytest.raises(BadImage, match=reason) as caught:
            decode(data)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadImage, match="No such file"):
        read_image(str(tmp_path / "gone.jpg"))
    with pytest.raises(BadImage, match="directory"):
        read_image(str(tmp_path))


FORMATS = [
    ("JPEG", "RGB"),
    ("JPEG", "CMYK"),
    ("PNG", "RGBA"),
    ("PNG", "P"),
    ("GIF", "P"),
    ("TIFF", "RGB"),
    ("BMP", "RGB"),
]


@settings(max_examples=150)
@given(
    kind=st.sampled_from(FORMATS),
    cut=st.floats(0, 1),
    at=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
)
def test_damaged_bytes_give_an_image_or_a_bad_image_and_nothing_else(kind, cut, at):
    fmt, mode = kind
    data = bytearray(encoded(picture(20, 30).convert(mode), fmt))
    for where, value in at:
        data[int(where * min(300, len(data)))] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            out = decode(bytes(data[: int(cut * len(data))] if cut < 0.8 else data))
        except BadImage:
            return
    assert out.dtype == torch.uint8
    assert out.shape[0] == 3


# Broken files among good ones

QUIET = "ignore::leaven.recipes.common.sources.BadImageWarning"


def with_broken(tmp_path, n, broken):
    flat(tmp_path, n)
    for i in broken:
        path = tmp_path / f"{i:03d}.png"
        path.write_bytes(path.read_bytes()[:60])
    return FileSource(str(tmp_path), [f"{i:03d}.png" for i in range(n)], list(range(n)), max_bad_images=3)


def test_an_unreadable_image_is_replaced_by_the_next_readable_one(tmp_path):
    source = with_broken(tmp_path, 6, [2, 3, 5])
    assert [source.label(i) for i in range(6)] == [0, 1, 4, 4, 4, 0]
    for i, j in enumerate([0, 1, 4, 4, 4, 0]):
        assert torch.equal(source.image(i), read_image(source.path(j)))
    assert source.bad_count == 3
    assert source.bad_images() == [str(tmp_path / f"00{i}.png") for i in (2, 3, 5)]


def test_an_unreadable_image_is_replaced_within_its_part_of_the_images(tmp_path):
    """By the next one of all it would be a held-out image that is trained on."""
    source = with_broken(tmp_path, 8, [1, 4, 7])
    train = Subset(source, np.array([0, 1, 3, 4, 6, 7]))
    few = Subset(train, np.array([0, 1, 3, 5]))
    for part, expected in ((train, [0, 3, 3, 6, 6, 0]), (few, [0, 0, 0, 0])):
        assert [part.label(i) for i in range(len(part))] == expected
        source._status.zero_()
        for i, j in enumerate(expected):
            assert torch.equal(part.image(i), read_image(source.path(j)))
            assert part.label(i) == j
        source._status.zero_()
    with pytest.raises(TooManyBadImages, match=r"^no image that is left to take can be read: .*001.png"):
        Subset(source, np.array([1, 4])).image(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_named_once_and_training_goes_on(tmp_path, workers):
    source = with_broken(tmp_path, 24, [4, 9, 23])
    loader = make_loader(KeyedDataset(source, raw), KeyedBatchSampler(24, 4, 1), workers)
    with pytest.warns(BadImageWarning) as caught:
        labels = [int(label) for _, part in loader for label in part]
    readable = [i for i in range(24) if i not in (4, 9, 23)]
    assert sorted(labels) == sorted([*readable, 5, 10, 0])
    texts = sorted(str(w.message) for w in caught if w.category is BadImageWarning)
    for i, text in zip((4, 9, 23), texts, strict=True):
        assert text.startswith(f"replaced {tmp_path}/{i:03d}.png by the next image: ")
        assert "truncated" in text
        assert text.endswith("at most 3 allowed)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(loader)


@pytest.mark.filterwarnings(QUIET)
def test_streams_with_broken_images_are_bit_equal_for_any_workers_and_after_a_resume(tmp_path):
    def stream(workers, epoch=0, position=0):
        source = with_broken(tmp_path, 24, [4, 9, 23])
        loader = make_loader(
            KeyedDataset(source, TrainTransform((8, 8), (0.5, 1.0), 0.5, (0.5,) * 3, (0.2,) * 3)),
            KeyedBatchSampler(24, 4, 1, epoch=epoch, position=position),
            workers,
        )
        return [batch for _ in range(epoch, 2) for batch in loader]

    whole = stream(0)
    for other in (stream(2), whole[:7] + stream(2, 1, 1), whole[:7] + stream(0, 1, 1)):
        for (images, labels), (same, also) in zip(whole, other, strict=True):
            assert torch.equal(images, same)
            assert torch.equal(labels, also)


def test_the_first_few_are_named_and_the_rest_are_counted(tmp_path):
    source = with_broken(tmp_path, 40, range(1, 40, 2))
    source.max_bad_images = 30
    said = []
    for i in range(40):
        source.image(i)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            source.report()
        said += [str(warning.message) for warning in caught]
    assert [text.split(":")[0] for text in said[:5]] == [
        f"replaced {tmp_path}/{i:03d}.png by the next image" for i in (1, 3, 5, 7, 9)
    ]
    assert said[5:] == [f"replaced more images: {n} unreadable so far, at most 30 allowed" for n in (10, 20)]


class Backwards:
    """A source made of another one."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def image(self, index):
        return self.source.image(len(self) - 1 - index)

    def label(self, index):
        return self.source.label(len(self) - 1 - index)


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize("wrap", [lambda source: source, Backwards])
@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_images_are_one_line_that_names_them(tmp_path, workers, wrap):
    source = wrap(with_broken(tmp_path, 40, range(1, 40, 3)))
    loader = make_loader(KeyedDataset(source, raw), KeyedBatchSampler(40, 4, 1), workers)
    with pytest.raises(TooManyBadImages) as caught:
        list(loader)
    assert isinstance(caught.value, UserError)
    assert not caught.value.on_every_rank
    message = str(caught.value)
    assert re.match(
        r"\d+ unreadable images, more than --max-bad-images 3: .*\.png.*; repair or remove", message
    )
    assert "\n" not in message
    assert "Traceback" not in message


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_of_nothing_but_broken_images(tmp_path, workers):
    source = with_broken(tmp_path, 3, range(3))
    loader = make_loader(KeyedDataset(source, raw), KeyedBatchSampler(3, 1), workers)
    with pytest.raises(TooManyBadImages, match="none of the 3 images of this split can be read"):
        list(loader)


def test_no_broken_image_at_all_may_be_asked_for(tmp_path):
    with_broken(tmp_path, 20, [3])
    data = open_data(str(tmp_path), max_bad_images=0)
    source = next(source for source in (data.train, data.val) if "003.png" in paths(source))
    with pytest.raises(TooManyBadImages, match="1 unreadable images, more than --max-bad-images 0"):
        source.image(paths(source).index("003.png"))


def test_an_unreadable_file_counts_as_broken(open_folder):
    source = with_broken(open_folder, 6, [])
    (open_folder / "002.png").chmod(0)
    with without_root():
        assert source.label(2) == 3
        with pytest.warns(BadImageWarning, match="002.png by the next image: Permission denied"):
            source.report()


# torchvision's data sets


def fashion(root, leaven_data):
    """Unpacked, as torchvision wants to find it."""
    raw_folder = root / "FashionMNIST" / "raw"
    raw_folder.mkdir(parents=True)
    for path in (leaven_data / "fashion-mnist").glob("*.gz"):
        (raw_folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return root


def test_fashion_mnist_is_read_where_it_lies(tmp_path, leaven_data):
    from torchvision.datasets import FashionMNIST

    root = fashion(tmp_path, leaven_data)
    data = open_data(f"tv:FashionMNIST@{root}", in_chans=1)
    theirs = FashionMNIST(root, train=True)
    assert (data.name, data.kind, len(data.train), len(data.val)) == (
        "FashionMNIST",
        "torchvision",
        60000,
        10000,
    )
    assert data.classes == tuple(theirs.classes)
    for i in (0, 1, 59999):
        assert torch.equal(data.train.image(i)[0], theirs.data[i])
        assert data.train.label(i) == theirs.targets[i]
    share = np.bincount(theirs.data.numpy().ravel(), minlength=256) / theirs.data.numel()
    grey = np.arange(256) / 255
    mean = share @ grey
    assert data.mean == pytest.approx((mean,), abs=0.01)
    assert data.std == pytest.approx((np.sqrt(share @ (grey - mean) ** 2),), abs=0.01)
    assert data.image_size == (64, 64)
    assert "10000 held out (test)" in data.notes[0]
    assert open_data(f"tv:FashionMNIST@{root}").train.image(0).shape == (3, 28, 28)


@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_in_a_torchvision_set_is_a_bad_image():
    """Its images come decoded, but not turned: that is left to us, and Pillow raises what it likes."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "hello"
    file = io.BytesIO()
    Image.new("RGB", (20, 24)).save(file, "JPEG", exif=exif)
    whole = file.getvalue()
    place = whole.index(b"Exif")
    kinds = set()
    for at in range(place + 6, place + 50):  # the tags and their types, one byte wrong
        for byte in (0, 5, 12, 255):
            damaged = Image.open(io.BytesIO(whole[:at] + bytes([byte]) + whole[at + 1 :]))
            source = TorchvisionSource(Pairs([(damaged.convert("RGB"), 0)]), "Pairs")
            try:
                source.read(0)
            except BadImage as error:
                kinds.add(str(error))
    assert kinds


class Pairs(list):
    targets = (0,)


def test_torchvision_mistakes(tmp_path):
    assert "is no such folder" not in error_of(f"tv:CIFAR10@{tmp_path}")
    message = error_of(f"tv:CIFAR10@{tmp_path}")
    assert f"CIFAR10 cannot be read from {tmp_path} (Dataset not found or corrupted)" in message
    assert f"'tv:CIFAR10@{tmp_path}?download'" in message
    assert list(tmp_path.iterdir()) == []
    assert "did you mean CIFAR10?" in error_of(f"tv:CIFAR01@{tmp_path}")
    assert "expected tv:NAME@ROOT" in error_of("tv:CIFAR10")
    assert "expected tv:NAME@ROOT" in error_of("tv:@/x")
    assert "cannot be read" in error_of("tv:Flowers102@/nowhere")
    for name in ("SUN397", "EMNIST", "CocoDetection", "VisionDataset", "FakeData"):
        assert "has no train and test split" in error_of(f"tv:{name}@{tmp_path}")


def test_several_processes_do_not_download_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "download with one process first" in error_of(f"tv:CIFAR10@{tmp_path}?download")


def test_a_download_is_asked_for_only_when_told(tmp_path, monkeypatch):
    import torchvision.datasets

    asked = []

    class Toy(torchvision.datasets.VisionDataset):
        def __init__(self, root, split="train", download=False):
            if split not in ("train", "test"):
                raise ValueError(f"Unknown value '{split}' for argument split")
            asked.append((split, download))
            self.labels = [1, 0, 1]

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return picture(40, 30, seed=index), self.labels[index]

    monkeypatch.setattr(torchvision.datasets, "SVHN", Toy)
    data = open_data(f"tv:SVHN@{tmp_path}")
    assert (data.classes, data.train.label(1), data.image_size) == (("0", "1"), 0, (64, 64))
    assert torch.equal(data.val.image(2), exact(picture(40, 30, seed=2)))
    open_data(f"tv:SVHN@{tmp_path}?download")
    assert asked == [("train", False), ("test", False), ("train", True), ("test", True)]
    monkeypatch.setattr(Toy, "__len__", lambda self: 4)
    assert "does not give one class per image" in error_of(f"tv:SVHN@{tmp_path}")


# Sizes


@pytest.mark.parametrize(
    ("shape", "size"), [((8, 8), 64), ((64, 64), 64), ((70, 300), 96), ((256, 320), 224)]
)
def test_suggested_size(shape, size):
    source = ArraySource(torch.zeros(20, 1, *shape, dtype=torch.uint8), None)
    assert suggested_size(source) == (size, size)


def test_photos_from_folder_to_batch(tmp_path, leaven_data):
    data = open_data(str(leaven_data / "imagenette224-mini"))
    assert (len(data.train), len(data.val), len(data.classes), data.image_size) == (1500, 500, 10, (224, 224))
    transform = TrainTransform((96, 128), (0.67, 1.0), 0.5, data.mean, data.std)
    loader = make_loader(KeyedDataset(data.train, transform), KeyedBatchSampler(1500, 32), workers=2)
    images, labels = next(iter(loader))
    assert images.shape == (32, 3, 96, 128)
    assert abs(images.mean()) < 0.3
    assert 0.8 < images.std() < 1.3
    assert len(set(labels.tolist())) > 5
    shutil.copytree(leaven_data / "imagenette224-mini" / "val" / "n03028079", tmp_path / "flat")
    assert open_data(str(tmp_path / "flat")).classes == ()
