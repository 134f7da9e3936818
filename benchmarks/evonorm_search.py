"""The search for layers: does evolution beat random search?

    python benchmarks/evonorm_search.py cost                             # results/evonorm_search_cost-<machine>.json
    python benchmarks/evonorm_search.py --data DATA --work RUNS run      # searches, then the ranking, then trainings
    python benchmarks/evonorm_search.py --data DATA --work RUNS table    # results/evonorm_search.json, and in words

Arms, 300 candidates each, fixed beforehand: evolution from random graphs, evolution that begins with EvoNorm-S0,
random graphs alone; three seeds; CIFAR at 16 px, judged on a fifth of the training images; the S series. Then the best
of every search is trained again, longer, with three seeds, on the held-out images, beside BatchNorm with ReLU and the
published layers (recipes/evonorm_search.py --rerank). Cost: compiled genomes beside timm's classes of the same formula,
and free checks a second, on one thread. What the best is worth in backbones that no search has seen is not in here yet.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import timm.layers
import torch
from ledger import RESULTS, ROOT, data_sets, summary
from timing import interleaved, machine, result_file
from torch import nn

from leaven.callbacks.evonorm import NAMED, Genome, SearchSpace, evolved_norm
from leaven.callbacks.evonorm.checks import FreeChecks

SEEDS, CANDIDATES = (0, 1, 2), 300
ARMS = {"evolution": ["--start", "none"], "evolution from S0": ["--start", "evonorm_s0"]}
ARMS["random"] = ["--start", "none", "--random"]
SEARCH = shlex.split(
    f"recipes/evonorm_search.py --image-size 16 --labels 200 --candidates {CANDIDATES} --population 40 --steps 120 "
    "--quality-steps 60 --quality 0.15 --resume auto"
)
RERANK = shlex.split("recipes/evonorm_search.py --image-size 16 --steps 1000 --top 1 --seeds 3 --resume auto")


def run(words: list[str], folder: Path, log: Path) -> None:
    """A program, once: what was stopped goes on."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, *words, "--output-dir", str(folder)]
    with log.open("a") as file:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file).returncode
    if code:
        raise SystemExit(f"{folder.name} failed ({code}): see {log}")
    print(f"done: {folder.name}", flush=True)


def name(arm: str, seed: int) -> str:
    return f"{arm.replace(' ', '-')}-{seed}"


def searches(cifar: str, work: Path, jobs: int) -> None:
    def one(arm: str, seed: int) -> None:
        folder = work / name(arm, seed)
        words = [*SEARCH, *ARMS[arm], "--data", cifar, "--seed", str(seed)]
        if not (folder / "search.json").is_file():
            run(words, folder, work / f"{folder.name}.log")
        again = work / f"{folder.name}-rerank"
        if not (again / "rerank.json").is_file():
            run([*RERANK, "--rerank", str(folder), "--data", cifar], again, work / f"{again.name}.log")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda pair: one(*pair), [(arm, seed) for seed in SEEDS for arm in ARMS]))


def found(work: Path) -> list[dict[str, Any]]:
    """Of every search: the curve of its best so far, its best, and that one's accuracy on the held-out images."""
    rows = []
    for arm in ARMS:
        for seed in SEEDS:
            folder = work / name(arm, seed)
            best, journal = json.loads((folder / "search.json").read_text()), folder / "journal.jsonl"
            lines = [json.loads(line) for line in journal.read_text().splitlines()]
            ranking = json.loads((work / f"{folder.name}-rerank" / "rerank.json").read_text())["ranking"]
            top = {"arm": arm, "seed": seed, "graphs": best["graphs looked at"], "rejected": best["rejected"]}
            again = next(each for each in ranking if each["name"].startswith("candidate"))
            known = {each["name"]: each["mean"] for each in ranking if each["name"] in NAMED}
            rows.append(
                top
                | {"validation": best["found"][0]["mean"], "formula": best["found"][0]["formula"]}
                | {"genome": best["found"][0]["genome"], "held out": again["mean"], "known": known}
                | {"seconds": round(sum(line["seconds"] for line in lines), 1), "trained": len(lines)}
            )
    return rows


def cost() -> dict[str, Any]:
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for shape in ((8, 64, 56, 56), (8, 256, 14, 14)):
        x = torch.randn(shape, requires_grad=True)

        def step(layer: Any, x: torch.Tensor = x) -> Callable[[], None]:
            return lambda: layer(x * 1.0).square().mean().backward()

        for kind in ("b0", "b1", "b2", "s0", "s1", "s2"):
            ours = evolved_norm(Genome.named(f"evonorm_{kind}"), shape[1])
            theirs: nn.Module = getattr(timm.layers.evo_norm, f"EvoNorm2d{kind.upper()}")(shape[1])
            for how in ("eager", "compiled"):
                torch.compiler.reset()
                both = {"genome": ours, "timm": theirs}
                ways = {
                    who: step(torch.compile(each) if how == "compiled" else each)
                    for who, each in both.items()
                }
                row = interleaved(ways, base="timm", repeats=11, device="cpu")
                rows[f"{kind}, {'x'.join(map(str, shape))}, {how}"] = row
                print(
                    kind, shape, how, row["genome"]["ratio_to_timm"], row["genome"]["ratio_range"], flush=True
                )
    space, checks, rng, start = SearchSpace("B"), FreeChecks(), Random(0), time.process_time()
    for _ in range(10_000):
        checks(space.random(rng))
    return {"layers": rows, "free checks per second": round(10_000 / (time.process_time() - start))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("cost", "run", "table"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    report: dict[str, Any] = {"machine": machine("cpu")}
    if args.step == "cost":
        path = result_file(__file__, "cpu").with_stem(f"evonorm_search_cost-{os.cpu_count()}core")
        path.write_text(json.dumps(report | cost(), indent=1) + "\n")
        return
    work = args.work.resolve()
    cifar = data_sets(args.data.resolve(), work)["cifar"]
    if args.step == "run":
        searches(cifar, work, args.jobs)
        return
    rows = found(work)
    arms = {arm: [row["held out"] for row in rows if row["arm"] == arm] for arm in ARMS}
    report |= {"searches": rows, "held out": {arm: summary(scores) for arm, scores in arms.items()}}
    (RESULTS / "evonorm_search.json").write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        print(
            row["arm"],
            row["seed"],
            f"{row['held out']:.4f}",
            f"S0 {row['known']['evonorm_s0']:.4f}",
            row["formula"],
        )


if __name__ == "__main__":
    main()
