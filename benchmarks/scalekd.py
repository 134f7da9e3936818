"""Does ScaleKD help a small student? Against plain training, logit and feature distillation, and without its parts.

    python benchmarks/scalekd.py --data DATA --work RUNS teacher    # a teacher with all labels
    python benchmarks/scalekd.py --data DATA --work RUNS tune       # learning rates, on a fifth of the training images
    python benchmarks/scalekd.py --data DATA --work RUNS run        # the held-out images
    python benchmarks/scalekd.py --data DATA --work RUNS table      # results/scalekd.json, and in words

DATA holds cifar10-jpeg/cifar10-jpeg-12k.zip. The teacher has learnt from all labels of it, the student gets a tenth of
them; both see 64 px. The learning rate is tuned for plain training, the two tasks of timm.task and ScaleKD, whose
ablations take its own. "equal time": as many epochs as take what ScaleKD's took in the tuning runs. A finished run is
one line of results/scalekd_runs.jsonl and is not done again. The arms of a seed share labels, weights and draws.
"""

import json
import shlex
import statistics
from typing import Any

from ledger import RESULTS, Ledger, Run, arguments, data_sets, execute, interval95, summary
from timing import machine

LEDGER = RESULTS / "scalekd_runs.jsonl"
TEACHER, STUDENT, LABELS = "test_convnext2", "test_resnet", "10%"  # timm's, 0.4 million parameters each
TEACHER_EPOCHS, EPOCHS = 25, 30
SEEDS = (0, 1, 2, 3, 4)
RATES = ("1.5e-3", "4e-3", "1e-2")
TUNE = 100
TUNED = ("plain", "logits", "features", "scalekd")
ABLATIONS = ("no-projector", "no-frequency", "no-tail")
COMMON = shlex.split(
    "--data cifar --image-size 64 --batch-size 50 --workers 0 --channels-last "
    "--weight-decay 0.05 --warmup-epochs 2 --crop-scale 0.5,1 --crop-pct 1.0 --save-every 100"
)


def taught() -> Run:
    words = ["recipes/train.py", "--backbone", TEACHER, *COMMON, "--seed", "7", "--lr", "2e-3"]
    words += ["--epochs", str(TEACHER_EPOCHS), "--eval-every", str(TEACHER_EPOCHS)]
    return Run(f"teacher-{TEACHER}", tuple(words))


def training(arm: str, seed: int, lr: str, epochs: int = EPOCHS, split: tuple[str, ...] = ()) -> Run:
    words = [
        "benchmarks/scalekd_arms.py",
        arm,
        "--backbone",
        STUDENT,
        *COMMON,
        "--seed",
        str(seed),
        "--lr",
        lr,
    ]
    words += [
        "--teacher",
        TEACHER,
        "--teacher-weights",
        "taught",
        "--labels",
        LABELS,
        "--labels-seed",
        str(seed),
    ]
    words += ["--reduction", "per_49", "--epochs", str(epochs), "--eval-every", str(epochs), *split]
    name = f"{STUDENT}-{arm}-{seed}-{lr}" + ("" if epochs == EPOCHS else f"-{epochs}")
    return Run(name, tuple(words))


def rated(arm: str) -> dict[str, Run]:
    return {lr: training(arm, TUNE, lr, split=("--val-from-train", "20%")) for lr in RATES}


def rate(ledger: Ledger, arm: str) -> str:
    scores = {lr: ledger.top1(run) for lr, run in rated("scalekd" if arm in ABLATIONS else arm).items()}
    return max(scores, key=lambda lr: scores[lr])


def arms(ledger: Ledger, seed: int) -> dict[str, Run]:
    """What is compared, by name."""
    runs = {arm: training(arm, seed, rate(ledger, arm)) for arm in (*TUNED, *ABLATIONS)}
    spent = {arm: statistics.median(map(ledger.seconds, rated(arm).values())) for arm in TUNED}
    for arm in ("plain", "logits"):
        epochs = round(EPOCHS * spent["scalekd"] / spent[arm])
        runs[f"{arm}, equal time"] = training(arm, seed, rate(ledger, arm), max(epochs, EPOCHS + 1))
    return runs


def table(ledger: Ledger) -> dict[str, Any]:
    compared = [arms(ledger, seed) for seed in SEEDS]
    scores = {arm: [ledger.top1(each[arm]) for each in compared] for arm in compared[0]}
    rows: dict[str, Any] = {}
    for arm, values in scores.items():
        gains = [a - b for a, b in zip(scores["scalekd"], values, strict=True)]
        rows[arm] = {
            "top1": summary(values),
            "scalekd minus this": summary(gains) | {"interval95": interval95(gains)},
        }
        rows[arm]["lr"], rows[arm]["updates"] = (
            rate(ledger, arm.split(",")[0]),
            ledger.rows[compared[0][arm].name]["updates"],
        )
    teacher = ledger.top1(taught())
    best = max(statistics.mean(scores[arm]) for arm in ("plain", "plain, equal time"))
    return {
        "machine": machine("cpu"),
        "teacher": {"backbone": TEACHER, "top1": teacher, "above the student": teacher > best},
        "student": STUDENT,
        "results": rows,
        "tried on the tuning split": [ledger.rows[run.name] for arm in TUNED for run in rated(arm).values()],
    }


def words(report: dict[str, Any]) -> str:
    teacher = report["teacher"]
    lines = [f"Teacher: {teacher['backbone']}, top-1 {100 * teacher['top1']:.1f} %."]
    if not teacher["above the student"]:
        lines.append("Not shown: the teacher is not above the student.")
    lines += ["", "| arm | lr | updates | top-1 | ScaleKD minus this | 95 % interval |", "|" + " --- |" * 6]
    for arm, row in report["results"].items():
        gain = row["scalekd minus this"]
        low, high = (100 * each for each in gain["interval95"])
        mean, sd = (100 * row["top1"][key] for key in ("mean", "sd"))
        lines.append(
            f"| {arm} | {row['lr']} | {row['updates']} | {mean:.1f} ± {sd:.1f} | {100 * gain['mean']:+.1f} "
            f"| {low:+.1f} to {high:+.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    args = arguments(__doc__, ("teacher", "tune", "run", "table"))
    work, ledger = args.work.resolve(), Ledger(LEDGER)
    if args.step == "table":
        report = table(ledger)
        (RESULTS / "scalekd.json").write_text(json.dumps(report, indent=1) + "\n")
        print(words(report))
        return
    weights = work / taught().name / "backbone.safetensors"
    data = data_sets(args.data, work) | {"taught": str(weights)}
    if not weights.is_file():
        ledger.rows.pop(taught().name, None)  # its line, of another machine say, is no teacher
    execute([[taught()]], data, work, args.jobs, ledger)
    if args.step == "tune":
        execute([list(rated(arm).values()) for arm in TUNED], data, work, args.jobs, ledger)
    if args.step == "run":
        execute([list(arms(ledger, seed).values()) for seed in SEEDS], data, work, args.jobs, ledger)


if __name__ == "__main__":
    main()
