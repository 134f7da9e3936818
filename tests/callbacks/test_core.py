"""attach, Attached, Progress: what counts as an update, what comes off again, what is refused."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from callback_toys import (
    CentreGradient,
    InvertInput,
    Objective,
    ScaleInput,
    ScaleStem,
    TinyNet,
    assert_same,
    batch,
    hook_count,
    snapshot,
    train_step,
)
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from leaven.callbacks import (
    Callback,
    NoEffectWarning,
    Progress,
    ResumeWarning,
    attach,
    map_images,
    updates,
)
from leaven.callbacks.core import AttachError, Handle

pytestmark = pytest.mark.filterwarnings("error::leaven.callbacks.NoEffectWarning")


class Recorder(Callback):
    """Writes down the progress at every update."""

    def __init__(self, name: str = "Recorder", journal: list[str] | None = None, order: int = 50) -> None:
        self.name, self.order = name, order
        self.journal = journal if journal is not None else []
        self.steps: list[int] = []

    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterable[Handle]:
        self.model, self.optimizers, self.progress = model, optimizers, progress
        self.journal.append(f"setup {self.name}")
        yield Undo(self)

    def update(self) -> None:
        self.steps.append(self.progress.step)
        self.journal.append(f"update {self.name}")


class Undo:
    def __init__(self, owner: Recorder) -> None:
        self.owner = owner

    def remove(self) -> None:
        self.owner.journal.append(f"remove {self.owner.name}")


def pair(lr: float = 0.1) -> tuple[TinyNet, SGD]:
    torch.manual_seed(0)
    model = TinyNet()
    return model, SGD(model.parameters(), lr=lr)


# --- Progress -----------------------------------------------------------------------------------------------


def test_progress_is_a_fraction_that_stops_at_one() -> None:
    progress = Progress(4)
    assert progress.fraction == 0
    progress.step = 3
    assert progress.fraction == 0.75
    progress.step = 9
    assert progress.fraction == 1
    for wrong in (0, None, "9", 1.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"at least 1, not {wrong!r}"):
            Progress(wrong)  # type: ignore[arg-type]
    assert repr(Progress(4.0)) == "Progress(0/4)"  # type: ignore[arg-type]


def test_every_plain_step_counts_once() -> None:
    model, optimizer = pair()
    recorder = Recorder()
    attached = attach(model, optimizer, recorder, total_steps=4)
    for seed in range(3):
        train_step(model, optimizer, seed)
    assert attached.progress.step == 3
    assert recorder.steps == [1, 2, 3]


def test_a_step_with_a_closure_counts_once_however_often_it_is_called() -> None:
    model, _ = pair()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    attached = attach(model, optimizer, total_steps=4)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        images, labels = batch(0)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert calls > 2
    assert attached.progress.step == 2


def test_a_step_by_way_of_a_parents_step_counts_once_when_it_is_done() -> None:
    """torch runs the hooks of both, if a plain SGD was ever made."""

    class Clamped(SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.clamp_(-0.01, 0.01)
            return loss

    model, _ = pair()
    optimizer = Clamped(model.parameters(), lr=0.1)
    largest: list[float] = []

    class Looks(Recorder):
        def update(self) -> None:
            super().update()
            largest.append(max(float(p.detach().abs().max()) for p in self.model.parameters()))

    recorder = Looks()
    attached = attach(model, optimizer, recorder, total_steps=4)
    for seed in range(3):
        train_step(model, optimizer, seed)
    with pytest.raises(ZeroDivisionError):  # and a step that broke off is forgotten
        optimizer.step(lambda: 1 / 0)
    train_step(model, optimizer, 3)
    assert attached.progress.step == 4
    assert recorder.steps == [1, 2, 3, 4]
    assert max(largest) <= 0.01 + 1e-6


IMPLEMENTATIONS = [{"foreach": False}, {"foreach": True}, {"fused": True}]


@pytest.mark.parametrize("kind", [SGD, AdamW])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=["single", "foreach", "fused"])
def test_a_step_that_gradscaler_skipped_does_not_count(
    kind: type[Optimizer], implementation: dict[str, bool]
) -> None:
    model, _ = pair()
    optimizer = kind(model.parameters(), lr=0.1, **implementation)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    recorder = Recorder()
    attached = attach(model, optimizer, recorder, total_steps=9)
    for seed, broken in enumerate([True, False, True, True, False]):
        before = snapshot(model)
        images, labels = batch(seed)
        loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss * float("inf") if broken else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before["head.weight"], model.head.weight) == broken
    assert attached.progress.step == 2
    assert recorder.steps == [1, 2]


def test_gradscaler_with_unscale_and_clipping_counts_the_same() -> None:
    model, _ = pair()
    optimizer = AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    attached = attach(model, optimizer, total_steps=9)
    for seed, broken in enumerate([False, True, False]):
        images, labels = batch(seed)
        loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss * float("inf") if broken else loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert attached.progress.step == 2


def test_several_optimizers_count_a_round_when_each_has_stepped() -> None:
    model, _ = pair()
    critic, actor = SGD(model.stem.parameters(), lr=0.1), SGD(model.head.parameters(), lr=0.1)
    attached = attach(model, [critic, actor], total_steps=9)
    counts = []
    for who in (critic, critic, actor, actor, critic, critic, actor):
        who.step()
        counts.append(attached.progress.step)
    assert counts == [0, 0, 1, 1, 2, 2, 3]


def test_a_round_half_done_survives_resume() -> None:
    model, _ = pair()
    optimizers = [SGD(model.stem.parameters(), lr=0.1), SGD(model.head.parameters(), lr=0.1)]
    first = attach(model, optimizers, total_steps=9)
    optimizers[0].step()
    state = first.state_dict()
    first.remove()
    second = attach(model, optimizers, total_steps=9)
    second.load_state_dict(state)
    optimizers[1].step()
    assert second.progress.step == 1
    with pytest.raises(ValueError, match="written with 2 optimizers, not 1"):
        attach(model, optimizers[0], total_steps=9).load_state_dict(state)


def test_an_optimizer_that_never_steps_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leaven.callbacks.core._SILENT_ROUND", 5)
    model, optimizer = pair()
    idle = AdamW(model.head.parameters())
    attach(model, [optimizer, idle], total_steps=9)
    for _ in range(4):
        optimizer.step()
    with pytest.warns(NoEffectWarning, match="AdamW none"):
        optimizer.step()


def test_the_same_optimizer_twice_counts_once() -> None:
    model, optimizer = pair()
    attached = attach(model, [optimizer, optimizer], total_steps=9)
    optimizer.step()
    assert attached.progress.step == 1


def test_explicit_steps_serve_engines_that_bypass_hooks() -> None:
    model, optimizer = pair()
    recorder = Recorder()
    attached = attach(model, None, recorder, total_steps=9)
    optimizer.step()
    attached.step()
    attached.step()
    assert recorder.optimizers == ()
    assert recorder.steps == [1, 2]


def test_explicit_steps_never_count_twice() -> None:
    model, optimizer = pair()
    attached = attach(model, optimizer, total_steps=9)
    for _ in range(3):
        optimizer.step()
        attached.step()
    assert attached.progress.step == 3


def test_an_explicit_step_does_not_count_a_skipped_fused_step() -> None:
    model, _ = pair()
    optimizer = SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    attached = attach(model, optimizer, total_steps=9)
    images, labels = batch(0)
    scaler.scale(F.cross_entropy(model(images), labels) * float("inf")).backward()
    scaler.step(optimizer)
    attached.step()
    assert attached.progress.step == 0


# --- updates() ----------------------------------------------------------------------------------------------


def loader(items: int, **kwargs: Any) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(items, 1)), **kwargs)


def test_updates_counts_accumulation_per_epoch() -> None:
    assert updates(range(10), epochs=3) == 30
    assert updates(range(5), epochs=2, accumulation=2) == 6  # 2 + 2 + 1 micro-batches, twice
    assert updates(loader(21, batch_size=4), epochs=1) == 6
    assert updates(loader(21, batch_size=4, drop_last=True), epochs=1) == 5
    sampler = torch.utils.data.BatchSampler(range(20), batch_size=4, drop_last=True)
    assert updates(loader(20, batch_sampler=sampler), epochs=1, world_size=2) == 2  # 5 batches, dropped to 4


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("items", [16, 21, 23, 24, 37])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_updates_agrees_with_how_accelerate_shards(items: int, drop_last: bool, world_size: int) -> None:
    from accelerate.data_loader import BatchSamplerShard

    whole = loader(items, batch_size=4, drop_last=drop_last)
    shards = [BatchSamplerShard(whole.batch_sampler, world_size, rank) for rank in range(world_size)]
    assert {len(list(shard)) for shard in shards} == {updates(whole, 1, world_size=world_size)}


def test_updates_says_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="no length: give total_steps yourself"):
        updates(iter(range(3)), epochs=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 batches for 2 processes in 1 epochs: there would be no update"):
        updates(loader(4, batch_size=4, drop_last=True), epochs=1, world_size=2)
    for how in ({"accumulation": 0}, {"world_size": 0}):
        with pytest.raises(ValueError, match=r"^accumulation and world_size must be at least 1, not .*=0"):
            updates(range(3), epochs=2, **how)


# --- who gets what, in which order --------------------------------------------------------------------------


def test_callbacks_act_in_order_and_are_removed_in_reverse() -> None:
    model, optimizer = pair()
    journal: list[str] = []
    late, early, middle = (
        Recorder(name, journal, order) for name, order in zip("cab", (90, 10, 50), strict=True)
    )
    attached = attach(model, optimizer, late, early, middle, total_steps=9)
    optimizer.step()
    attached.remove()
    assert journal == [f"{what} {name}" for what in ("setup", "update") for name in "abc"] + [
        f"remove {name}" for name in "cba"
    ]


def test_hooks_fire_in_order_too() -> None:
    model, optimizer = pair()
    seen: list[str] = []

    class Seer(Callback):
        def __init__(self, name: str, order: int) -> None:
            self.name, self.order = name, order

        def setup(
            self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
        ) -> Iterable[Handle]:
            yield model.register_forward_pre_hook(lambda *_: seen.append(self.name))

    attach(model, optimizer, Seer("second", 60), Seer("first", 40), total_steps=9)
    model(batch(0)[0])
    assert seen == ["first", "second"]


def test_a_callback_gets_the_part_it_binds_to() -> None:
    objective = Objective()
    optimizer = SGD(objective.parameters(), lr=0.1)
    whole, part = Recorder("whole"), Recorder("part")
    part.binds = "backbone"
    attach(objective, optimizer, whole, part, total_steps=9)
    assert whole.model is objective
    assert part.model is objective.backbone
    plain, _ = pair()
    alone = Recorder()
    alone.binds = "backbone"
    attach(plain, None, alone, total_steps=9)
    assert alone.model is plain


def test_two_claims_on_a_slot_raise_and_name_both() -> None:
    model, optimizer = pair()
    with pytest.raises(AttachError, match=r"ScaleInput and InvertInput both claim the slot 'input'"):
        attach(model, optimizer, ScaleInput(), CentreGradient(), InvertInput(), total_steps=9)
    assert hook_count(model, optimizer) == 0


def test_an_objective_refuses_a_slot_in_one_line() -> None:
    class Sparse(Objective):
        refused_slots: ClassVar = {"first-layer-gradient": "its first layer sees no images; use it elsewhere"}

    objective = Sparse()
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    line = "^cannot attach CentreGradient to Sparse: its first layer sees no images; use it elsewhere$"
    for whole in (objective, torch.nn.ModuleDict({"inner": objective})):
        with pytest.raises(AttachError, match=line):
            attach(whole, optimizer, ScaleInput(), CentreGradient(), total_steps=9)
    assert hook_count(objective, optimizer) == 0
    attach(objective, optimizer, ScaleInput(), total_steps=9)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda m, o: attach(m, o, ScaleInput, total_steps=9), r"callbacks, not their classes: ScaleInput\("),
        (lambda m, o: attach(m, o, [ScaleInput()], total_steps=9), "one by one, not a list"),
        (lambda m, o: attach(m, o, None, total_steps=9), "a NoneType is no callback"),
        (lambda m, o: attach(m, o, m, total_steps=9), "a TinyNet is no callback"),
        (lambda m, o: attach(ScaleInput(), m, total_steps=9), "the first is a module, not a ScaleInput"),
        (lambda m, o: attach(ScaleInput, m, total_steps=9), "the first is a module, not the class ScaleInput"),
        (lambda m, o: attach(o, m, ScaleInput(), total_steps=9), "the first is a module, not an SGD"),
        (lambda m, o: attach(m, ScaleInput(), total_steps=9), "the second is .* or None .*, not a ScaleInput"),
        (lambda m, o: attach(m, m, ScaleInput(), total_steps=9), "the second is .*, not a TinyNet"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_told_in_one_line(call: Any, line: str) -> None:
    model, optimizer = pair()
    with pytest.raises(TypeError, match=line):
        call(model, optimizer)
    assert hook_count(model, optimizer) == 0


def test_two_callbacks_of_one_name_raise_and_a_name_resolves_it() -> None:
    model, optimizer = pair()
    twin = Recorder()
    with pytest.raises(
        AttachError, match=r"two callbacks are named 'Recorder'.*callback.name = 'Recorder_2'"
    ):
        attach(model, optimizer, Recorder(), twin, total_steps=9)
    twin.name = "Recorder_2"
    assert ScaleInput().name == "ScaleInput"
    assert type("Named", (Callback,), {"name": "own"})().name == "own"
    attached = attach(model, optimizer, Recorder(), twin, total_steps=9)
    assert set(attached.state_dict()["callbacks"]) == {"Recorder", "Recorder_2"}


# --- on and off ---------------------------------------------------------------------------------------------


def test_remove_restores_the_model_and_can_be_repeated() -> None:
    model, optimizer = pair()
    own = model.stem.register_forward_hook(lambda *_: None)  # a hook of the user's stays
    before = snapshot(model)
    attached = attach(model, optimizer, ScaleInput(), CentreGradient(), ScaleStem(), total_steps=9)
    assert hook_count(model, optimizer) > 1
    attached.remove()
    attached.remove()
    assert hook_count(model, optimizer) == 1
    own.remove()
    assert hook_count(model, optimizer) == 0
    assert_same(before, snapshot(model))
    train_step(model, optimizer, 0)
    assert attached.progress.step == 0


def test_the_context_manager_removes_also_on_an_exception() -> None:
    model, optimizer = pair()
    with attach(model, optimizer, ScaleInput(), total_steps=9):
        assert hook_count(model, optimizer) > 0
    assert hook_count(model, optimizer) == 0
    with pytest.raises(ZeroDivisionError), attach(model, optimizer, ScaleInput(), total_steps=9):
        raise ZeroDivisionError
    assert hook_count(model, optimizer) == 0


class FailsHalfWay(Callback):
    order = 70

    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterator[Handle]:
        yield model.register_forward_pre_hook(self.never)
        raise LookupError("found no first layer")

    def never(self, *_: object) -> None:
        raise AssertionError("this hook should be gone")


def test_a_setup_that_raises_rolls_back_itself_and_those_before() -> None:
    model, optimizer = pair()
    journal: list[str] = []
    with pytest.raises(LookupError, match="found no first layer"):
        attach(model, optimizer, FailsHalfWay(), ScaleInput(), Recorder(journal=journal), total_steps=9)
    assert journal == ["setup Recorder", "remove Recorder"]
    assert hook_count(model, optimizer) == 0


def test_a_callback_can_be_attached_again() -> None:
    model, optimizer = pair()
    recorder = Recorder()
    for _ in range(2):
        with attach(model, optimizer, recorder, total_steps=9):
            optimizer.step()
    assert recorder.steps == [1, 1]


def test_a_callback_that_is_attached_is_not_attached_again() -> None:
    model, optimizer = pair()
    recorder = Recorder()
    with attach(model, optimizer, recorder, total_steps=9):
        for net, its in ((model, optimizer), pair()):
            with pytest.raises(AttachError, match=r"^this Recorder is attached already.*\.remove\(\)"):
                attach(net, its, recorder, total_steps=9)
        optimizer.step()
    assert recorder.steps == [1]
    assert recorder.model is model


class Careless(Callback):
    """Its setup returns what it is told to, after it has hooked into the model as it is told to."""

    def __init__(self, how: str) -> None:
        self.how = how

    def setup(self, model: nn.Module, *_: object) -> Any:
        if self.how == "return handle":
            return model.register_forward_hook(lambda *_: None)
        return self.giving(model) if self.how == "yield None" else None

    def giving(self, model: nn.Module) -> Iterator[Any]:
        yield model.register_forward_hook(lambda *_: None)
        yield None


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("return", "it returned None"),
        ("return handle", "it returned a RemovableHandle"),
        ("yield None", r"it gave None, without \.remove\(\)"),
    ],
)
def test_a_setup_that_gives_no_handles_is_named_and_leaves_nothing(how: str, line: str) -> None:
    model, optimizer = pair()
    with pytest.raises(TypeError, match=f"^Careless.setup must yield a handle for each .*: {line}$"):
        attach(model, optimizer, Recorder(), Careless(how), total_steps=9)
    assert hook_count(model, optimizer) == 0


def test_paused_turns_hooks_and_updates_off_but_counts() -> None:
    model, optimizer = pair()
    model.drop.p = 0.0
    images, _ = batch(0)
    plain = model(images)
    recorder = Recorder()
    with attach(model, optimizer, InvertInput(), recorder, total_steps=9) as attached:
        inverted = model(images)
        assert not torch.equal(inverted, plain)
        with attached.paused():
            with attached.paused():
                pass
            assert torch.equal(model(images), plain)
            optimizer.step()
        assert torch.equal(model(images), inverted)
        with pytest.raises(ZeroDivisionError), attached.paused():
            raise ZeroDivisionError
        assert torch.equal(model(images), inverted)
        optimizer.step()
    assert attached.progress.step == 2
    assert recorder.steps == [2]


def test_paused_turns_gradient_hooks_off() -> None:
    model, optimizer = pair()
    images, labels = batch(0)

    def gradient() -> Tensor:
        model.zero_grad()
        torch.manual_seed(0)
        F.cross_entropy(model(images), labels).backward()
        assert model.stem.weight.grad is not None
        return model.stem.weight.grad

    plain = gradient()
    with attach(model, optimizer, CentreGradient(), total_steps=9) as attached:
        assert torch.equal(gradient(), plain - plain.mean())
        with attached.paused():
            assert torch.equal(gradient(), plain)
    assert torch.equal(gradient(), plain)


def test_removing_inside_a_pause_is_final() -> None:
    model, optimizer = pair()
    model.drop.p = 0.0
    images, _ = batch(0)
    plain = model(images)
    attached = attach(model, optimizer, InvertInput(), total_steps=9)
    with attached.paused():
        attached.remove()
    assert torch.equal(model(images), plain)


@pytest.mark.parametrize("pause", [False, True])
def test_a_removed_hook_does_nothing_even_if_something_still_holds_it(pause: bool) -> None:
    model, optimizer = pair()
    attached = attach(model, optimizer, InvertInput(), total_steps=9)
    (hook,) = model._forward_pre_hooks.values()  # as code that torch.compile made of it does
    arguments = (batch(0)[0],), {}
    assert hook(model, *arguments) is not None
    if pause:
        with attached.paused():
            attached.remove()
    else:
        attached.remove()
    assert hook(model, *arguments) is None


def test_updates_see_the_model_without_hooks() -> None:
    model, optimizer = pair()
    model.drop.p = 0.0
    images, _ = batch(0)

    class Looks(Callback):
        def setup(
            self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
        ) -> Iterable[Handle]:
            self.model = model
            return []

        def update(self) -> None:
            self.seen = self.model(images)

    looks = Looks()
    attach(model, optimizer, looks, InvertInput(), total_steps=9)
    model.norm.eval()
    optimizer.step()
    assert torch.equal(looks.seen, model(-images))  # the hook inverts once more


# --- copies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_hooks_are_inert_in_copies(how: str) -> None:
    model, optimizer = pair()
    model.drop.p = 0.0
    images, _ = batch(0)
    expected = copy.deepcopy(model)(images)
    recorder = Recorder()
    recorder.progress_holder = lambda: None  # type: ignore[attr-defined]  # cannot be pickled: must not be
    attach(model, optimizer, InvertInput(), CentreGradient(), ScaleStem(), recorder, total_steps=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(images), expected)
    F.cross_entropy(twin(images), batch(0)[1]).backward()
    gradient = twin.stem.weight.grad
    assert abs(gradient.mean()) > 1e-6  # not centred
    assert torch.equal(copy.deepcopy(twin)(images), twin(images))
    assert not torch.equal(model(images), expected)  # still at work in the original


def test_a_state_dict_hook_stays_at_work_in_copies_and_pauses() -> None:
    class Renames(Callback):
        def setup(
            self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
        ) -> Iterable[Handle]:
            yield model.register_state_dict_post_hook(rename)

    model, optimizer = pair()
    with attach(model, optimizer, Renames(), total_steps=9) as attached:
        assert "neck.weight" in copy.deepcopy(model).state_dict()
        with attached.paused():
            assert "neck.weight" in model.state_dict()
    assert "neck.weight" not in model.state_dict()


def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    state["neck.weight"] = state.pop("head.weight")


def test_the_optimizer_still_copies() -> None:
    model, optimizer = pair()
    attached = attach(model, optimizer, total_steps=9)
    twin = copy.deepcopy(optimizer)
    pickle.dumps(optimizer)
    twin.step()
    assert attached.progress.step == 0


# --- hooks that never fire ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bypass", ["forward", "forward_features"])
def test_calls_that_bypass_hooks_are_reported_by_name(bypass: str) -> None:
    model, optimizer = pair()
    attach(model, optimizer, ScaleInput(), total_steps=9)
    images, _ = batch(0)

    def update() -> None:
        getattr(model, bypass)(images).mean().backward()
        optimizer.step()

    update()
    update()
    with pytest.warns(
        NoEffectWarning, match=r"ScaleInput has no effect: 3 updates passed.*not model.forward"
    ):
        update()
    update()  # once is enough: a second NoEffectWarning would be an error here


def test_a_frozen_parameter_is_reported_by_name() -> None:
    model, optimizer = pair()
    attach(model, optimizer, CentreGradient(), ScaleInput(), total_steps=9)
    model.stem.requires_grad_(False)
    train_step(model, optimizer, 0)
    train_step(model, optimizer, 1)
    with pytest.warns(NoEffectWarning, match=r"^CentreGradient has no effect.*replaced or unfrozen"):
        train_step(model, optimizer, 2)


def test_only_the_silent_hook_of_several_is_named() -> None:
    class Both(ScaleStem):
        def setup(
            self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
        ) -> Iterable[Handle]:
            yield from super().setup(model, optimizers, progress)
            self.unused = nn.Linear(1, 1)
            yield self.unused.weight.register_hook(self.silent)

        def silent(self, gradient: Tensor) -> None: ...

    model, optimizer = pair()
    attach(model, optimizer, Both(), total_steps=9)
    train_step(model, optimizer, 0)
    train_step(model, optimizer, 1)
    with pytest.warns(
        NoEffectWarning, match=r"^Both has no effect: 3 updates passed and its hook silent never"
    ):
        train_step(model, optimizer, 2)


def test_hooks_that_fire_are_not_reported() -> None:
    model, optimizer = pair()
    attach(model, optimizer, ScaleInput(), CentreGradient(), ScaleStem(), total_steps=9)
    for seed in range(5):
        train_step(model, optimizer, seed)  # NoEffectWarning is an error here


def test_updates_within_a_pause_do_not_make_hooks_look_silent() -> None:
    model, optimizer = pair()
    attached = attach(model, optimizer, ScaleInput(), total_steps=9)
    with attached.paused():
        for seed in range(5):
            train_step(model, optimizer, seed)
    train_step(model, optimizer, 5)


# --- inputs and gradients -----------------------------------------------------------------------------------


def test_images_are_found_by_position_and_by_keyword() -> None:
    model, optimizer = pair()
    model.drop.p = 0.0
    images, _ = batch(0)
    expected = model(-images)
    with attach(model, optimizer, InvertInput(), total_steps=9):
        assert torch.equal(model(images), expected)
        assert torch.equal(model(pixel_values=images), expected)


def test_map_images_takes_the_first_images_and_nothing_else() -> None:
    images, mask = torch.ones(2, 3, 4, 4), torch.ones(2, 1, 4, 4, dtype=torch.bool)
    args, kwargs = map_images(torch.neg, (mask, images, images), {"x": images})
    assert args[0] is mask
    assert torch.equal(args[1], -images)
    assert args[2] is images
    assert kwargs["x"] is images
    args, kwargs = map_images(torch.neg, (mask,), {"mask": mask, "x": images, "y": images})
    assert torch.equal(kwargs["x"], -images)
    assert kwargs["y"] is images
    with pytest.raises(TypeError, match=r"called without images.*attach to the part of the model"):
        map_images(torch.neg, (mask,), {"labels": torch.ones(2)})


def test_gradient_hooks_act_before_clipping_and_inside_closures() -> None:
    """Why callbacks use gradient hooks: a step pre-hook is late in one loop and early in the other."""
    images, labels = batch(0)
    order: list[str] = []

    def prepare() -> tuple[TinyNet, SGD]:
        model, optimizer = pair()
        attach(model, optimizer, CentreGradient(), total_steps=9)
        optimizer.register_step_pre_hook(lambda *_: order.append("pre-hook"))
        return model, optimizer

    def backward(model: TinyNet, optimizer: SGD) -> Tensor:
        optimizer.zero_grad()
        torch.manual_seed(0)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        order.append("backward")
        assert model.stem.weight.grad is not None
        assert abs(model.stem.weight.grad.mean()) < 1e-8  # centred already, before the user clips
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return loss

    plain, optimizer = prepare()
    backward(plain, optimizer)
    optimizer.step()
    assert order == ["backward", "pre-hook"]
    order.clear()
    closed, optimizer = prepare()
    optimizer.step(lambda: backward(closed, optimizer))
    assert order == ["pre-hook", "backward"]
    assert_same(snapshot(plain), snapshot(closed))


def test_gradient_hooks_act_on_every_micro_batch() -> None:
    model, optimizer = pair()
    model.drop.p = 0.0
    model.norm.eval()
    expected = torch.zeros_like(model.stem.weight)
    for seed in range(2):
        images, labels = batch(seed)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(images), labels), model.stem.weight)
        expected += gradient - gradient.mean()
    attach(model, optimizer, CentreGradient(), total_steps=9)
    for seed in range(2):
        images, labels = batch(seed)
        F.cross_entropy(model(images), labels).backward()
    torch.testing.assert_close(model.stem.weight.grad, expected)


# --- state --------------------------------------------------------------------------------------------------


class Keeps(Callback):
    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]

    def logs(self) -> dict[str, float]:
        return {self.name: float(self.value)}


def test_state_is_keyed_by_name_and_restored() -> None:
    model, optimizer = pair()
    attached = attach(model, optimizer, Keeps("a", 1), Keeps("b", 2), total_steps=9)
    optimizer.step()
    state = attached.state_dict()
    assert state["progress"] == {"step": 1, "total_steps": 9, "round": [0]}
    assert state["callbacks"] == {"a": {"value": 1}, "b": {"value": 2}}
    assert attached.logs() == {"a": 1.0, "b": 2.0}
    attached.remove()
    again = attach(model, optimizer, Keeps("b", 0), Keeps("a", 0), total_steps=9)
    again.load_state_dict(state)
    assert again.progress.step == 1
    assert again.logs() == {"a": 1.0, "b": 2.0}


def test_state_of_other_callbacks_is_refused_in_one_line_and_changes_nothing() -> None:
    model, optimizer = pair()
    full = attach(model, optimizer, Keeps("a", 1), Keeps("b", 2), total_steps=9)
    optimizer.step()
    state = full.state_dict()
    fewer = attach(model, optimizer, Keeps("a", 5), total_steps=9)
    with pytest.raises(ValueError, match=r"^the checkpoint has state for b, but attached are a$"):
        fewer.load_state_dict(state)
    more = attach(model, optimizer, Keeps("a", 5), Keeps("b", 5), Keeps("c", 5), total_steps=9)
    with pytest.raises(ValueError, match=r"^the checkpoint has no state for c, only for \['a', 'b'\]$"):
        more.load_state_dict(state)
    assert (fewer.progress.step, more.progress.step) == (0, 0)
    assert more.logs() == {"a": 5.0, "b": 5.0, "c": 5.0}


def test_what_is_no_state_is_refused_in_one_line() -> None:
    model, optimizer = pair()
    attached = attach(model, optimizer, Keeps("a", 5), total_steps=9)
    state = attached.state_dict()
    for wrong in (
        None,
        {},
        model.state_dict(),
        state | {"progress": {"step": 3}},
        state | {"callbacks": None},
    ):
        with pytest.raises(
            ValueError, match=r"^this is no state of attached callbacks.*attached.state_dict\(\)"
        ):
            attached.load_state_dict(wrong)
    with pytest.raises(ValueError, match=r"^the checkpoint's state of a has no 'value'$"):
        attached.load_state_dict(state | {"callbacks": {"a": {}}})
    assert attached.progress.step == 0


def test_progress_is_restored_before_the_callbacks() -> None:
    class Asks(Recorder):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.step_at_load = self.progress.step

    model, optimizer = pair()
    first = attach(model, optimizer, Asks(), total_steps=9)
    optimizer.step()
    asks = Asks()
    attach(model, optimizer, asks, total_steps=9).load_state_dict(first.state_dict())
    assert asks.step_at_load == 1


def test_another_schedule_is_said_so() -> None:
    model, optimizer = pair()
    state = attach(model, optimizer, total_steps=9).state_dict()
    with pytest.warns(ResumeWarning, match="written with total_steps=9, this run has 12"):
        attach(model, optimizer, total_steps=12).load_state_dict(state)


@pytest.mark.parametrize("value", [object(), {1, 2}, {"deep": [torch.nn.ReLU()]}, torch.Generator()])
def test_only_plain_types_and_tensors_can_be_saved(value: Any) -> None:
    model, optimizer = pair()
    attached = attach(model, optimizer, Keeps("keeper", value), total_steps=9)
    with pytest.raises(TypeError, match="the state of keeper holds a"):
        attached.state_dict()


def test_everything_has_a_readable_repr() -> None:
    model, optimizer = pair()
    attached = attach(model, optimizer, ScaleStem(), ScaleInput(), total_steps=9)
    optimizer.step()
    assert repr(attached) == "Attached(ScaleInput(), ScaleStem(); Progress(1/9))"


def test_the_import_is_light() -> None:
    heavy = [
        "timm",
        "torchvision",
        "kornia",
        "gpytorch",
        "sklearn",
        "matplotlib",
        "accelerate",
        "torch._dynamo",
    ]
    heavy += ["leaven.pretext", "leaven.backbones", "torch.distributed.fsdp"]
    code = f"""
