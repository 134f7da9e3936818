"""Settings in final numbers, trackers, and who may say what to whom."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from recipe_programs import TINY
from torch import nn

from leaven.recipes.common.flags import UserError
from leaven.recipes.common.launcher import Launcher
from leaven.recipes.common.optimizer import clips_itself, make_optimizer
from leaven.recipes.common.pretraining import PretrainSettings
from leaven.recipes.common.start import LoopSettings, on_main, read_settings, resolve, start, tracker_names


def test_the_papers_learning_rate_and_batch() -> None:
    paper = LoopSettings(global_batch_size=4096, lr_base=2e-4)
    one = resolve(paper, 32, {})
    assert (one.batch_size, one.lr) == (128, pytest.approx(3.2e-3))
    four = resolve(replace(paper, grad_accum_steps=4), 8, {})
    assert (four.batch_size, four.lr) == (128, pytest.approx(3.2e-3))
    assert (one.global_batch_size, one.lr_base) == (None, None)  # settled: resolving again changes nothing
    assert resolve(one, 32, {}) == one


def test_learning_rate_follows_the_global_batch() -> None:
    settings = LoopSettings(batch_size=32, grad_accum_steps=2, lr_base=1e-3)
    assert resolve(settings, 4, {}).lr == pytest.approx(1e-3 * 32 * 2 * 4 / 256)
    assert resolve(LoopSettings(lr=0.5), 4, {}).lr == 0.5


def test_contradictions_and_indivisible_batches_are_refused() -> None:
    with pytest.raises(UserError, match=r"--lr-base and --lr exclude each other"):
        resolve(LoopSettings(lr_base=1e-3, lr=0.1), 1, {})
    with pytest.raises(UserError, match=r"--global-batch-size and --batch-size exclude"):
        resolve(LoopSettings(global_batch_size=64, batch_size=8), 1, {})
    with pytest.raises(UserError, match=r"--global-batch-size 100 does not divide into 3 process\(es\)"):
        resolve(LoopSettings(global_batch_size=100), 3, {})
    with pytest.raises(UserError, match=r"does not divide"):
        resolve(LoopSettings(global_batch_size=2), 3, {})


def test_what_accelerate_launch_was_told_is_heard() -> None:
    told = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    settings = resolve(LoopSettings(), 1, told)
    assert (settings.mixed_precision, settings.grad_accum_steps) == ("bf16", 4)
    settings = resolve(LoopSettings(mixed_precision="fp16", grad_accum_steps=2), 1, told)
    assert (settings.mixed_precision, settings.grad_accum_steps) == ("fp16", 2)


def test_trackers_that_cannot_track_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from leaven.recipes.common import start as module

    assert tracker_names(None) == []
    with pytest.raises(UserError, match=r"--log-with paper: accelerate knows .*tensorboard"):
        tracker_names("paper")
    monkeypatch.setattr(module, "get_available_trackers", list)
    with pytest.raises(UserError, match=r"--log-with wandb: its package is missing; pip install wandb"):
        tracker_names("wandb")


def test_a_resumed_run_starts_from_its_own_settings(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("epochs: 7\nlr: 1e-2\nbetas: [0.9, 0.95]\n")
    settings = read_settings(LoopSettings, ["--resume", str(tmp_path), "--lr", "0.5"])
    assert (settings.epochs, settings.lr, settings.betas) == (7, 0.5, (0.9, 0.95))
    assert read_settings(LoopSettings, ["--resume", "auto"]).epochs == LoopSettings().epochs


@pytest.mark.parametrize("flags", [["--resume", "{}"], ["--resume={}"]])
def test_a_flag_that_needs_another_finds_it_in_the_resumed_folder(tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "config.yaml").write_text("callbacks: [knn]\n")
    flags = [flag.format(tmp_path) for flag in flags]
    assert read_settings(PretrainSettings, [*flags, "--eval-every", "2"]).callbacks == ("knn",)
    with pytest.raises(UserError, match="add --callbacks knn"):
        read_settings(PretrainSettings, [*flags, "--eval-every", "2", "--callbacks", "ema"])


def test_fp16_on_a_cpu_is_refused(recipe: Callable[[Path], ModuleType], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--mixed-precision fp16 needs a GPU"):
        start(LoopSettings(mixed_precision="fp16", output_dir=str(tmp_path / "run")), "tiny")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed", "Megatron-LM"])
def test_a_launcher_that_would_split_the_model_is_refused_before_anything_is_written(
    recipe: Callable[[Path], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    recipe(TINY)
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper().replace('-', '_')}", "true")
    with pytest.raises(UserError, match=f"^this loop trains with DDP, not {name}: "):
        start(LoopSettings(output_dir=str(tmp_path / "run")), "tiny")
    assert not (tmp_path / "run").exists()


def test_processes_that_accelerate_does_not_join_are_noticed(
    recipe: Callable[[Path], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import PartialState

    PartialState()  # alone, before the variables of a launcher are seen
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"2 processes were started, but accelerate joined 1"):
        start(LoopSettings(output_dir=str(tmp_path / "run")), "tiny")


def test_processes_that_accelerate_launch_did_not_start_are_noticed(
    recipe: Callable[[Path], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leaven.recipes.common import start as module

    launcher = Launcher(("python", "accelerate", "launch", "--cpu", "--num_processes", "2", "x.py"))
    monkeypatch.setattr(module, "find_launcher", lambda: launcher)
    with pytest.raises(UserError, match=r"asked for 2 processes and started 1: .*--multi_gpu"):
        start(LoopSettings(output_dir=str(tmp_path / "run")), "tiny")


def test_on_main_passes_results_and_user_errors_on(recipe: Callable[[Path], ModuleType]) -> None:
    def fails() -> None:
        raise UserError("no")

    assert on_main(lambda: 3) == 3
    with pytest.raises(UserError, match=r"^no$"):
        on_main(fails)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.layer_scale = nn.Parameter(torch.ones(4, 1, 1))
        self.mask_token = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)

    def no_weight_decay(self) -> set[str]:
        return {"mask_token"}


def test_only_weights_decay() -> None:
    net = Net()
    optimizer = make_optimizer(net, LoopSettings(opt="lamb", weight_decay=0.04))
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {
        "conv.weight": 0.04,
        **dict.fromkeys(["conv.bias", "norm.weight", "norm.bias", "layer_scale", "mask_token"], 0.0),
    }


def test_a_decay_that_starts_at_zero_is_not_lost() -> None:
    optimizer = make_optimizer(Net(), LoopSettings(opt="adamw", weight_decay=0.0, weight_decay_end=0.2))
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.2]


def test_gradients_are_clipped_by_one_hand_only() -> None:
    lamb = make_optimizer(Net(), LoopSettings(opt="lamb", clip_grad=5.0))
    assert clips_itself(lamb)
    assert lamb.defaults["max_grad_norm"] == 5.0
    assert make_optimizer(Net(), LoopSettings(opt="lamb")).defaults["max_grad_norm"] is None
    assert not clips_itself(make_optimizer(Net(), LoopSettings(opt="adamw", clip_grad=5.0)))


def test_optimizers_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match=r"--opt lambs: timm has no such optimizer; did you mean lamb"):
        make_optimizer(Net(), LoopSettings(opt="lambs"))
    with pytest.raises(UserError, match=r"--opt sgd does not take betas"):
        make_optimizer(Net(), LoopSettings(opt="sgd", betas=(0.9, 0.95)))
    with pytest.raises(UserError, match=r"--opt adahessian needs second derivatives"):
        make_optimizer(Net(), LoopSettings(opt="adahessian"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"--opt fusedadam: CUDA required"):
            make_optimizer(Net(), LoopSettings(opt="fusedadam"))
    assert make_optimizer(Net(), LoopSettings(opt="lamb", betas=(0.9, 0.95))).defaults["betas"] == (0.9, 0.95)


def test_the_stand_in_recipe_loads(recipe: Callable[[Path], ModuleType]) -> None:
    assert recipe(TINY).TinySettings().trajectory().keys() >= {"lr", "seed", "backbone"}
