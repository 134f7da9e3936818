"""The same callbacks in plain PyTorch, accelerate, Lightning and HF Trainer: the real libraries."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from callback_toys import TinyNet, assert_same, batch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import AdamW

from leaven.callbacks import EMA, AttachError, EvoNorm, TrAct, attach
from leaven.curricula import EfficientTrain, Schedule, Stage

pytestmark = [
    pytest.mark.slow,  # importing Lightning and transformers alone takes half a minute
    pytest.mark.filterwarnings("ignore"),  # theirs
    pytest.mark.filterwarnings("error::leaven.callbacks.NoEffectWarning"),
]
LOOPS = Path(__file__).parents[2] / "examples" / "loops"
EPOCHS, BATCHES = 2, 3
SIZES = Schedule((Stage(0.5, 8), Stage(1.0, 16)))


def needs(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed: an extra of leaven's")


class Classifier(nn.Module):
    """A network with its loss, as HF calls it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = TinyNet()
        self.net.drop.p = 0.0  # the loops draw differently

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Seen(EfficientTrain):
    """Keeps the sizes of all updates."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        super().__init__(SIZES, image_size=16)

    def update(self) -> None:
        self.sizes.append(self.size[0] if self._progress is not None else 0)
        super().update()


def callbacks() -> tuple[EvoNorm, TrAct, Seen, EMA]:
    return EvoNorm(), TrAct(), Seen(), EMA(decay=0.5)


def data() -> list[dict[str, Tensor]]:
    found = [batch(seed) for seed in range(BATCHES)]
    return [{"pixel_values": x, "labels": y} for xs, ys in found for x, y in zip(xs, ys, strict=True)]


def plain(epochs: int = EPOCHS) -> tuple[Classifier, Seen, EMA]:
    model = Classifier()
    optimizer = AdamW(model.parameters(), lr=0.01)
    used = callbacks()
    with attach(model.net, optimizer, *used, total_steps=EPOCHS * BATCHES):
        for _ in range(epochs):
            for seed in range(BATCHES):
                x, y = batch(seed)
                model(x, y)["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
    return model, used[2], used[3]


def compare(net: nn.Module, seen: Seen, ema: EMA, updates: int = EPOCHS * BATCHES) -> None:
    model, plain_seen, plain_ema = plain()
    assert seen.sizes[-updates:] == plain_seen.sizes[-updates:]
    for ours, theirs in ((model.net, net), (plain_ema.module, ema.module)):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for key, value in ours.state_dict().items():
            torch.testing.assert_close(value, theirs.state_dict()[key], rtol=1e-6, atol=1e-7)


def module_of(pl: Any, model: Classifier) -> Any:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model.net

        def training_step(self, rows: Any, index: int) -> Tensor:
            return F.cross_entropy(self.net(rows["pixel_values"]), rows["labels"])

        def configure_optimizers(self) -> AdamW:
            return AdamW(self.parameters(), lr=0.01)

    return Module()


def lightning(pl: Any, epochs: int, adapter: Any, **how: Any) -> Any:
    quiet = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[adapter], **quiet, **how)


def loader() -> Any:
    return torch.utils.data.DataLoader(data(), batch_size=8)


def test_lightning_goes_as_plain_pytorch_and_resumes(tmp_path: Path) -> None:
    pl = needs("lightning.pytorch")
    from leaven.callbacks.lightning import AsLightning

    model, used = Classifier(), callbacks()
    adapter = AsLightning(*used, model="net")
    trainer = lightning(pl, EPOCHS, adapter, enable_checkpointing=False)
    trainer.fit(module_of(pl, model), loader())
    compare(model.net, used[2], used[3])
    assert adapter.attached.progress.step == EPOCHS * BATCHES
    assert not model.net._forward_pre_hooks

    # Stopped after one of the two epochs; the schedule is that of both.
    class Stop(pl.Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "half.ckpt")
            trainer.should_stop = True

    first = AsLightning(*callbacks(), model="net")
    trainer = lightning(pl, EPOCHS, first, enable_checkpointing=False)
    trainer.callbacks.append(Stop())
    trainer.fit(module_of(pl, Classifier()), loader())
    assert first.attached.progress.step == BATCHES
    model, used = Classifier(), callbacks()
    second = AsLightning(*used, model="net")
    trainer = lightning(pl, EPOCHS, second, enable_checkpointing=False)
    trainer.fit(module_of(pl, model), loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert second.attached.progress.step == EPOCHS * BATCHES
    compare(model.net, used[2], used[3], BATCHES)


def test_lightning_accumulates_and_says_what_it_cannot_find() -> None:
    pl = needs("lightning.pytorch")
    from leaven.callbacks.lightning import AsLightning

    adapter = AsLightning(EMA(), TrAct(), model="net")
    trainer = lightning(pl, EPOCHS, adapter, accumulate_grad_batches=2, enable_checkpointing=False)
    trainer.fit(module_of(pl, Classifier()), loader())
    assert repr(adapter.attached.progress) == "Progress(4/4)"  # 3 batches make two updates
    trainer = lightning(pl, 1, AsLightning(EMA()), enable_checkpointing=False)
    with pytest.raises(ValueError, match="Module has no module 'model'; give AsLightning"):
        trainer.fit(module_of(pl, Classifier()), loader())


def test_lightning_operates_for_a_validation_too_and_once(tmp_path: Path) -> None:
    pl = needs("lightning.pytorch")
    from leaven.callbacks.lightning import AsLightning

    def module() -> Any:
        made = module_of(pl, Classifier())
        type(made).validation_step = lambda self, rows, index: self.log(
            "sum", self.net(rows["pixel_values"]).sum()
        )
        return made

    def trainer(adapter: Any) -> Any:
        return lightning(pl, 1, adapter, enable_checkpointing=False)

    first, fitted = trainer(AsLightning(EvoNorm(), EMA(), model="net")), module()
    first.fit(fitted, loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    expected = first.validate(fitted, loader(), verbose=False)
    adapter = AsLightning(EvoNorm(), EMA(), model="net")
    second = trainer(adapter)
    for net in (fitted, module(), module()):  # the first one has its layers
        found = second.validate(net, loader(), tmp_path / "last.ckpt", verbose=False, weights_only=False)
        assert found == expected
        assert type(net.net.norm).__name__ == "EvoNormS0"
    second.fit(module(), loader())
    assert adapter.attached.progress.step == BATCHES  # and not what the validation has loaded


def test_adapters_say_what_they_take() -> None:
    needs("lightning.pytorch")
    needs("transformers")
    from leaven.callbacks.hf import AsTrainerCallback
    from leaven.callbacks.lightning import AsLightning

    for adapter in (AsLightning, AsTrainerCallback):
        name = adapter.__name__
        with pytest.raises(TypeError, match=f"^{name} takes one callback at least"):
            adapter()
        with pytest.raises(
            TypeError, match=rf"^{name}\(\*callbacks\) takes callbacks, not their classes: TrAct\("
        ):
            adapter(TrAct)
        with pytest.raises(TypeError, match="takes callbacks one by one, not a list"):
            adapter([EMA()])


def hf(out: Path, model: Classifier, adapter: Any, **how: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    how = {"save_strategy": "no", "num_train_epochs": EPOCHS} | how
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
        max_grad_norm=0,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **how,
    )
    optimizer = AdamW(model.parameters(), lr=0.01)
    return Trainer(model, arguments, train_dataset=data(), optimizers=(optimizer, None), callbacks=[adapter])


def test_hf_trainer_goes_as_plain_pytorch_and_resumes(tmp_path: Path) -> None:
    needs("transformers")
    from leaven.callbacks.hf import AsTrainerCallback

    model, used = Classifier(), callbacks()
    adapter = AsTrainerCallback(*used, model="net")
    hf(tmp_path / "whole", model, adapter, save_strategy="epoch").train()
    compare(model.net, used[2], used[3])
    assert adapter.attached is not None
    assert adapter.attached.progress.step == EPOCHS * BATCHES
    assert not model.net._forward_pre_hooks

    half = tmp_path / "whole" / f"checkpoint-{BATCHES}"
    for adapter_at, message in (
        (tmp_path / "whole", ""),
        (tmp_path / "other", "leaven_callbacks.pt is not there"),
    ):
        model, used = Classifier(), callbacks()
        adapter = AsTrainerCallback(*used, model="net")
        trainer = hf(adapter_at, model, adapter)
        if message:
            with pytest.raises(FileNotFoundError, match=message):
                trainer.train(resume_from_checkpoint=str(half))
            assert not model.net._forward_pre_hooks
        else:
            trainer.train(resume_from_checkpoint=str(half))
            compare(model.net, used[2], used[3], BATCHES)
    model, used = Classifier(), callbacks()
    adapter = AsTrainerCallback(*used, model="net", resume=half)
    hf(tmp_path / "other", model, adapter).train(resume_from_checkpoint=str(half))
    compare(model.net, used[2], used[3], BATCHES)


def test_hf_trainer_accumulates_and_says_what_it_cannot_find(tmp_path: Path) -> None:
    needs("transformers")
    from leaven.callbacks.hf import AsTrainerCallback

    adapter = AsTrainerCallback(EMA(), TrAct(), model="net")
    hf(tmp_path, Classifier(), adapter, gradient_accumulation_steps=2).train()
    assert repr(adapter.attached.progress) == "Progress(4/4)"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="Classifier has no part 'backbone'"):
        hf(tmp_path, Classifier(), AsTrainerCallback(EMA(), model="backbone")).train()


def test_hf_trainer_starts_anew_after_a_training_that_broke_off(tmp_path: Path) -> None:
    """Stopped by hand in a notebook, or out of memory under auto_find_batch_size."""
    needs("transformers")
    from transformers import TrainerCallback

    from leaven.callbacks.hf import AsTrainerCallback

    class Breaks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    model, used = Classifier(), callbacks()
    trainer = hf(tmp_path, model, AsTrainerCallback(*used, model="net"))
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.add_callback(Breaks)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Breaks)
    model.load_state_dict(whole)
    trainer.optimizer.state.clear()
    trainer.train()
    compare(model.net, used[2], used[3])
    assert not model.net._forward_pre_hooks


def test_lightning_without_an_end_is_refused_in_one_line() -> None:
    pl = needs("lightning.pytorch")
    from leaven.callbacks.lightning import AsLightning

    trainer = lightning(pl, -1, AsLightning(EMA(), model="net"), enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"total_steps must be the number of optimizer updates.*not inf"):
        trainer.fit(module_of(pl, Classifier()), loader())


def test_one_script_in_four_loops_ends_with_the_same_weights(tmp_path: Path) -> None:
    """examples/loops: EvoNorm, TrAct, EfficientTrain and EMA, 28 updates."""
    needs("lightning")
    needs("transformers")
    environment = {**os.environ, "SMOKE": "1", "OMP_NUM_THREADS": "1"}
    weights, last = {}, set()
    for script in sorted(LOOPS.glob("*.py")):
        run = subprocess.run(
            [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr[-2000:]
        last.add(run.stdout[run.stdout.index("accuracy of the averaged") :].strip())
        weights[script.stem] = load_file(tmp_path / f"{script.stem}.safetensors")
    assert len(weights) == 4
    assert len(last) == 1, last
    for found in weights.values():
        for key, value in weights["plain_pytorch"].items():
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7)
    assert any(key.endswith(".v") for key in weights["hf_trainer"])


def test_surgery_after_ddp_is_refused_by_name() -> None:
    class DistributedDataParallel(nn.Module):  # by its name, as `attach` knows it
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    net = TinyNet()
    with pytest.raises(AttachError, match=r"attach it before it is wrapped in DistributedDataParallel"):
        attach(DistributedDataParallel(net), None, EvoNorm(), total_steps=1)
    assert_same(net.state_dict(), net.state_dict())
    assert type(net.norm) is nn.BatchNorm2d
