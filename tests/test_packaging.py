"""What is installed is what is in the rooms, imports are cheap, and they point one way."""

import ast
import email
import importlib
import importlib.metadata
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import leaven

ROOT = Path(__file__).parents[1]
# Tier by tier: a room may import those of later tiers.
TIERS = [["recipes"], ["curricula", "bayes"], ["callbacks"], ["pretext"], ["backbones"]]
ROOMS = [room for tier in TIERS for room in tier]
HEAVY = {"timm", "torchvision", "kornia", "gpytorch", "sklearn", "matplotlib"}


def sources(room: str) -> list[Path]:
    """The room's .py files, relative to the root."""
    return sorted(file.relative_to(ROOT) for file in (ROOT / room).rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """Full names of the modules a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively; write the full name"
            assert node.module is not None
            # `from leaven import callbacks` imports leaven.callbacks
            yield from (
                (f"leaven.{alias.name}" for alias in node.names) if node.module == "leaven" else [node.module]
            )


# --- the built distributions


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist and the wheel made from it, built in a copy: a left-over build/ would put stale files in."""
    copy, out = tmp_path_factory.mktemp("copy") / "leaven", tmp_path_factory.mktemp("dist")
    leave = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=leave)
    # No isolation: the test extra brings the build backend, so that this needs no network.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_exactly_the_rooms_sources(wheel: zipfile.ZipFile) -> None:
    """A nested package missing from pyproject's list would be missing here, silently for whoever installs."""
    expected = {f"leaven/{file.as_posix()}" for room in ROOMS for file in sources(room)}
    expected |= {f"leaven/{file.name}" for file in (ROOT / "src/leaven").glob("*.py")}
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected | {"leaven/py.typed"}
    assert "leaven/pretext/spark/__init__.py" in found


def test_the_wheels_metadata(wheel: zipfile.ZipFile) -> None:
    folder = f"leaven-{leaven.__version__}.dist-info"
    metadata = email.message_from_bytes(wheel.read(f"{folder}/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("leaven", leaven.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "TERMS AND CONDITIONS" in wheel.read(f"{folder}/licenses/LICENSE").decode()
    assert "leaven = leaven.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    # Upper bounds lock users out of the next torch; only lower bounds are stated.
    assert not [line for line in metadata.get_all("Requires-Dist") or [] if re.search(r"<|~=|==\s*\d", line)]


def test_the_unpacked_wheel_works_alone(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """From a folder that knows nothing of this checkout, all comes from the wheel."""
    wheel.extractall(tmp_path / "site")
    program = (
        "import leaven, leaven.recipes.common, leaven.pretext.spark, leaven.cli\n"
        "for module in (leaven, leaven.recipes.common, leaven.pretext.spark): print(module.__file__)\n"
        "leaven.cli.main(['ls'])"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith(str(tmp_path / "site")) for line in lines[:3])
    assert any(line.startswith("spark ") for line in lines[3:])


def test_the_sdist_has_what_a_packager_needs(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "tests/conftest.py"} <= names
    assert not [name for name in names if name.endswith((".png", ".JPEG", ".gz", ".zip", ".pt", ".pyc"))]


def test_one_version_everywhere() -> None:
    assert f"\nversion: {leaven.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dynamic"] == [
        "version"
    ]


# --- the layout


@pytest.mark.skipif(sys.platform == "win32", reason="git on Windows may check links out as text files")
def test_there_is_one_link_per_room_and_no_other() -> None:
    links = {path.name: os.readlink(path) for path in (ROOT / "src/leaven").iterdir() if path.is_symlink()}
    assert links == {room: f"../../{room}" for room in ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_every_package_and_module_says_what_it_is(room: str) -> None:
    for file in sources(room):
        assert ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))), (
            f"{file} has no docstring"
        )


