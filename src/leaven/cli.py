"""The ``leaven`` command: list the recipes, copy one to edit it, and say what works on this machine."""

import argparse
import ast
import difflib
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import leaven
import leaven.recipes
from leaven.doctor import doctor


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code (2: it cannot be done, 1: `doctor` found a problem).

    As shells report signals, it is 130 after Ctrl-C, and 141 where nobody reads on (``leaven ls | head -1``).

    Raises:
        SystemExit: with 2 on wrong arguments, with 0 after ``--help`` and ``--version``.
    """
    try:
        code = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or Python flushes again, in vain, at exit
        return 141
    except KeyboardInterrupt:
        return 130
    return code


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="leaven", description=__doc__)
    parser.add_argument("--version", action="version", version=f"leaven {leaven.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="list the recipes")
    cp = commands.add_parser("cp", help="copy a recipe to a folder of yours, to run and edit it there")
    cp.add_argument("recipe", help="a name that `leaven ls` lists")
    cp.add_argument("folder", type=Path, help="where to put it; created if missing")
    commands.add_parser("doctor", help="versions, devices, threads, extras, SparK backends: what works here")
    arguments = parser.parse_args(argv)
    if arguments.command == "ls":
        return list_recipes()
    if arguments.command == "cp":
        return copy_recipe(arguments.recipe, arguments.folder)
    return doctor()


def recipes() -> dict[str, Path]:
    """Every recipe's file by name."""
    files = Path(leaven.recipes.__file__ or "").parent.glob("*.py")
    return {file.stem: file for file in sorted(files) if not file.name.startswith("_")}


def list_recipes() -> int:
    """Print each recipe with the first line of its docstring (parsed: importing would take seconds)."""
    found = recipes()
    for name, file in found.items():
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "(no description)"
        print(f"{name:<{max(map(len, found))}}  {docstring.splitlines()[0]}")
    return 0


def copy_recipe(name: str, folder: Path) -> int:
    """Copy one recipe into `folder`, never over a file; as it imports leaven by name, it runs anywhere."""
    found, name = recipes(), name.removesuffix(".py")
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(found)}"
        return _refuse(f"no recipe is called {name!r}; {hint}")
    target = folder / found[name].name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with found[name].open("rb") as source, target.open("xb") as copy:
            shutil.copyfileobj(source, copy)
    except FileExistsError:
        what = f"{target} exists already" if folder.is_dir() else f"{folder} is not a folder"
        return _refuse(f"{what}; nothing was copied")
    except OSError as error:
        return _refuse(f"cannot write {target}: {error.strerror}")
    print(f"copied to {target}; try it with: python {shlex.quote(str(target))} --dry-run")
    return 0


def _refuse(message: str) -> int:
    print(f"leaven: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
