"""Flags, files and presets become settings; mistakes become one line."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from typing import Literal

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from leaven.recipes.common.flags import CommonSettings, UserError, flag, from_yaml, parse, run_main, to_yaml


@dataclasses.dataclass
class Settings(CommonSettings):
    """A recipe's settings."""

    lr: float = 0.3  # another default, the parent's help text
    mask_ratio: float = flag(0.6, "share hidden, in 100 %")
    scale: tuple[float, float] = flag((0.67, 1.0), "range of crop areas")
    depths: tuple[int, ...] = flag((), "depths")
    names: tuple[str, ...] = flag((), "names")
    steps: int | None = flag(None, "steps")
    kind: Literal["a", "b", 3] = flag("a", "kind")
    fast: bool = flag(True, "fast")


def file(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


# Values


def test_defaults():
    assert parse(Settings, []) == Settings()
    assert parse(CommonSettings, []) == CommonSettings()


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--batch-size", "8"], "batch_size", 8),
        (["--batch_size", "8"], "batch_size", 8),
        (["--batch_size=8"], "batch_size", 8),
        (["--lr", "1e-4"], "lr", 1e-4),
        (["--lr=1"], "lr", 1.0),
        (["--image-size", "64"], "image_size", (64, 64)),
        (["--image-size", "96x128"], "image_size", (96, 128)),
        (["--image-size", "96X128"], "image_size", (96, 128)),
        (["--image-size", "none"], "image_size", None),
        (["--scale", "0.5,0.9"], "scale", (0.5, 0.9)),
        (["--depths", "1,2,3"], "depths", (1, 2, 3)),
        (["--depths", "4"], "depths", (4,)),
        (["--depths", ""], "depths", ()),
        (["--names", "max,x_y"], "names", ("max", "x_y")),
        (["--steps", "5"], "steps", 5),
        (["--steps", "none"], "steps", None),
        (["--kind", "b"], "kind", "b"),
        (["--kind", "3"], "kind", 3),
        (["--no-fast"], "fast", False),
        (["--fast"], "fast", True),
        (["--compile"], "compile", True),
        (["--channels_last"], "channels_last", True),
        (["--output-dir", "runs/my_run"], "output_dir", "runs/my_run"),
        (["--output_dir=my_run=2"], "output_dir", "my_run=2"),
        (["--mixed-precision", "bf16"], "mixed_precision", "bf16"),
        (["--lr", "1", "--lr", "2"], "lr", 2.0),
    ],
)
def test_a_flag_sets_its_field_in_its_type(argv, name, value):
    settings = parse(Settings, argv)
    assert getattr(settings, name) == value
    assert type(getattr(settings, name)) is type(value)
    assert dataclasses.replace(Settings(), **{name: value}) == settings


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("lr: 1e-3", "lr", 1e-3),  # text, in YAML 1.1
        ("lr: 1", "lr", 1.0),
        ("batch-size: 8", "batch_size", 8),
        ("batch_size: '8'", "batch_size", 8),
        ("batch_size: 8.0", "batch_size", 8),
        ("mixed_precision: no", "mixed_precision", "no"),  # False, in YAML 1.1
        ("image_size: 96x128", "image_size", (96, 128)),
        ("image_size: [96, 128]", "image_size", (96, 128)),
        ("image_size: 64", "image_size", (64, 64)),
        ("image_size: null", "image_size", None),
        ("scale: [0.5, 1]", "scale", (0.5, 1.0)),
        ("names: [a, b]", "names", ("a", "b")),
        ("fast: no", "fast", False),
        ("fast: 'off'", "fast", False),
        ("kind: 3", "kind", 3),
        ("output_dir: 2026-01-31", "output_dir", "2026-01-31"),  # a date, in YAML 1.1
        ("output_dir: 7", "output_dir", "7"),
        ("", "lr", 0.3),
    ],
)
def test_a_file_sets_fields_in_their_types(tmp_path, text, name, value):
    settings = parse(Settings, ["--config", file(tmp_path, text)])
    assert getattr(settings, name) == value
    assert type(getattr(settings, name)) is type(value)
    assert dataclasses.replace(Settings(), **{name: value}) == settings


