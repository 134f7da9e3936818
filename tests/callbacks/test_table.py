"""Every callback, the same checks. A new callback is one new row in ROWS.

Run as a script, this file is one of the two processes of the DDP checks.
"""

import copy
import io
import itertools
import json
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
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
    run_twice,
    snapshot,
    train_step,
)
from torch import Tensor
from torch.optim import SGD, AdamW

from leaven.callbacks import (
    EMA,
    Attached,
    Callback,
    EvoNorm,
    KNNProbe,
    NoEffectWarning,
    TrAct,
    attach,
    updates,
)
from leaven.callbacks.core import AttachError
from leaven.curricula import EfficientTrain, Schedule, Stage

pytestmark = pytest.mark.filterwarnings("error::leaven.callbacks.NoEffectWarning")


@dataclass(frozen=True)
class Row:
    """How to make a callback for a TinyNet; `surgery`: the network itself changes, so eval and copies do too."""

    make: Callable[[], Callback]
    surgery: bool = False


# Of 8 updates, 3 are on small images.
SMALL_THEN_WHOLE = Schedule((Stage(0.3, 8), Stage(1.0, 16)))
ROWS = {
    "EMA": Row(lambda: EMA(decay=0.9, warmup=True)),
    "KNNProbe": Row(lambda: KNNProbe(batch(900, 24), batch(901, 12), every=2, k=5)),
    "EfficientTrain": Row(lambda: EfficientTrain(SMALL_THEN_WHOLE, image_size=16)),
    "TrAct": Row(TrAct),
    "EvoNorm": Row(EvoNorm, surgery=True),
    "ScaleInput": Row(ScaleInput),
    "InvertInput": Row(InvertInput),
    "CentreGradient": Row(CentreGradient),
    "ScaleStem": Row(ScaleStem),
}
each_row = pytest.mark.parametrize("name", ROWS)
TOTAL = 8


def start(*names: str, seed: int = 0) -> tuple[TinyNet, AdamW, Attached]:
    torch.manual_seed(seed)
    model = TinyNet()
    optimizer = AdamW(model.parameters(), lr=0.01)
    attached = attach(model, optimizer, *(ROWS[name].make() for name in names), total_steps=TOTAL)
    return model, optimizer, attached


@each_row
def test_trains(name: str) -> None:
    model, optimizer, attached = start(name)
    before = snapshot(model)
    losses = [train_step(model, optimizer, seed) for seed in range(TOTAL)]
    assert torch.isfinite(torch.stack(losses)).all()
    assert not torch.equal(before["stem.weight"], model.stem.weight)
    assert attached.progress.step == TOTAL
    assert attached.progress.fraction == 1
    assert all(type(value) is float for value in attached.logs().values())
    assert type(attached.callbacks[0]).__name__ in repr(attached)


@each_row
@pytest.mark.parametrize("cut", [1, 5])
def test_resumes_bit_equal(name: str, cut: int) -> None:
    model, optimizer, attached = start(name)
    checkpoint = io.BytesIO()
    for seed in range(TOTAL):
        if seed == cut:
            parts = {"model": model, "optimizer": optimizer, "attached": attached}
            torch.save({key: part.state_dict() for key, part in parts.items()}, checkpoint)
        train_step(model, optimizer, seed)
    checkpoint.seek(0)
    saved = torch.load(checkpoint, weights_only=True)
    again, optimizer_again, attached_again = start(name, seed=1)
    again.load_state_dict(saved["model"])
    optimizer_again.load_state_dict(saved["optimizer"])
    attached_again.load_state_dict(saved["attached"])
    for seed in range(cut, TOTAL):
        train_step(again, optimizer_again, seed)
    assert_same(model.state_dict(), again.state_dict())
    assert_same(attached.state_dict(), attached_again.state_dict())
    assert attached.logs() == attached_again.logs()


