"""Schedules against the papers' numbers and against counting update by update."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leaven.curricula import ET, ET_PP, ET_PP_DEIT, Schedule, Stage

PRESETS = {"ET": ET, "ET_PP": ET_PP, "ET_PP_DEIT": ET_PP_DEIT}
each_preset = pytest.mark.parametrize("schedule", PRESETS.values(), ids=PRESETS)


def test_the_papers_numbers() -> None:
    assert ET.speedup() == pytest.approx(1 / (0.6 * (160 / 224) ** 2 + 0.2 * (192 / 224) ** 2 + 0.2))
    assert ET.speedup() == pytest.approx(1.531, abs=5e-4)
    assert ET_PP.epochs(200) == pytest.approx(454.6, abs=0.05)
    assert ET.shapes() == (160, 192, 224)
    assert ET_PP.shapes() == (96, 160, 224)
    assert ET_PP_DEIT.shapes() == (96, 160, 192, 224)
    assert {stage.size: stage.replay for stage in ET_PP.stages} == {96: 4, 160: 2, 224: 1}
    assert {stage.replay for stage in ET.stages} == {1}
    assert [round(9 * ET.strength(t)) for t in (0, 0.2, 0.4, 0.6, 0.8, 1)] == [1, 3, 5, 7, 9, 9]


def test_efficienttrain_by_epochs() -> None:
    assert [ET.at(epoch / 300).size for epoch in (0, 179, 180, 239, 240, 299)] == [
        160,
        160,
        192,
        192,
        224,
        224,
    ]
    assert [ET.at(epoch / 300).batches for epoch in (0, 239, 240)] == [2, 2, 1]


@pytest.mark.parametrize("schedule", [ET_PP, ET_PP_DEIT], ids=["ET_PP", "ET_PP_DEIT"])
def test_stages_of_computation_by_counting_updates(schedule: Schedule) -> None:
    """Update by update at its cost, the stages take their shares of the computation, and the strengths a tenth each."""
    total = 20_000
    costs = [(schedule.at(step / total).size / 224) ** 2 for step in range(total)]
    spent, done = {}, 0.0
    tenths = dict.fromkeys(range(10), 0.0)
    for step, cost in enumerate(costs):
        assert schedule.clock(step / total) == pytest.approx(done / sum(costs), abs=1e-3)
        spent[schedule.at(step / total).size] = spent.get(schedule.at(step / total).size, 0.0) + cost / sum(
            costs
        )
        tenths[round(9 * schedule.strength(step / total))] += cost / sum(costs)
        done += cost
    ends = [0.0, *(stage.until for stage in schedule.stages)]
    for stage, (a, b) in zip(schedule.stages, itertools.pairwise(ends), strict=True):
        assert spent[stage.size] == pytest.approx(b - a, abs=1e-3)
    assert list(tenths.values()) == pytest.approx([0.1] * 10, abs=1e-3)
    # The same computation at full size is that many updates fewer.
    assert total / schedule.speedup() == pytest.approx(sum(costs), rel=1e-3)


@each_preset
def test_monotone_and_full_at_the_end(schedule: Schedule) -> None:
    grid = [step / 1000 for step in range(1001)]
    sizes = [schedule.at(t).size for t in grid]
    assert sizes == sorted(sizes)
    assert sizes[-1] == schedule.full == 224
    for function in (schedule.clock, schedule.compute, schedule.strength):
        values = [function(t) for t in grid]
        assert values == sorted(values)
        assert values[-1] == pytest.approx(1.0)
    assert schedule.clock(0) == schedule.compute(0) == 0
    assert schedule.at(1.0).size == 224


@given(total=st.integers(1, 3000), tenth=st.integers(1, 9))
def test_a_border_belongs_to_the_stage_that_begins_there(total: int, tenth: int) -> None:
    schedule = Schedule((Stage(tenth / 10, 4), Stage(1.0, 8)))
    small = sum(schedule.at(step / total).size == 4 for step in range(total))
    assert small == -(-tenth * total // 10)


def test_speedup_of_measured_costs() -> None:
    seconds = {160: 5.0, 192: 7.0, 224: 8.0}
    assert ET.speedup(seconds.__getitem__) == pytest.approx(8 / (0.6 * 5 + 0.2 * 7 + 0.2 * 8))
    assert ET.speedup(lambda size: 1.0) == 1.0


def test_other_full_sizes() -> None:
    assert ET.scaled(224).shapes() == (160, 192, 224)
    assert ET.scaled(128).shapes() == (96, 112, 128)
    assert ET.scaled(128, 32).shapes() == (96, 128)
    assert ET.scaled(64, 8).shapes() == (48, 56, 64)
    assert ET_PP.scaled(32, 32).shapes() == (32,)
    assert ET_PP.scaled(100, 16).shapes() == (48, 64, 100)
    assert [stage.until for stage in ET_PP.scaled(64, 8).stages] == [0.2, 0.6, 1.0]


def test_what_is_no_schedule() -> None:
    for stages, message in (
        ((), "end at 1"),
        (((0.5, 8),), "end at 1"),
        (((0.5, 8), (0.5, 9), (1.0, 9)), "one after another"),
        (((0.0, 8), (1.0, 9)), "one after another"),
        (((0.5, 9), (1.0, 8)), "must not shrink"),
        (((0.5, 0), (1.0, 8)), "must not shrink"),
        (((0.5, 8, 0), (1.0, 8)), "at least 1"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            Schedule(stages)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="axis"):
        Schedule(((1.0, 8),), axis="epochs")  # type: ignore[arg-type]


def test_numbers_that_make_no_schedule_are_refused() -> None:
    whole = "size, batches and replay are whole numbers"
    for stages, how, message in (
        (((float("nan"), 32), (1, 64)), {}, "must end one after another"),
        (((0.5, 32.5), (1, 64)), {}, whole),
        (((0.5, 32, 1.5), (1, 64)), {}, whole),
        (((1, 64),), {"strengths": 0.5}, "strengths must be a tuple"),
        (((1, 64),), {"strengths": (-0.1,)}, "strengths must be a tuple"),
        (((1, 64),), {"axis": "epochs"}, "axis must be"),
    ):
        with pytest.raises(ValueError, match=message):
            Schedule(tuple(Stage(*stage) for stage in stages), **how)
    with pytest.raises(ValueError, match="must be at least 1, not 64 and 0"):
        ET.scaled(64, 0)
    assert ET.at(-1) == ET.stages[0]
    assert ET.at(2) == ET.stages[-1]
