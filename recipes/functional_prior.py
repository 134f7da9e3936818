"""GP-matched functional priors (Tran et al., JMLR 2022) and their posterior, on tables or on images.

    python recipes/functional_prior.py --data houses.csv --target price
    python recipes/functional_prior.py --data uci/boston --splits 10 --jobs 2 --baselines
    python recipes/functional_prior.py --data PATH/OF/IMAGES --backbone resnet50 --init pretrained --labels 20

The prior of a network's weights is moved until its functions look like those of a Gaussian process, then the posterior
is sampled by SGHMC. Tables: a network with one hidden layer. Images: a head on frozen features; with --scope last_block
or all, the backbone's own parameters too. --prior standard leaves N(0, 1) as it is, to compare with. Every split and
seed is a trial of its own; what was stopped goes on with --resume auto. Without --data: scikit-learn's diabetes table,
a smoke test and no evidence.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leaven.bayes import SGHMC, FunctionalPrior, GPTarget, PosteriorSamples, auroc, calibration, fit_prior
from leaven.bayes.deep_kernel_machine import normalised
from leaven.bayes.functional_prior import (
    gaussian_loglik,
    image_measure,
    map_estimate,
    softmax_loglik,
    table_measure,
)
from leaven.pretext import extract_features, recalibrate_batchnorm
from leaven.recipes.common.batches import CALIBRATION_IMAGES, EVALUATION_BATCH, build_backbone, user_errors
from leaven.recipes.common.data import KeyedLoader
from leaven.recipes.common.flags import UserError, flag, parse, run_main
from leaven.recipes.common.plots import band, curves, histograms
from leaven.recipes.common.run_folder import writing
from leaven.recipes.common.sampler import permutation
from leaven.recipes.common.study import StudySettings, conduct, features, share_threads
from leaven.recipes.common.tables import Scale, open_table

DRAWN = 20  # functions in a picture


@dataclass
class FunctionalPriorSettings(StudySettings):
    """A functional prior and its posterior on a table, or with --backbone on images."""

    hidden: tuple[int, ...] | None = flag(
        None, "widths of the layers before the last: 100 for tables, none on a backbone's features"
    )
    scope: Literal["head", "last_block", "all"] = flag("head", "what of a backbone has a prior")
    prior: Literal["gp", "standard"] = flag("gp", "matched to a Gaussian process, or N(0, 1) as it is")
    family: Literal["gaussian", "hierarchical", "flow"] = flag("gaussian", "of the weights")
    distance: Literal["w1", "sliced", "energy"] = flag("w1", "between functions; w1 is the paper's")
    gp_on: Literal["features", "pixels"] = flag("features", "what the process sees of images")
    gp_variance: float | None = flag(
        None, "median of the process's variance: 1.1 for tables (the paper's), 8 for logits"
    )
    noise: float = flag(0.1, "variance of a table's target around the function, of a target of variance 1")
    fit_steps: int = flag(100, "updates of the prior")
    critic_steps: int = flag(100, "updates of the critic before each of them, at most")
    functions: int = flag(128, "drawn of prior and process for each update of the prior")
    points: int = flag(100, "inputs that functions are compared at")
    chains: int = flag(4, "of SGHMC, at once")
    burn_in: int = flag(2000, "steps that the sampler adapts in")
    thin: int = flag(200, "steps between draws")
    draws: int = flag(30, "of each chain; the first third is left out")
    step_size: float = flag(0.01, "of the sampler")
    friction: float = flag(0.01, "of the sampler")
    temperature: float = flag(1.0, "of the posterior; below 1 it is colder")
    batch_size: int = flag(32, "rows per step of a chain")
    baselines: bool = flag(False, "MAP estimate and deep ensemble of five under the same prior, too")
    chunk_size: int = flag(16, "functions at a time; fewer need less memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("fit_steps", "critic_steps", "points", "chains", "thin", "chunk_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name, least in (("functions", 2), ("draws", 6), ("burn_in", 0)):
            if getattr(self, name) < least:
                raise UserError(
                    f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}"
                )
        for name in ("noise", "step_size", "temperature", "gp_variance"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be greater than 0, got {value}")
        if not 0 < self.friction < 1:
            raise UserError(f"--friction must be between 0 and 1, got {self.friction}")
        if min(self.hidden or (1,)) < 1:
            raise UserError("--hidden: widths of at least 1, as in 100 or 50,50")
        if self.prior == "standard" and self.family != "gaussian":
            raise UserError(f"--prior standard is gaussian: leave out --family {self.family}")
        if self.scope != "head" and self.backbone == "none":
            raise UserError(f"--scope {self.scope} is of images: add --backbone")
        if self.scope != "head" and self.hidden is not None:
            raise UserError(f"--hidden is of heads, and --scope {self.scope} takes the backbone's own")


def main(argv: list[str] | None = None) -> None:
    """Read the flags and run the study."""
    settings = parse(FunctionalPriorSettings, argv)
    conduct(
        "functional_prior", settings, on_table, on_images, features if settings.scope == "head" else pixels
    )


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    widths = [inputs, *hidden]
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def process(
    settings: FunctionalPriorSettings, inputs: int, outputs: int, variance: float, **how: Any
) -> GPTarget:
    """RBF, with log-normal lengthscales around sqrt(2 inputs) and log-normal variance, as in the paper.

    Tables have a lengthscale for each input; the paper's variance has a log-standard-deviation of 1 for tables and of
    sqrt(0.3) for classes.
    """
    import gpytorch

    log_normal, table = gpytorch.priors.LogNormalPrior, settings.backbone == "none"
    lengthscale = log_normal(math.log(math.sqrt(2 * inputs)), 1.0)
    rbf = gpytorch.kernels.RBFKernel(ard_num_dims=inputs if table else None, lengthscale_prior=lengthscale)
    spread = 1.0 if table else math.sqrt(0.3)
    kernel = gpytorch.kernels.ScaleKernel(
        rbf, outputscale_prior=log_normal(math.log(settings.gp_variance or variance), spread)
    )
    return GPTarget(kernel, outputs=outputs, **how)


def match(
    settings: FunctionalPriorSettings, prior: FunctionalPrior, target: GPTarget, measure: Any, seed: int
) -> list[float]:
    """The distance before every update; none for --prior standard."""
    if settings.prior == "standard":
        prior.standardise()
        return []
    return fit_prior(
        prior, target, measure, settings.distance,
        steps=settings.fit_steps, critic_steps=settings.critic_steps, functions=settings.functions,
        chunk_size=settings.chunk_size, seed=seed,
    )  # fmt: skip


def sample(
    settings: FunctionalPriorSettings,
    prior: FunctionalPrior,
    loglik: Any,
    x: Tensor,
    y: Tensor,
    seed: int,
    path: Path,
) -> tuple[PosteriorSamples, dict[str, float]]:
    """The posterior, kept as a file beside the prior; how well the chains have mixed."""
    sampler = SGHMC(
        prior, loglik, x, y,
        chains=settings.chains, batch_size=settings.batch_size, step_size=settings.step_size,
        friction=settings.friction, burn_in=settings.burn_in, thin=settings.thin,
        temperature=settings.temperature, seed=seed,
    )  # fmt: skip
    posterior = sampler.run(settings.draws).after(settings.draws // 3)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        posterior.save(path)
        torch.save(prior.state_dict(), path.with_suffix(".prior.pt"))
    rhat = posterior.rhat()
    mixing = {
        "r-hat": float(rhat.mean()),
        "worst r-hat": float(rhat.max()),
        "effective draws": float(posterior.ess().mean()),
        "clamped": posterior.clamped_fraction,
    }
    if mixing["r-hat"] > 1.2 or mixing["clamped"] > 0.5:
        print(
            f"{path.stem}: the chains are no sample of the posterior (mean R-hat {mixing['r-hat']:.2f}, clamped "
            f"{mixing['clamped']:.0%}): more --burn-in and --draws, or a smaller --step-size"
        )
    return posterior, mixing


def rivals(
    settings: FunctionalPriorSettings, prior: FunctionalPrior, loglik: Any, x: Tensor, y: Tensor, seed: int
) -> dict[str, dict[str, Tensor]]:
    """Parameters of the baselines; as many updates as the sampler makes steps."""
    if not settings.baselines:
        return {}
    steps = settings.burn_in + settings.draws * settings.thin
    how: dict[str, Any] = {"steps": steps, "batch_size": settings.batch_size, "seed": seed}
    five = map_estimate(prior, loglik, x, y, members=5, **how)
    return {"map ": {name: value[:1] for name, value in five.items()}, "ensemble ": five}


def on_table(settings: FunctionalPriorSettings, folder: str, split: int, seed: int) -> dict[str, Any]:
    """One trial: RMSE and NLL on the test rows, in the target's own unit."""
    share_threads(settings.jobs)
    name, plots = f"split{split}-seed{seed}", Path(folder) / "plots"
    table = open_table(settings.data, settings.target, settings.seed)
    train, test = table.split(split)
    inputs, targets = Scale(table.x[train]), Scale(table.y[train])
    x, y = inputs(table.x[train]), targets(table.y[train])
    torch.manual_seed(seed)
    prior = FunctionalPrior(mlp(x.shape[1], settings.hidden or (100,), y.shape[1]), family=settings.family)
    target = process(settings, x.shape[1], y.shape[1], math.exp(0.1))
    line, column = along(x, y)
    pictures = {"before": drawn(prior, line)}
    distances = match(settings, prior, target, table_measure(x, settings.points), seed)
    pictures |= {"after": drawn(prior, line), "Gaussian process": target.sample(line, DRAWN, keyed(seed))}
    where = f"{table.columns[column]} (standardised; the others at their mean)"
    curves(line[:, column], {k: v[..., 0] for k, v in pictures.items()}, plots / f"prior-{name}.png", where)
    if distances:
        updates = torch.arange(len(distances))
        one: dict[str, Tensor] = {settings.distance: torch.tensor([distances])}
        curves(updates, one, plots / f"distance-{name}.png", "update of the prior")

    loglik = gaussian_loglik(settings.noise)
    kept = Path(folder) / "posterior" / f"{name}.safetensors"
    posterior, mixing = sample(settings, prior, loglik, x, y, seed, kept)
    truth, x_test = targets(table.y[test]).double(), inputs(table.x[test])
    found: dict[str, Any] = {}
    for who, params in {"": posterior.flat(), **rivals(settings, prior, loglik, x, y, seed)}.items():
        with torch.no_grad():
            functions = prior.evaluate(params, x_test, settings.chunk_size).double()
        mean = functions.mean(0)
        variance = functions.var(0, correction=int(len(functions) > 1)) + settings.noise
        nll = 0.5 * ((truth - mean).square() / variance + (2 * math.pi * variance).log()).sum(1)
        found[f"{who}rmse"] = float(((mean - truth) * targets.std).square().mean().sqrt())
        found[f"{who}nll"] = float(nll.mean() + targets.std.log().sum())
    if x.shape[1] == 1:
        functions = posterior.predict(prior, line, settings.chunk_size)[..., 0]
        spread = (functions.var(0) + settings.noise).sqrt()
        band(line[:, 0], functions.mean(0), spread, (x[:, 0], y[:, 0]), plots / f"band-{name}.png", where)
    return found | mixing


