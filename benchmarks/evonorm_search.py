"""The search for layers: does evolution beat random search?

    python benchmarks/evonorm_search.py cost                               # results/evonorm_search_cost-<machine>.json
    python benchmarks/evonorm_search.py --data DATA --work RUNS calibrate  # results/evonorm_search_limits.json
    python benchmarks/evonorm_search.py --data DATA --work RUNS run        # searches, then the ranking of their bests
    python benchmarks/evonorm_search.py --data DATA --work RUNS table      # results/evonorm_search.json, and in words
    python benchmarks/evonorm_search.py --data DATA --work RUNS retrain    # the best in other backbones; then table

Arms, 300 candidates each, fixed beforehand: evolution from random graphs, evolution that begins with EvoNorm-S0,
random graphs alone; three seeds; CIFAR at 16 px, judged on a fifth of the training images; the S series. Then the bests
of all searches are trained again, longer, with three seeds, on the held-out images, beside BatchNorm with ReLU and the
published layers (recipes/evonorm_search.py --rerank). The best of all searches, by the images they were judged on, goes
into two backbones that no search has seen, trained by recipes/train.py beside BatchNorm with ReLU, S0 and B0. Cost:
compiled genomes beside timm's classes of the same formula, and free checks a second, on one thread. Calibrate: what
known layers reach by the time that a candidate is looked at, and the gradients that ascent finds, over five seeds.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import timm.layers
import torch
from ledger import MEMORY, RESULTS, ROOT, Ledger, Run, data_sets, execute, interval95, summary
from timing import interleaved, machine, result_file
from torch import nn

from leaven.callbacks.evonorm import NAMED, Genome, SearchSpace, evolved_norm
from leaven.callbacks.evonorm.checks import FreeChecks
from leaven.callbacks.evonorm.judging import ANCHORS, Budget, Rejected, Task, build, stability, train

SEEDS, CANDIDATES = (0, 1, 2), 300
ARMS = {"evolution": ["--start", "none"], "evolution from S0": ["--start", "evonorm_s0"]}
ARMS["random"] = ["--start", "none", "--random"]
SEARCH = shlex.split(
    f"recipes/evonorm_search.py --image-size 16 --labels 200 --candidates {CANDIDATES} --population 40 --steps 120 "
    "--quality-steps 60 --quality 0.15 --resume auto"
)
RERANK = shlex.split("recipes/evonorm_search.py --image-size 16 --steps 400 --seeds 3 --resume auto")

# What the best is trained in again: as it comes, and with the best of the searches in place.
NETS = {
    "resnet18": (["--backbone", "tv:resnet18"], ["--backbone", "benchmarks.evolved_nets:resnet18"]),
    "regnetx_002": (["--backbone", "regnetx_002"], ["--backbone", "benchmarks.evolved_nets:regnetx_002"]),
}
LAYERS: dict[str, list[str]] = {"BN, ReLU": [], "best": []}
LAYERS |= {kind.upper(): ["--callbacks", f"evonorm_{kind}"] for kind in ("s0", "b0")}
RETRAIN = shlex.split(
    "--data cifar --image-size 32 --epochs 8 --eval-every 8 --batch-size 64 --workers 0 --lr 1.5e-3 "
    "--weight-decay 0.05 --warmup-epochs 1 --crop-scale 0.5,1 --crop-pct 1.0 --save-every 100"
)
LEDGER = RESULTS / "evonorm_search_runs.jsonl"


def run(words: list[str], folder: Path, log: Path) -> None:
    """A program, once: what was stopped goes on."""
    environment = os.environ | MEMORY | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, *words, "--output-dir", str(folder)]
    with log.open("a") as file:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file).returncode
    if code:
        raise SystemExit(f"{folder.name} failed ({code}): see {log}")
    print(f"done: {folder.name}", flush=True)


def name(arm: str, seed: int) -> str:
    return f"{arm.replace(' ', '-')}-{seed}"


def searches(cifar: str, work: Path, jobs: int) -> None:
    """All searches, as many at a time as jobs; then their bests are ranked again, together."""

    def one(arm: str, seed: int) -> None:
        folder = work / name(arm, seed)
        words = [*SEARCH, *ARMS[arm], "--data", cifar, "--seed", str(seed)]
        if not (folder / "search.json").is_file():
            run(words, folder, work / f"{folder.name}.log")

    pairs = [(arm, seed) for seed in SEEDS for arm in ARMS]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda pair: one(*pair), pairs))
    bests, again = work / "bests", work / "ranking"
    bests.mkdir(exist_ok=True)
    said = [json.loads((work / name(*pair) / "search.json").read_text()) for pair in pairs]
    rows = [each["found"][0] | {"candidate": name(*pair)} for each, pair in zip(said, pairs, strict=True)]
    (bests / "search.json").write_text(json.dumps({"found": rows}))
    if not (again / "rerank.json").is_file():
        words = [*RERANK, "--rerank", str(bests), "--top", str(len(rows)), "--jobs", str(jobs)]
        run([*words, "--data", cifar], again, work / "ranking.log")


def found(work: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Of every search: its best, and that one's accuracy on the held-out images; and those of known layers."""
    ranking = json.loads((work / "ranking" / "rerank.json").read_text())["ranking"]
    held_out = {each["name"].removeprefix("candidate "): each["mean"] for each in ranking}
    rows = []
    for arm in ARMS:
        for seed in SEEDS:
            folder = work / name(arm, seed)
            said = json.loads((folder / "search.json").read_text())
            top = said["found"][0]
            lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
            rows.append(
                {"arm": arm, "seed": seed, "graphs": said["graphs looked at"], "rejected": said["rejected"]}
                | {"validation": top["mean"], "held out": held_out[name(arm, seed)]}
                | {"formula": top["formula"], "genome": top["genome"], "trained": len(lines)}
                | {"seconds": round(sum(line["seconds"] for line in lines), 1)}
            )
    return rows, {known: held_out[known] for known in NAMED}


