"""Are a denoiser's features worth training for? Beside pixels, untrained networks, and other ways to train features.

    python benchmarks/diffusion_features.py --data DATA --work RUNS            # as many at a time as there are cores
    python benchmarks/diffusion_features.py --data DATA --work RUNS --table    # in words, and as JSON in results/

DATA holds cifar10-jpeg/ and fashion-mnist/. The denoiser is recipes/diffusion_features.py's small U-Net at 32 px;
SparK, RotNet and supervised training have a resnet10t at 64 px and as many updates as take about as long. Everybody is
probed by the same rule: ridge regression on standardised features, what there is to choose (timestep, block, pooling,
penalty; for the resnet10t stage, pooling, penalty; of pixels the penalty) chosen on a fifth of the labels, told on
held-out images. "untrained" is the U-Net with fresh weights, none of them zero by design, and has the same choice.
"supervised" has seen all labels of the training images: an upper bound. A finished trial is one line of
RUNS/diffusion_features.jsonl.
"""

import shlex
import statistics
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dkm_head import unpack_fashion
from ledger import RESULTS, Ledger, Run, data_sets, execute
from study import study
from torch import Tensor

from leaven.backbones import create, load, load_around_classifier, stages
from leaven.backbones import features as stage_maps
from leaven.pretext import kshot_indices
from leaven.pretext.diffusion import Cell, DiffusionFeatures, Schedule, fresh_like
from leaven.pretext.diffusion.blocks import pooled
from leaven.recipes.common.batches import Images, find_data
from leaven.recipes.common.flags import ImageSettings
from leaven.recipes.diffusion_features import told

LEDGER = RESULTS / "diffusion_features_runs.jsonl"
SETS, SEEDS, SIDE, NET_SIDE, TRAIN, VAL = ("cifar", "fashion"), (0, 1, 2), 32, 64, 10_000, 2000
KINDS = ("pixels", "untrained", "denoiser", "RotNet", "SparK", "supervised")
LABELS = {"100": 10, "1,000": 100, "all": None}  # images of each class
TIMES, POOLS = (10, 20, 40, 90, 150), (1, 2, 4)
COMMON = shlex.split("--workers 0 --batch-size 64 --warmup-epochs 1 --channels-last")
BATCHES = ["--limit-batches", "156"]  # as many as CIFAR has
HOW: dict[str, list[str]] = {
    "denoiser": shlex.split("recipes/diffusion_features.py --epochs 8 --no-grid"),
    "SparK": shlex.split(
        "recipes/spark.py --backbone resnet10t --epochs 40 --lr 2e-3 --weight-decay 0.05 --weight-decay-end none "
        "--stages 4,8,16 --decoder-width 128 --crop-scale 0.67,1"
    ),
    "RotNet": shlex.split("recipes/rotnet.py --backbone resnet10t --epochs 10 --lr 2e-3 --crop-scale 0.5,1"),
    "supervised": shlex.split(
        "recipes/train.py --backbone resnet10t --epochs 40 --lr 4e-3 --weight-decay 0.05 --crop-scale 0.35,1 "
        "--eval-every 40"
    ),
}


def training(data: str, kind: str, seed: int) -> Run:
    side = str(SIDE if kind == "denoiser" else NET_SIDE)
    words = [*HOW[kind], "--data", data, "--seed", str(seed), "--image-size", side, *COMMON, *BATCHES]
    return Run(f"{kind}-{data}-{seed}", tuple(words))


def pixels(data: str, places: dict[str, str], work: Path) -> Path:
    """Training and held-out images in [0, 1], taken once."""
    cache = work / f"pixels01-{data}.pt"
    if not cache.is_file():
        settings = ImageSettings(data=places[data], image_size=(SIDE, SIDE), workers=0)
        found = find_data(settings)
        images = Images(found, settings, (SIDE, SIDE), (0.0,) * 3, (1.0,) * 3)
        parts = []
        for part, most in ((found.train, TRAIN), (found.val, VAL)):
            batches = list(images.whole(part, most))
            parts.append((torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])))
        moments = torch.tensor([found.mean, found.std])
        torch.save((*parts, moments), cache)
    return cache


