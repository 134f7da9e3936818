"""SparK under EfficientTrain against SparK, at equal epochs: wall time, masked loss, and accuracy after fine-tuning.

    python benchmarks/spark_curriculum.py --data DATA --work RUNS run      # as many at a time as there are cores
    python benchmarks/spark_curriculum.py --data DATA --work RUNS table    # results/spark_curriculum.json, and in words

DATA holds imagenette224-mini/. Everything is done by the recipes, one thread each, loading included in the times. The
arms of a seed share weights, order and augmentation, and run one after another, in an order that turns from seed to
seed. A finished run is one line of results/spark_curriculum_runs.jsonl and is not done again.
"""

import json
import shlex
import statistics
from typing import Any

from ledger import RESULTS, Ledger, Run, arguments, data_sets, execute, interval95, summary
from timing import machine

LEDGER = RESULTS / "spark_curriculum_runs.jsonl"
NET, SIDE, EPOCHS = "test_resnet", 96, 20
SEEDS = (0, 1, 2)
COMMON = shlex.split(
    f"--data photos --backbone {NET} --image-size {SIDE} --workers 0 --channels-last --weight-decay 0.05"
)
PRETRAIN = shlex.split(
    "--batch-size 64 --stages 4,8,16 --decoder-width 64 --lr 2e-3 --weight-decay-end none --warmup-epochs 2 "
    "--crop-scale 0.67,1 --save-every 10 --probe-images 500"
)
FINETUNE = shlex.split(
    "--batch-size 50 --lr 1.5e-3 --smoothing 0.1 --crop-scale 0.35,1 --crop-pct 1.0 --save-every 100"
)
LABELS = {"10%": 50, "100%": 12}  # and epochs
ARMS = {"SparK": (), "SparK, ET": ("--callbacks", "efficienttrain", "--curriculum", "et")}
LOSS = "and after"  # on the model card: of whole held-out images, for both arms


def pretrain(seed: int, arm: str) -> Run:
    words = ["recipes/spark.py", *COMMON, *PRETRAIN, "--seed", str(seed), "--epochs", str(EPOCHS), *ARMS[arm]]
    return Run(f"pretrain-{seed}-{arm.replace(', ', '-')}", tuple(words))


def finetune(seed: int, arm: str, labels: str) -> Run:
    start, epochs = pretrain(seed, arm), str(LABELS[labels])
    words = [
        "recipes/train.py",
        *COMMON,
        *FINETUNE,
        "--seed",
        str(seed),
        "--epochs",
        epochs,
        "--eval-every",
        epochs,
    ]
    words += ["--warmup-epochs", "2", "--labels", labels, "--labels-seed", str(seed)]
    return Run(f"{start.name.replace('pretrain', 'finetune')}-{labels.strip('%')}", tuple(words), start)


def chains() -> list[list[Run]]:
    """A chain per seed: the pre-trainings next to each other, then what starts from them."""
    found = []
    for seed in SEEDS:
        order = [*ARMS] if seed % 2 == 0 else [*ARMS][::-1]
        found.append([pretrain(seed, arm) for arm in order])
        found[-1] += [finetune(seed, arm, labels) for labels in LABELS for arm in order]
    return found


def table(ledger: Ledger) -> list[dict[str, Any]]:
    """Differences and ratios, paired by seed."""
    base, other = ARMS
    starts = {arm: [pretrain(seed, arm) for seed in SEEDS] for arm in ARMS}
    pairs = list(zip(starts[base], starts[other], strict=True))
    speedups = [ledger.seconds(a) / ledger.seconds(b) for a, b in pairs]
    rows: list[dict[str, Any]] = [{"what": "speed-up", "median": round(statistics.median(speedups), 3)}]
    rows[0]["seeds"] = [round(each, 3) for each in speedups]
    scores = {
        "masked loss": {arm: [ledger.rows[run.name]["card"][LOSS] for run in starts[arm]] for arm in ARMS}
    }
    for labels in LABELS:
        scores[f"top-1, {labels} of the labels"] = {
            arm: [ledger.top1(finetune(seed, arm, labels)) for seed in SEEDS] for arm in ARMS
        }
    for what, by_arm in scores.items():
        gains = [b - a for a, b in zip(by_arm[base], by_arm[other], strict=True)]
        row: dict[str, Any] = {"what": what} | {arm: summary(values) for arm, values in by_arm.items()}
        rows.append(row | {"difference": summary(gains), "interval95": interval95(gains)})
    return rows


def words(rows: list[dict[str, Any]]) -> str:
    """As a Markdown table: means over seeds, and the interval of the paired difference."""
    lines = ["| | " + " | ".join(ARMS) + " | difference (95 %) |", "|" + " --- |" * 4]
    for row in rows[1:]:
        scale, digits = (1, 4) if row["what"] == "masked loss" else (100, 1)
        cells = [f"{scale * row[arm]['mean']:.{digits}f}" for arm in ARMS]
        low, high = (f"{scale * each:+.{digits}f}" for each in row["interval95"])
        cells.append(f"{scale * row['difference']['mean']:+.{digits}f} ({low} to {high})")
        lines.append("| " + " | ".join([row["what"], *cells]) + " |")
    seeds = ", ".join(f"{each:.2f}" for each in rows[0]["seeds"])
    return "\n".join(
        [*lines, f"wall time of the pre-training: {rows[0]['median']:.2f} times faster ({seeds})"]
    )


def main() -> None:
    args = arguments(__doc__, ("run", "table"))
    work, ledger = args.work.resolve(), Ledger(LEDGER)
    if args.step == "run":
        execute(chains(), data_sets(args.data, work), work, args.jobs, ledger)
        return
    rows = table(ledger)
    path = RESULTS / "spark_curriculum.json"
    path.write_text(json.dumps({"machine": machine("cpu"), "results": rows}, indent=1) + "\n")
    print(words(rows))


if __name__ == "__main__":
    main()