def calibrate(cifar: str, work: Path) -> dict[str, Any]:
    """By known layer and anchor: accuracies when a candidate is looked at, and largest gradients under ascent."""
    folder = work / "calibrate"
    if not (folder / "search.json").is_file():
        words = [*SEARCH, "--candidates", "1", "--start", "evonorm_s0", "--data", cifar]
        run(words, folder, work / "calibrate.log")
    torch.set_num_threads(1)
    x, y, x_val, y_val = torch.load(folder / "task.pt")
    task = Task(x, y, x_val, y_val, classes=int(y.max()) + 1)
    looked = Budget(steps=120, quality_steps=60, quality=2.0, stability_steps=10)  # as SEARCH has it
    layers: dict[str, Any] = {}
    for known in ("bn_relu", "evonorm_b0", "evonorm_s0"):
        factory = partial(evolved_norm, Genome.named(known))
        for anchor in ANCHORS:
            reached, norms = [], []
            for seed in range(5):
                norms.append(stability(build(anchor, task, factory, seed), task, looked, seed))
                try:
                    train(build(anchor, task, factory, seed), task, looked, seed)
                except Rejected as error:  # every accuracy is below 2
                    reached.append(error.value)
            row = {"accuracy after 60": summary(reached), "largest gradient": round(max(norms), 2)}
            layers[f"{known}, {anchor}"] = row
            print(known, anchor, row, flush=True)
    return {"twice guessing": 2 / task.classes, "layers": layers}


def spread(scores: list[float]) -> dict[str, float]:
    return {"median": statistics.median(scores), "least": min(scores), "most": max(scores)}


def retraining(arm: str, net: str, seed: int) -> Run:
    words = ["recipes/train.py", *NETS[net][arm == "best"], *LAYERS[arm], *RETRAIN, "--seed", str(seed)]
    return Run(f"{net}-{arm.replace(', ', '-')}-{seed}", tuple(words))


def retrained(ledger: Ledger) -> list[dict[str, Any]]:
    """Top-1 on the held-out images, and differences to BatchNorm with ReLU, paired by seed."""
    rows = []
    for net in NETS:
        base = [ledger.top1(retraining("BN, ReLU", net, seed)) for seed in SEEDS]
        for arm in LAYERS:
            scores = [ledger.top1(retraining(arm, net, seed)) for seed in SEEDS]
            gains = [a - b for a, b in zip(scores, base, strict=True)]
            row = {"backbone": net, "layers": arm, "top1": summary(scores), "minus BN": summary(gains)}
            rows.append(row | {"interval95": interval95(gains)})
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
    parser.add_argument("step", choices=("cost", "calibrate", "run", "retrain", "table"))
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
    data = data_sets(args.data.resolve(), work)
    if args.step == "calibrate":
        limits = report | calibrate(data["cifar"], work)
        (RESULTS / "evonorm_search_limits.json").write_text(json.dumps(limits, indent=1) + "\n")
        return
    if args.step == "run":
        searches(data["cifar"], work, args.jobs)
        return
    ledger = Ledger(LEDGER)
    if args.step == "retrain":
        chains = [[retraining(arm, net, seed) for arm in LAYERS] for net in NETS for seed in SEEDS]
        execute(chains, data, work, args.jobs, ledger)
        return
    rows, known = found(work)
    for what in ("validation", "held out"):
        arms = {arm: [row[what] for row in rows if row["arm"] == arm] for arm in ARMS}
        report[what] = {arm: spread(scores) for arm, scores in arms.items()}
    report |= {"searches": rows, "known": known}
    if retraining("best", [*NETS][-1], SEEDS[-1]).name in ledger.rows:
        report["retrained"] = retrained(ledger)
    (RESULTS / "evonorm_search.json").write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        print(row["arm"], row["seed"], f"{row['validation']:.4f} {row['held out']:.4f}", row["formula"])
    print(known, report["held out"])


if __name__ == "__main__":
    main()