def features(
    kind: str, weights: str, x: Tensor, moments: Tensor, seed: int, first: int = 0
) -> dict[Cell, Tensor]:
    """Maps of images in [0, 1] by cell; the first one's index, for the noise."""
    if kind == "pixels":
        return {Cell("clean", "pixels", None): x}
    if kind in ("denoiser", "untrained"):
        net = load("leaven.pretext.diffusion:small_unet", weights).eval()
        net = fresh_like(net, seed) if kind == "untrained" else net
        extract = DiffusionFeatures(
            net, Schedule.linear(), timesteps=TIMES, pool=POOLS, include_clean=True, seed=seed
        )
        pairs = zip(x.split(500), torch.arange(first, first + len(x)).split(500), strict=True)
        parts = [extract(2 * part - 1, indices) for part, indices in pairs]
        return {cell: torch.cat([part.pop(cell) for part in parts]) for cell in extract.cells}
    mean, std = moments.view(2, 1, 3, 1, 1)
    net = create("resnet10t")
    load_around_classifier(net, weights)
    found: dict[Cell, list[Tensor]] = {}
    with torch.no_grad():
        known = stages(net.eval(), image_size=(NET_SIDE, NET_SIDE))
        for part in x.split(500):
            images = F.interpolate((part - mean) / std, (NET_SIDE, NET_SIDE), mode="bicubic")
            for stage, maps in zip(known, stage_maps(net, images, known), strict=True):
                for pool in POOLS:
                    found.setdefault(Cell("clean", stage.name, pool), []).append(pooled(maps, pool))
    return {cell: torch.cat(maps) for cell, maps in found.items()}


def trial(caches: dict[str, str], work: str, data: str, kind: str, seed: int) -> dict[str, Any]:
    """Accuracy by number of labels, and the cell that was chosen."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    (x, y), (x_val, y_val), moments = torch.load(caches[data])
    run = training(data, "denoiser" if kind in ("pixels", "untrained") else kind, seed)
    weights = str(Path(work) / run.name / "backbone.safetensors")
    parts = {
        name: (features(kind, weights, pictures, moments, seed, first), labels)
        for name, pictures, labels, first in (("train", x, y, 0), ("val", x_val, y_val, len(x)))
    }
    found: dict[str, Any] = {}
    for amount, shots in LABELS.items():
        chosen = torch.arange(len(y)) if shots is None else kshot_indices(y, shots, seed)
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
        judged, kept = chosen[order[: len(order) // 5]], chosen[order[len(order) // 5 :]]
        result, _ = told(parts, kept, judged, chosen)
        found[amount] = {"top1": result["top1"], "cell": str(Cell(*result["cell"])), "l2": result["l2"]}
        if amount == "1,000":
            found["grid"] = result["grid"]
    return found


def trials() -> dict[str, dict[str, Any]]:
    return {
        f"{data}, {kind}, seed {seed}": {"data": data, "kind": kind, "seed": seed}
        for data in SETS
        for kind in KINDS
        for seed in SEEDS
    }


def summary(outcomes: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Means over seeds; what is not complete is left out."""
    rows = []
    lines = ["| data | features | 100 labels | 1,000 labels | all | chosen with 1,000 |", "|" + " --- |" * 6]
    for data in SETS:
        for kind in KINDS:
            found = [outcomes.get(f"{data}, {kind}, seed {seed}") for seed in SEEDS]
            if any(each is None or each["failure"] for each in found):
                continue
            results = [each["result"] for each in found if each]
            row: dict[str, Any] = {"data": data, "features": kind}
            cells = [data, kind]
            for amount in LABELS:
                values = [result[amount]["top1"] for result in results]
                row[amount] = {"mean": statistics.mean(values), "sd": statistics.stdev(values)}
                cells.append(f"{100 * row[amount]['mean']:.1f} ± {100 * row[amount]['sd']:.1f} %")
            row["cells"] = [result["1,000"]["cell"] for result in results]
            rows.append(row)
            lines.append("| " + " | ".join([*cells, row["cells"][0]]) + " |")
    return rows, "\n".join(lines)


def prepare(data: Path, work: Path, jobs: int) -> tuple[Any, dict[str, dict[str, Any]]]:
    """All trainings, and the images."""
    places = data_sets(data, work) | {"fashion": unpack_fashion(data, work)}
    runs = [training(name, kind, seed) for seed in SEEDS for name in SETS for kind in HOW]
    execute([[run] for run in runs], places, work, jobs, Ledger(LEDGER))
    caches = {name: str(pixels(name, places, work)) for name in SETS}
    return partial(trial, caches, str(work)), trials()


def main() -> None:
    settings = {
        "timesteps": TIMES,
        "pools": POOLS,
        "training images": TRAIN,
        "held-out images": VAL,
        "how": HOW,
    }
    study(__file__, __doc__, prepare, summary, settings)


if __name__ == "__main__":
    main()