import sys, torch
before = set(sys.modules)
import leaven.callbacks
print([name for name in {heavy} if name in sys.modules and name not in before])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def backward(model: nn.Module, times: int) -> None:
    for seed in range(times):
        F.cross_entropy(model(batch(seed)[0]), batch(seed)[1]).backward()


def test_backward_passes_without_one_update_are_reported_once() -> None:
    model, optimizer = pair()
    attached = attach(model, optimizer, Recorder(), ScaleInput(), total_steps=20)
    backward(model, 63)
    with pytest.warns(
        NoEffectWarning, match=r"^Recorder, ScaleInput: not one .* 64 backward .*attached SGD made no step"
    ):
        backward(model, 1)
    backward(model, 64)
    attached.remove()


def test_the_end_without_one_update_is_reported() -> None:
    model, optimizer = pair()
    other = AdamW(model.parameters())
    attached = attach(model, optimizer, Recorder(), total_steps=20)
    for seed in range(8):
        train_step(model, other, seed)
    with pytest.warns(NoEffectWarning, match="attach the optimizer that the loop steps") as given:
        attached.__exit__(None, None, None)
    assert len(given) == 1
    attached = attach(model, None, Recorder(), total_steps=20)
    backward(model, 8)
    before = hook_count(model)
    with pytest.warns(NoEffectWarning, match=r"^Recorder: .*attached.step\(\) was not called"):
        attached.remove()
    assert hook_count(model) == before - 2 == 0


