"""Deep kernel machines (Yang et al., ICML 2023) on tables, or on the features of a backbone.

    python recipes/dkm.py --data houses.csv --target price
    python recipes/dkm.py --data uci/boston --splits 10 --nu 0.01,1,100,inf --jobs 2
    python recipes/dkm.py --data PATH/OF/IMAGES --backbone resnet50 --init runs/spark/backbone.safetensors --labels 20

Several --nu: the one is taken that is likeliest on a fifth of the training part, for every split anew; inf is the
infinitely wide network, which learns no representation. Every split and seed is a trial of its own; what was stopped
goes on with --resume auto. Without --data: scikit-learn's diabetes table, a smoke test and no evidence.
"""

import json
import math
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from leaven.bayes import DeepKernelMachine, calibration, reliability_plot
from leaven.bayes.calibration import auroc
from leaven.bayes.deep_kernel_machine import fit, normalised
from leaven.recipes.common.batches import Images, build_backbone, find_data, user_errors
from leaven.recipes.common.card import command
from leaven.recipes.common.few_labels import keep_few
from leaven.recipes.common.flags import ImageSettings, UserError, flag, parse, run_main, to_yaml
from leaven.recipes.common.launcher import set_threads
from leaven.recipes.common.probes import labelled_features, recalibrate
from leaven.recipes.common.run_folder import RunFolder, open_run, writing
from leaven.recipes.common.study import refuse_changes, stopping
from leaven.recipes.common.tables import open_table
from leaven.trials import Outcome, TrialsError, run_trials