@each_row
def test_removes_cleanly(name: str) -> None:
    model, optimizer, attached = start(name)
    torch.manual_seed(0)
    plain = TinyNet()
    plain_optimizer = AdamW(plain.parameters(), lr=0.01)
    attached.remove()
    assert hook_count(model, optimizer) == 0
    assert_same(plain.state_dict(), model.state_dict())
    for seed in range(3):
        train_step(plain, plain_optimizer, seed)
        train_step(model, optimizer, seed)
    assert_same(plain.state_dict(), model.state_dict())

    trained, optimizer, attached = start(name)
    for seed in range(3):
        train_step(trained, optimizer, seed)
    attached.remove()
    assert hook_count(trained, optimizer) == 0
    trained_as_plain = TinyNet()
    if ROWS[name].surgery:  # which stays, once trained
        attach(trained_as_plain, None, ROWS[name].make(), total_steps=1)
    trained_as_plain.load_state_dict(trained.state_dict())
    assert torch.equal(logits(trained), logits(trained_as_plain))


def logits(model: Any) -> Tensor:
    """In training mode, dropout keyed."""
    torch.manual_seed(7)
    return model(batch(7)[0])


@each_row
def test_does_nothing_in_eval(name: str) -> None:
    if ROWS[name].surgery:
        pytest.skip("surgery changes eval mode too")
    model, optimizer, attached = start(name)
    for seed in range(3):
        train_step(model, optimizer, seed)
    model.eval()
    images, _ = batch(5)
    with attached.paused():
        plain = model(images)
    assert torch.equal(model(images), plain)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(ROWS, 2)))
def test_composes_or_clashes_by_slot(first: str, second: str) -> None:
    slots = [ROWS[name].make().slot for name in (first, second)]
    if slots[0] is not None and slots[0] == slots[1]:
        with pytest.raises(AttachError, match=f"{first} and {second} both claim the slot {slots[0]!r}"):
            start(first, second)
        return
    model, optimizer, attached = start(first, second)
    for seed in range(4):
        train_step(model, optimizer, seed)
    assert attached.progress.step == 4
    for observer, other in ((first, second), (second, first)):
        if ROWS[observer].make().order > 80:  # observing must not change what the other one does
            alone, optimizer_alone, _ = start(other)
            for seed in range(4):
                train_step(alone, optimizer_alone, seed)
            assert_same(alone.state_dict(), model.state_dict())
    attached.remove()
    assert hook_count(model, optimizer) == 0


@each_row
def test_hooks_do_nothing_in_copies(name: str) -> None:
    model, optimizer, attached = start(name)
    for seed in range(3):
        train_step(model, optimizer, seed)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    if ROWS[name].surgery:
        return
    with attached.paused():
        plain = logits(model)
        F.cross_entropy(plain, batch(7)[1]).backward()
    for twin in twins:
        output = logits(twin)
        F.cross_entropy(output, batch(7)[1]).backward()
        assert torch.equal(output, plain)
        assert torch.equal(twin.stem.weight.grad, model.stem.weight.grad)


@each_row
def test_trains_in_bf16_autocast(name: str) -> None:
    model, optimizer, attached = start(name)
    for seed in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images, labels = batch(seed)
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.isfinite(loss)
    assert attached.progress.step == 4
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@each_row
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_gradscaler_skips_are_as_if_they_had_not_been(name: str, fused: bool) -> None:
    def run(seeds: list[int]) -> tuple[TinyNet, Attached]:
        torch.manual_seed(0)
        model = TinyNet()
        model.norm.momentum = 0.0  # a skipped step's forward pass would leave its traces here
        optimizer = SGD(model.parameters(), lr=0.1, fused=fused)
        attached = attach(model, optimizer, ROWS[name].make(), total_steps=TOTAL)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
        for seed in seeds:
            torch.manual_seed(abs(seed))
            images, labels = batch(abs(seed))
            loss = F.cross_entropy(model(images), labels)
            scaler.scale(loss * float("inf") if seed < 0 else loss).backward()
            scaler.step(optimizer)
            scaler.update(16.0)
            optimizer.zero_grad()
        return model, attached

    clean, attached_clean = run([1, 2, 3, 4])
    bumpy, attached_bumpy = run([-9, 1, 2, -9, -8, 3, 4, -7])
    assert attached_bumpy.progress.step == 4
    assert_same(attached_clean.state_dict()["progress"], attached_bumpy.state_dict()["progress"])
    state, other = clean.state_dict(), bumpy.state_dict()
    for key in state.keys() - {"norm.num_batches_tracked"}:
        assert torch.equal(state[key], other[key]), key
    assert attached_clean.logs() == attached_bumpy.logs()


