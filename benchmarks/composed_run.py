"""Everything on one backbone, from one command that can be stopped and started again at any moment.

    python benchmarks/composed_run.py --data DATA/imagenette224-mini --work RUNS      # results/composed_run.json
    python benchmarks/composed_run.py --data digits --work RUNS --small               # minutes to try it out

1. SparK under EfficientTrain, with an average of the weights and kNN on the way.
2. A teacher: ConvNeXt, with labels, under EfficientTrain.
3. Fine-tuning of what SparK trained: ScaleKD from that teacher, with TrAct, EfficientTrain and an average.
4. A deep kernel machine in place of the classifier, nu chosen on a fifth of the training images.
For comparison, 3 without 1: the same network from scratch, and 4 on it.

A step is a recipe with --resume auto: exact at every update. A finished one is not done again.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from ledger import ROOT, card
from timing import machine

COMMON = "--workers 0 --channels-last --mixed-precision bf16 --weight-decay 0.05 --seed 0"
CURRICULUM = "--curriculum 0.5:32,0.75:48,1:64"
SIZES = {  # epochs of steps 1 to 3, updates of step 4
    False: {"pretrain": "40", "teacher": "20", "finetune": "15", "steps": "500"},
    True: {"pretrain": "2", "teacher": "1", "finetune": "1", "steps": "30"},
}


def steps(data: str, work: Path, small: bool) -> dict[str, list[str]]:
    """The command line of each step, by name, in order."""
    n = SIZES[small]
    limit = "--limit-batches 4 --probe-images 100" if small else ""
    of_training = f"--data {data} --image-size 64 --batch-size 50 {COMMON}"
    distil = (
        f"recipes/scalekd.py --backbone resnet10t --teacher convnext_atto --teacher-weights "
        f"{work / 'teacher' / 'backbone.safetensors'} --epochs {n['finetune']} --crop-pct 1 "
        f"--callbacks efficienttrain,tract,ema --model-ema-decay 0.99 {CURRICULUM} {of_training}"
    )
    machine_of = (
        f"recipes/dkm.py --backbone resnet10t --data {data} --image-size 64 --seed 0 --nu 1,10,100,inf "
        f"--inducing 200 --steps {n['steps']}"
    )
    limit3 = "--limit-batches 4" if small else ""
    pretrained, labelled = (work / name / "backbone.safetensors" for name in ("1-spark", "3-scalekd"))
    words = {
        "1-spark": f"recipes/spark.py --backbone resnet10t --stages 4,8,16 --decoder-width 128 --lr 2e-3 "
        f"--epochs {n['pretrain']} --callbacks efficienttrain,ema,knn --model-ema-decay 0.99 "
        f"--eval-every {1 if small else 10} {CURRICULUM} {of_training} {limit}",
        "teacher": f"recipes/train.py --backbone convnext_atto --lr 1.5e-3 --epochs {n['teacher']} --crop-pct 1 "
        f"--callbacks efficienttrain {CURRICULUM} {of_training} {limit3}",
        "3-scalekd": f"{distil} --lr 1.5e-3 --init {pretrained} {limit3}",
        "4-dkm": f"{machine_of} --init {labelled}",
        "scratch": f"{distil} --lr 4e-3 {limit3}",
        "scratch-dkm": f"{machine_of} --init {work / 'scratch' / 'backbone.safetensors'}",
    }  # fmt: skip
    return {name: shlex.split(line) for name, line in words.items()}


def done(folder: Path) -> bool:
    """Whether a step's last file is there."""
    return (folder / "results.json").is_file() or (folder / "README.md").is_file()


def outcome(folder: Path) -> dict[str, Any]:
    """What a step found."""
    if (folder / "results.json").is_file():
        summary = json.loads((folder / "results.json").read_text())["summary"]
        return {what: value["mean"] for what, value in summary.items()}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(row["step_s"] for row in rows)
    return {"updates": len(rows), "seconds of updates": round(seconds, 1), **card(folder / "README.md")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="a few updates of each step, nothing committed")
    args = parser.parse_args()
    work: Path = args.work.resolve()
    data = str(Path(args.data).resolve()) if Path(args.data).exists() else args.data
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    results = {}
    for name, words in steps(data, work, args.small).items():
        folder = work / name
        if not done(folder):
            print(f"{name}: {shlex.join(words)}", flush=True)
            command = [sys.executable, *words, "--output-dir", str(folder), "--resume", "auto"]
            code = subprocess.run(command, cwd=ROOT, env=environment).returncode
            if code:
                raise SystemExit(f"{name} ended with {code}; start again to go on")
        line = re.sub(re.escape(str(work)), "RUNS", shlex.join(words)).replace(data, "DATA")
        results[name] = {"command": line, **outcome(folder)}
    path = work / "composed_run.json" if args.small else ROOT / "benchmarks" / "results" / "composed_run.json"
    path.write_text(json.dumps({"machine": machine("cpu"), "steps": results}, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