@dataclass
class DKMSettings(ImageSettings):
    """A deep kernel machine on a table, or with --backbone on frozen features of images."""

    backbone: str = flag("none", "none: the data is a table; otherwise as in the other recipes")
    data: str = flag("diabetes", "a .csv or .parquet file, a folder of UCI splits; with --backbone, images")
    target: str | None = flag(None, "column of the table to learn, or several, comma-separated")
    splits: int = flag(1, "train/test splits of the table")
    seeds: int = flag(1, "trainings of every split, from --seed on")
    labels: str | None = flag(None, "learn from N images of each class or P%; none: from all")
    recalibrate: bool = flag(True, "take BatchNorm's statistics anew from whole training images first")
    ood: str | None = flag(None, "other images, to be told from the known ones by the entropy")
    depth: int = flag(3, "kernels one after another; 1 is a sparse Gaussian process")
    inducing: int = flag(100, "inducing points; fewer where there are fewer training rows")
    nu: tuple[str, ...] = flag(
        ("1", "100", "inf"), "how strongly learnt Gram matrices are held; several: chosen, see above"
    )
    kernel: Literal["rbf", "arccos", "norm-gauss", "linear"] = flag("rbf", "of a Gram matrix")
    ard: bool = flag(False, "a learnt scale for each input")
    skr: float | None = flag(None, "stochastic kernel regularisation: the paper's gamma")
    steps: int = flag(1000, "updates")
    batch_size: int = flag(256, "rows per update")
    lr: float = flag(0.02, "learning rate at the start; it falls to 0")
    jobs: int = flag(1, "trials at a time, in processes of their own")
    dask: str | None = flag(
        None, "address of a Dask scheduler whose workers do the trials, --jobs of them at a time"
    )
    time_limit: float | None = flag(
        None, "seconds for one trial, after which it has failed; needs --jobs 2 or more"
    )
    resume: str | None = flag(None, "auto: go on in --output-dir")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backbone != "none" and self.data == "diabetes":
            self.data = "digits"
        for name in ("splits", "seeds", "depth", "inducing", "steps", "jobs"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.skr is not None and not self.skr >= 1:
            raise UserError(f"--skr must be at least 1, got {self.skr}")
        try:
            good = all(float(nu) > 0 for nu in self.nu)
        except ValueError:
            good = False
        if not good or not self.nu:
            raise UserError(f"--nu {','.join(self.nu)}: numbers greater than 0, or inf")
        for name in ("init", "labels", "ood") if self.backbone == "none" else ("target",):
            if getattr(self, name) is not None:
                kind = "images: add --backbone" if self.backbone == "none" else "tables"
                raise UserError(f"--{name} is of {kind}")
        if self.time_limit is not None and self.jobs < 2 and self.dask is None:
            raise UserError("--time-limit needs processes of their own: add --jobs 2")


def main(argv: list[str] | None = None) -> None:
    """Read the flags and run the study."""
    settings = parse(DKMSettings, argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("recipes/dkm.py starts its own processes: leave the launcher out, use --jobs")
    notes = about(settings)
    name = Path(settings.data).stem if settings.backbone == "none" else settings.backbone
    run = open_run("dkm", name, output_dir=settings.output_dir, resume=settings.resume)
    print("\n".join([set_threads(settings.jobs), *notes]))
    refuse_changes(run, settings)
    run.write(run.config, to_yaml(replace(settings, resume=None, output_dir=None)))
    trial: Callable[..., Any] = partial(on_table, settings)
    if settings.backbone != "none":
        cache = run.path / "features.pt"
        extract(settings, cache)
        trial = partial(on_features, settings, str(cache), str(run.plots))
    trials = {
        f"split {k}, seed {settings.seed + s}": {"split": k, "seed": settings.seed + s}
        for k in range(settings.splits)
        for s in range(settings.seeds)
    }
    outcomes = study(trial, trials, settings, run)
    report(settings, outcomes, run, notes)


def about(settings: DKMSettings) -> list[str]:
    """What is learnt from; an error before anything is made."""
    if settings.backbone == "none":
        table = open_table(settings.data, settings.target, settings.seed)
        if table.splits and settings.splits > table.splits:
            raise UserError(f"--splits {settings.splits}: {settings.data} has {table.splits}")
        smoke = (
            ["diabetes is a smoke test of the recipe and no evidence"] if settings.data == "diabetes" else []
        )
        return [str(table), *smoke]
    if settings.splits != 1:
        raise UserError("--splits is of tables; images are split as they lie, see --seeds")
    return keep_few(find_data(settings), settings.labels, settings.seed).notes


def study(
    trial: Callable[..., Any], trials: dict[str, dict[str, Any]], settings: DKMSettings, run: RunFolder
) -> dict[str, Outcome]:
    """All trials: in this process, in others, or on a cluster."""
    how: dict[str, Any] = {"journal": run.path / "journal.jsonl", "time_limit": settings.time_limit}
    with user_errors(TrialsError), stopping("study", run), ExitStack() as stack:
        if settings.dask is not None:
            client = stack.enter_context(connected(settings.dask))
            how |= {"executor": lambda workers: client.get_executor(), "workers": settings.jobs}
        elif settings.jobs > 1:
            pool = partial(ProcessPoolExecutor, mp_context=get_context("spawn"))
            how |= {"executor": pool, "workers": settings.jobs}
        return run_trials(trial, trials, **how)


def connected(address: str) -> Any:
    """A client of a Dask scheduler."""
    try:
        import distributed
    except ImportError as error:
        raise UserError('--dask needs Dask: pip install "leaven[cluster]"') from error
    try:
        module: Any = distributed
        return module.Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise UserError(f"--dask {address}: no scheduler answers there ({error})") from error


def build(settings: DKMSettings, x: Tensor, outputs: int, nu: str, likelihood: Any) -> DeepKernelMachine:
    """A fresh machine for this training part."""
    inducing = min(settings.inducing, len(torch.unique(x, dim=0)))
    return DeepKernelMachine(
        x.shape[1], outputs, settings.depth, inducing, float(nu), settings.kernel, likelihood,
        ard=settings.ard, skr=settings.skr,
    )  # fmt: skip


def learn(
    settings: DKMSettings, x: Tensor, y: Tensor, outputs: int, seed: int, likelihood: Any
) -> tuple[DeepKernelMachine, str]:
    """The machine of the likeliest nu on a fifth of the rows, trained on all of them; and that nu."""

    def trained(nu: str, x: Tensor, y: Tensor) -> DeepKernelMachine:
        torch.manual_seed(seed)
        how: dict[str, Any] = {
            "steps": settings.steps,
            "batch_size": settings.batch_size,
            "lr": settings.lr,
            "seed": seed,
        }
        return fit(build(settings, x, outputs, nu, likelihood), x, y, **how)

    best = settings.nu[0]
    if len(settings.nu) > 1:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        kept, judged = order[len(x) // 5 :], order[: len(x) // 5]
        scores = {}
        for nu in settings.nu:
            machine = trained(nu, x[kept], y[kept])
            with torch.no_grad():
                scores[nu] = float(machine.expected_log_prob(machine(x[judged]), y[judged]).mean())
        best = max(scores, key=lambda nu: scores[nu])
    return trained(best, x, y), best


def on_table(settings: DKMSettings, split: int, seed: int) -> dict[str, Any]:
    """One trial: RMSE and NLL on the test rows, in the target's own unit."""
    torch.set_num_threads(max(1, torch.get_num_threads() // settings.jobs))
    table = open_table(settings.data, settings.target, settings.seed)
    train, test = table.split(split)
    inputs, targets = Scale(table.x[train]), Scale(table.y[train])
    x, y = inputs(table.x[train]), targets(table.y[train])
    machine, nu = learn(settings, x, y, y.shape[1], seed, "gaussian")
    with torch.no_grad():
        prediction = machine(inputs(table.x[test]))
    truth = targets(table.y[test]).double()
    errors = (prediction.mean - truth) * targets.std
    nll = -prediction.log_prob(truth).mean() + targets.std.log().sum()
    return {"rmse": float(errors.square().mean().sqrt()), "nll": float(nll), "nu": nu}


class Scale:
    """Columns to mean 0 and standard deviation 1, by those of some rows; a constant column stays at 0."""

    def __init__(self, rows: Any) -> None:
        values = torch.as_tensor(rows, dtype=torch.float64)
        self.mean, std = values.mean(0), values.std(0, correction=0)
        self.std = torch.where(std > 0, std, 1.0)

    def __call__(self, rows: Any) -> Tensor:
        return ((torch.as_tensor(rows, dtype=torch.float64) - self.mean) / self.std).float()


def extract(settings: DKMSettings, cache: Path) -> None:
    """Features of training, held-out and other images, once."""
    if cache.is_file():
        return
    data = keep_few(find_data(settings), settings.labels, settings.seed)
    size = settings.image_size or data.image_size
    backbone = build_backbone(settings, size, classes=0)
    images = Images.of(data, settings, size, backbone)
    if settings.recalibrate:
        print("\n".join(recalibrate({settings.backbone: backbone}, images)))
    found = {
        name: labelled_features(backbone, images.whole(part, len(part)))
        for name, part in (("train", data.train), ("val", data.val))
    }
    if settings.ood is not None:
        other = find_data(replace(settings, data=settings.ood))
        strange = replace(images, data=other)
        found["ood"] = labelled_features(backbone, strange.whole(other.val, len(other.val)))
    temporary = cache.with_suffix(".tmp")
    with writing(cache):
        torch.save({name: (normalised(x), y) for name, (x, y) in found.items()}, temporary)
        temporary.replace(cache)


def on_features(settings: DKMSettings, cache: str, plots: str, split: int, seed: int) -> dict[str, Any]:
    """One trial: scores of the class probabilities on the held-out images."""
    torch.set_num_threads(max(1, torch.get_num_threads() // settings.jobs))
    found = torch.load(cache)
    (x, y), (x_val, y_val) = found["train"], found["val"]
    machine, nu = learn(settings, x, y, int(y.max()) + 1, seed, "categorical")
    with torch.no_grad():
        prediction = machine(x_val)
        scores = calibration(prediction.probs(), y_val)
        result = {
            "accuracy": scores.accuracy,
            "nll": scores.nll,
            "brier": scores.brier,
            "ece": scores.ece,
            "nu": nu,
        }
        if "ood" in found:
            result["ood auroc"] = auroc(prediction.entropy(), machine(found["ood"][0]).entropy())
    Path(plots).mkdir(parents=True, exist_ok=True)
    reliability_plot(scores, Path(plots) / f"reliability-seed{seed}.png", f"{settings.backbone}, DKM")
    return result


def report(settings: DKMSettings, outcomes: dict[str, Outcome], run: RunFolder, notes: list[str]) -> None:
    """Means and standard errors over trials, in words and as results.json."""
    for name, outcome in outcomes.items():
        words = outcome.failure or ", ".join(
            f"{what} {value:.4f}" if isinstance(value, float) else f"{what} {value}"
            for what, value in outcome.result.items()
        )
        print(f"{name}: {words}")
    done = [outcome.result for outcome in outcomes.values() if outcome.failure is None]
    if not done:
        raise UserError(f"no trial of {len(outcomes)} came to an end; see {run.path / 'journal.jsonl'}")
    summary = {}
    for what in (key for key in done[0] if key != "nu"):
        values = [result[what] for result in done]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        summary[what] = {
            "mean": statistics.mean(values),
            "standard error": None if math.isnan(error) else error,
        }
        spread = "" if math.isnan(error) else f" ± {error:.4f} (standard error over {len(values)} trials)"
        print(f"{what}: {summary[what]['mean']:.4f}{spread}")
    trials = {name: vars(outcome) for name, outcome in outcomes.items()}
    body = {"command": command(), "data": notes, "summary": summary, "trials": trials}
    run.write(run.path / "results.json", json.dumps(body, indent=1))
    print(f"run folder: {run.path} (results.json, config.yaml, journal.jsonl)")


if __name__ == "__main__":
    run_main(main)
