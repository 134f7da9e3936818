"""The search for layers: genomes, the compiled layer against timm and an interpreter, checks, evolution, resume."""

import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from leaven.callbacks import EvoNorm, attach
from leaven.callbacks.evonorm import NAMED, Genome, GenomeError, SearchSpace, evo_norm
from leaven.callbacks.evonorm.checks import FreeChecks
from leaven.callbacks.evonorm.evolution import AgeingEvolution, Candidate, Member, pareto_front
from leaven.callbacks.evonorm.evolved import EvolvedNormAct2d, interpret, primitive
from leaven.callbacks.evonorm.genome import AGGREGATIONS, ARITY, BINARY, INITIAL, UNARY
from leaven.callbacks.evonorm.judging import ANCHORS, Budget, Rejected, Task, build, judge, stability
from leaven.callbacks.evonorm.search import search
from leaven.trials import TrialsError

EPS = {"b0": 1e-3}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(name: str, channels: int = 8, **how: Any) -> EvolvedNormAct2d:
    kind = name.removeprefix("evonorm_")
    steps = Genome.of(NAMED[name], eps=EPS.get(kind, 1e-5))
    return EvolvedNormAct2d(steps, channels, groups=how.pop("groups", 4), **how)


# genomes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["b0", "b1", "b2", "s0", "s1", "s2"])
def test_published_layers_are_those_of_timm(kind: str, training: bool) -> None:
    ours = layer(f"evonorm_{kind}")
    cls = getattr(timm.layers.evo_norm, f"EvoNorm2d{kind.upper()}")
    theirs = cls(8, **({"groups": 4} if kind.startswith("s") else {}), eps=EPS.get(kind, 1e-5))
    with torch.no_grad():
        for a, b in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
            a.normal_()
            b.copy_(a)
        if ours.v1 is not None:
            ours.v1.normal_()
            theirs.v.copy_(ours.v1)
    for model in (ours, theirs):
        model.train()
        model(randn(6, 8, 5, 5, seed=2) * 2 + 1)  # moves the running average
        model.train(training)
    x, y = (randn(3, 8, 5, 5).requires_grad_() for _ in range(2))
    a, b = ours(x), theirs(y)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    a.square().sum().backward()
    b.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    if kind.startswith("b"):
        (running,) = (m.running for m in ours.modules() if hasattr(m, "running"))
        torch.testing.assert_close(running, theirs.running_var)


def test_batch_norm_and_relu() -> None:
    ours, norm = layer("bn_relu"), nn.BatchNorm2d(8)
    for _ in range(3):
        x = randn(4, 8, 5, 5) + 1
        torch.testing.assert_close(ours(x), norm(x).relu(), rtol=1e-4, atol=1e-5)
    ours.eval()
    norm.eval()
    x = randn(2, 8, 5, 5, seed=5)
    # Running means start at 0 and running variances at 1 in both.
    torch.testing.assert_close(ours(x), norm(x).relu(), rtol=1e-4, atol=1e-5)


def test_json_comes_back_and_tells_what_it_is() -> None:
    for name in NAMED:
        genome = Genome.named(name)
        again = Genome.from_json(genome.to_json())
        assert again == genome
        assert again.key == genome.key
        assert again.meta == {"name": name}
        assert genome.formula()
        assert genome.formula(latex=True).count("{") == genome.formula(latex=True).count("}")
    assert len({Genome.named(name).key for name in NAMED}) == len(NAMED)
    assert Genome.named("evonorm_s0").formula() == "(x * sigmoid(v1 * x)) / std_whg(x)"
    assert not Genome.named("evonorm_s0").uses_batch
    assert Genome.named("bn_relu").uses_batch
    with pytest.raises(GenomeError, match="no genome 'gelu'; there are: evonorm_b0"):
        Genome.named("gelu")


def test_squares_in_latex_are_of_the_whole() -> None:
    for first, second, expected in (
        (("square", 0), ("square", 4), "(x^2)^2"),
        (("div", 0, 3), ("square", 4), r"(\frac{x}{v_1})^2"),
        (("add", 0, 3), ("square", 4), "(x + v_1)^2"),
        (("tanh", 0), ("square", 4), r"\tanh(x)^2"),
    ):
        assert Genome.of([first, second]).formula(latex=True) == expected


