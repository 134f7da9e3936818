"""RotNet on real data: what it learns, where in the network, and what flips after the rotation and bad crops do to it.

    python benchmarks/rotnet.py --data DATA --work RUNS run        # as many at a time as there are cores
    python benchmarks/rotnet.py --data DATA --work RUNS order      # flips before and after the rotation
    python benchmarks/rotnet.py --data DATA --work RUNS audit      # Fourier crops before the rotation
    python benchmarks/rotnet.py --data DATA --work RUNS table      # results/rotnet.json, and in words

DATA holds imagenette224-mini/ and cifar10-jpeg/cifar10-jpeg-12k.zip. Training and probes are recipes/rotnet.py's, one
thread each: rotation accuracy over all four turns of held-out images, and linear probes of each stage against those of
the same network untrained. A finished run is one line of results/rotnet_runs.jsonl and is not done again.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from ledger import RESULTS, Ledger, Run, arguments, data_sets, execute, summary
from timing import machine
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from leaven.curricula import fourier_crop
from leaven.pretext import RotNet, cue_audit, rotate4

LEDGER = RESULTS / "rotnet_runs.jsonl"
NET = "test_resnet"
SEEDS = (0, 1, 2)
SETS = {
    "photos": ("64", "20", "0.35,1"),
    "cifar": ("32", "8", "0.5,1"),
}  # side, epochs, share of the area of a crop
ORDER_EPOCHS = 3  # of the comparison of orders, on CIFAR at 32 px
AUDITED = 128  # photos
COMMON = shlex.split(
    "--batch-size 32 --lr 2e-3 --weight-decay 0.05 --warmup-epochs 1 --workers 0 "
    "--channels-last --save-every 100"
)


def training(which: str, seed: int) -> Run:
    side, epochs, crop = SETS[which]
    words = ["recipes/rotnet.py", "--backbone", NET, "--data", which, "--seed", str(seed), *COMMON]
    words += ["--image-size", side, "--epochs", epochs, "--crop-scale", crop]
    return Run(f"{which}-{NET}-{seed}", tuple(words))


def pictures(folder: Path, most: int = 10**9) -> Tensor:
    """An ImageFolder as one tensor (N, 3, H, W) in [0, 1], in an order that mixes the classes."""
    images = ImageFolder(folder, v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:most]
    return torch.stack([images[int(i)][0] for i in order])


def flipped(x: Tensor) -> Tensor:
    """A random half of the images, mirrored."""
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)


def asked(images: Tensor, after: bool) -> tuple[Tensor, Tensor]:
    """All four turns and their labels, with random flips before the rotation or after it."""
    copies, labels = rotate4(images if after else flipped(images))
    return (flipped(copies) if after else copies), labels


def order(cifar: Path) -> dict[str, Any]:
    """Rotation accuracy by label, trained and asked with random flips before the rotation, and after it."""
    train, test = (pictures(cifar / part) * 4 - 2 for part in ("train", "test"))
    found = {}
    for name, after in (("flips before the rotation", False), ("flips after the rotation", True)):
        torch.manual_seed(0)
        rotnet = RotNet(timm.create_model(NET, num_classes=0))
        optimizer = torch.optim.AdamW(rotnet.parameters(), lr=1e-3, weight_decay=0.05)
        total = ORDER_EPOCHS * (len(train) // 32)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total)
        for _ in range(ORDER_EPOCHS):
            for batch in torch.randperm(len(train)).split(32)[: len(train) // 32]:
                copies, labels = asked(train[batch], after)
                torch.nn.functional.cross_entropy(rotnet.logits(copies), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        rotnet.eval()
        right = torch.zeros(4)
        with torch.no_grad():
            for images in test.split(100):
                copies, labels = asked(images, after)
                hits = rotnet.logits(copies).argmax(1) == labels
                right += torch.stack([hits[labels == label].float().sum() for label in range(4)])
        by_label = [round(value, 4) for value in (right / len(test)).tolist()]
        found[name] = {"accuracy": round(float(right.sum()) / len(test) / 4, 4), "by label": by_label}
        print(name, found[name], flush=True)
    return found


def audit(photos: Path) -> dict[str, Any]:
    """`cue_audit` of photos that are Fourier cropped before the rotation, on either grid."""
    images = pictures(photos / "train", AUDITED)

    def crop(size: int, align: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        return lambda x: rotate4(fourier_crop(x, size, align=align))

    cases = {"whole, 224 px": rotate4}
    for size in (160, 96):
        cases |= {f"to {size} px, {align}-aligned": crop(size, align) for align in ("center", "corner")}
    found = {}
    for name, rotate in cases.items():
        result = cue_audit(images, rotate=rotate, limit=AUDITED)
        found[name] = {"as given": result.as_given, "pipeline": result.pipeline}
        print(name, found[name], flush=True)
    return found


def table(ledger: Ledger) -> list[dict[str, Any]]:
    """Rotation accuracy and probes by stage, of what is complete."""
    rows = []
    for which in SETS:
        runs = [training(which, seed) for seed in SEEDS]
        if any(run.name not in ledger.rows for run in runs):
            continue
        cards = [ledger.rows[run.name]["card"] for run in runs]
        results = {what: summary([card[what] for card in cards]) for what in cards[0]}
        rows.append({"data": which, "side": SETS[which][0], "backbone": NET, "results": results})
    return rows


def words(rows: list[dict[str, Any]]) -> str:
    """As a Markdown table: percent, mean over seeds and standard deviation."""
    lines = ["| data | what | top-1 |", "|" + " --- |" * 3]
    for row in rows:
        for what, found in row["results"].items():
            value = f"{100 * found['mean']:.1f} ± {100 * found['sd']:.1f}"
            lines.append(f"| {row['data']}, {row['side']} px | {what} | {value} |")
    return "\n".join(lines)


def main() -> None:
    args = arguments(__doc__, ("run", "order", "audit", "table"))
    work, ledger = args.work.resolve(), Ledger(LEDGER)
    data, path = data_sets(args.data, work), RESULTS / "rotnet.json"
    report = json.loads(path.read_text()) if path.is_file() else {}
    if args.step == "run":
        execute([[training(which, seed)] for which in SETS for seed in SEEDS], data, work, args.jobs, ledger)
        return
    if args.step == "order":
        report["order"] = order(Path(data["cifar"]))
    elif args.step == "audit":
        report["audit"] = audit(Path(data["photos"]))
    else:
        report["results"] = table(ledger)
        print(words(report["results"]))
    report["machine"] = machine("cpu")
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
