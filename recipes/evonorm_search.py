"""Search for a layer that normalises and activates (Liu et al., NeurIPS 2020), on your own images.

    python recipes/evonorm_search.py                                    # digits: a smoke test of the recipe
    python recipes/evonorm_search.py --data PATH/OF/IMAGES --image-size 32 --candidates 500 --jobs 2
    python recipes/evonorm_search.py --rerank runs/evonorm_search-... --data PATH/OF/IMAGES --steps 2000

Every candidate is trained in three small networks; it is judged on a part of the training images, never on the
held-out ones. --start none begins with random graphs, which takes many candidates before anything learns; with --random
all are random, for comparison. --rerank trains the best of a search again, longer, and tells them on held-out images
beside BatchNorm with ReLU and the published layers. The best lies in layer.json: `EvoNorm(genome="layer.json")` puts it
into any backbone. What was stopped goes on with --resume auto, and what is done with more --candidates: it becomes what
it would have been with so many from the start.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch

from leaven.callbacks.evonorm import NAMED, Genome, GenomeError, SearchSpace
from leaven.callbacks.evonorm.checks import FreeChecks
from leaven.callbacks.evonorm.evolution import AgeingEvolution, Member
from leaven.callbacks.evonorm.judging import ANCHORS, Budget, judge_file
from leaven.callbacks.evonorm.nsga2 import NSGA2
from leaven.callbacks.evonorm.search import search
from leaven.recipes.common.batches import Images, find_data, user_errors
from leaven.recipes.common.card import command
from leaven.recipes.common.data import Data
from leaven.recipes.common.few_labels import keep_few
from leaven.recipes.common.flags import ImageSettings, UserError, flag, parse, run_main, to_yaml
from leaven.recipes.common.launcher import set_threads
from leaven.recipes.common.plots import scatter
from leaven.recipes.common.run_folder import RunFolder, open_run, writing
from leaven.recipes.common.study import connected, refuse_changes, stopping
from leaven.trials import TrialsError, run_trials


@dataclass
class EvoNormSearchSettings(ImageSettings):
    """A search for layers by ageing evolution."""

    backbone: str = flag("anchors", "not of this recipe: the three anchors are its networks")
    workers: int = 0
    val_from_train: str | None = flag("20%", "share of the training images to judge on")
    labels: str | None = flag(None, "learn from N images of each class or P%; none: from all")
    series: Literal["S", "B"] = flag("S", "S: statistics of an image alone; B: of the batch, too")
    nodes: int = flag(10, "of a graph, besides the four that it begins with")
    candidates: int = flag(100, "to judge, in all")
    population: int = flag(20, "members that parents are taken from; older ones leave")
    tournament: float = flag(0.25, "share of the population of which the winner has a child")
    winner: Literal["pareto", "average", "nsga2"] = flag(
        "pareto", "best in no score surpassed, or on average; nsga2: parents by Optuna's NSGA-II instead"
    )
    start: tuple[str, ...] | None = flag(("evonorm_s0",), "genomes to begin with, by name or JSON file; none")
    random: bool = flag(False, "random search, for comparison")
    anchors: tuple[str, ...] = flag(tuple(ANCHORS), "networks to score with, the hardest first")
    steps: int = flag(120, "updates of a training")
    batch_size: int = 64
    lr: float = flag(0.1, "of SGD at the start; it falls to 0")
    quality_steps: int = flag(60, "updates after which a training is looked at; 0: it is not")
    quality: float | None = flag(
        None, "least accuracy by then; none: twice that of guessing, or 75% of two classes"
    )
    stability_steps: int = flag(10, "of ascent on the gradient's norm; 0: none")
    round_size: int = flag(8, "candidates that are asked for at once")
    rerank: str | None = flag(None, "run folder of a search: train its best again, longer")
    top: int = flag(10, "how many of them")
    seeds: int = flag(3, "trainings of each of them, from --seed on")
    jobs: int = flag(1, "candidates at a time, in processes of their own")
    dask: str | None = flag(None, "address of a Dask scheduler whose workers judge, --jobs at a time")
    time_limit: float | None = flag(
        None, "seconds for a candidate, after which it is rejected; needs --jobs 2"
    )
    resume: str | None = flag(None, "auto: go on in --output-dir, or else in the newest such run of runs/")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is None and self.data == "digits":
            self.image_size = (16, 16)
        for name in ("nodes", "candidates", "steps", "round_size", "top", "seeds", "jobs"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if unknown := set(self.anchors) - set(ANCHORS):
            raise UserError(f"--anchors {min(unknown)}: there are {', '.join(ANCHORS)}")
        if self.backbone != "anchors" or self.init is not None:
            raise UserError(
                "--backbone and --init are not of this recipe: layers are judged in three small networks"
            )
        if self.val_from_train is None and self.rerank is None:
            raise UserError("--val-from-train none: a search must not see the held-out images")
        if self.random and self.winner == "nsga2":
            raise UserError("--random has no parents: leave out --winner nsga2")
        if self.time_limit is not None and self.jobs < 2 and self.dask is None:
            raise UserError("--time-limit needs processes of their own: add --jobs 2")


def main(argv: list[str] | None = None) -> None:
    """Read the flags; search, or rank again."""
    settings = parse(EvoNormSearchSettings, argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "recipes/evonorm_search.py starts its own processes: leave the launcher out, use --jobs"
        )
    starts = [read_genome(name) for name in settings.start or ()]
    if settings.rerank is not None:
        settings.val_from_train = None
    data = keep_few(find_data(settings), settings.labels, settings.seed)
    if len(data.classes) < 2:
        raise UserError(f"--data {settings.data}: no labels, which trainings are judged by")
    with user_errors(ValueError):
        evolution = None if settings.rerank is not None else begin(settings, starts)
    best = [] if settings.rerank is None else best_of(settings.rerank, settings.top)
    run = open_run("evonorm_search", data.name, output_dir=settings.output_dir, resume=settings.resume)
    print("\n".join([set_threads(settings.jobs), *data.notes]))
    refuse_changes(run, settings, may_grow="candidates")
    run.write(run.config, to_yaml(replace(settings, resume=None, output_dir=None)))
    collect(settings, data, run.path / "task.pt")
    print(f"{budget(settings, len(data.classes))}; anchors: {', '.join(settings.anchors)}")
    with user_errors(TrialsError, ValueError), stopping("search", run), ExitStack() as stack:
        how = executor(settings, stack)
        if evolution is None:
            rerank(settings, best, run, len(data.classes), how)
        else:
            find(settings, evolution, run, len(data.classes), how)
    if data.kind == "digits":
        print("digits are a smoke test of the recipe and no evidence")


def read_genome(name: str) -> Genome:
    """By name, or from a file."""
    try:
        return (
            Genome.named(name) if name in NAMED else Genome.from_json(Path(name).read_text(encoding="utf-8"))
        )
    except (OSError, GenomeError) as error:
        raise UserError(f"genome {name}: {error}; names are {', '.join(NAMED)}") from error


def executor(settings: EvoNormSearchSettings, stack: ExitStack) -> dict[str, Any]:
    """Who judges."""
    how: dict[str, Any] = {"time_limit": settings.time_limit}
    if settings.dask is not None:
        client = stack.enter_context(connected(settings.dask))
        return how | {"executor": lambda workers: client.get_executor(), "workers": settings.jobs}
    if settings.jobs > 1:
        pool = partial(ProcessPoolExecutor, mp_context=get_context("spawn"))
        return how | {"executor": pool, "workers": settings.jobs}
    return how


def budget(settings: EvoNormSearchSettings, classes: int) -> Budget:
    """How a candidate is trained."""
    # Of two classes twice that of guessing would be every image.
    quality = min(2 / classes, 0.75) if settings.quality is None else settings.quality
    return Budget(
        steps=settings.steps, batch_size=settings.batch_size, lr=settings.lr, quality=quality,
        quality_steps=settings.quality_steps, stability_steps=settings.stability_steps,
    )  # fmt: skip


def collect(settings: EvoNormSearchSettings, data: Data, cache: Path) -> None:
    """All images, once, as tensors."""
    if cache.is_file():
        return
    images = Images(data, settings, settings.image_size or data.image_size, data.mean, data.std)
    parts = []
    for part in (data.train, data.val):
        batches = list(images.whole(part, len(part)))
        parts += [torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])]
    temporary = cache.with_suffix(".tmp")
    with writing(cache):
        torch.save(parts, temporary)
        temporary.replace(cache)


def begin(settings: EvoNormSearchSettings, starts: Sequence[Genome]) -> AgeingEvolution:
    """The search before its first candidate.

    Raises:
        ValueError: numbers out of range, or starts that are not of the series.
    """
    space = SearchSpace(settings.series, settings.nodes)
    for genome in starts:
        space.padded(genome)
    shared: dict[str, Any] = {"start": starts, "accept": FreeChecks(), "seed": settings.seed}
    if settings.winner == "nsga2":
        with user_errors(ImportError):
            return NSGA2(space, settings.population, scores=len(settings.anchors), **shared)
    return AgeingEvolution(
        space,
        settings.population,
        settings.tournament,
        settings.winner,
        random_only=settings.random,
        **shared,
    )


def find(
    settings: EvoNormSearchSettings,
    evolution: AgeingEvolution,
    run: RunFolder,
    classes: int,
    how: dict[str, Any],
) -> None:
    """The search, and what came out of it."""
    function = partial(
        judge_file, str((run.path / "task.pt").resolve()), classes, budget(settings, classes), settings.anchors,
        settings.jobs, seed=settings.seed,
    )  # fmt: skip
    began = time.monotonic()

    def report(found: AgeingEvolution) -> None:
        told = len(found.history) + len(found.rejected)
        best = (
            f"best {found.best()[0].mean:.4f}  {found.best()[0].candidate.genome.formula()}"
            if found.history
            else ""
        )
        print(
            f"candidate {told}/{settings.candidates}  {len(found.rejected)} rejected  "
            f"{time.monotonic() - began:.0f} s  {best}",
            flush=True,
        )

    journal = run.path / "journal.jsonl"
    search(
        evolution,
        function,
        settings.candidates,
        round_size=settings.round_size,
        journal=journal,
        report=report,
        **how,
    )
    write(evolution, settings, run)


def write(found: AgeingEvolution, settings: EvoNormSearchSettings, run: RunFolder) -> None:
    """Results in words, as JSON, and as pictures."""
    if not found.history:
        raise UserError(
            f"none of {settings.candidates} candidates learnt anything ({found.looked_at} graphs were looked at; the "
            f"last: {found.rejected[max(found.rejected)]}): give --start, more --candidates, or a lower --quality"
        )
    front = {each.candidate.number for each in found.front()}
    rows = [
        row(each, settings.anchors) | {"front": each.candidate.number in front} for each in found.best(10**9)
    ]
    reasons: dict[str, int] = {}
    for why in found.rejected.values():
        kind = why.split(":")[0]
        reasons[kind] = reasons.get(kind, 0) + 1
    report = {"command": command(), "graphs looked at": found.looked_at, "rejected": reasons, "found": rows}
    run.write(run.path / "search.json", json.dumps(report, indent=1))
    best = found.best()[0]
    run.write(run.path / "layer.json", genome_of(best, settings).to_json() + "\n")
    numbers = [each.candidate.number for each in found.history]
    points = {anchor: [each.scores[i] for each in found.history] for i, anchor in enumerate(settings.anchors)}
    scatter(numbers, points, run.plots / "scores.png", "candidate", "accuracy")
    if len(settings.anchors) > 1:
        first, second = settings.anchors[:2]
        all_of = {
            "surpassed": [e.scores[:2] for e in found.history if e.candidate.number not in front],
            "front": [e.scores[:2] for e in found.front()],
        }
        pairs = {who: ([a for a, _ in each], [b for _, b in each]) for who, each in all_of.items()}
        scatter(None, pairs, run.plots / "front.png", f"accuracy, {first}", f"accuracy, {second}")
    print(f"{found.looked_at} graphs looked at; rejected: {reasons}")
    for each in found.best(5):
        print(words(each, settings.anchors))
    print(f"run folder: {run.path} (layer.json, search.json, journal.jsonl, plots)")


def row(member: Member, anchors: Sequence[str]) -> dict[str, Any]:
    """For JSON."""
    genome = member.candidate.genome
    scores = dict(zip(anchors, member.scores, strict=True))
    found = {"candidate": member.candidate.number, "parent": member.candidate.parent, "mean": member.mean}
    return (
        found
        | {"scores": scores, "formula": genome.formula(), "latex": genome.formula(latex=True)}
        | {"genome": json.loads(genome.to_json())}
    )


def words(member: Member, anchors: Sequence[str]) -> str:
    """For the log."""
    scores = ", ".join(f"{anchor} {score:.4f}" for anchor, score in zip(anchors, member.scores, strict=True))
    return f"candidate {member.candidate.number}: {member.mean:.4f} ({scores})  {member.candidate.genome.formula()}"


def genome_of(member: Member, settings: EvoNormSearchSettings) -> Genome:
    """With notes of where it comes from."""
    scores = dict(zip(settings.anchors, member.scores, strict=True))
    meta = {
        "scores": scores,
        "candidate": member.candidate.number,
        "seed": settings.seed,
        "data": settings.data,
    }
    return replace(member.candidate.genome, meta=meta)


def best_of(folder: str, top: int) -> list[dict[str, Any]]:
    """The best rows of a search."""
    known = Path(folder) / "search.json"
    if not known.is_file():
        raise UserError(f"--rerank {folder}: no search.json there: is the search done?")
    rows: list[dict[str, Any]] = json.loads(known.read_text(encoding="utf-8"))["found"]
    return rows[:top]


def rerank(
    settings: EvoNormSearchSettings,
    found: list[dict[str, Any]],
    run: RunFolder,
    classes: int,
    how: dict[str, Any],
) -> None:
    """The best of a search and what is known, trained longer, on the held-out images."""
    genomes = {f"candidate {each['candidate']}": json.dumps(each["genome"]) for each in found}
    genomes |= {name: Genome.named(name).to_json() for name in NAMED}
    mild = replace(budget(settings, classes), quality_steps=0, stability_steps=0)
    function: Callable[..., Any] = partial(
        judge_file, str((run.path / "task.pt").resolve()), classes, mild, settings.anchors, settings.jobs
    )
    trials = {
        f"{name}, seed {settings.seed + s}": {"genome": genome, "seed": settings.seed + s}
        for name, genome in genomes.items()
        for s in range(settings.seeds)
    }
    outcomes = run_trials(function, trials, journal=run.path / "journal.jsonl", **how)
    rows: list[dict[str, Any]] = []
    for name, genome in genomes.items():
        results = [outcomes[f"{name}, seed {settings.seed + s}"].result or {} for s in range(settings.seeds)]
        scores = [result["scores"] for result in results if "scores" in result]
        means = [sum(part) / len(part) for part in zip(*scores, strict=True)]
        done = len(scores) == settings.seeds
        rows.append(
            {
                "name": name,
                "formula": Genome.from_json(genome).formula(),
                "mean": sum(means) / len(means) if done else None,
                "scores": means if done else None,
                "seeds": scores,
            }
        )
    rows.sort(key=lambda each: -(each["mean"] if each["mean"] is not None else -1.0))
    report = {"command": command(), "anchors": settings.anchors, "ranking": rows}
    run.write(run.path / "rerank.json", json.dumps(report, indent=1))
    for each in rows:
        score = "failed" if each["mean"] is None else f"{each['mean']:.4f}"
        print(f"{score}  {each['name']}  {each['formula']}")
    print(f"run folder: {run.path} (rerank.json, journal.jsonl)")


if __name__ == "__main__":
    run_main(main)
