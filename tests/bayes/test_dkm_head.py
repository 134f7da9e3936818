"""DKMHead on backbones of all kinds: frozen or not, in two processes, under autocast, with weights that come back."""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from leaven.bayes import DeepKernelMachine, DKMHead
from leaven.bayes.deep_kernel_machine import normalised
from leaven.pretext import extract_features


def images(n: int = 24, side: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return torch.randn(n, 3, side, side, generator=generator) + labels.view(-1, 1, 1, 1), labels


def head(backbone: Any = "test_resnet", **how: Any) -> DKMHead:
    torch.manual_seed(0)
    x, _ = images()
    made = DKMHead(backbone, 3, n_data=24, n_inducing=8, image_size=32, **how)
    made.init_inducing(x)
    return made


def backbones() -> dict[str, Any]:
    return {
        "resnet": "test_resnet",
        "vit": "test_vit",
        "torchvision": torchvision.models.shufflenet_v2_x0_5(weights=None),
        "own": nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(16)),
    }


@pytest.mark.parametrize("kind", ["resnet", "vit", "torchvision", "own"])
@pytest.mark.parametrize("freeze", [True, False])
def test_it_learns_on_any_backbone(kind: str, freeze: bool) -> None:
    backbone = backbones()[kind]
    x, y = images()
    if kind == "own":
        backbone(x)
    made = head(backbone, freeze=freeze)
    before = copy.deepcopy(made.backbone.state_dict())
    optimizer = torch.optim.Adam(made.param_groups(1e-2))
    made.train()
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        output = made(x, y)
        output.loss.backward()
        assert all(p.grad is not None for p in made.machine.parameters())
        optimizer.step()
        losses.append(float(output.loss))
    assert losses[-1] < losses[0] - 0.1
    assert set(output.logs) == {"kl", "top1"}
    same = all(
        torch.equal(a, b) for a, b in zip(before.values(), made.backbone.state_dict().values(), strict=True)
    )
    assert same is freeze
    assert made.backbone.training is not freeze
    probs = made.eval().predict(x).probs()
    assert probs.shape == (24, 3)
    torch.testing.assert_close(probs.sum(1), torch.ones(24, dtype=probs.dtype))


def test_cached_features_give_the_same_machine() -> None:
    made = head(depth=3)
    x, y = images()
    features = normalised(extract_features(made.backbone, x))
    machine = DeepKernelMachine(features.shape[1], 3, 3, 8, 3.0, likelihood="categorical")
    machine.load_state_dict(made.machine.state_dict())
    torch.manual_seed(1)
    direct = made.eval()(x, y).loss
    torch.manual_seed(1)
    torch.testing.assert_close(machine.eval().loss(features, y, 24), direct)
    assert made.machine.nu == [3.0, 3.0]


def test_real_targets() -> None:
    made = head(likelihood="gaussian")
    x, _ = images()
    output = made(x, torch.randn(24, 3))
    assert set(output.logs) == {"kl", "rmse"}
    with pytest.raises(ValueError, match="targets"):
        made(x, torch.randn(24, 2))


def test_autocast_leaves_the_head_alone() -> None:
    made = head().eval()
    x, y = images()
    torch.manual_seed(1)
    exact = made(x, y).loss
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        rough = made(x, y).loss
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05)


def test_weights_and_export(tmp_path: Path) -> None:
    made = head()
    x, _ = images()
    other = DKMHead("test_resnet", 3, n_data=24, n_inducing=8, image_size=32)
    with pytest.raises(RuntimeError, match="no inducing points yet"):
        other.predict(x)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.eval().predict(x).mean, made.eval().predict(x).mean)
    made.export(tmp_path / "backbone.safetensors", name="test_resnet")
    plain = timm.create_model("test_resnet", num_classes=0)
    plain.load_state_dict(load_file(tmp_path / "backbone.safetensors"), strict=True)
    assert {f"machine.{name}" for name, _ in made.machine.named_parameters()} <= made.no_weight_decay()


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="n_data must be at least 1"):
        DKMHead("test_resnet", 3, n_data=0)
    with pytest.raises(ValueError, match="kernel must be one of"):
        DKMHead("test_resnet", 3, n_data=4, kernel="cosine")
    x, y = images()
    few = DKMHead("test_resnet", 3, n_data=23, n_inducing=8, image_size=32)
    few.init_inducing(x)
    with pytest.warns(
        UserWarning, match="DKMHead trains on a batch of 24 images with n_data=23: n_data is the"
    ):
        few(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few(x[:23], y[:23])
        few.eval()(x, y)
    with pytest.raises(ValueError, match=r"class indices \(24,\) of an integer type .* torch.float32"):
        few(x, y.float())
    made = DKMHead("test_resnet", 3, n_data=4, n_inducing=64)
    with pytest.raises(ValueError, match="64 inducing points of 24 different ones"):
        made.init_inducing(images()[0])


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path: Path) -> None:
    """Each with half of the batch: gradients, the divergences' among them, are those of one process with all of it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, __file__, str(tmp_path)], check=True, timeout=120, env=environment)
    made, x, y = real_head()
    made(x, y).loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, p in made.named_parameters():
            assert p.grad is not None
            assert p.grad.abs().max() > 0
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5)


def real_head() -> tuple[DKMHead, Tensor, Tensor]:
    """Trained together with a backbone without BatchNorm, on real targets, whose loss draws nothing."""
    made = head("test_convnext", freeze=False, likelihood="gaussian", depth=3)
    with torch.no_grad():
        for p in made.machine.parameters():
            p.add_(0.3 * torch.randn_like(p))  # at the start many gradients are zero
    x, _ = images()
    return made.train(), x[:8], torch.randn(8, 3, generator=torch.Generator().manual_seed(1))


def worker(out: Path) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel as DDP

    dist.init_process_group("gloo")
    made, x, y = real_head()
    mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    wrapped = DDP(made)
    wrapped(x[mine], y[mine]).loss.backward()
    torch.save({name: p.grad for name, p in made.named_parameters()}, out / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(Path(sys.argv[1]))
