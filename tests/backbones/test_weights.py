import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision.models
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import leaven
from leaven.backbones import UnknownBackbone, WeightsMismatch, create, load, save


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


def shake(model: nn.Module) -> nn.Module:
    """Different from any fresh model in every tensor, buffers included."""
    for value in model.state_dict().values():
        value.copy_(torch.randint_like(value, 1, 100))
    return model


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.register_buffer("grid", torch.arange(6.0).view(2, 3).T)
        self.register_buffer("row", self.grid[0])


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_atto", "vit_ti", "swin_t", "tv:resnet18", "tv:mobilenet_v3_small"]
)
def test_round_trip_into_plain_models(tmp_path, name: str) -> None:
    model = shake(create(name).to(memory_format=torch.channels_last))
    path = tmp_path / "deep" / "backbone.safetensors"
    save(model, path, name=name)
    if name.startswith("tv:"):
        plain = torchvision.models.get_model(name[3:], weights=None)
    else:
        plain = timm.create_model(leaven.backbones.resolve(name), num_classes=0)
    plain.load_state_dict(load_file(path), strict=True)
    assert equal(plain, model)
    assert equal(load(name, path), model)
    assert metadata(path)["backbone"] == leaven.backbones.resolve(name)
    assert metadata(path)["leaven"] == leaven.__version__
    assert os.listdir(path.parent) == [path.name]


def test_the_same_pixels_give_the_same_features(tmp_path) -> None:
    model = create("resnet18").eval()
    model.bn1.running_mean.normal_()
    save(model, tmp_path / "w.safetensors", name="resnet18")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(load("resnet18", tmp_path / "w.safetensors").eval()(x), model(x))


def test_tied_and_overlapping_tensors_keep_all_their_keys(tmp_path) -> None:
    model = Tied()
    save(model, tmp_path / "w.safetensors", name=None)
    fresh = Tied()
    nn.init.zeros_(fresh.one.weight)
    assert load(fresh, tmp_path / "w.safetensors") is fresh
    assert equal(fresh, model)
    assert fresh.two.weight is fresh.one.weight
    assert set(load_file(tmp_path / "w.safetensors")) == set(model.state_dict())
    assert "backbone" not in metadata(tmp_path / "w.safetensors")


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_are_looked_through(tmp_path, wrap) -> None:
    model = create("test_resnet")
    save(wrap(model), tmp_path / "w.safetensors", name="test_resnet")
    fresh = create("test_resnet")
    load(wrap(fresh), tmp_path / "w.safetensors")
    assert equal(fresh, model)


def test_metadata_says_how_to_build(tmp_path) -> None:
    model = create("test_resnet", in_chans=1, num_classes=4)
    notes = {"in_chans": 1, "num_classes": 4, "epochs": 3}
    save(model, tmp_path / "w.safetensors", name="test_resnet", metadata=notes)
    assert equal(load("test_resnet", tmp_path / "w.safetensors"), model)
    assert metadata(tmp_path / "w.safetensors")["epochs"] == "3"


@pytest.mark.parametrize("size", [64, (32, 64)])
def test_a_noted_image_size_is_that_of_the_network_unless_another_is_given(tmp_path, size) -> None:
    model = create("test_vit", image_size=size)
    save(model, tmp_path / "w.safetensors", name="test_vit", metadata={"image_size": size})
    assert equal(load("test_vit", tmp_path / "w.safetensors"), model)
    assert equal(load("test_vit", tmp_path / "w.safetensors", image_size=size), model)
    with pytest.raises(WeightsMismatch, match="shapes differ: pos_embed"):
        load("test_vit", tmp_path / "w.safetensors", image_size=96)


def test_an_unknown_name_is_refused_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(UnknownBackbone):
        save(nn.Linear(1, 1), tmp_path / "w.safetensors", name="no_such_net")
    assert os.listdir(tmp_path) == []