def test_the_key_is_that_of_the_function() -> None:
    swish = Genome.of([("sigmoid", 0), ("mul", 0, 4)])
    same = [
        Genome.of([("sigmoid", 0), ("mul", 4, 0)]),
        Genome.of([("exp", 3), ("sigmoid", 0), ("abs", 4), ("mul", 0, 5)]),
        Genome.of([("sigmoid", 0), ("sigmoid", 0), ("mul", 0, 5)]),
        Genome((("sigmoid", (0,)), ("mul", (0, 4)), ("neg", (5,))), 5),
    ]
    assert {each.key for each in same} == {swish.key}
    assert Genome.of([("div", 0, 3)]).key != Genome.of([("div", 3, 0)]).key
    assert Genome.of([("sigmoid", 0), ("mul", 3, 4)]).key != swish.key


def test_other_keys_are_other_functions() -> None:
    """No two of many small graphs are called the same that differ on random numbers."""
    space, rng = SearchSpace("B", nodes=3), Random(0)
    x, v0, v1 = randn(3, 4, 3, 3), randn(4, seed=1), randn(4, seed=2)
    seen: dict[str, Tensor] = {}
    for _ in range(400):
        genome = space.random(rng)
        value = interpret(genome, x, v0, v1, 2)
        if genome.key in seen:
            torch.testing.assert_close(value, seen[genome.key], equal_nan=True)
        seen[genome.key] = value


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "nonsense", '{"version": 1}', "[" * 100_000, "1" * 200_000,
        '{"version": 2, "nodes": [], "output": 0, "eps": 1e-5}',
        '{"version": 1, "nodes": [["__import__", 0]], "output": 4, "eps": 1e-5}',
        '{"version": 1, "nodes": [["add", 0]], "output": 4, "eps": 1e-5}',
        '{"version": 1, "nodes": [["neg", 4]], "output": 4, "eps": 1e-5}',
        '{"version": 1, "nodes": [["neg", -1]], "output": 4, "eps": 1e-5}',
        '{"version": 1, "nodes": [["neg", 0.5]], "output": 4, "eps": 1e-5}',
        '{"version": 1, "nodes": [["neg", true]], "output": 4, "eps": 1e-5}',
        '{"version": 1, "nodes": [[]], "output": 4, "eps": 1e-5}',
        '{"version": 1, "nodes": [["neg", 0]], "output": 5, "eps": 1e-5}',
        '{"version": 1, "nodes": [["neg", 0]], "output": "4", "eps": 1e-5}',
        '{"version": 1, "nodes": [["neg", 0]], "output": 4, "eps": 0}',
        '{"version": 1, "nodes": [["neg", 0]], "output": 4, "eps": "nan"}',
        '{"version": 1, "nodes": [["neg", 0]], "output": 4, "eps": 1e-5, "meta": 3}',
        '{"version": 1, "nodes": [["neg", 0]], "output": 4, "eps": 1' + "0" * 400 + "}",
        json.dumps({"version": 1, "nodes": [["neg", 0]] * 300, "output": 4, "eps": 1e-5}),
    ],
)  # fmt: skip
def test_hostile_json_is_refused(text: str) -> None:
    with pytest.raises(GenomeError) as error:
        Genome.from_json(text)
    assert len(str(error.value).splitlines()) == 1
    assert isinstance(error.value, ValueError)


def test_a_formula_that_would_not_end_is_refused() -> None:
    nodes = [("mul", 0, 0)] + [("mul", 4 + i, 4 + i) for i in range(40)]
    genome = Genome.of(nodes)
    assert len(genome.key) == 24
    with pytest.raises(GenomeError, match="too long"):
        genome.formula()


# the space


@pytest.mark.parametrize("series", ["S", "B"])
@pytest.mark.parametrize("nodes", [1, 2, 10])
def test_random_graphs_and_mutations(series: Any, nodes: int) -> None:
    space, rng = SearchSpace(series, nodes), Random(0)
    drawn = set()
    for _ in range(200):
        genome = space.random(rng)
        child = space.mutate(genome, rng)
        assert len(child.nodes) == len(genome.nodes) == nodes
        assert sum(a != b for a, b in zip(genome.nodes, child.nodes, strict=True)) <= 1
        assert series == "B" or not any(op.endswith("_bwh") for op, _ in (*genome.nodes, *child.nodes))
        drawn |= {op for op, _ in genome.nodes}
    assert nodes == 1 or drawn == set(space.primitives)
    assert len(space.primitives) == (24 if series == "B" else 21)