@each_row
@pytest.mark.parametrize("when", ["before", "after"])
def test_accumulates_under_accelerate(name: str, when: str, accelerator_with: Any) -> None:
    accelerator = accelerator_with(gradient_accumulation_steps=2, mixed_precision="bf16")
    assert accelerate_epochs(accelerator, name, when) == [0, 1, 1, 2, 3, 3, 4, 4, 5, 6]


def accelerate_epochs(accelerator: Any, name: str, when: str, batches: int = 5) -> list[int]:
    """Two epochs of an objective on `batches` batches; the step count after each micro-batch."""
    torch.manual_seed(0)
    model: Any = Objective()
    optimizer: Any = AdamW(model.parameters(), lr=0.01)
    parts = [batch(seed, 4) for seed in range(batches)]
    data = torch.utils.data.TensorDataset(*(torch.cat(each) for each in zip(*parts, strict=True)))
    loader: Any = torch.utils.data.DataLoader(data, batch_size=4)
    total = updates(loader, 2, accelerator.gradient_accumulation_steps, accelerator.num_processes)
    if when == "before":
        attached = attach(model, optimizer, ROWS[name].make(), total_steps=total)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    else:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        attached = attach(model, optimizer, ROWS[name].make(), total_steps=total)
    counts = []
    for _ in range(2):
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = model(images, labels).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            assert torch.isfinite(loss)
            counts.append(attached.progress.step)
    assert counts[-1] == total
    return counts


@each_row
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_is_eager_bit_for_bit_and_does_not_recompile(name: str, how: str) -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    eager, eager_optimizer, eager_attached = start(name)
    net, optimizer, attached = start(name)
    model: Any = net
    if how == "in place":
        net.compile(backend=counter)
    else:
        model = torch.compile(net, backend=counter)
    frames = []
    for seed in range(TOTAL):
        train_step(eager, eager_optimizer, seed)
        train_step(model, optimizer, seed)
        frames.append(counter.frame_count)
    assert_same(eager.state_dict(), net.state_dict())
    assert eager_attached.logs() == attached.logs()
    assert frames[3] == frames[-1]
    attached.remove()
    eager_attached.remove()
    assert torch.equal(logits(eager), logits(model))
    torch.compiler.reset()


# --- two processes ------------------------------------------------------------------------------------------