def test_no_update_is_not_reported_where_none_is_missing() -> None:
    model, optimizer = pair()
    with attach(model, optimizer, Recorder(), total_steps=20):
        backward(model, 32)  # accumulation
        optimizer.step()
        backward(model, 99)
        assert hook_count(model) == 0  # nothing is counted any longer
    with attach(model, optimizer, Recorder(), total_steps=20):
        backward(model, 7)  # a look at gradients
    with attach(model, optimizer, Recorder(), total_steps=20), torch.no_grad():
        model.eval()
        for seed in range(99):
            model(batch(seed)[0])
    attached = attach(model, optimizer, Recorder(), total_steps=20)
    backward(model, 9)
    attached.__exit__(KeyError, KeyError(), None)  # a loop that broke off


def test_parameters_in_no_group_are_reported() -> None:
    model, _ = pair()
    with pytest.warns(
        NoEffectWarning, match=r"^4 of the 6 parameters of TinyNet .*\(norm.weight, norm.bias, \.\.\.\)"
    ):
        attach(model, SGD(model.stem.parameters(), lr=0.1), Recorder(), total_steps=9)
    with pytest.warns(
        NoEffectWarning, match="among them stem.weight, on which CentreGradient acts: it has no effect"
    ):
        attach(model, SGD(model.head.parameters(), lr=0.1), Recorder(), CentreGradient(), total_steps=9)


