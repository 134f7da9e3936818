"""What EfficientTrain saves and costs: baseline, ET, ET++, plain bilinear resizing, and a shorter training.

    python benchmarks/efficienttrain.py --data DATA --work RUNS run      # as many at a time as there are cores
    python benchmarks/efficienttrain.py --data DATA --work RUNS table    # results/efficienttrain.json, and in words

DATA holds imagenette224-mini/ and cifar10-jpeg/cifar10-jpeg-12k.zip. Everything is done by recipes/train.py, one thread
each, loading included in the times. A finished run is one line of results/efficienttrain_runs.jsonl and is not done
again. The arms of a seed share weights, order and augmentation; they run one after another, in an order that turns from
seed to seed, so that a machine that slows down slows no arm in particular.

ET has the baseline's epochs. ET++ costs, by area, two thirds of the baseline, as in the paper's 200 of 300 epochs;
"shorter" is the baseline with two thirds of its epochs: what a curriculum must beat.
"""

import json
import shlex
import statistics
from typing import Any

from ledger import RESULTS, Ledger, Run, arguments, data_sets, execute, interval95, summary
from timing import machine

from leaven.curricula import ET_PP

LEDGER = RESULTS / "efficienttrain_runs.jsonl"
# Learning rates of timm's networks, 0.4 and 0.8 million parameters.
NETS = {"test_resnet": "3e-3", "test_vit3": "1e-3"}
SEEDS = (0, 1, 2)
COMMON = shlex.split(
    "--workers 0 --channels-last --weight-decay 0.05 --warmup-epochs 1 "
    "--aa randaugment --crop-pct 1.0 --save-every 100"
)
# Side, epochs of the baseline, images per update, share of the area that a crop takes.
SETS = {"cifar": (64, 8, 64, "0.5,1"), "photos": (128, 10, 32, "0.35,1")}
ARMS = {
    "baseline": (),
    "ET": ("--callbacks", "efficienttrain", "--curriculum", "et"),
    "ET, bilinear": ("--callbacks", "efficienttrain", "--curriculum", "et", "--curriculum-op", "bilinear"),
    "ET++": ("--callbacks", "efficienttrain", "--curriculum", "et_pp"),
    "shorter": (),
}


def training(which: str, net: str, seed: int, arm: str) -> Run:
    side, epochs, batch, crop = SETS[which]
    if arm in ("ET++", "shorter"):
        epochs = round(2 / 3 * epochs * (ET_PP.scaled(side).speedup() if arm == "ET++" else 1))
    words = ["recipes/train.py", "--backbone", net, "--data", which, "--seed", str(seed), *COMMON]
    words += ["--image-size", str(side), "--batch-size", str(batch), "--lr", NETS[net], "--crop-scale", crop]
    words += ["--epochs", str(epochs), "--eval-every", str(epochs), *ARMS[arm]]
    return Run(f"{which}-{net}-{seed}-{arm.replace(', ', '-')}", tuple(words))


def chains() -> list[list[Run]]:
    """A chain per data set, network and seed."""
    arms = [*ARMS]
    return [
        [training(which, net, seed, arm) for arm in arms[seed % len(arms) :] + arms[: seed % len(arms)]]
        for which in SETS
        for net in NETS
        for seed in SEEDS
    ]


def table(ledger: Ledger) -> dict[str, Any]:
    """What is complete: accuracies, differences to the baseline and ratios of time, paired by seed."""
    results = []
    for which in SETS:
        for net in NETS:
            runs = {arm: [training(which, net, seed, arm) for seed in SEEDS] for arm in ARMS}
            if any(run.name not in ledger.rows for each in runs.values() for run in each):
                continue
            for arm, each in runs.items():
                pairs = list(zip(each, runs["baseline"], strict=True))
                gains = [ledger.top1(run) - ledger.top1(base) for run, base in pairs]
                speedups = [ledger.seconds(base) / ledger.seconds(run) for run, base in pairs]
                results.append(
                    {"data": which, "side": SETS[which][0], "backbone": net, "arm": arm}
                    | {"top1": summary([ledger.top1(run) for run in each])}
                    | {"minus baseline": summary(gains), "interval95": interval95(gains)}
                    | {"speedup": round(statistics.median(speedups), 3)}
                    | {"speedups": [round(each, 3) for each in speedups]}
                )
    return {"machine": machine("cpu"), "results": results}


def words(report: dict[str, Any]) -> str:
    """As a Markdown table: percent, and the interval of the paired difference."""
    lines = ["| data | backbone | arm | top-1 | minus baseline (95 %) | speed-up |", "|" + " --- |" * 6]
    for row in report["results"]:
        low, high = (100 * each for each in row["interval95"])
        gain = f"{100 * row['minus baseline']['mean']:+.1f} ({low:+.1f} to {high:+.1f})"
        cells = [f"{row['data']}, {row['side']} px", row["backbone"], row["arm"]]
        cells += [f"{100 * row['top1']['mean']:.1f}", "" if row["arm"] == "baseline" else gain]
        lines.append("| " + " | ".join([*cells, f"{row['speedup']:.2f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    args = arguments(__doc__, ("run", "table"))
    work, ledger = args.work.resolve(), Ledger(LEDGER)
    if args.step == "run":
        execute(chains(), data_sets(args.data, work), work, args.jobs, ledger)
        return
    report = table(ledger)
    (RESULTS / "efficienttrain.json").write_text(json.dumps(report, indent=1) + "\n")
    print(words(report))


if __name__ == "__main__":
    main()
