"""Does SparK help on small sets of real photos? Pre-training on unlabelled images against training from scratch.

    python benchmarks/spark_evidence.py --data DATA --work RUNS tune      # settings, on a fifth of the training images
    python benchmarks/spark_evidence.py --data DATA --work RUNS final     # the held-out images, opened once
    python benchmarks/spark_evidence.py --data DATA --work RUNS table     # results/spark_evidence.json, and in words

DATA holds imagenette224-mini/ and cifar10-jpeg/cifar10-jpeg-12k.zip. Everything is done by the recipes, one thread
each, as many at a time as there are cores. What was stopped goes on where it was; what is done is not done again.

Per data set and network, 64 px: three pre-trainings (seeds 0 to 2) on all training images without labels; fine-tuning
on 1 %, 10 % and 100 % of the labels; from scratch with the same epochs ("scratch"); and from scratch with as many more
epochs as the pre-training took time ("scratch, equal total"). A seed decides the labels that are kept, the fresh
weights and all draws, so differences are paired.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timing import machine

ROOT = Path(__file__).resolve().parents[1]
NETS = ("convnext_atto", "resnet10t")
SETS = ("photos", "cifar")
LABELS = ("1%", "10%", "100%")
SEEDS = (0, 1, 2)
COMMON = ["--image-size", "64", "--batch-size", "64", "--workers", "0", "--mixed-precision", "bf16"]
PRETRAIN = ["--stages", "4,8,16", "--decoder-width", "128", "--lr", "2e-3", "--weight-decay", "0.05"]
PRETRAIN += [
    "--weight-decay-end",
    "none",
    "--warmup-epochs",
    "3",
    "--save-every",
    "10",
    "--probe-images",
    "1",
]
EPOCHS = {"photos": 60, "cifar": 9}  # 90,000 images
FINETUNE = ["--smoothing", "0.1", "--save-every", "20", "--crop-pct", "1.0", "--weight-decay", "0.05"]
CROP = {"photos": "0.35,1", "cifar": "0.5,1"}
# By share of the labels: epochs, batch size.
TUNING = {
    "photos": {"1%": (100, 20), "10%": (80, 50), "100%": (20, 50)},
    "cifar": {"1%": (60, 50), "10%": (15, 50), "100%": (5, 50)},
}
RATES = ("5e-4", "1.5e-3", "4e-3")


@dataclass
class Run:
    """One recipe's run: its folder under RUNS, its command line, and what it needs first."""

    name: str
    command: list[str]
    needs: list["Run"] = field(default_factory=list)


def pretrain(data: dict[str, str], which: str, net: str, seed: int, *extra: str) -> Run:
    name = "-".join(["pretrain", which, net, str(seed), *(word.strip("-") for word in extra)])
    words = [
        "recipes/spark.py",
        "--backbone",
        net,
        "--data",
        data[which],
        "--seed",
        str(seed),
        *COMMON,
        *PRETRAIN,
    ]
    return Run(
        name.replace("%", ""), [*words, "--epochs", str(EPOCHS[which]), "--crop-scale", "0.67,1", *extra]
    )


def finetune(
    data: dict[str, str], work: Path, which: str, net: str, labels: str, seed: int, lr: str, start: Run | None,
    *extra: str, epochs: int | None = None, tag: str = "",
) -> Run:  # fmt: skip
    usual, batch = TUNING[which][labels]
    kind = "scratch" if start is None else "spark"
    name = "-".join(["train", which, net, labels.strip("%"), kind, str(seed), lr, *([tag] if tag else [])])
    words = [
        "recipes/train.py",
        "--backbone",
        net,
        "--data",
        data[which],
        "--seed",
        str(seed),
        *COMMON,
        *FINETUNE,
    ]
    words += ["--labels", labels, "--labels-seed", str(seed), "--lr", lr, "--epochs", str(epochs or usual)]
    words += ["--batch-size", str(batch), "--crop-scale", CROP[which], "--eval-every", str(epochs or usual)]
    words += ["--warmup-epochs", str(max(1, (epochs or usual) // 20)), *extra]
    if start is not None:
        words += ["--init", str(work / start.name / "backbone.safetensors")]
    return Run(name, words, [] if start is None else [start])


def tuning(data: dict[str, str], work: Path) -> Iterator[Run]:
    """Learning rates of both arms at 10 % of the labels; mask ratio, decoder and rate of the pre-training."""
    split = ("--val-from-train", "20%")
    for which in SETS:
        for net in NETS:
            start = pretrain(data, which, net, 100, *split)
            others = [
                pretrain(data, which, net, 100, *split, *extra)
                for extra in (("--lr", "1e-3"), ("--mask-ratio", "0.75"), ("--decoder-width", "256"))
            ]
            for lr in RATES:
                yield finetune(data, work, which, net, "10%", 100, lr, None, *split, tag="tune")
                yield finetune(data, work, which, net, "10%", 100, lr, start, *split, tag="tune")
            for other in others if net == NETS[0] else []:
                tag = "tune-" + other.name.split("20-")[-1]
                yield finetune(data, work, which, net, "10%", 100, RATES[1], other, *split, tag=tag)


def final(data: dict[str, str], work: Path, rates: dict[str, str]) -> Iterator[Run]:
    """Everything that is compared; ``rates`` are those that `tune` chose, by set, network and arm."""
    for which in SETS:
        for net in NETS:
            for seed in SEEDS:
                start = pretrain(data, which, net, seed)
                for labels in LABELS:
                    for kind, init in (("scratch", None), ("spark", start)):
                        yield finetune(
                            data, work, which, net, labels, seed, rates[f"{which} {net} {kind}"], init
                        )


def equal_total(data: dict[str, str], work: Path, rates: dict[str, str]) -> Iterator[Run]:
    """From scratch for as long as pre-training and fine-tuning took together; after `final`."""
    for which in SETS:
        for net in NETS:
            lr = rates[f"{which} {net} scratch"]
            for seed in SEEDS:
                start = pretrain(data, which, net, seed)
                for labels in LABELS:
                    short = finetune(data, work, which, net, labels, seed, lr, None)
                    tuned = finetune(
                        data, work, which, net, labels, seed, rates[f"{which} {net} spark"], start
                    )
                    usual = TUNING[which][labels][0]
                    total = seconds(work / start.name) + seconds(work / tuned.name)
                    epochs = round(usual * total / seconds(work / short.name))
                    yield finetune(data, work, which, net, labels, seed, lr, None, epochs=epochs, tag="long")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def seconds(folder: Path) -> float:
    """What the updates of a run took."""
    return sum(row["step_s"] for row in rows(folder))


def top1(folder: Path) -> float:
    score: float = rows(folder)[-1]["val_top1"]
    return score


def done(folder: Path) -> bool:
    return (folder / "README.md").is_file()


def execute(runs: list[Run], work: Path, jobs: int) -> None:
    """Run what is not done yet, what is needed first before the rest."""
    needed = {need.name: need for run in runs for need in run.needs}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}

    def one(run: Run) -> None:
        folder = work / run.name
        command = [sys.executable, *run.command, "--output-dir", str(folder), "--resume", "auto"]
        with (work / f"{run.name}.log").open("a") as log:
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log).returncode
        print(f"{'done' if code == 0 else f'FAILED ({code})'}: {run.name}", flush=True)

    for part in (list(needed.values()), list({run.name: run for run in runs}.values())):
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, [run for run in part if not done(work / run.name)]))