def test_parameters_that_need_no_group_are_not_reported() -> None:
    model, optimizer = pair()
    attach(nn.parallel.DataParallel(model), optimizer, Recorder(), total_steps=9)
    attach(torch.compile(model), optimizer, Recorder(), total_steps=9)
    parts = [SGD(part.parameters(), lr=0.1) for part in (model.stem, model.norm, model.head)]
    attach(model, parts, Recorder(), total_steps=9)
    model.head.requires_grad_(False)
    attach(model, parts[:2], Recorder(), total_steps=9)
    model.head = model.head.requires_grad_(True)
    model.twin = model.head  # shared
    attach(model, SGD(model.parameters(), lr=0.1), Recorder(), total_steps=9)


def test_hooks_are_off_while_a_callback_is_set_up() -> None:
    class Probing(Recorder):
        def setup(
            self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
        ) -> Iterable[Handle]:
            model(torch.zeros(2, 3, 16, 16))
            return super().setup(model, optimizers, progress)

    model, optimizer = pair()
    calls = []

    class Listening(Recorder):
        def setup(
            self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
        ) -> Iterable[Handle]:
            yield model.register_forward_pre_hook(lambda *_: calls.append(1))

    attach(model, optimizer, Listening("a"), Probing(), total_steps=9)
    attach(model, optimizer, Probing(), total_steps=9)
    assert not calls
    model(torch.zeros(2, 3, 16, 16))
    assert calls


def test_more_updates_than_announced_are_reported_once() -> None:
    model = TinyNet()
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(model, optimizer, Recorder(), total_steps=2) as attached:
        for seed in range(2):
            train_step(model, optimizer, seed)  # NoEffectWarning is an error here
        with pytest.warns(NoEffectWarning, match="^update 3 of total_steps=2: schedules stand"):
            train_step(model, optimizer, 2)
        train_step(model, optimizer, 3)
        assert (attached.progress.step, attached.progress.fraction) == (4, 1.0)


def test_an_optimizer_of_another_model_is_reported() -> None:
    model, other = TinyNet(), TinyNet()
    optimizer = SGD(other.parameters(), lr=0.1)
    with (
        attach(model, optimizer, Recorder(), total_steps=9),
        pytest.warns(NoEffectWarning, match="^SGD updates no parameter of the TinyNet"),
    ):
        train_step(other, optimizer, 0)


def test_no_optimizer_in_a_list_is_refused() -> None:
    with pytest.raises(AttachError, match=r"^the list of optimizers is empty: .*or None where"):
        attach(TinyNet(), [], Recorder(), total_steps=9)
