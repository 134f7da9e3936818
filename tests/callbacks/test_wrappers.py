"""Wrapped models and optimizers: accelerate, torch.compile, and what is refused."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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

from leaven.callbacks import Callback, Progress, attach, updates
from leaven.callbacks.core import AttachError, Handle
from leaven.callbacks.wrappers import unwrap_model

pytestmark = pytest.mark.filterwarnings("error::leaven.callbacks.NoEffectWarning")


def pair() -> tuple[TinyNet, SGD]:
    torch.manual_seed(0)
    model = TinyNet()
    return model, SGD(model.parameters(), lr=0.1)


# --- accelerate ---------------------------------------------------------------------------------------------


def batches(count: int) -> torch.utils.data.DataLoader[Any]:
    images, labels = zip(*(batch(seed, size=4) for seed in range(count)), strict=True)
    data = torch.utils.data.TensorDataset(torch.cat(images), torch.cat(labels))
    return torch.utils.data.DataLoader(data, batch_size=4)


@pytest.mark.parametrize("when", ["before prepare", "after prepare"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accumulation_under_accelerate_counts_true_updates(
    accelerator_with: Any, when: str, precision: str
) -> None:
    torch.manual_seed(0)
    accelerator = accelerator_with(gradient_accumulation_steps=2, mixed_precision=precision)
    model = Objective()
    optimizer: Optimizer = AdamW(model.parameters(), lr=0.01)
    loader = batches(5)
    callbacks = (ScaleInput(), CentreGradient(), ScaleStem())
    total = updates(loader, epochs=2, accumulation=2)
    if when == "before prepare":
        attached = attach(model, optimizer, *callbacks, total_steps=total)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    else:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        attached = attach(model, optimizer, *callbacks, total_steps=total)
    counts = []
    for _ in range(2):
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(images, labels).loss)
                optimizer.step()
                optimizer.zero_grad()
            counts.append(attached.progress.step)
    assert counts == [0, 1, 1, 2, 3, 3, 4, 4, 5, 6]
    assert attached.progress.fraction == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_accelerates_scaler_skipped_does_not_count(accelerator_with: Any, fused: bool) -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    accelerator_with()
    model, _ = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    optimizer = AcceleratedOptimizer(SGD(model.parameters(), lr=0.1, fused=fused), scaler=scaler)
    attached = attach(model, optimizer, total_steps=9)
    for seed, broken in enumerate([True, False, True, False]):
        images, labels = batch(seed)
        loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss * float("inf") if broken else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert attached.progress.step == 2


class Counts(Callback):
    """Keeps a number and a tensor that only the checkpoint can know."""

    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterable[Handle]:
        self.seen = torch.zeros(2)
        return ()

    def update(self) -> None:
        self.seen += torch.tensor([1.0, 2.0])

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen.copy_(state["seen"])


def test_one_object_is_registered_with_accelerate(accelerator_with: Any, tmp_path: Path) -> None:
    accelerator = accelerator_with()
    model, optimizer = pair()
    counts = Counts()
    attached = attach(model, optimizer, counts, total_steps=9)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(attached)
    train_step(prepared, wrapped, 0)
    train_step(prepared, wrapped, 1)
    accelerator.save_state(str(tmp_path))
    weights = snapshot(model)
    train_step(prepared, wrapped, 2)
    accelerator.load_state(str(tmp_path))
    assert attached.progress.step == 2
    assert torch.equal(counts.seen, torch.tensor([2.0, 4.0]))
    assert_same(snapshot(model), weights)
    (saved,) = tmp_path.glob("custom_checkpoint_*.pkl")
    assert_same(torch.load(saved, weights_only=True), attached.state_dict())


# --- torch.compile ------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module, how: str, **settings: Any) -> nn.Module:
    if how == "in place":
        model.compile(backend="eager", **settings)
        return model
    return torch.compile(model, backend="eager", **settings)  # type: ignore[return-value]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["wrapped", "in place", "submodule"])
def test_a_compiled_model_that_was_called_is_refused(how: str) -> None:
    net, optimizer = pair()
    if how == "submodule":
        net.norm = nn.Sequential(net.norm)
        model: nn.Module = net
        net.norm = compiled(net.norm, "wrapped")  # type: ignore[assignment]
    else:
        model = compiled(net, how)
    attach(model, optimizer, ScaleStem(), total_steps=9).remove()  # not called yet: fine
    model(batch(0)[0])
    with pytest.raises(
        AttachError, match=r"cannot attach ScaleStem to .*attach before the first call, or"
    ) as e:
        attach(model, optimizer, ScaleStem(), total_steps=9)
    assert "\n" not in str(e.value)
    assert hook_count(net, optimizer) == 0
    torch.compiler.reset()
    with attach(model, optimizer, ScaleStem(), total_steps=9):
        for seed in range(4):
            train_step(model, optimizer, seed)  # the hook fires: NoEffectWarning is an error


@pytest.mark.usefixtures("fresh_compiler")
def test_code_compiled_for_another_model_of_the_class_counts_too() -> None:
    """torch.compile would run it without our hooks, although this very model was never called."""
    other = compiled(TinyNet(), "wrapped")
    other(batch(0)[0])
    net, optimizer = pair()
    with pytest.raises(AttachError, match=r"or another model of its class"):
        attach(compiled(net, "wrapped"), optimizer, ScaleStem(), total_steps=9)
    attach(net, optimizer, ScaleStem(), total_steps=9)  # not compiled: no matter


@pytest.mark.usefixtures("fresh_compiler")
def test_code_compiled_for_another_model_of_torchs_own_layers_is_no_matter() -> None:
    compiled(nn.Sequential(nn.Conv2d(3, 2, 1)), "wrapped")(batch(0)[0])
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model = compiled(net, "wrapped")
    attach(model, SGD(net.parameters(), lr=0.1), InvertInput(), total_steps=9)
    images, _ = batch(0)
    expected = F.relu(net[0](-images))
    assert torch.equal(model(images), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_callback_may_declare_that_it_supports_compiled_models() -> None:
    net, optimizer = pair()
    model = compiled(net, "wrapped")
    model(batch(0)[0])
    callback = Counts()
    callback.supports = frozenset({"compiled"})
    attached = attach(model, optimizer, callback, total_steps=9)
    optimizer.step()
    assert attached.progress.step == 1
    with pytest.raises(AttachError, match="cannot attach ScaleInput to OptimizedModule"):
        attach(model, optimizer, callback, ScaleInput(), total_steps=9)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_pausing_and_removing_reach_compiled_code(how: str) -> None:
    """Compiled code is not guarded on hooks: one that was only taken out of the dict would go on firing."""
    net, optimizer = pair()
    net.drop.p = 0.0
    net.norm.eval()
    images, _ = batch(0)
    plain = net(images)
    model = compiled(net, how)
    callback = ScaleStem()
    attached = attach(model, optimizer, callback, InvertInput(), total_steps=9)
    callback.factor.fill_(3.0)
    hooked = model(images)
    assert not torch.equal(hooked, plain)
    with attached.paused():
        assert torch.equal(model(images), plain)
    assert torch.equal(model(images), hooked)
    attached.remove()
    assert torch.equal(model(images), plain)


@pytest.mark.usefixtures("fresh_compiler")
def test_accelerates_compiled_model_is_seen_through_and_refused_once_called(accelerator_with: Any) -> None:
    from accelerate.utils import TorchDynamoPlugin

    accelerator = accelerator_with(
        dynamo_plugin=TorchDynamoPlugin(backend="eager"),
        mixed_precision="bf16",
        step_scheduler_with_optimizer=False,
    )
    net, optimizer = pair()
    model, wrapped = accelerator.prepare(net, optimizer)
    assert type(model).__name__ == "OptimizedModule"
    assert unwrap_model(model) is net
    with attach(model, wrapped, ScaleStem(), ScaleInput(), total_steps=9) as attached:
        for seed in range(4):
            train_step(model, wrapped, seed)
    assert attached.progress.step == 4
    with pytest.raises(AttachError, match="already compiled"):
        attach(model, wrapped, ScaleStem(), total_steps=9)


# --- other wrappers -----------------------------------------------------------------------------------------


def test_data_parallel_is_seen_through() -> None:
    model, optimizer = pair()
    wrapped = nn.DataParallel(model)
    attached = attach(wrapped, optimizer, ScaleInput(), CentreGradient(), total_steps=9)
    for seed in range(4):
        train_step(wrapped, optimizer, seed)
    assert attached.progress.step == 4


def test_an_optimizer_wrapper_that_is_no_optimizer_is_seen_through() -> None:
    class Wrapper:  # like Lightning's
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    model, optimizer = pair()
    attached = attach(model, [Wrapper(Wrapper(optimizer))], total_steps=9)  # type: ignore[list-item,arg-type]
    optimizer.step()
    assert attached.progress.step == 1


def test_an_optimizer_that_runs_no_hooks_is_refused_with_a_way_out() -> None:
    from timm.optim import Lookahead

    model, optimizer = pair()
    lookahead = Lookahead(optimizer)
    for odd in (lookahead, object(), "adamw"):
        with pytest.raises(
            AttachError, match=r"does not run torch's optimizer step hooks: pass .* optimizer=None"
        ):
            attach(model, odd, ScaleInput(), total_steps=9)  # type: ignore[arg-type]
    assert hook_count(model) == 0


class DeepSpeedEngine(nn.Module):
    """Stands in for DeepSpeed's, which is recognised by its name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_deepspeed_is_refused_unless_declared_and_then_counts_by_explicit_steps() -> None:
    model, _ = pair()
    engine = DeepSpeedEngine(model)
    with pytest.raises(AttachError, match="cannot attach Counts to DeepSpeedEngine: a DeepSpeed engine runs"):
        attach(engine, None, Counts(), total_steps=9)
    callback = Counts()
    callback.supports = frozenset({"deepspeed"})
    attached = attach(engine, None, callback, total_steps=9)
    attached.step()
    assert callback.seen.tolist() == [1.0, 2.0]


def test_fsdp_is_refused() -> None:
    # Stands in for FSDP1, which needs an accelerator; FSDP2 is run for real in test_table.
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model, optimizer = pair()
    with pytest.raises(AttachError, match=r"sharded .*use DDP"):
        attach(FullyShardedDataParallel(model), optimizer, CentreGradient(), total_steps=9)
