"""Do recipes survive being killed, a full disk, broken images, a dead worker and a loss that is NaN?

    python benchmarks/soak.py --kills 20 --work /tmp/soak
    python benchmarks/soak.py --kills 2 --only dkm,train --work /tmp/soak

Every recipe that can be resumed is run once without a break. A second run is killed by SIGKILL at random moments, while
it starts, trains or writes down what came out, each time to be started again at once with --resume auto; the time until
it has gone on is drawn so that the kills fall all over the run. Then the two are compared to the bit: losses and
whatever else metrics.jsonl has but times, and weights; of searches and studies the journal. Each fault has its
documented end: one line, an exit code, and a last checkpoint from which the run goes on to the same end.

Processes are forked from one that has imported torch and timm already: what a kill may tear apart lies after that, and
imports are most of a tiny run. The networks are tiny and the images are scikit-learn's digits: this is about processes
and files, not about learning.
"""

import argparse
import importlib
import json
import os
import random
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timing import machine

IMPORTED = ("timm", "accelerate", "sklearn.datasets", "matplotlib.pyplot", "gpytorch", "leaven.recipes.train")
ROOT = Path(__file__).resolve().parents[1]
TIMES = {"step_s", "data_s", "images_per_s", "peak_memory_mib"}
NET = "--backbone test_resnet"
SMALL = f"{NET} --image-size 32 --batch-size 8 --epochs 6 --limit-batches 3 --workers 1"
TINY_UNET = """from leaven.pretext.diffusion import UNet


def tiny(in_chans=3):
    return UNet(in_chans, width=16, multipliers=(1, 2), attention=(), head_width=16)
"""


@dataclass(frozen=True)
class Recipe:
    """How a recipe is run, and what must be the same afterwards: log and weights, or the journal that it names."""

    flags: str
    journal: str | None = None
    teacher: str | None = None  # flags of recipes/train.py, which runs first


RECIPES = {
    "train": Recipe(f"{SMALL} --model-ema-decay 0.9"),
    "dkm": Recipe("--steps 20 --inducing 10 --nu 1 --seeds 6", "journal.jsonl"),
    "spark": Recipe(f"{SMALL} --stages 4,8 --decoder-width 16 --probe-images 60"),
    "rotnet": Recipe(f"{SMALL} --probe-images 60 --drop-path 0.1"),
    "scalekd": Recipe(
        f"{SMALL} --teacher test_vit --teacher-weights teacher/backbone.safetensors",
        teacher=f"{SMALL} --backbone test_vit --epochs 1 --output-dir teacher",
    ),
    "diffusion_features": Recipe(f"{SMALL} --backbone tiny_net:tiny --no-grid"),
    "functional_prior": Recipe(
        "--fit-steps 3 --critic-steps 5 --functions 16 --points 20 --chains 2 --burn-in 30 --thin 2 "
        "--draws 6 --seeds 5",
        "journal.jsonl",
    ),
    "evonorm_search": Recipe(
        "--candidates 9 --population 3 --steps 6 --quality-steps 3 --quality 0.01 --stability-steps 1 "
        "--round-size 3 --anchors resnet,mobilenet --labels 20",
        "journal.jsonl",
    ),
    "schedule_search": Recipe(
        f"{NET} --sizes 32,48 --stages 3 --batch-size 8 --epochs 2 --limit-batches 4", "journal-greedy.jsonl"
    ),
}


def command(recipe: str, *flags: str) -> list[str]:
    return [str(ROOT / "recipes" / f"{recipe}.py"), *flags]


Before = Callable[[], None] | None


