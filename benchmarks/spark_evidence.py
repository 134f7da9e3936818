"""Does SparK help on small sets of real photos? Pre-training on unlabelled images against training from scratch.

    python benchmarks/spark_evidence.py --data DATA --work RUNS tune      # settings, on a fifth of the training images
    python benchmarks/spark_evidence.py --data DATA --work RUNS final     # the held-out images, opened once
    python benchmarks/spark_evidence.py --data DATA --work RUNS explore   # other pre-trainings, on that fifth again
    python benchmarks/spark_evidence.py --data DATA --work RUNS table     # results/spark_evidence.json, and words

DATA holds imagenette224-mini/ and cifar10-jpeg/cifar10-jpeg-12k.zip. Everything is done by the recipes, on one thread
each, as many at a time as there are cores. What was stopped goes on where it was. A finished run is one line of
results/spark_evidence_runs.jsonl and is not done again, on any machine.

Per data set and network, 64 px: three pre-trainings (seeds 0 to 2) on all training images without labels; fine-tuning
on 1 %, 10 % and 100 % of the labels; from scratch with the same epochs ("scratch"); and from scratch on as many images
as pre-training and fine-tuning saw together ("scratch, equal total"). A seed decides the labels that are kept, the
fresh weights and all draws, so differences are paired.
"""

import json
import shlex
import statistics
from collections.abc import Iterator
from typing import Any

from ledger import RESULTS, Ledger, Run, arguments, data_sets, execute, interval95, summary
from timing import machine

LEDGER = RESULTS / "spark_evidence_runs.jsonl"
NETS = ("convnext_atto", "resnet10t")
SETS = ("photos", "cifar")
LABELS = ("1%", "10%", "100%")
SEEDS = (0, 1, 2)
RATES = ("5e-4", "1.5e-3", "4e-3")
TUNE = 100  # the seed of everything that settings are chosen by
SPLIT = ("--val-from-train", "20%")
# Part of the tuning was done without --channels-last: another layout of the same arithmetic.
COMMON = shlex.split(
    "--image-size 64 --batch-size 64 --workers 0 --mixed-precision bf16 --channels-last --weight-decay 0.05"
)
PRETRAIN = shlex.split(
    "--stages 4,8,16 --decoder-width 64 --lr 2e-3 --weight-decay-end none --warmup-epochs 2 "
    "--crop-scale 0.67,1 --save-every 10 --probe-images 200"
)
VARIANTS = {"ratio75": ("--mask-ratio", "0.75"), "width128": ("--decoder-width", "128")}
# What is tried beyond the choice, each on top of width 128. Cells follow from the deepest map that is pre-trained.
EXPLORED = {
    "width128-long": ("--decoder-width", "128", "--epochs", "160"),
    "width128-ratio45": ("--decoder-width", "128", "--mask-ratio", "0.45"),
    "width128-ratio75": ("--decoder-width", "128", "--mask-ratio", "0.75"),
    "width128-cell8": ("--decoder-width", "128", "--stages", "4,8"),
    "width128-cell32": ("--decoder-width", "128", "--stages", "4,8,16,32"),
    "width256": ("--decoder-width", "256"),
}
EPOCHS = {"photos": 40, "cifar": 6}  # 60,000 images
IMAGES = {"photos": 1500, "cifar": 10000}
CROP = {"photos": "0.35,1", "cifar": "0.5,1"}
FINETUNE = shlex.split("--smoothing 0.1 --save-every 100 --crop-pct 1.0")
# By share of the labels: images, epochs, batch size.
TUNING = {
    "photos": {"1%": (20, 100, 20), "10%": (150, 80, 50), "100%": (1500, 20, 50)},
    "cifar": {"1%": (100, 60, 50), "10%": (1000, 15, 50), "100%": (10000, 5, 50)},
}


def pretrain(which: str, net: str, seed: int, variant: str = "", split: tuple[str, ...] = ()) -> Run:
    words = ["recipes/spark.py", "--backbone", net, "--data", which, "--seed", str(seed), *COMMON, *PRETRAIN]
    words += ["--epochs", str(EPOCHS[which]), *(VARIANTS | EXPLORED).get(variant, ()), *split]
    return Run("-".join(filter(None, ("pretrain", which, net, str(seed), variant))), tuple(words))