def test_scripts_do_not_shadow_dependencies() -> None:
    """A script's folder heads sys.path: recipes/timm.py would be what `import timm` finds."""
    taken = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    taken |= {"diffusers", "lightning", "datasets", "dask", "distributed", "transformers"}  # extras to come
    for folder in ("recipes", "benchmarks", "examples"):
        names = {path.stem for path in (ROOT / folder).iterdir() if not path.name.startswith("_")}
        assert not names & (taken - {"common"} if folder != "recipes" else taken)


def test_text_is_read_and_written_as_utf_8() -> None:
    """Wherever it runs: what a run has written under one locale is read again under another."""
    asked = 0
    for file in [file for room in (*ROOMS, "src/leaven") for file in sources(room)]:
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            name = (
                node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            )
            if name in ("read_text", "write_text"):
                asked += 1
                assert "encoding" in [word.arg for word in node.keywords], f"{file}:{node.lineno}"
    assert asked > 10


# --- imports


@pytest.mark.parametrize("room", ROOMS)
def test_imports_between_rooms_point_one_way(room: str) -> None:
    tier = next(i for i, rooms in enumerate(TIERS) if room in rooms)
    allowed = {room, *(later for rooms in TIERS[tier + 1 :] for later in rooms)}
    for file in sources(room):
        for name in imported(file):
            top, _, rest = name.partition(".")
            assert top not in ROOMS, f"{file} imports {name}; write leaven.{name}"
            target = rest.partition(".")[0]
            if top == "leaven" and target in ROOMS and name != "leaven.callbacks.core":
                assert target in allowed, (
                    f"{file} imports {name}, but {room} may import only {sorted(allowed)}"
                )


def test_the_core_of_callbacks_imports_torch_alone() -> None:
    """Every room may use it, so it and whatever it uses of its own room must stand on nothing else."""
    todo, seen = ["leaven.callbacks.core"], set()
    while todo:
        module = todo.pop()
        seen.add(module)
        for name in imported(Path(module.removeprefix("leaven.").replace(".", "/") + ".py")):
            top = name.partition(".")[0]
            if top == "leaven":
                assert name.startswith("leaven.callbacks."), f"{module} imports {name}"
                todo += [name] if name not in seen else []
            else:
                assert top == "torch" or top in sys.stdlib_module_names, f"{module} imports {name}"


def test_every_library_that_is_imported_is_declared() -> None:
    """Also those that would come along with another one today."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    declared = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower() for line in lines}
    providers = importlib.metadata.packages_distributions()
    for file in [file for room in (*ROOMS, "src/leaven") for file in sources(room)]:
        for module in {name.partition(".")[0] for name in imported(file)} - sys.stdlib_module_names:
            # doctor asks before it uses `packaging`
            if module not in ("leaven", "packaging"):
                names = {name.lower() for name in providers.get(module, [module])}
                assert names & declared, f"{file} imports {module}, which pyproject.toml does not declare"


@pytest.mark.parametrize("package", ["leaven", *(f"leaven.{room}" for room in ROOMS)])
def test_importing_a_room_is_cheap(package: str) -> None:
    """In a fresh process: nothing heavy is loaded, and no room under its bare name."""
    program = f"import sys, {package}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}  # this tree, whatever is installed
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "leaven" in loaded
    assert not loaded & (HEAVY | set(ROOMS))
    if package == "leaven":
        assert "torch" not in loaded


def test_every_public_name_imports() -> None:
    """Each package's and module's __all__, and no room under its bare name afterwards."""
    checked = 0
    for found in [None, *pkgutil.walk_packages(leaven.__path__, "leaven.")]:
        try:
            module = leaven if found is None else importlib.import_module(found.name)
        except ImportError as error:
            if not re.search(r'needs \w+: pip install "leaven\[\w+\]"$', str(error)):  # no extra's
                raise
            continue
        names = getattr(module, "__all__", [])
        assert len(names) == len(set(names)), f"{module.__name__}.__all__ names something twice"
        for name in names:
            assert hasattr(module, name), f"{module.__name__}.__all__ promises {name}"
            checked += 1
    assert checked > 10
    assert not set(ROOMS) & set(sys.modules)