def child(words: Sequence[str], work: Path, log: str, before: Before) -> None:
    """Become the recipe; what it says goes to a file, one run after another."""
    file = os.open(work / log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(work)
    if before is not None:
        before()
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


def start(words: Sequence[str], work: Path, log: str, before: Before = None) -> ForkProcess:
    process = get_context("fork").Process(target=child, args=(words, work, log, before))
    process.start()
    return process


def ended_with(process: ForkProcess, within: float = 3600) -> int | None:
    """Its exit code, None if it still runs after so many seconds."""
    process.join(within)
    return process.exitcode


def finish(words: Sequence[str], work: Path, log: str, before: Before = None) -> int | None:
    return ended_with(start(words, work, log, before))


def said(work: Path, log: str) -> list[str]:
    return (work / log).read_text().splitlines()


# --- what must be the same


def left_by(folder: Path, recipe: Recipe) -> tuple[Any, dict[str, torch.Tensor]]:
    """The log without times and the weights, or the journal."""
    if recipe.journal is not None:
        entries = [json.loads(line) for line in (folder / recipe.journal).read_text().splitlines()]
        told = [(each["name"], each["arguments"], each["result"]) for each in entries]
        return sorted(told, key=lambda each: each[0]), {}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    log = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    return log, load_file(folder / "backbone.safetensors")


def equal(one: Path, other: Path, recipe: Recipe) -> bool:
    """Whether two runs left the same, to the bit."""
    (log, weights), (log2, weights2) = left_by(one, recipe), left_by(other, recipe)
    log, log2 = json.dumps(log).replace(one.name, "RUN"), json.dumps(log2).replace(other.name, "RUN")
    same = weights.keys() == weights2.keys() and all(torch.equal(weights[k], weights2[k]) for k in weights)
    return log == log2 and same


# --- kills


def soak(name: str, kills: int, work: Path, draw: random.Random) -> dict[str, Any]:
    """One recipe: run it through, kill another run of it again and again, compare."""
    recipe, began = RECIPES[name], time.monotonic()
    (work / "tiny_net.py").write_text(TINY_UNET)
    if recipe.teacher:
        assert finish(command("train", *recipe.teacher.split()), work, "teacher.log") == 0
    words, started = command(name, *recipe.flags.split(), "--output-dir"), time.time()
    assert finish([*words, "whole"], work, "whole.log") == 0, said(work, "whole.log")[-1]
    # The settings are written when the run begins, after all that has to be imported and opened.
    first = (work / "whole" / "config.yaml").stat().st_mtime - started
    rest = time.time() - started - first
    moments, ends, why = {"starting": 0, "running": 0}, 0, ""
    while not why:
        folder, since, early = f"killed-{ends}", time.time(), draw.random() < 0.25
        process = start([*words, folder, "--resume", "auto"], work, "killed.log")
        last = sum(moments.values()) == kills
        if not early and not last:
            wait_for(process, work / folder / (recipe.journal or "metrics.jsonl"), since)
        wait = 3600.0 if last else draw.uniform(0, first if early else rest / 2)
        code = ended_with(process, wait)
        if code is None:
            process.kill()
            process.join()
            moments["starting" if early else "running"] += 1
        elif code != 0:
            why = said(work, "killed.log")[-1]
        elif not equal(work / "whole", work / folder, recipe):
            why = f"{folder} is another than the run without a break"
        elif last:
            break
        else:
            ends += 1  # it came to its end between two kills: the next one begins anew
    result: dict[str, Any] = {
        "kills": sum(moments.values()),
        "moments": moments,
        "runs to their end": ends + 1,
    }
    return result | {"equal": not why, "why": why, "seconds": round(time.monotonic() - began)}


def wait_for(process: ForkProcess, path: Path, since: float = 0.0) -> None:
    """Until a file is written, or the process has ended."""
    while process.is_alive():
        if path.exists() and path.stat().st_mtime > since:
            return
        time.sleep(0.02)


# --- faults: what is done to recipes/train.py, and whether it ends as documented

FAULTY = f"{SMALL} --epochs 15".split()


def ended(work: Path, log: str, code: int | None, words: str) -> str:
    """Empty if a run ended with one line that has these words, and with code 2; else what it did instead."""
    errors = [line for line in said(work, log) if line.startswith("error: ")]
    if any("Traceback" in line for line in said(work, log)):
        return f"a traceback: {said(work, log)[-1]}"
    if code != 2 or len(errors) != 1 or words not in errors[0]:
        return f"exit code {code}, {errors}"
    return ""


def goes_on(work: Path, words: list[str]) -> str:
    """Empty if the broken run goes on to the end of the whole one."""
    if finish([*words, "--workers", "0", "--output-dir", "whole"], work, "whole.log"):
        return said(work, "whole.log")[-1]
    if finish([*words, "--workers", "0", "--output-dir", "broken", "--resume", "auto"], work, "again.log"):
        return said(work, "again.log")[-1]
    return (
        ""
        if equal(work / "whole", work / "broken", RECIPES["train"])
        else "other numbers than without the fault"
    )


def full_disk(work: Path) -> str:
    """No file may grow beyond 100 kB: the first checkpoint is there already."""
    words = command("train", *FAULTY)
    process = start([*words, "--output-dir", "broken"], work, "start.log")
    wait_for(process, work / "broken/checkpoints/update-000000003.pt")
    process.kill()
    process.join()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    code = finish(
        [*words, "--workers", "0", "--output-dir", "broken", "--resume", "auto"], work, "full.log", limit
    )
    return ended(work, "full.log", code, "cannot write the checkpoint of update") or goes_on(work, words)


def dead_worker(work: Path) -> str:
    """The kernel kills a loader's worker, as it does when memory is short."""
    words = command("train", *FAULTY)
    process = start([*words, "--workers", "1", "--output-dir", "broken"], work, "dead.log")
    wait_for(process, work / "broken/checkpoints/update-000000003.pt")
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if "resource_tracker" not in Path(f"/proc/{child}/cmdline").read_text():
            os.kill(int(child), signal.SIGKILL)
    code = ended_with(process)
    return ended(work, "dead.log", code, "a process that loads data was lost") or goes_on(work, words)


def not_a_number(work: Path) -> str:
    """A learning rate that no network survives."""
    words = command(
        "train", *FAULTY, "--workers", "0", "--lr", "1e30", "--warmup-epochs", "0", "--opt", "sgd"
    )
    code = finish([*words, "--output-dir", "broken"], work, "nan.log")
    return ended(work, "nan.log", code, "stopped before the weights took it")


def broken_images(work: Path) -> str:
    """Three files of a folder are no pictures: borne if three are allowed, one line if two are."""
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    for number, (row, label) in enumerate(zip(pixels[:200], labels[:200], strict=True)):
        path = work / "images" / str(label) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((row.reshape(8, 8) * 15).astype("uint8")).save(path)
    for path in sorted((work / "images").rglob("*.png"))[::70]:
        path.write_bytes(path.read_bytes()[:40])
    words = command(
        "train", *FAULTY, "--epochs", "1", "--limit-batches", "40", "--workers", "0", "--data", "images"
    )
    code = finish([*words, "--max-bad-images", "3", "--output-dir", "borne"], work, "borne.log")
    named = sum("warning: replaced" in line for line in said(work, "borne.log"))
    if code or not named:
        return f"exit code {code}, {named} named"
    code = finish([*words, "--max-bad-images", "0", "--output-dir", "few"], work, "few.log")
    return ended(work, "few.log", code, "more than --max-bad-images 0")


FAULTS = {each.__name__: each for each in (full_disk, dead_worker, not_a_number, broken_images)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="of each recipe")
    parser.add_argument("--only", default=",".join((*FAULTS, *RECIPES)), help="faults and recipes")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT / "src"), ACCELERATE_USE_CPU="1")
    torch.set_num_threads(1)
    for module in IMPORTED:
        importlib.import_module(module)
    work = args.work.resolve()
    report = json.loads(args.out.read_text()) if args.out.exists() else {"recipes": {}, "faults": {}}
    report["machine"], good = machine("cpu"), True
    for name in args.only.split(","):
        folder, began = work / name, time.monotonic()
        folder.mkdir(parents=True)
        if name in FAULTS:
            why = FAULTS[name](folder)
            found = {"as documented": not why, "why": why, "seconds": round(time.monotonic() - began)}
        else:
            found = soak(name, args.kills, folder, random.Random(f"{args.seed} {name}"))
        report["faults" if name in FAULTS else "recipes"][name] = found
        good = good and (found.get("equal") or found.get("as documented"))
        print(f"{name}: {json.dumps(found)}", flush=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{'recipe':<20} kills  equal  seconds")
    for name, row in report["recipes"].items():
        print(f"{name:<20} {row['kills']:>5}  {row['equal']!s:>5}  {row['seconds']:>7}")
    for name, row in report["faults"].items():
        print(f"{name}: {row['why'] or 'ends as documented'}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
