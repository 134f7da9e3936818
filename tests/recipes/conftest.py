"""Lets the tests of this folder import `recipe_programs` and run a recipe's `main` in the test's own process."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], ModuleType]]:
    """Loads a recipe's file as a module; runs in `tmp_path`, and accelerate's global state is forgotten."""
    from accelerate.state import AcceleratorState, GradientState
    from recipe_programs import environment

    monkeypatch.chdir(tmp_path)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    loaded: dict[Path, ModuleType] = {}

    def load(path: Path) -> ModuleType:
        if path in loaded:
            return loaded[path]
        name = f"recipe_under_test_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and type hints look their module up
        spec.loader.exec_module(module)
        loaded[path] = module
        return module

    forget()
    yield load
    forget()


@pytest.fixture
def run(recipe: Callable[[Path], ModuleType]) -> Callable[..., Path]:
    """Runs a recipe in this process: its file, run folder, flags -> folder."""
    from accelerate.state import AcceleratorState, GradientState

    def main(program: Path, name: str, *flags: str) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        recipe(program).main([*flags, "--output-dir", name])
        return Path(name)

    return main