def finetune(
    which: str, net: str, labels: str, seed: int, lr: str, start: Run | None,
    *, epochs: int | None = None, note: str = "long", split: tuple[str, ...] = (),
) -> Run:  # fmt: skip
    _, usual, batch = TUNING[which][labels]
    long, epochs = epochs is not None, epochs or usual
    arm = start.name.replace("pretrain", "spark") if start else f"scratch-{which}-{net}-{seed}"
    words = ["recipes/train.py", "--backbone", net, "--data", which, "--seed", str(seed), *COMMON, *FINETUNE]
    words += ["--labels", labels, "--labels-seed", str(seed), "--lr", lr, "--batch-size", str(batch)]
    words += [
        "--epochs",
        str(epochs),
        "--eval-every",
        str(epochs),
        "--warmup-epochs",
        str(max(1, epochs // 20)),
    ]
    words += ["--crop-scale", CROP[which], *split]
    return Run("-".join([arm, labels.strip("%"), lr, *([note] if long else [])]), tuple(words), start)


def judged(variant: str, net: str = NETS[0]) -> list[Run]:
    """What a setting of the pre-training is judged by, on the tuning split."""
    start = pretrain("photos", net, TUNE, variant, SPLIT)
    return [finetune("photos", net, part, TUNE, RATES[1], start, split=SPLIT) for part in ("10%", "100%")]


def untrained(net: str, more: int) -> list[Run]:
    """Beside them: fresh weights, trained on `more` times all training images more than the fine-tuning sees."""
    runs = []
    for part in ("10%", "100%"):
        images, usual, _ = TUNING["photos"][part]
        epochs = usual + round(more * IMAGES["photos"] / images) if more else None
        runs.append(
            finetune(
                "photos", net, part, TUNE, RATES[1], None, epochs=epochs, note=f"long{more}", split=SPLIT
            )
        )
    return runs


def exploration() -> list[list[Run]]:
    """Longer pre-training of both networks; other ratios, cells and widths of the first; and their alternatives.

    And the learning rates of the second, which differ most between its arms, at all of the labels too.
    """
    chains = [judged("width128-long", net) for net in NETS]
    chains += [judged("width128-cell8"), judged("width128-cell32"), untrained(NETS[0], 0)]
    chains += [judged(variant) for variant in ("width128-ratio45", "width256", "width128-ratio75")]
    start = pretrain("photos", NETS[1], TUNE, "width128", SPLIT)
    for known, first in ((judged("width128", NETS[1]), start), (untrained(NETS[1], 0), None)):
        more = [finetune("photos", NETS[1], "100%", TUNE, lr, first, split=SPLIT) for lr in RATES]
        chains.append(list(dict.fromkeys([*known, *more])))
    return chains + [untrained(net, more) for more in (40, 160) for net in NETS]  # the dearest last


def rated(net: str, spark: bool) -> dict[str, Run]:
    """What the learning rate of an arm is chosen by, on the tuning split."""
    start = pretrain("photos", net, TUNE, split=SPLIT) if spark else None
    return {lr: finetune("photos", net, "10%", TUNE, lr, start, split=SPLIT) for lr in RATES}


def tuning() -> list[list[Run]]:
    """Photos only: learning rates of both arms at 10 % of the labels; mask ratio and decoder of the pre-training."""
    chains = [list(rated(net, spark).values()) for net in NETS for spark in (True, False)]
    chains[0] += judged("")
    return chains + [judged(variant) for variant in VARIANTS]


def chosen(ledger: Ledger) -> tuple[dict[tuple[str, bool], str], str]:
    """The best learning rate of each network and arm, and the best pre-training, on the tuning split."""
    rates = {}
    for net in NETS:
        for spark in (True, False):
            scores = {lr: ledger.top1(run) for lr, run in rated(net, spark).items()}
            rates[net, spark] = max(scores, key=lambda lr: scores[lr])
    means = {v: statistics.mean(map(ledger.top1, judged(v))) for v in ("", *VARIANTS)}
    return rates, max(means, key=lambda variant: means[variant])


def arms(which: str, net: str, seed: int, labels: str, ledger: Ledger) -> dict[str, Run]:
    """The three runs that are compared, by the name of the arm."""
    rates, variant = chosen(ledger)
    start = pretrain(which, net, seed, variant)
    images, usual, _ = TUNING[which][labels]
    total = usual + round(EPOCHS[which] * IMAGES[which] / images)
    scratch = rates[net, False]
    return {
        "spark": finetune(which, net, labels, seed, rates[net, True], start),
        "scratch": finetune(which, net, labels, seed, scratch, None),
        "scratch, equal total": finetune(which, net, labels, seed, scratch, None, epochs=total),
    }


def final(ledger: Ledger) -> Iterator[list[Run]]:
    """Everything that is compared, a chain per data set, seed and network."""
    for which in SETS:
        for seed in SEEDS:
            for net in NETS:
                yield [run for labels in LABELS for run in arms(which, net, seed, labels, ledger).values()]


def table(ledger: Ledger) -> dict[str, Any]:
    """All results of what is complete, and every configuration that was tried on the tuning split."""
    results = []
    for which in SETS:
        for net in NETS:
            for labels in LABELS:
                compared = [arms(which, net, seed, labels, ledger) for seed in SEEDS]
                if any(run.name not in ledger.rows for each in compared for run in each.values()):
                    continue
                scores = {arm: [ledger.top1(each[arm]) for each in compared] for arm in compared[0]}
                row: dict[str, Any] = {"data": which, "backbone": net, "labels": labels}
                row |= {arm: summary(values) for arm, values in scores.items()}
                for arm in ("scratch", "scratch, equal total"):
                    pairs = zip(scores["spark"], scores[arm], strict=True)
                    gains = [a - b for a, b in pairs]
                    row[f"spark minus {arm}"] = summary(gains) | {"interval95": interval95(gains)}
                row["seconds"] = {
                    arm: round(statistics.median(ledger.rows[each[arm].name]["seconds"] for each in compared))
                    for arm in compared[0]
                }
                starts = [ledger.rows[each["spark"].start.name] for each in compared if each["spark"].start]
                row["seconds"]["pre-training"] = round(
                    statistics.median(start["seconds"] for start in starts)
                )
                row["masked loss"] = summary([start["loss"] for start in starts])
                results.append(row)
    rates, variant = chosen(ledger)
    names = {f"{net}, {'spark' if spark else 'scratch'}": lr for (net, spark), lr in rates.items()}
    tried = {run.name: ledger.rows[run.name] for runs in tuning() for run in runs}
    explored = [run.name for runs in exploration() for run in runs if run.name in ledger.rows]
    return {
        "machine": machine("cpu"),
        "chosen": {"learning rates": names, "pre-training": variant or "base"},
        "results": results,
        "tried on the tuning split": tried,
        "tried beyond the choice, top-1 on the tuning split": {
            name: ledger.rows[name]["top1"] for name in explored
        },
    }


def words(report: dict[str, Any]) -> str:
    """The results as a Markdown table: top-1 in percent, mean over seeds, paired differences and their spread."""
    head = (
        "| data | backbone | labels | scratch | SparK | scratch, equal total | gain | gain at equal total |"
    )
    lines = [head, "|" + " --- |" * 8]
    for row in report["results"]:
        cells = [row["data"], row["backbone"], row["labels"]]
        cells += [f"{100 * row[arm]['mean']:.1f}" for arm in ("scratch", "spark", "scratch, equal total")]
        for arm in ("scratch", "scratch, equal total"):
            gain = row[f"spark minus {arm}"]
            seeds = ", ".join(f"{100 * value:+.1f}" for value in gain["seeds"])
            cells.append(f"{100 * gain['mean']:+.1f} ({seeds})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = arguments(__doc__, ("tune", "final", "explore", "table"))
    work, ledger = args.work.resolve(), Ledger(LEDGER)
    if args.step == "table":
        report = table(ledger)
        (RESULTS / "spark_evidence.json").write_text(json.dumps(report, indent=1) + "\n")
        print(words(report))
        return
    data = data_sets(args.data, work)
    chains = {"tune": tuning, "explore": exploration, "final": lambda: list(final(ledger))}[args.step]()
    execute(chains, data, work, args.jobs, ledger)


if __name__ == "__main__":
    main()