def along(x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """Inputs (200, D) along the column that the first target follows best, the others at 0; and that column."""
    column = int((x * y[:, :1]).mean(0).abs().argmax())
    low, high = float(x[:, column].min()), float(x[:, column].max())
    line = torch.zeros(200, x.shape[1])
    line[:, column] = torch.linspace(low - 0.3 * (high - low), high + 0.3 * (high - low), 200)
    return line, column


def keyed(seed: int) -> torch.Generator:
    """A stream for pictures."""
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def drawn(prior: FunctionalPrior, x: Tensor, n: int = DRAWN, chunk_size: int | None = None) -> Tensor:
    """Values (n, B, outputs) of a few functions, the same noise before and after matching."""
    return prior.functions(x, n, keyed(0), chunk_size)


def pixels(backbone: nn.Module, loader: KeyedLoader) -> tuple[Tensor, Tensor]:
    """The images themselves, and labels."""
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def network(settings: FunctionalPriorSettings, x: Tensor, classes: int) -> tuple[nn.Module, Any]:
    """What has the prior, in evaluation mode, and what the process sees of its inputs."""
    if settings.scope == "head":
        return mlp(x.shape[1], settings.hidden or (), classes), None
    size = (x.shape[-2], x.shape[-1])
    n = min(len(x), CALIBRATION_IMAGES)
    mixed = torch.from_numpy(permutation(0, 0, n, "calibration"))  # as in `Images.calibration`
    calibration = x[mixed * len(x) // n]
    nets = []
    for outputs in (classes, 0):
        torch.manual_seed(settings.seed)
        net = build_backbone(settings, size, classes=outputs)
        if settings.recalibrate:
            recalibrate_batchnorm(net, calibration.split(EVALUATION_BATCH))
        nets.append(net.eval())
    if settings.gp_on == "pixels":
        return nets[0], None
    return nets[0], lambda images: normalised(extract_features(nets[1], [images]))


def on_images(settings: FunctionalPriorSettings, folder: str, split: int, seed: int) -> dict[str, Any]:
    """One trial: scores of the class probabilities on the held-out images."""
    share_threads(settings.jobs)
    name, plots = f"seed{seed}", Path(folder) / "plots"
    parts = torch.load(Path(folder) / "inputs.pt")
    (x, y), (x_val, y_val) = parts["train"], parts["val"]
    classes = int(y.max()) + 1
    torch.manual_seed(seed)
    net, feature_map = network(settings, x, classes)
    with user_errors(ValueError):
        prior = FunctionalPrior(
            net, family=settings.family, scope="all" if settings.scope == "head" else settings.scope
        )
    shown = x[: settings.points]
    seen = shown.flatten(1) if feature_map is None else feature_map(shown)
    target = process(settings, seen.shape[1], classes, 8.0, feature_map=feature_map)
    logits = {"before": drawn(prior, shown, 100, settings.chunk_size)}
    distances = match(settings, prior, target, image_measure(x, settings.points), seed)
    logits |= {
        "after": drawn(prior, shown, 100, settings.chunk_size),
        "Gaussian process": target.sample(shown, 100, keyed(seed)),
    }
    confidences = {who: each.softmax(2).amax(2).flatten() for who, each in logits.items()}
    what = "confidence of functions drawn from the prior"
    histograms(confidences, plots / f"prior-{name}.png", what)
    if distances:
        updates = torch.arange(len(distances))
        one: dict[str, Tensor] = {settings.distance: torch.tensor([distances])}
        curves(updates, one, plots / f"distance-{name}.png", "update of the prior")

    kept = Path(folder) / "posterior" / f"{name}.safetensors"
    posterior, mixing = sample(settings, prior, softmax_loglik, x, y, seed, kept)
    found: dict[str, Any] = {}
    for who, params in {"": posterior.flat(), **rivals(settings, prior, softmax_loglik, x, y, seed)}.items():
        probs = probabilities(prior, params, x_val, settings.chunk_size)
        scores = calibration(probs, y_val)
        numbers = {"accuracy": scores.accuracy, "nll": scores.nll, "brier": scores.brier, "ece": scores.ece}
        if "ood" in parts:
            strange = probabilities(prior, params, parts["ood"][0], settings.chunk_size)
            numbers["ood auroc"] = auroc(*(torch.special.entr(each).sum(1) for each in (probs, strange)))
        found |= {f"{who}{what}": value for what, value in numbers.items()}
    return found | mixing


@torch.no_grad()
def probabilities(prior: FunctionalPrior, params: dict[str, Tensor], x: Tensor, chunk_size: int) -> Tensor:
    """Mean class probabilities (B, C) of all functions, in float64."""
    return torch.cat(
        [
            prior.evaluate(params, part, chunk_size).double().softmax(2).mean(0)
            for part in x.split(EVALUATION_BATCH)
        ]
    )


if __name__ == "__main__":
    run_main(main)
