"""Search for a curriculum of image sizes on your own data, with your own backbone.

    python recipes/schedule_search.py --backbone resnet10t --data PATH/OF/IMAGES --image-size 64 --sizes 32,48,64
    python recipes/schedule_search.py --method compute --backbone resnet10t --sizes 32,48,64 --stages 3 --jobs 2

`greedy` (EfficientTrain, Algorithm 1) asks for a whole training per candidate, and finds the smallest sizes that cost
no accuracy. `compute` (EfficientTrain++, Algorithm 2) asks for the budget of one training per candidate size, and
finds the sizes that learn most from equal computation. Judged on a part of the training images, never on the held-out
ones. What was stopped goes on with --resume auto.
"""

import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from leaven.curricula.search import compute_search, greedy_search
from leaven.recipes.common.batches import find_data, user_errors
from leaven.recipes.common.few_labels import keep_few
from leaven.recipes.common.flags import UserError, flag, run_main, to_yaml
from leaven.recipes.common.run_folder import open_run
from leaven.recipes.common.start import read_settings
from leaven.recipes.common.study import refuse_changes, stopping
from leaven.recipes.train import TrainSettings, train
from leaven.trials import TrialsError


@dataclass
class SearchSettings(TrainSettings):
    """The flags of recipes/train.py, for every training of the search, and those of the search."""

    epochs: int = 6
    workers: int = 0
    val_from_train: str | None = flag("20%", "share of the training images to judge on")
    method: Literal["greedy", "compute"] = flag("greedy", "which of the two searches")
    sizes: tuple[int, ...] = flag((32, 48, 64), "candidates, sides in pixels; the largest is the full size")
    stages: int = flag(3, "of equal length (greedy) or computation (compute); the last keeps the full size")
    tolerance: float = flag(0.0, "greedy: how much of the baseline's accuracy, in [0, 1], may be lost")
    finetune_epochs: int = flag(1, "compute: epochs at full size by which a stage is judged")
    jobs: int = flag(1, "trainings at a time, in processes of their own")
    time_limit: float | None = flag(
        None, "seconds for one training, after which it has failed; none: no limit"
    )

    def __post_init__(self) -> None:
        if self.callbacks or self.replay_buffer or self.curriculum != "et" or self.val_from_train is None:
            raise UserError(
                "a search brings its own curriculum, and judges on --val-from-train: leave --callbacks, --curriculum "
                "and --replay-buffer out"
            )
        super().__post_init__()
        if self.dry_run:
            raise UserError("--dry-run: a search has none; try --epochs 1 --limit-batches 2")
        if self.image_size is not None and self.image_size != (max(self.sizes), max(self.sizes)):
            raise UserError(f"--image-size is the largest of --sizes, {max(self.sizes)}: leave it out")
        if self.method == "greedy" and self.finetune_epochs != 1:
            raise UserError("--finetune-epochs is of --method compute")
        if self.method == "compute" and self.tolerance:
            raise UserError("--tolerance is of --method greedy")
        if self.stages < 2 or min(self.jobs, self.finetune_epochs) < 1 or self.tolerance < 0:
            raise UserError(
                "--stages must be at least 2, --jobs and --finetune-epochs at least 1, --tolerance at least 0"
            )
        if len(set(self.sizes)) < 2:
            raise UserError(f"--sizes {','.join(map(str, self.sizes))}: name two sizes at least")