def test_mismatches_name_the_first_few_keys_and_change_nothing(tmp_path) -> None:
    path = tmp_path / "w.safetensors"
    save(create("resnet18"), path, name="resnet18")
    with pytest.raises(WeightsMismatch) as caught:
        load("resnet34", path)
    message = str(caught.value)
    assert message.startswith(
        f"{path} (written from resnet18) does not fit resnet34: it lacks layer1.2.conv1.weight"
    )
    assert " more" in message
    assert "\n" not in message
    assert len(message) < 400

    save(create("resnet34"), path, name="resnet34")
    with pytest.raises(WeightsMismatch, match=r"it has unknown layer1\.2\.bn1\.bias, .* and 93 more$"):
        load("resnet18", path)

    grey = create("resnet18", in_chans=1)
    save(create("resnet18"), path, name="resnet18")
    before = {key: value.clone() for key, value in grey.state_dict().items()}
    with pytest.raises(
        WeightsMismatch,
        match=r"does not fit ResNet: shapes differ: conv1\.weight is \(64, 3, 7, 7\) instead of \(64, 1, 7, 7\)$",
    ):
        load(grey, path)
    assert all(torch.equal(value, before[key]) for key, value in grey.state_dict().items())


def test_missing_and_broken_files(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^no weights file .*none\.safetensors$"):
        load("resnet18", tmp_path / "none.safetensors")
    path = tmp_path / "w.safetensors"
    save(create("test_resnet"), path, name="test_resnet")
    with pytest.raises(FileNotFoundError, match=r"is a folder; did you mean .*w\.safetensors\?$"):
        load("test_resnet", tmp_path)
    torch.save({}, tmp_path / "w.pth")
    with pytest.raises(WeightsMismatch, match="convert pickled weights"):
        load("test_resnet", tmp_path / "w.pth")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsMismatch, match="is not a complete safetensors file") as caught:
        load("test_resnet", path)
    assert "\n" not in str(caught.value)


FULL_DISK = """
import resource, signal, sys
from torch import nn
from leaven.backbones import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes past the limit then fail, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(nn.Linear(300, 300), sys.argv[1], name=None)
except OSError as error:
    print(error)
"""


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "w.safetensors"
    save(create("test_resnet"), path, name="test_resnet")
    before = path.read_bytes()
    out = subprocess.run(
        [sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True
    ).stdout
    assert out.startswith(f"could not write {path}: ")
    assert out.count("\n") == 1
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_equal_models_give_equal_files_that_others_may_read(tmp_path: Path) -> None:
    """By the umask, as other files; safetensors alone writes for the owner, and its notes in random order."""
    notes = {f"note {i}": 'ü "quoted"\n' for i in range(20)}
    model = nn.Linear(2, 3)
    for name in ("a", "b", "c"):
        save(model, tmp_path / name, name=None, metadata=notes)
    other = tmp_path / "other"
    other.touch()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert (tmp_path / "a").stat().st_mode == other.stat().st_mode
    read = metadata(tmp_path / "a")
    assert notes.items() <= read.items()
    load(nn.Linear(2, 3), tmp_path / "a")


def test_a_run_folder_means_its_backbone_rather_than_the_average(tmp_path: Path) -> None:
    for name in ("backbone-ema", "backbone"):
        save(nn.Linear(2, 3), tmp_path / f"{name}.safetensors", name=None)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*/backbone\.safetensors\?$"):
        load(nn.Linear(2, 3), tmp_path)


def test_a_plain_network_and_weights_of_evonorm(tmp_path: Path) -> None:
    save(nn.Linear(2, 3), tmp_path / "w", name=None, metadata={"evonorm": "s0"})
    with pytest.raises(
        WeightsMismatch, match=r"of a network with EvoNorm-s0, so build that first: .*replace_norm_act"
    ):
        load(nn.BatchNorm2d(3), tmp_path / "w")
    with pytest.raises(WeightsMismatch) as rebuilt:  # what differs now is something else
        load(nn.Linear(2, 4), tmp_path / "w")
    assert "EvoNorm" not in str(rebuilt.value)