def worker(out: Path) -> None:
    """One of two gloo processes: every row under DDP and under accelerate; results as JSON."""
    import torch.distributed as dist
    from accelerate import Accelerator
    from torch.nn.parallel import DistributedDataParallel as DDP

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    rank, results = dist.get_rank(), {}
    for name, row in ROWS.items():
        for when in ("before", "after"):
            torch.manual_seed(0)
            net = TinyNet()
            optimizer = AdamW(net.parameters(), lr=0.01)
            if when == "before":
                attached = attach(net, optimizer, row.make(), total_steps=TOTAL)
                model = DDP(net)
            else:
                model = DDP(net)
                if row.surgery:  # DDP has counted the parameters
                    with pytest.raises(AttachError, match="before it is wrapped in DistributedDataParallel"):
                        attach(model, optimizer, row.make(), total_steps=TOTAL)
                    continue
                attached = attach(model, optimizer, row.make(), total_steps=TOTAL)
            for seed in range(4):
                train_step(model, optimizer, 10 * rank + seed)
            results[f"{name} {when}"] = {
                "step": attached.progress.step,
                "weights agree": all(agree(value) for value in net.parameters()),
                "keys": tensor_keys(attached.state_dict()["callbacks"]),
                "accelerate counts": accelerate_epochs(accelerator, name, when, batches=6),
            }
            attached.remove()
    results["gradient before all-reduce"] = gradients_differ_between_ranks()
    results["fsdp2"] = refusals_of_fsdp2()
    results["ema"] = keys_under_ddp_and_compile()
    (out / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def agree(value: Tensor) -> bool:
    import torch.distributed as dist

    both = [torch.empty_like(value) for _ in range(2)]
    dist.all_gather(both, value.detach())
    return torch.equal(*both)


def tensor_keys(state: Any) -> list[str]:
    if not isinstance(state, dict):
        return []
    return [
        key
        for name, value in state.items()
        for key in ([name] if isinstance(value, Tensor) else tensor_keys(value))
    ]


def gradients_differ_between_ranks() -> bool:
    """What the hook is given is this rank's own gradient, not the mean."""
    from torch.nn.parallel import DistributedDataParallel as DDP

    class Keeps(CentreGradient):
        def centre(self, gradient: Tensor) -> Tensor:
            self.seen = gradient.clone()
            return super().centre(gradient)

    torch.manual_seed(0)
    net, keeps = TinyNet(), Keeps()
    optimizer = SGD(net.parameters(), lr=0.1)
    attach(net, optimizer, keeps, total_steps=TOTAL)
    images, labels = batch(int(os.environ["RANK"]))
    model = DDP(net)  # a temporary one would be gone, with its all-reduce, before backward
    F.cross_entropy(model(images), labels).backward()
    assert net.stem.weight.grad is not None
    return agree(net.stem.weight.grad) and not agree(keeps.seen)


def refusals_of_fsdp2() -> list[str]:
    """Sharded before attach: refused there. Sharded afterwards: refused at the first update."""
    from torch.distributed.fsdp import fully_shard

    net = TinyNet()
    fully_shard(net)
    with pytest.raises(AttachError) as before:
        attach(net, SGD(net.parameters(), lr=0.1), CentreGradient(), total_steps=TOTAL)
    net = TinyNet()
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    attach(net, optimizer, EMA(), total_steps=TOTAL)
    fully_shard(net)
    with pytest.raises(AttachError) as after:
        optimizer.step()
    return [str(before.value), str(after.value)]


def keys_under_ddp_and_compile() -> bool:
    from torch.nn.parallel import DistributedDataParallel as DDP

    torch.manual_seed(0)
    net = TinyNet()
    optimizer = SGD(net.parameters(), lr=0.1)
    model = torch.compile(DDP(net), backend="eager")
    ema = EMA(decay=0.5)
    attached = attach(model, optimizer, ema, total_steps=TOTAL)
    start = snapshot(ema.module)
    for seed in range(3):
        train_step(model, optimizer, seed)
    assert not torch.equal(start["stem.weight"], ema.module.stem.weight)
    assert not torch.equal(net.stem.weight, ema.module.stem.weight)
    return list(attached.state_dict()["callbacks"]["EMA"]["module"]) == list(TinyNet().state_dict())


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ddp")
    run_twice(__file__, out)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@each_row
@pytest.mark.parametrize("when", ["before", "after"])
def test_trains_under_ddp_and_accelerate_in_two_processes(
    name: str, when: str, two_processes: list[dict[str, Any]]
) -> None:
    for results in two_processes:
        if ROWS[name].surgery and when == "after":
            assert f"{name} {when}" not in results  # refused there
            continue
        result = results[f"{name} {when}"]
        assert result["step"] == 4
        assert result["weights agree"]
        assert not [key for key in result["keys"] if key.startswith("module.") or "_orig_mod" in key]
        assert result["accelerate counts"] == [0, 1, 2, 2, 3, 4]  # 3 batches a process, 2 make an update


def test_what_else_two_processes_show(two_processes: list[dict[str, Any]]) -> None:
    for results in two_processes:
        assert results["gradient before all-reduce"]
        for name, line in zip(("CentreGradient", "EMA"), results["fsdp2"], strict=True):
            assert line.startswith(f"cannot attach {name} to FSDPTinyNet: its parameters are sharded")
        assert results["ema"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error", NoEffectWarning)
    worker(Path(sys.argv[1]))