def test_precedence_is_default_preset_file_flag(tmp_path):
    presets = {"paper": {"lr": 1.0, "epochs": 1600, "batch_size": 4096, "image_size": (224, 224)}}
    path = file(tmp_path, "epochs: 20\nbatch_size: 32\n")
    argv = ["--batch-size", "8", "--preset", "paper", "-c", path]
    settings = parse(Settings, argv, presets=presets)
    assert settings == Settings(lr=1.0, epochs=20, batch_size=8, image_size=(224, 224))
    named = file(tmp_path, "preset: paper\nepochs: 3\n")
    assert parse(Settings, ["-c", named], presets=presets).batch_size == 4096
    two = presets | {"small": {"batch_size": 16}}
    assert parse(Settings, ["-c", named, "--preset", "small"], presets=two).batch_size == 16
    assert parse(Settings, [], presets=presets) == Settings()


@example(1.0, None, (), ("\x85", "\u2028x", "a\nb", "\udce9"), "Ä ", "no", True, None)
@given(
    lr=st.floats(0, 1e3),
    size=st.none() | st.tuples(st.integers(8, 999), st.integers(8, 999)),
    depths=st.lists(st.integers()).map(tuple),
    names=st.lists(st.text()).map(tuple),
    text=st.none() | st.text().filter(lambda t: t.lower() not in ("none", "null")),
    precision=st.sampled_from(["no", "bf16", "fp16"]),
    fast=st.booleans(),
    steps=st.none() | st.integers(),
)
def test_settings_survive_yaml(lr, size, depths, names, text, precision, fast, steps):
    settings = Settings(
        lr=lr,
        image_size=size,
        depths=depths,
        names=names,
        output_dir=text,
        mixed_precision=precision,
        fast=fast,
        steps=steps,
    )
    again = from_yaml(Settings, to_yaml(settings))
    assert again == settings
    assert to_yaml(again) == to_yaml(settings)


def test_a_written_config_is_a_config(tmp_path):
    settings = parse(
        Settings, ["--lr", "1e-4", "--image-size", "96x128", "--data", "bild/größe 1", "--no-fast"]
    )
    assert parse(Settings, ["--config", file(tmp_path, to_yaml(settings))]) == settings
    assert "data: bild/größe 1\n" in to_yaml(settings)
    assert list(yaml.safe_load(to_yaml(settings))) == [f.name for f in dataclasses.fields(Settings)]


# Mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batchsize", "8"], "unknown flag --batchsize; did you mean --batch-size?"),
        (["--batchsize=8"], "unknown flag --batchsize; did you mean --batch-size?"),
        (["--batch_sizes", "8"], "unknown flag --batch-sizes; did you mean --batch-size?"),
        (["--no-fat"], "unknown flag --no-fat; did you mean --no-fast?"),
        (["--xyzzy", "8"], "unknown flag --xyzzy; --help"),
        (["--epoch", "8"], "unknown flag --epoch; did you mean --epochs?"),  # and no silent abbreviation
        (["-x"], "unknown flag -x"),
        (["spark"], "unexpected argument spark"),
        (["--compile", "true"], "unexpected argument true"),
        (["--lr"], "argument --lr: expected one argument"),
        (["--lr", "fast"], "--lr: expected a number, got 'fast'"),
        (["--epochs", "1.5"], "--epochs: expected a whole number, got '1.5'"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
        (["--limit-batches", "0"], "--limit-batches must be at least 1, got 0"),
        (["--in-chans", "4"], "--in-chans must be 1 or 3, got 4"),
        (["--image-size", "12x12x3"], "--image-size: expected N or HxW"),
        (["--image-size", "big"], "--image-size: expected a whole number, got 'big'"),
        (["--image-size", "0"], "--image-size must be from 8 to 8192"),
        (["--scale", "0.5"], "--scale: expected 2 values"),
        (["--mixed-precision", "bf61"], "expected one of no, bf16, fp16; did you mean bf16?"),
        (["--config", "/nowhere/x.yaml"], "cannot read --config /nowhere/x.yaml: No such file or directory"),
        (["--preset", "papr"], "unknown preset papr; did you mean paper?; there are: paper"),
    ],
)
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(UserError) as caught:
        parse(Settings, argv, presets={"paper": {"lr": 1.0}})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 8", "unknown key batchsize in {path}; did you mean batch_size?"),
        ("model: x", "unknown key model in {path}"),
        ("epochs: 1.5", "--epochs: expected a whole number, got 1.5"),
        ("epochs: true", "--epochs: expected a whole number, got True"),
        ("epochs: [1]", "--epochs: expected a whole number"),
        ("epochs: null", "--epochs: expected a whole number, got None"),
        ("backbone: no", "--backbone: expected text, got False"),
        ("fast: 2", "--fast: expected true or false"),
        ("- 1", "{path} must hold `name: value` lines"),
        ("a: [", "{path} is not YAML"),
        ("mixed_precision: yes", "expected one of no, bf16, fp16"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    path = file(tmp_path, text)
    with pytest.raises(UserError) as caught:
        parse(Settings, ["--config", path])
    assert message.format(path=path) in str(caught.value)


def test_help_shows_defaults_as_flags_take_them(capsys):
    """Sides of candidates and pools are lists, not sizes."""

    @dataclasses.dataclass
    class Lists(CommonSettings):
        image_size: tuple[int, int] | None = (64, 96)
        pool: tuple[int, ...] = flag((1, 2, 4), "sides")

    with pytest.raises(SystemExit):
        parse(Lists, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 64x96)" in text
    assert "sides (default: 1,2,4)" in text


def test_unreadable_bytes_and_a_folder_as_config(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "x.yaml", tmp_path):
        with pytest.raises(UserError, match="cannot read --config"):
            parse(Settings, ["--config", str(path)])


def test_help_lists_every_flag_with_its_text_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Settings, ["--help"], presets={"paper": {}})
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(Settings):
        assert f"--{f.name.replace('_', '-')}" in text
    assert "peak learning rate (default: 0.3)" in text
    assert "share hidden, in 100 % (default: 0.6)" in text
    assert "--fast, --no-fast" in text
    assert "(default: 0.67,1.0)" in text
    assert "--preset NAME a named set of defaults: paper" in text


# run_main

PROGRAM = textwrap.dedent(
    """
    from leaven.backbones import resolve
    from leaven.recipes.common.flags import CommonSettings, parse, run_main

    def main():
        print(resolve(parse(CommonSettings).backbone))

    if __name__ == "__main__":
        run_main(main)
    """
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "recipe.py"
    path.write_text(PROGRAM)

    def run(*argv, **env):
        result = subprocess.run(
            [sys.executable, path, *argv], capture_output=True, text=True, env=os.environ | env
        )
        return result.returncode, result.stdout, result.stderr

    return run


def test_exit_codes_and_one_line_of_a_real_process(program):
    assert program("--backbone", "resnet18") == (0, "resnet18\n", "")
    assert program("--bacbone", "x") == (
        2,
        "",
        "error: unknown flag --bacbone; did you mean --backbone?; --help lists the flags\n",
    )
    code, out, err = program("--backbone", "convnext_tny")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert "convnext_tiny" in err


def test_ranks_and_defects(monkeypatch, capsys):
    class Mine(UserError):
        on_every_rank = False

    def fail(error):
        def main():
            raise error

        with pytest.raises(SystemExit) as caught:
            run_main(main, KeyError)
        return caught.value.code, capsys.readouterr().err

    waits = []
    monkeypatch.setattr("leaven.recipes.common.flags.time.sleep", waits.append)
    assert fail(UserError("two\nlines")) == (2, "error: two lines\n")
    assert fail(KeyError("named by the recipe")) == (2, "error: 'named by the recipe'\n")
    monkeypatch.setenv("RANK", "0")
    assert fail(UserError("said once")) == (2, "error: said once\n")
    monkeypatch.setenv("RANK", "1")
    assert fail(Mine("met here")) == (2, "error: met here (rank 1)\n")
    assert waits == []
    assert fail(UserError("said once")) == (2, "")
    assert waits == [10]
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_main(stopped)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"
