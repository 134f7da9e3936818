"""The `leaven` command, called as a user would and through `main`."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import leaven
from leaven import cli, doctor

ROOT = Path(__file__).parents[1]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipes folder with known content."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "spark.py").write_text('"""Teach it to fill in.\n\nMore."""\nprint("ran")\n')
    (folder / "rotnet.py").write_text("import nothing_that_exists\n")
    (folder / "__init__.py").write_text('"""Not a recipe."""\n')
    monkeypatch.setattr(cli, "recipes", lambda: {name: folder / f"{name}.py" for name in ("rotnet", "spark")})
    return folder


def clone_environment() -> dict[str, str]:
    """As in a plain clone: leaven is found through PYTHONPATH=src, ahead of any installed one."""
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONNOUSERSITE": "1"}


# --- ls


def test_ls_prints_each_recipe_with_its_first_line_and_imports_none(shelf: Path, capsys) -> None:
    assert cli.main(["ls"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "rotnet  (no description)",
        "spark   Teach it to fill in.",
    ]


def test_ls_lists_the_real_recipes_from_their_files() -> None:
    expected = {file.stem for file in (ROOT / "recipes").glob("*.py")} - {"__init__"}
    assert set(cli.recipes()) == expected
    assert "spark" in expected


def test_as_a_module_and_into_a_pipe_that_closes(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    run = {"cwd": tmp_path, "env": clone_environment(), "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run([sys.executable, "-m", "leaven", "ls"], stdout=writes, **run)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")
    done = subprocess.run([sys.executable, "-m", "leaven", "ls"], stdout=subprocess.PIPE, **run)
    assert (done.returncode, done.stderr) == (0, "")
    assert "spark" in done.stdout


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def stopped() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "doctor", stopped)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == ""


# --- cp


def test_cp_copies_the_file_as_it_is_and_creates_the_folder(shelf: Path, tmp_path: Path, capsys) -> None:
    target = tmp_path / "my project" / "deep"
    assert cli.main(["cp", "spark", str(target)]) == 0
    assert (target / "spark.py").read_bytes() == (shelf / "spark.py").read_bytes()
    command = capsys.readouterr().out.strip().split("try it with: ")[1]
    command = command.replace("python", sys.executable, 1)
    assert subprocess.run(command, shell=True, capture_output=True, text=True).stdout == "ran\n"


def test_cp_never_overwrites(shelf: Path, tmp_path: Path, capsys) -> None:
    mine = tmp_path / "spark.py"
    mine.write_text("mine")
    assert cli.main(["cp", "spark.py", str(tmp_path)]) == 2
    assert mine.read_text() == "mine"
    assert capsys.readouterr().err == f"leaven: {mine} exists already; nothing was copied\n"


def test_cp_suggests_a_near_name(shelf: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(["cp", "sprak", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == "leaven: no recipe is called 'sprak'; did you mean spark?\n"
    assert cli.main(["cp", "zebra", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == "leaven: no recipe is called 'zebra'; there are: rotnet, spark\n"
    assert not (tmp_path / "new").exists()


def test_cp_to_a_place_that_cannot_be_written_is_one_line(shelf: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert cli.main(["cp", "spark", str(file)]) == 2
    assert capsys.readouterr().err == f"leaven: {file} is not a folder; nothing was copied\n"
    assert cli.main(["cp", "spark", str(file / "below")]) == 2
    assert capsys.readouterr().err.startswith(f"leaven: cannot write {file / 'below' / 'spark.py'}: ")


def test_cp_of_the_real_recipe_runs_from_another_folder(tmp_path: Path) -> None:
    """From a plain clone: neither the copy nor leaven is where the command is run."""
    run = {"cwd": tmp_path, "env": clone_environment(), "capture_output": True, "text": True, "timeout": 300}
    copied = subprocess.run([sys.executable, "-m", "leaven.cli", "cp", "spark", "copy"], **run)
    assert copied.returncode == 0, copied.stderr
    done = subprocess.run([sys.executable, "copy/spark.py", "--dry-run", "--backbone", "resnet10t"], **run)
    assert done.returncode == 0, done.stderr


def test_wrong_use_exits_with_2(capsys) -> None:
    for arguments in ([], ["doctr"], ["cp", "spark"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"leaven {leaven.__version__}\n"


# --- doctor


def test_failure_runs_a_program_and_gives_its_last_line() -> None:
    assert doctor.failure("pass") is None
    assert doctor.failure("import no_such_thing") == "ModuleNotFoundError: No module named 'no_such_thing'"
    assert doctor.failure("import os; os.kill(os.getpid(), 11)") == "died with code -11"
    assert doctor.failure("raise SystemExit(3)") == "died with code 3"
    chatty = (
        "import os, sys; print('a harmless warning', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)"
    )
    assert doctor.failure(chatty) == "died with code -11"


def test_doctor_reports_all_sections_when_all_is_well(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(doctor, "failure", lambda program: None)
    assert doctor.doctor() == 0
    out = capsys.readouterr().out
    for part in (
        f"leaven {leaven.__version__}",
        "Python 3.",
        "Packages",
        "Devices and threads",
        "Extras",
        "spconv",
    ):
        assert part in out
    for name in ("torch", "torchvision", "timm", "accelerate", "kornia", "gpytorch", "scikit-learn"):
        assert f"  {name} " in out
        assert importlib.metadata.version(name) in out
    assert out.endswith("No problem found.\n")


@pytest.mark.parametrize(("finder", "hidden"), [("", False), ("last", True)])
def test_doctor_says_whether_a_folder_hides_the_package(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finder: str,
    hidden: bool,
) -> None:
    """It does so of an installation for development, whose finder is asked last."""
    (tmp_path / "leaven").mkdir()
    monkeypatch.chdir(tmp_path)
    site = ROOT / "src"
    if finder:
        site = tmp_path / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(
            "import sys\nfrom importlib.machinery import PathFinder\n"
            f"class Last:\n    def find_spec(name, path=None, target=None):\n"
            f"        return PathFinder.find_spec(name, [{str(ROOT / 'src')!r}]) if name == 'leaven' else None\n"
            "sys.meta_path.append(Last)\n"
        )
    monkeypatch.setenv("PYTHONPATH", str(site))
    real = doctor.failure
    monkeypatch.setattr(
        doctor, "failure", lambda program: real(program) if "leaven.__version__" in program else None
    )
    assert doctor.doctor() == hidden
    assert ("hides the package" in capsys.readouterr().out) == hidden


def test_doctor_survives_missing_and_broken_packages(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """torch is broken, timm and spconv are missing, all backends fail: a report and exit code 1."""
    version = doctor.installed_version
    monkeypatch.setattr(
        doctor, "installed_version", lambda n: None if n in ("timm", "spconv") else version(n)
    )
    monkeypatch.setattr(doctor, "installed_packages", lambda: {"torch", "kornia"})
    broken = {
        "import torch": "OSError: libtorch.so: cannot open",
        "import timm": "ModuleNotFoundError: no timm",
    }
    monkeypatch.setattr(
        doctor, "failure", lambda program: broken.get(program) or ("no torch" if "SparK" in program else None)
    )
    assert doctor.doctor() == 1
    out = capsys.readouterr().out
    assert "timm          -              ModuleNotFoundError: no timm" in out
    assert "unknown: torch cannot be imported" in out
    assert "  spconv        missing: spconv\n" in out
    assert "  spconv        not installed: pip install 'leaven[spconv]'" in out
    problems = out.split("4 to fix:\n")[1].splitlines()
    assert problems[0].startswith(f"  torch {version('torch')} cannot be imported (OSError: libtorch.so")
    assert problems[1] == "  timm is missing: pip install --upgrade timm"
    assert problems[2:] == [
        f"  SparK's backend {name!r} does not work: no torch" for name in ("packed", "dense")
    ]


def test_doctor_tries_spconv_by_whichever_name_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "failure", lambda program: "CUDA driver" if "'spconv'" in program else None)
    monkeypatch.setattr(doctor, "installed_packages", lambda: {"torch", "spconv-cu126"})
    assert doctor.doctor() == 1
    out = capsys.readouterr().out
    assert "  spconv        CUDA driver\n" in out
    assert "SparK's backend 'spconv' does not work: CUDA driver" in out


def test_doctor_sees_a_torchvision_for_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.torchvision_mismatch() is None
    version = {"torch": "2.15.0+cpu", "torchvision": "0.20.1", "packaging": "26"}
    monkeypatch.setattr(doctor, "installed_version", version.get)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy", "torch==2.5.1"])
    line = doctor.torchvision_mismatch()
    assert line is not None
    assert line.startswith("torchvision 0.20.1 needs torch==2.5.1, but torch 2.15.0+cpu is installed")
    version["torch"] = "2.5.1+cu121"
    assert doctor.torchvision_mismatch() is None
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch (>=2.5)"])
    version["torch"] = "2.6.0.dev20241101"  # a nightly is newer
    assert doctor.torchvision_mismatch() is None
    version["torch"] = "2.4.0"
    assert doctor.torchvision_mismatch() is not None
    del version["torchvision"]
    assert doctor.torchvision_mismatch() is None


def test_doctor_reads_requirements_with_and_without_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    for installed in (True, False):
        if not installed:
            monkeypatch.setattr(importlib.metadata, "requires", not_installed)
        core, extras = doctor.requirements()
        assert {"torch", "torchvision", "timm", "PyYAML", "scikit-learn"} <= set(core)
        assert extras["spconv"] == ["spconv"]
        assert "pytest" in extras["test"]


def test_doctor_knows_how_each_core_package_is_imported() -> None:
    core, _ = doctor.requirements()
    assert [name for name in core if importlib.util.find_spec(doctor.MODULES.get(name, name)) is None] == []


def test_doctor_tries_for_real(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Nothing replaced, but fewer packages: importing all of them takes many seconds."""
    monkeypatch.setattr(doctor, "requirements", lambda: (["torch", "no-such-package"], {"test": ["pytest"]}))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    assert doctor.doctor() == 1
    out = capsys.readouterr().out
    assert f"torch         {importlib.metadata.version('torch'):<14} ok" in out
    assert "1 to fix:\n  no-such-package is missing: pip install --upgrade no-such-package\n" in out
    assert "  packed        ok\n  dense         ok\n" in out
    assert "usable cores; torch uses 1 threads" in out