def test_known_layers_are_put_into_the_space() -> None:
    space = SearchSpace("B")
    for name in NAMED:
        genome = Genome.named(name)
        padded = space.padded(genome)
        assert len(padded.nodes) == 10
        assert padded.key == genome.key
        assert space.padded(padded) is padded
        other = Genome.of(NAMED[name], eps=1e-3)
        assert space.padded(other).eps == space.mutate(other, Random(0)).eps == 1e-3
    with pytest.raises(ValueError, match="bwh is not in the S series"):
        SearchSpace("S").padded(Genome.named("bn_relu"))
    with pytest.raises(ValueError, match="6 live nodes, and the space 3"):
        SearchSpace("B", nodes=3).padded(Genome.named("bn_relu"))
    with pytest.raises(ValueError, match='series must be "S" or "B"'):
        SearchSpace("C")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nodes must be at least 1"):
        SearchSpace("S", 0)


# the layer


def graphs(n: int = 40, series: Any = "B") -> list[Genome]:
    space, rng, checks = SearchSpace(series), Random(1), FreeChecks()
    found = (space.random(rng) for _ in itertools.count())
    return list(itertools.islice((each for each in found if not checks(each)), n))


def test_the_compiled_module_is_the_interpreter() -> None:
    for genome in graphs():
        made = EvolvedNormAct2d(genome, 8, groups=4).double()
        x, y = (randn(4, 8, 5, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
        v0 = made.v0 if made.v0 is not None else torch.zeros(8, dtype=torch.float64)
        v1 = made.v1 if made.v1 is not None else torch.ones(8, dtype=torch.float64)
        a, b = made(x), interpret(genome, y, v0, v1, 4)
        torch.testing.assert_close(a, b, msg=genome.formula())
        a.sum().backward()
        b.sum().backward()
        torch.testing.assert_close(x.grad, y.grad, msg=genome.formula())


def test_what_is_repeated_is_computed_once() -> None:
    twice = Genome.of([("std_bwh", 0), ("std_bwh", 0), ("add", 4, 5), ("div", 0, 6)])
    made = EvolvedNormAct2d(twice, 8)
    assert sum(hasattr(m, "running") for m in made.modules()) == 1


def test_without_activation_it_is_scale_and_shift() -> None:
    made = layer("evonorm_b0", apply_act=False)
    assert {name for name, _ in made.named_parameters()} == {"weight", "bias"}
    with torch.no_grad():
        made.weight.normal_()
        made.bias.normal_()
    x = randn(2, 8, 3, 3)
    torch.testing.assert_close(made(x), x * made.weight.view(1, -1, 1, 1) + made.bias.view(1, -1, 1, 1))


def test_images_of_a_batch_do_not_see_each_other_in_the_s_series() -> None:
    for genome in graphs(15, "S"):
        made = EvolvedNormAct2d(genome, 8, groups=4)
        x = randn(4, 8, 5, 5)
        whole = made(x)
        torch.testing.assert_close(made(x[1:2]), whole[1:2], msg=genome.formula())
        torch.testing.assert_close(made.eval()(x), whole, msg=genome.formula())


def test_the_b_series_in_evaluation() -> None:
    for genome in [Genome.named("evonorm_b0"), Genome.named("bn_relu")]:
        made = EvolvedNormAct2d(genome, 8)
        for i in range(200):
            made(randn(32, 8, 4, 4, seed=i) * 2 + 3)
        x = randn(32, 8, 4, 4, seed=999) * 2 + 3
        trained = made(x)
        made.eval()
        before = [m.running.clone() for m in made.modules() if hasattr(m, "running")]
        alone = made(x[:1])
        torch.testing.assert_close(made(x)[:1], alone)
        after = [m.running for m in made.modules() if hasattr(m, "running")]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        with torch.no_grad():
            assert float((made(x) - trained).abs().mean()) < 0.1 * float(trained.abs().mean())


@pytest.mark.parametrize("op", ARITY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_primitives_are_finite_everywhere(op: str, dtype: torch.dtype) -> None:
    for value in (0.0, 1.0, -1.0, 1e3, -1e3, 1e-8, 50.0, -50.0):
        genome = Genome.of([(op, *[0] * ARITY[op]), ("add", 4, 0)])
        x = torch.full((2, 4, 3, 3), value, dtype=dtype, requires_grad=True)
        y = EvolvedNormAct2d(genome, 4, groups=2).float()(x)
        if dtype != torch.float16 or value not in (1e3, -1e3, 50.0):  # whose square, product, exp do not fit
            assert torch.isfinite(y).all(), value
        (gradient,) = torch.autograd.grad(y.float().clamp(-1e30, 1e30).sum(), x)
        assert not torch.isnan(gradient).any(), value


@pytest.mark.parametrize("op", ARITY)
def test_gradients_of_primitives(op: str) -> None:
    x, y = (randn(2, 4, 3, 3, seed=i, dtype=torch.float64).requires_grad_() for i in range(2))
    inputs = (x, y)[: ARITY[op]]
    assert torch.autograd.gradcheck(lambda *each: primitive(op, list(each), 2, 4, 1e-5), inputs)


def test_statistics_over_their_axes() -> None:
    x = randn(3, 4, 5, 6, dtype=torch.float64)
    for op in AGGREGATIONS:
        name, axes = op.split("_")
        found = primitive(op, [x], 2, 4, 1e-5).expand_as(x)
        for b, c in itertools.product(range(3), range(4)):
            part = {"bwh": x[:, c], "wh": x[b, c], "whc": x[b], "whg": x[b, c // 2 * 2 : c // 2 * 2 + 2]}[
                axes
            ]
            value = {
                "mean": part.mean(), "rms": (part.square().mean() + 1e-5).sqrt(),
                "std": (part.var(correction=0) + 1e-5).sqrt(),
            }[name]  # fmt: skip
            torch.testing.assert_close(found[b, c], value.expand(5, 6))


RANK = """
import sys, torch
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
made, x = torch.load(f"{folder}/layer.pt", weights_only=False)
x = (x[:3], x[3:])[rank].clone().requires_grad_()
y = made(x)
y.pow(3).sum().backward()
torch.save((y.detach(), x.grad, made.weight.grad, made.state_dict()), f"{folder}/{rank}.pt")
torch.distributed.barrier()
"""


@pytest.mark.parametrize("name", ["evonorm_b0", "bn_relu"])
def test_two_processes_are_one_with_all_images(name: str, tmp_path: Path) -> None:
    """Of unequal batches, gradients and running averages included."""
    torch.manual_seed(0)
    made, x = layer(name, sync=True).double(), randn(7, 8, 4, 3, dtype=torch.float64)
    torch.save((made, x), tmp_path / "layer.pt")
    whole = x.clone().requires_grad_()
    y = made(whole)
    y.pow(3).sum().backward()
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait() for process in ranks] == [0, 0]
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([half[0] for half in halves]), y.detach())
    torch.testing.assert_close(torch.cat([half[1] for half in halves]), whole.grad)
    torch.testing.assert_close(halves[0][2] + halves[1][2], made.weight.grad)
    for half in halves:
        for key, value in made.state_dict().items():
            torch.testing.assert_close(half[3][key], value)


def test_wrong_use_of_the_layer() -> None:
    with pytest.raises(ValueError, match=r"images \(B, 8, H, W\) are needed"):
        layer("evonorm_s0")(randn(2, 4, 3, 3))
    with pytest.raises(ValueError, match="groups must be at least 1"):
        layer("evonorm_s0", groups=0)
    assert layer("evonorm_s0", channels=6).groups == 3


# checks without training


@pytest.mark.parametrize(
    ("genome", "why"),
    [
        (Genome((), 0), "linear"),
        (Genome.of([("neg", 0), ("neg", 4)]), "linear"),
        (Genome.of([("mul", 0, 3)]), "linear"),
        (Genome.of([("mean_wh", 0), ("neg", 4), ("add", 0, 5)]), "linear"),
        (Genome.of([("exp", 3)]), "does not depend on x"),
        (Genome.of([("std_wh", 0), ("add", 4, 3)]), "constant over space"),
        (Genome.of([("mul", 0, 2), ("tanh", 4)]), "constant over space"),
        (Genome.of([("exp", 0), ("exp", 4), ("exp", 5), ("square", 6), ("square", 7)]), "not finite"),
    ],
)
def test_what_is_no_layer(genome: Genome, why: str) -> None:
    assert FreeChecks()(genome) == why


def test_what_is_a_layer() -> None:
    checks = FreeChecks()
    assert [checks(Genome.named(name)) for name in NAMED] == [""] * len(NAMED)
    assert checks(Genome.of([("max", 0, 1)])) == ""


def test_dependence_on_x_is_that_of_differences() -> None:
    space, rng, checks = SearchSpace("B", 4), Random(3), FreeChecks()
    v0, v1 = torch.zeros(8), torch.ones(8)
    for _ in range(300):
        genome = space.random(rng)
        a, b = (interpret(genome, randn(4, 8, 5, 5, seed=s), v0, v1, 4) for s in (0, 1))
        if checks(genome) == "does not depend on x":
            assert torch.equal(a.nan_to_num(), b.nan_to_num())
        elif checks(genome) == "":
            assert not torch.equal(a, b)


# evolution


def score(genome: str) -> dict[str, Any]:
    """Without training: how near the layer's output is to unit variance and to that of swish."""
    y = interpret(Genome.from_json(genome), randn(4, 8, 5, 5) * 3 + 1, torch.zeros(8), torch.ones(8), 4)
    if float(y.abs().max()) > 1e6:
        return {"rejected": "large"}
    apart = float((y - nn.functional.silu(randn(4, 8, 5, 5))).std())
    return {"scores": [-abs(math.log(float(y.std()) + 1e-6)), -apart]}


def evolution(**how: Any) -> AgeingEvolution:
    settings: dict[str, Any] = {"population": 20, "tournament": 0.25, "accept": FreeChecks(), "seed": 0}
    return AgeingEvolution(SearchSpace("S", 5), **settings | how)


def told(found: AgeingEvolution) -> list[Any]:
    return [(m.candidate.number, m.candidate.genome.key, m.candidate.parent, m.scores) for m in found.history]


def test_the_same_search_again_on_any_executor(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    serial = search(evolution(), score, 60, round_size=4)
    threads = search(evolution(), score, 60, round_size=4, executor=ThreadPoolExecutor, workers=3)
    assert told(serial) == told(threads)
    assert told(serial) != told(search(evolution(seed=1), score, 60, round_size=4))
    assert any(parent is not None for _, _, parent, _ in told(serial))
    assert len({key for _, key, _, _ in told(serial)}) == len(told(serial))


class Killed(BaseException):
    pass


def test_what_was_killed_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    whole = search(evolution(), score, 50, round_size=4, journal=tmp_path / "whole.jsonl")
    for dies in (1, 13, 37):
        calls = 0

        def judge_(genome: str, dies: int = dies) -> Any:
            nonlocal calls
            calls += 1
            if calls == dies:
                raise Killed
            return score(genome)

        journal = tmp_path / f"killed-{dies}.jsonl"
        with pytest.raises(Killed):
            search(evolution(), judge_, 50, round_size=4, journal=journal)
        resumed = search(evolution(), score, 50, round_size=4, journal=journal)
        assert told(resumed) == told(whole)
        lines = [
            [(e["name"], e["arguments"], e["result"]) for e in map(json.loads, p.read_text().splitlines())]
            for p in (journal, tmp_path / "whole.jsonl")
        ]
        assert lines[0] == lines[1]
    with pytest.raises(TrialsError, match="by other arguments"):
        search(evolution(seed=5), score, 50, round_size=4, journal=tmp_path / "whole.jsonl")


def nsga2(seed: int = 0) -> AgeingEvolution:
    from leaven.callbacks.evonorm.nsga2 import NSGA2

    return NSGA2(SearchSpace("S"), 5, scores=2, seed=seed)


@pytest.mark.parametrize("make", [evolution, nsga2])
def test_more_candidates_are_the_larger_search(tmp_path: Path, make: Any) -> None:
    """Rounds need not end where the smaller search did."""
    if make is nsga2:
        pytest.importorskip("optuna", reason='needs Optuna: pip install "leaven[optuna]"')
    whole = search(make(), score, 30, round_size=4, journal=tmp_path / "whole.jsonl")
    search(make(), score, 10, round_size=4, journal=tmp_path / "grown.jsonl")
    grown = search(make(), score, 30, round_size=4, journal=tmp_path / "grown.jsonl")
    assert told(grown) == told(whole)
    lines = [
        [(e["name"], e["arguments"], e["result"]) for e in map(json.loads, path.read_text().splitlines())]
        for path in (tmp_path / "grown.jsonl", tmp_path / "whole.jsonl")
    ]
    assert lines[0] == lines[1]


def test_a_judge_that_always_fails_is_an_error() -> None:
    def breaks(genome: str) -> Any:
        raise RuntimeError("no such file")

    with pytest.raises(TrialsError, match=r"failed for each of 6 candidates, .* RuntimeError: no such file"):
        search(evolution(), breaks, 6)


def test_failures_are_rejections() -> None:
    def breaks(genome: str) -> Any:
        if "sigmoid" in genome:
            raise RuntimeError("no")
        return score(genome)

    found = search(evolution(population=5), breaks, 40)
    assert found.rejected
    assert any("RuntimeError: no" in why for why in found.rejected.values())
    assert len(found.history) + len(found.rejected) == 40


def test_a_failure_that_the_search_went_on_from_stands_on_resume(tmp_path: Path) -> None:
    """A machine that was busy once must not make another search of it, whose candidates the journal does not know."""
    judged: list[str] = []

    def busy_once(genome: str) -> Any:
        judged.append(genome)
        if len(judged) == 3:
            raise MemoryError("busy")
        return score(genome)

    journal = tmp_path / "journal.jsonl"
    whole = search(evolution(), busy_once, 30, round_size=4, journal=journal)
    assert "busy" in whole.rejected[2]
    resumed = search(evolution(), busy_once, 30, round_size=4, journal=journal)
    assert (told(resumed), resumed.rejected, len(judged)) == (told(whole), whole.rejected, 30)


def test_a_judge_that_failed_for_all_can_be_mended(tmp_path: Path) -> None:
    def breaks(genome: str) -> Any:
        raise RuntimeError("no such file")

    journal = tmp_path / "journal.jsonl"
    with pytest.raises(TrialsError, match="failed for each of 4"):
        search(evolution(), breaks, 4, round_size=2, journal=journal)
    mended = search(evolution(), score, 4, round_size=2, journal=journal)
    assert told(mended) == told(search(evolution(), score, 4, round_size=2))


def test_scores_that_are_no_numbers_are_rejections() -> None:
    """None surpasses them, so that they would win every tournament."""

    def broken(genome: str) -> Any:
        return {"scores": [math.nan, math.inf]} if "sigmoid" in genome else score(genome)

    found = search(evolution(population=5), broken, 40)
    assert "a score is not a finite number" in found.rejected.values()
    assert all(math.isfinite(each.mean) for each in found.history)
    assert len(found.history) + len(found.rejected) == 40


def richness(genome: str) -> dict[str, Any]:
    """Something that can be climbed in small steps: live nodes, and kinds of primitives among them."""
    steps = [op for _, op, _ in Genome.from_json(genome).steps()]
    return {"scores": [float(len(steps)), float(len(set(steps)))]}


@pytest.mark.parametrize("winner", ["pareto", "average"])
def test_evolution_climbs_what_random_search_does_not(winner: Any) -> None:
    best = {}
    for random in (False, True):
        how: dict[str, Any] = {"winner": winner, "random_only": random}
        runs = [
            search(AgeingEvolution(SearchSpace("S"), 50, 0.2, seed=s, **how), richness, 1500)
            for s in range(3)
        ]
        best[random] = [run.best()[0].mean for run in runs]
    assert sum(best[False]) > sum(best[True]) + 1


def test_nsga2_replays_and_is_better_than_random() -> None:
    pytest.importorskip("optuna", reason='needs Optuna: pip install "leaven[optuna]"')
    from leaven.callbacks.evonorm.nsga2 import NSGA2

    def found(seed: int) -> NSGA2:
        start = [Genome.named("evonorm_s0")]
        return NSGA2(SearchSpace("S", 5), 20, scores=2, start=start, accept=FreeChecks(), seed=seed)

    once, again = (search(found(0), score, 60, round_size=4) for _ in range(2))
    assert told(once) == told(again)
    assert once.history[0].candidate.genome.key == Genome.named("evonorm_s0").key
    keys = [each.candidate.genome.key for each in once.history]
    assert len(set(keys)) == len(keys)
    drawn = evolution(random_only=True)
    assert told(search(found(1), score, 8)) != told(once)[:8]
    search(drawn, score, 60, round_size=4)
    medians = [statistics.median(each.mean for each in run.history[20:]) for run in (once, drawn)]
    assert medians[0] > medians[1]


def test_ageing() -> None:
    found = evolution(population=6)
    for _ in range(15):
        asked = found.ask()
        found.tell(asked.number, (1.0 / (1 + asked.number), 0.5))
        assert len(found.members) <= 6
    assert [each.candidate.number for each in found.members] == list(
        range(9, 15)
    )  # the best are gone with age
    assert [each.candidate.number for each in found.best(2)] == [0, 1]
    assert [each.candidate.number for each in found.front()] == [0]
    with pytest.raises(KeyError):
        found.tell(99, (0.0, 0.0))


def test_starts_come_first() -> None:
    start = [Genome.named("evonorm_s0"), Genome.named("evonorm_s2")]
    found = evolution(start=start, population=2)
    assert [found.ask().genome for _ in range(2)] == start
    found.tell(0, (0.5, 0.1))
    found.tell(1, (0.1, 0.5))
    child = found.ask()
    assert child.parent in (0, 1)
    assert child.genome.key not in {each.key for each in start}


@pytest.mark.parametrize("random_only", [True, False])
def test_a_space_that_is_used_up_is_an_error_and_no_endless_search(random_only: bool) -> None:
    found = AgeingEvolution(SearchSpace("S", 1), population=4, random_only=random_only)

    def more(candidates: int) -> None:
        for _ in range(candidates):
            found.tell(found.ask().number, [1.0])

    more(30)
    with pytest.raises(ValueError, match=r"no new genome of 1 nodes in .* draws after \d+ candidates: ask"):
        more(500)
    assert len({each.candidate.genome.key for each in found.history}) == len(found.history)


def member(number: int, *scores: float) -> Member:
    return Member(Candidate(number, Genome.named("bn_relu")), scores)


def test_the_front() -> None:
    rng = Random(0)
    members = [member(i, *(rng.choice((0.1, 0.2, 0.3, 0.4)) for _ in range(3))) for i in range(40)]
    front = pareto_front(members)
    for a in front:
        for b in members:
            assert not (all(y >= x for x, y in zip(a.scores, b.scores, strict=True)) and b.scores != a.scores)
    for a in set(members) - set(front):
        assert any(
            all(y >= x for x, y in zip(a.scores, b.scores, strict=True)) and b.scores != a.scores
            for b in front
        )
    shuffled = members[::-1]
    assert set(pareto_front(shuffled)) == set(front)
    bent = [Member(m.candidate, (m.scores[0] ** 3, *m.scores[1:])) for m in members]
    assert [m.candidate.number for m in pareto_front(bent)] == [m.candidate.number for m in front]
    one = [member(i, s) for i, s in enumerate((0.1, 0.3, 0.3))]
    assert [m.candidate.number for m in pareto_front(one)] == [1, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: evolution(population=1), "population must be at least 2"),
        (lambda: evolution(tournament=0.0), r"tournament in \(0, 1\]"),
        (lambda: evolution(winner="best"), 'winner must be "pareto" or "average"'),
        (lambda: evolution(winner="nsga2"), "NSGA-II is the class leaven.callbacks.evonorm.NSGA2"),
        (lambda: search(evolution(), score, 0), "candidates and round_size must be at least 1"),
    ],
)
def test_wrong_searches(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# judging


def task(n: int = 200, size: int = 8) -> Task:
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    x = nn.functional.interpolate(x, (size, size), mode="bilinear")
    y = torch.tensor(found.target)
    return Task(x[:n], y[:n], x[n : n + 100], y[n : n + 100], 10)


FAST = Budget(steps=4, batch_size=16, quality_steps=2, quality=0.0, stability_steps=2)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_anchors_take_any_layer(anchor: str) -> None:
    data = task()
    plain = build(anchor, data, None, 0)
    assert sum(p.numel() for p in plain.parameters()) < 60_000
    made = build(anchor, data, lambda n, apply_act: evo_norm("s0", n, apply_act=apply_act), 0)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in made.modules())
    assert made(data.x[:3]).shape == (3, 10)


def test_a_judgement_depends_on_the_genome_and_the_seed_alone() -> None:
    data, genome = task(), Genome.named("evonorm_s1")
    before = judge(genome, data, FAST)
    torch.rand(3)
    assert judge(genome, data, FAST) == before
    assert judge(genome, data, FAST, seed=1) != before
    assert len(before["scores"]) == 3
    assert json.loads(json.dumps(before)) == before


def test_rejections() -> None:
    data = task()
    strict = Budget(steps=4, batch_size=16, quality_steps=2, quality=0.99, stability_steps=0)
    assert "mobilenet, quality: 0." in judge(Genome.named("evonorm_s1"), data, strict)["rejected"]
    at_the_end = Budget(steps=2, batch_size=16, quality_steps=2, quality=0.99, stability_steps=0)
    assert "quality: 0." in judge(Genome.named("evonorm_s1"), data, at_the_end)["rejected"]
    # Reciprocals of what is near 0, many times over.
    wild = Genome.of([("square", 0), ("square", 4), ("exp", 5)])
    assert "stability" in judge(wild, data, FAST)["rejected"] or "loss" in judge(wild, data, FAST)["rejected"]
    with pytest.raises(ValueError, match="no anchor 'vgg'; there are: mobilenet"):
        build("vgg", data, None, 0)


def test_the_norm_that_the_last_step_of_ascent_leads_to_is_looked_at() -> None:
    data = task()

    def largest(steps: int, limit: float = 1e8) -> float:
        model = build("mobilenet", data, partial(EvolvedNormAct2d, Genome.named("evonorm_s1")), 0)
        return stability(model, data, Budget(stability_steps=steps, stability=limit), 0)

    start, once = largest(0), largest(1)
    assert once > start > 0
    with pytest.raises(Rejected, match="after 1 steps of ascent"):
        largest(1, (start + once) / 2)


@pytest.mark.slow
def test_known_layers_pass_and_learn() -> None:
    data = task(1200, 16)
    budget = Budget(steps=150, quality_steps=75, quality=0.2, stability_steps=20)
    for name in ("bn_relu", "evonorm_s0"):
        found = judge(Genome.named(name), data, budget)
        assert "scores" in found, found
        assert min(found["scores"]) > 0.5, found
    wild = Genome.of([("exp", 0), ("exp", 4)])
    model = build("mobilenet", data, partial(EvolvedNormAct2d, wild), 0)
    with pytest.raises(Rejected, match="a gradient of"):
        stability(model, data, budget, 0)


# in somebody's network


def test_what_was_found_trains_in_any_backbone(tmp_path: Path) -> None:
    import torchvision

    genome = Genome.of(
        [("sigmoid", 0), ("mul", 0, 4), ("rms_wh", 0), ("div", 5, 6)], meta={"found": "by hand"}
    )
    (tmp_path / "layer.json").write_text(genome.to_json())
    model = torchvision.models.resnet18(num_classes=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    callback = EvoNorm(genome=tmp_path / "layer.json")
    with attach(model, optimizer, callback, total_steps=2):
        assert len(callback.report.replaced) == 20
        for _ in range(2):
            model(randn(4, 3, 32, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert sum(isinstance(m, EvolvedNormAct2d) for m in model.modules()) == 20
    assert callback.state_dict() == {"kind": f"genome {genome.key}"}
    (tmp_path / "bad.json").write_text("no")
    with pytest.raises(ValueError, match="not a genome"):
        EvoNorm(genome=tmp_path / "bad.json")


def test_names_are_complete() -> None:
    assert set(ARITY) == {*BINARY, *UNARY, *AGGREGATIONS}
    assert len(ARITY) == 24
    assert INITIAL == ("x", "0", "v0", "v1")