def main(argv: list[str] | None = None) -> None:
    """Read the flags and search."""
    settings = read_settings(SearchSettings, argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "recipes/schedule_search.py starts its own processes: leave the launcher out, use --jobs"
        )
    data = keep_few(find_data(settings), settings.labels, settings.labels_seed)
    print("\n".join(data.notes))
    run = open_run(
        "schedule_search", settings.backbone, output_dir=settings.output_dir, resume=settings.resume
    )
    refuse_changes(run, settings)
    run.write(run.config, to_yaml(replace(settings, resume=None, output_dir=None)))
    # A fresh process for each training: nothing is left of the one before, and one that hangs can be stopped.
    fresh = partial(ProcessPoolExecutor, mp_context=get_context("spawn"), max_tasks_per_child=1)
    how: dict[str, Any] = {"executor": fresh, "workers": settings.jobs, "time_limit": settings.time_limit}
    how["journal"] = run.path / f"journal-{settings.method}.jsonl"
    folder, full = str(run.path.resolve()), max(settings.sizes)
    common = replace(trainings(settings), image_size=(full, full))
    with user_errors(ValueError, TrialsError), stopping("search", run):
        if settings.method == "greedy":
            found = greedy_search(
                partial(whole, common, folder),
                settings.sizes,
                settings.stages - 1,
                tolerance=settings.tolerance,
                **how,
            )
        else:
            batches = len(data.train) // settings.batch_size
            per_epoch = min(batches, settings.limit_batches or batches) // settings.grad_accum_steps
            found = compute_search(
                partial(stage, common, folder, per_epoch, settings.finetune_epochs),
                settings.sizes,
                settings.stages - 1,
                cost=lambda size: float(size * size),
                budget=settings.epochs * per_epoch * full**2 / settings.stages,
                **how,
            )
    text = curriculum((*found.sizes, full), settings.method)
    print(found.table())
    print(f"found, with score {found.score:.4f}: --callbacks efficienttrain --curriculum {text}")
    report = {"curriculum": text, "score": found.score, "tried": [asdict(row) for row in found.tried]}
    run.write(run.path / "search.json", json.dumps(report, indent=1))
    print(f"run folder: {run.path} (search.json, a run folder per training)")


def trainings(settings: SearchSettings) -> TrainSettings:
    """The settings of one training."""
    names = {field.name for field in fields(TrainSettings)}
    values = {name: value for name, value in vars(settings).items() if name in names}
    return TrainSettings(
        **{**values, "eval_every": settings.epochs, "save_every": 1, "keep": 1, "resume": "auto"}
    )


def whole(settings: TrainSettings, folder: str, sizes: tuple[int, ...]) -> float:
    """Accuracy of a whole training under these sizes and the full one at last, in stages of equal length."""
    sizes = (*sizes, max(settings.image_size or ()))
    under: dict[str, Any] = {}
    if len(set(sizes)) > 1:
        under = {"callbacks": ("efficienttrain",), "curriculum": curriculum(sizes, "greedy")}
    return accuracy(replace(settings, **under, output_dir=str(Path(folder) / "-".join(map(str, sizes)))))


def stage(
    settings: TrainSettings, folder: str, per_epoch: int, finetune_epochs: int,
    state: str | None, number: int, size: int, steps: int,
) -> dict[str, Any]:  # fmt: skip
    """Train on from weights for about so many updates at one size; the score is that of a copy tuned at full size.

    The optimizer starts afresh in every stage, at a constant rate; the copy's rate falls to zero.
    """
    # All the sizes so far are in the name: a search that takes another turn on resume must not go on in it.
    place = Path(folder) / f"{Path(state).parent.name if state else 'stages'}-{size}"
    epochs = math.ceil(steps / per_epoch)  # more epochs of fewer batches: none has more than there are
    limit = round(steps / epochs) * settings.grad_accum_steps
    learning = replace(
        settings,
        image_size=(size, size),
        epochs=epochs,
        limit_batches=limit,
        eval_every=epochs,
        init=state or settings.init,
    )
    accuracy(replace(learning, sched="constant", warmup_epochs=0.0 if state else 1.0, output_dir=str(place)))
    weights = str(place / "backbone.safetensors")
    tuning = replace(
        settings, epochs=finetune_epochs, eval_every=finetune_epochs, warmup_epochs=0.0, init=weights
    )
    return {"state": weights, "score": accuracy(replace(tuning, output_dir=f"{place}-tuned"))}


def accuracy(settings: TrainSettings) -> float:
    """Train, or go on where it was; the last accuracy on the images to judge on."""
    train(settings, find_data(settings))
    rows = (Path(str(settings.output_dir)) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    score: float = json.loads(rows[-1])["val_top1"]
    return score


def curriculum(sizes: tuple[int, ...], method: str) -> str:
    """A schedule as ``--curriculum`` takes it: ends of the stages as shares of the updates, and sizes."""
    weights = [1.0 if method == "greedy" else 1 / size**2 for size in sizes]
    ends = [sum(weights[: number + 1]) / sum(weights) for number in range(len(weights))]
    return ",".join(f"{end:.4g}:{size}" for end, size in zip(ends, sizes, strict=True))


if __name__ == "__main__":
    run_main(main)
