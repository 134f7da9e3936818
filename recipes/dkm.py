"""Deep kernel machines (Yang et al., ICML 2023) on tables, or on the features of a backbone.

    python recipes/dkm.py --data houses.csv --target price
    python recipes/dkm.py --data uci/boston --splits 10 --nu 0.01,1,100,inf --jobs 2
    python recipes/dkm.py --data PATH/OF/IMAGES --backbone resnet50 --init runs/spark/backbone.safetensors --labels 20

Several --nu: the one is taken that is likeliest on a fifth of the training part, for every split anew; inf is the
infinitely wide network, which learns no representation. Every split and seed is a trial of its own; what was stopped
goes on with --resume auto. Without --data: scikit-learn's diabetes table, a smoke test and no evidence.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from leaven.bayes import DeepKernelMachine, calibration, reliability_plot
from leaven.bayes.calibration import auroc
from leaven.bayes.deep_kernel_machine import Prediction, fit
from leaven.recipes.common.flags import UserError, flag, parse, run_main
from leaven.recipes.common.run_folder import writing
from leaven.recipes.common.study import StudySettings, conduct, features, share_threads
from leaven.recipes.common.tables import Scale, open_table


@dataclass
class DKMSettings(StudySettings):
    """A deep kernel machine on a table, or with --backbone on frozen features of images."""

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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("depth", "inducing", "steps"):
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


def main(argv: list[str] | None = None) -> None:
    """Read the flags and run the study."""
    conduct("dkm", parse(DKMSettings, argv), on_table, on_features, features)


def build(settings: DKMSettings, x: Tensor, outputs: int, nu: str, likelihood: Any) -> DeepKernelMachine:
    """A fresh machine for this training part."""
    return DeepKernelMachine(**arguments(settings, x, outputs, nu, likelihood))


def arguments(settings: DKMSettings, x: Tensor, outputs: int, nu: str, likelihood: Any) -> dict[str, Any]:
    """What that machine is built with."""
    return {
        "in_features": x.shape[1],
        "out_features": outputs,
        "depth": settings.depth,
        "n_inducing": min(settings.inducing, len(torch.unique(x, dim=0))),
        "nu": float(nu),
        "kernel": settings.kernel,
        "likelihood": likelihood,
        "ard": settings.ard,
        "skr": settings.skr,
    }


def keep(
    machine: DeepKernelMachine, made_with: dict[str, Any], folder: str, name: str, **more: Tensor
) -> None:
    """Write the trained machine to ``machines/NAME.pt``: what it is built with, its state, what else it needs."""
    path = Path(folder) / "machines" / f"{name}.pt"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"arguments": made_with, "state_dict": machine.state_dict(), **more}, path)


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
            try:
                machine = trained(nu, x[kept], y[kept])
            except FloatingPointError:  # so held, this table cannot be learnt
                scores[nu] = -math.inf
                continue
            with torch.no_grad():
                score = log_likelihood(machine(x[judged]), y[judged])
            scores[nu] = score if math.isfinite(score) else -math.inf
        best = max(scores, key=lambda nu: scores[nu])
    return trained(best, x, y), best


def log_likelihood(prediction: Prediction, y: Tensor) -> float:
    """Mean log p(y), as it is told of the test rows; the objective's E log p(y | f) is a bound below it."""
    if prediction.noise is None:
        return -calibration(prediction.probs(), y).nll
    return float(prediction.log_prob(y.double()).mean())


def on_table(settings: DKMSettings, folder: str, split: int, seed: int) -> dict[str, Any]:
    """One trial: RMSE and NLL on the test rows, in the target's own unit."""
    share_threads(settings.jobs)
    table = open_table(settings.data, settings.target, settings.seed)
    train, test = table.split(split)
    inputs, targets = Scale(table.x[train]), Scale(table.y[train])
    x, y = inputs(table.x[train]), targets(table.y[train])
    machine, nu = learn(settings, x, y, y.shape[1], seed, "gaussian")
    made_with = arguments(settings, x, y.shape[1], nu, "gaussian")
    scales = {"x_mean": inputs.mean, "x_std": inputs.std, "y_mean": targets.mean, "y_std": targets.std}
    keep(machine, made_with, folder, f"split{split}-seed{seed}", **scales)
    with torch.no_grad():
        prediction = machine(inputs(table.x[test]))
    truth = targets(table.y[test]).double()
    errors = (prediction.mean - truth) * targets.std
    nll = -prediction.log_prob(truth).mean() + targets.std.log().sum()
    return {"rmse": float(errors.square().mean().sqrt()), "nll": float(nll), "nu": nu}


def on_features(settings: DKMSettings, folder: str, split: int, seed: int) -> dict[str, Any]:
    """One trial: scores of the class probabilities on the held-out images."""
    share_threads(settings.jobs)
    found = torch.load(Path(folder) / "inputs.pt")
    (x, y), (x_val, y_val) = found["train"], found["val"]
    machine, nu = learn(settings, x, y, int(y.max()) + 1, seed, "categorical")
    made_with = arguments(settings, x, int(y.max()) + 1, nu, "categorical")
    keep(machine, made_with, folder, f"split{split}-seed{seed}")
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
    plots = Path(folder) / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    reliability_plot(scores, plots / f"reliability-seed{seed}.png", f"{settings.backbone}, DKM")
    return result


if __name__ == "__main__":
    run_main(main)