def chosen(data: dict[str, str], work: Path) -> dict[str, str]:
    """The better learning rate of each arm on the tuning split."""
    rates = {}
    for which in SETS:
        for net in NETS:
            start = pretrain(data, which, net, 100, "--val-from-train", "20%")
            for kind, init in (("scratch", None), ("spark", start)):
                scores = {
                    lr: top1(work / finetune(data, work, which, net, "10%", 100, lr, init, tag="tune").name)
                    for lr in RATES
                }
                rates[f"{which} {net} {kind}"] = max(scores, key=lambda lr: scores[lr])
    return rates


def summary(values: list[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {
        "mean": round(statistics.mean(values), 4),
        "sd": round(spread, 4),
        "seeds": [round(v, 4) for v in values],
    }


def table(data: dict[str, str], work: Path) -> dict[str, Any]:
    """All results, and every configuration that was tried on the tuning split."""
    rates, results = chosen(data, work), []
    long = {run.name.rsplit("-long", 1)[0]: run for run in equal_total(data, work, rates)}
    for which in SETS:
        for net in NETS:
            starts = [pretrain(data, which, net, seed) for seed in SEEDS]
            for labels in LABELS:
                arms: dict[str, list[Run]] = {"scratch": [], "spark": [], "scratch, equal total": []}
                for seed, start in zip(SEEDS, starts, strict=True):
                    scratch = finetune(
                        data, work, which, net, labels, seed, rates[f"{which} {net} scratch"], None
                    )
                    arms["scratch"].append(scratch)
                    lr = rates[f"{which} {net} spark"]
                    arms["spark"].append(finetune(data, work, which, net, labels, seed, lr, start))
                    arms["scratch, equal total"].append(long[scratch.name])
                scores = {arm: [top1(work / run.name) for run in runs] for arm, runs in arms.items()}
                gains = {
                    f"spark minus {arm}": summary(
                        [a - b for a, b in zip(scores["spark"], scores[arm], strict=True)]
                    )
                    for arm in ("scratch", "scratch, equal total")
                }
                minutes = {
                    arm: round(statistics.mean(seconds(work / r.name) for r in runs) / 60, 2)
                    for arm, runs in arms.items()
                }
                results.append(
                    {
                        "data": which,
                        "backbone": net,
                        "labels": labels,
                        **{arm: summary(s) for arm, s in scores.items()},
                    }
                    | gains
                    | {
                        "minutes": minutes,
                        "pre-training minutes": round(
                            statistics.mean(seconds(work / s.name) for s in starts) / 60, 2
                        ),
                    }
                )
    tried = {
        run.name: {"command": " ".join(run.command), "top1": top1(work / run.name)}
        for run in tuning(data, work)
    }
    return {"machine": machine("cpu"), "rates": rates, "results": results, "tried on the tuning split": tried}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("tune", "final", "table"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "cifar10-jpeg").is_dir():
        zipfile.ZipFile(args.data / "cifar10-jpeg" / "cifar10-jpeg-12k.zip").extractall(work)
    data = {"photos": str((args.data / "imagenette224-mini").resolve()), "cifar": str(work / "cifar10-jpeg")}
    if args.step == "tune":
        execute(list(tuning(data, work)), work, args.jobs)
    elif args.step == "final":
        rates = chosen(data, work)
        execute(list(final(data, work, rates)), work, args.jobs)
        execute(list(equal_total(data, work, rates)), work, args.jobs)
    else:
        output = Path(__file__).parent / "results" / "spark_evidence.json"
        output.write_text(json.dumps(table(data, work), indent=1) + "\n")
        print(f"written: {output}")


if __name__ == "__main__":
    main()
