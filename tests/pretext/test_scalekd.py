"""ScaleKD over teachers and students of every family, against the equations written out and limits that are known."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from leaven.backbones import NoStages
from leaven.pretext import ScaleKD
from leaven.pretext.scalekd import NoTail, TeacherTail
from tests.pretext.scalekd_networks import CLASSES, STUDENTS, TEACHERS, student_of, teacher_of

PARTS = {"ce", "kd", "spatial3", "frequency3", "spatial4", "frequency4"}


def batch(n: int = 4, size: tuple[int, int] = (64, 64), seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, *size, generator=generator), torch.randint(CLASSES, (n,), generator=generator)


def objective(
    student: str = "resnet", teacher: str = "vit", size: tuple[int, int] = (64, 64), **how: Any
) -> ScaleKD:
    torch.manual_seed(3)
    return ScaleKD(student_of(student, size), teacher_of(teacher, size), image_size=size, **how)


def gradients(model: nn.Module, x: Tensor, y: Tensor, part: str | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    model(x, y).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Every teacher once, with the students in turn; all other pairs are slow.
PAIRS = [
    pytest.param(student, teacher, marks=[] if (i - j) % len(STUDENTS) == 0 else [pytest.mark.slow])
    for i, teacher in enumerate(TEACHERS)
    for j, student in enumerate(STUDENTS)
]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_every_student_learns_from_every_teacher(student: str, teacher: str) -> None:
    """Not square; all that is trainable gets a gradient, and the teacher none, nor another mode."""
    size = (64, 96)
    distil = objective(student, teacher, size)
    theirs = copy.deepcopy(distil.tail.teacher)
    own = {name for name, _ in distil.named_parameters()}
    assert own == {name for name in distil.state_dict() if name in own}
    optimizer = torch.optim.AdamW(distil.parameters(), lr=1e-4)
    distil.train()
    x, y = batch(4, size)
    for _ in range(2):
        output = distil(x, y)
        assert set(output.logs) == PARTS | {"top1"}
        assert torch.isfinite(output.loss)
        torch.testing.assert_close(output.loss, sum(output.logs[part] for part in PARTS))
        output.loss.backward()
        assert all(p.grad is not None for p in distil.parameters())
        optimizer.step()
        optimizer.zero_grad()
    taught = distil.tail.teacher
    assert not any(module.training for module in taught.modules())
    assert all(
        torch.equal(a, b)
        for a, b in zip(taught.state_dict().values(), theirs.state_dict().values(), strict=True)
    )
    assert all(p.grad is None for p in taught.parameters())
    assert {key.split(".")[0] for key in distil.state_dict()} == {
        "backbone",
        "spatial3",
        "frequency3",
        "spatial4",
        "frequency4",
    }


def test_the_loss_follows_the_equations() -> None:
    """Written out, view by view, a pass of the tail for each."""
    distil = objective(alpha_spatial=(0.08, 0.1), alpha_freq=(0.06, 0.0), kd_temperature=2.0, kd_weight=0.3)
    x, y = batch()
    output = distil(x, y)
    student, teacher = distil.backbone, distil.tail.teacher

    def stem(x: Tensor) -> Tensor:
        return student.maxpool(student.act1(student.bn1(student.conv1(x))))

    third = student.layer3(student.layer2(student.layer1(stem(x))))
    fourth = student.layer4(third)
    logits = student.fc(student.global_pool(fourth))
    with torch.no_grad():
        inner = teacher.blocks[:3](teacher.norm_pre(teacher._pos_embed(teacher.patch_embed(x))))
        normed = teacher.norm(teacher.blocks[3](inner))
        soft = (teacher(x) / 2.0).softmax(1)
    target = normed[:, 1:].mT.reshape(4, 32, 8, 8)
    expected = {
        "ce": 0.7 * F.cross_entropy(logits, y),
        "kd": 0.3 * 4 * -(soft * (logits / 2.0).log_softmax(1)).sum(1).mean(),
    }
    for view, alphas in (("spatial", (0.08, 0.1)), ("frequency", (0.06, 0.0))):
        first = getattr(distil, f"{view}3")(third)
        tokens = torch.cat([inner[:, :1], first.flatten(2).mT], 1)
        seen = teacher.norm(teacher.blocks[3](tokens))[:, 1:].mT.reshape(4, 32, 8, 8)
        last = getattr(distil, f"{view}4")(fourth, seen)
        for stage, map_, alpha in (("3", seen, alphas[0]), ("4", last, alphas[1])):
            a, b = map_, target
            if view == "frequency":
                a, b = (m - m.mean((2, 3), keepdim=True) for m in (a, b))
            a, b = (m / m.norm(dim=1, keepdim=True) for m in (a, b))
            expected[view + stage] = alpha * ((a - b) ** 2).sum() / 4
    for part, value in expected.items():
        torch.testing.assert_close(output.logs[part], value.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, torch.stack(list(expected.values())).sum(), rtol=1e-5, atol=1e-5)


def test_without_weights_it_is_the_labels_loss() -> None:
    x, y = batch()
    distil = objective(kd_weight=0.0, alpha_spatial=0.0, alpha_freq=0.0, smoothing=0.1)
    assert torch.equal(
        distil(x, y).loss.detach(), F.cross_entropy(distil.backbone(x), y, label_smoothing=0.1).detach()
    )
    soft = torch.eye(CLASSES)[y] * 0.7 + 0.3 / CLASSES
    output = distil(x, soft)
    torch.testing.assert_close(output.loss, F.cross_entropy(distil.backbone(x), soft))
    assert "top1" not in output.logs
    assert "kd" not in output.logs


def test_images_without_labels_distil() -> None:
    x, y = batch()
    distil = objective(kd_weight=1.0).eval()
    with_labels, without = distil(x, y), distil(x)
    assert "ce" not in without.logs
    assert "top1" not in without.logs
    torch.testing.assert_close(without.loss, with_labels.loss)
    with pytest.raises(
        ValueError, match=r"targets are needed at kd_weight=0\.5; without labels give kd_weight=1"
    ):
        objective()(x)


def test_images_marked_without_a_label_distil_beside_the_others() -> None:
    x, y = batch()
    marked = torch.tensor([0, -100, 2, -100])
    distil = objective(smoothing=0.1).eval()
    output, logits = distil(x, marked), distil.backbone(x).detach()
    ce = 0.5 * F.cross_entropy(logits, marked, label_smoothing=0.1)
    torch.testing.assert_close(output.logs["ce"], ce)
    assert output.logs["top1"] == (logits.argmax(1) == marked)[[0, 2]].float().mean()
    torch.testing.assert_close(output.logs["kd"], distil(x, y).logs["kd"])
    none = distil(x, torch.full((4,), -100))
    assert none.logs["ce"] == none.logs["top1"] == 0
    none.loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in distil.parameters())


@pytest.mark.parametrize(
    ("targets", "line"),
    [
        (torch.tensor([0, -1, 2, 3]), "class indices must be from 0 to 4, or -100 for images without a label, not -1"),
        (torch.tensor([0, 5, 2, 3]), "class indices must be from 0 to 4, .*, not 5"),
        (torch.zeros(4), r"class indices \(4,\) of an integer type or soft labels \(4, 5\) .* torch.float32"),
        (torch.zeros(3).long(), r"class indices \(4,\) .*, not \(3,\)"),
        (torch.zeros(4, 6), r"soft labels \(4, 6\) for logits \(4, 5\)"),
    ],
)  # fmt: skip
def test_targets_that_do_not_fit_are_one_line(targets: Tensor, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}"):
        objective()(batch()[0], targets)


def test_the_gradient_of_the_logits_is_that_of_the_divergence() -> None:
    x, y = batch()
    distil = objective(kd_weight=1.0, alpha_spatial=0.0, alpha_freq=0.0).eval()
    found = gradients(distil, x, y)["backbone.fc.weight"]
    distil.zero_grad()
    teacher = distil.tail.teacher(x).log_softmax(1)
    F.kl_div(distil.backbone(x).log_softmax(1), teacher, reduction="batchmean", log_target=True).backward()
    torch.testing.assert_close(found, distil.backbone.fc.weight.grad)
    with torch.no_grad():
        distil.backbone.fc.weight.mul_(1e5)
        distil.tail.teacher.head.weight.mul_(1e5)
    assert torch.isfinite(distil(x, y).loss)


def test_the_second_maps_losses_reach_the_first_map_through_the_queries() -> None:
    x, y = batch()
    for detached in (False, True):
        distil = objective(
            kd_weight=0.0, alpha_spatial=(0.0, 1.0), alpha_freq=(0.0, 1.0), detach_query=detached
        )
        reached = gradients(distil, x, y)["spatial3.conv.weight"].abs().max() > 0
        assert bool(reached) is not detached


def test_checkpointing_the_tail_changes_nothing() -> None:
    x, y = batch()
    plain, saved = gradients(objective(), x, y), gradients(objective(checkpoint_tail=True), x, y)
    for name, value in plain.items():
        torch.testing.assert_close(saved[name], value)


def test_micro_batches_are_one_batch_without_batchnorm() -> None:
    x, y = batch(8)
    distil = objective("convnext")
    whole = gradients(distil, x, y)
    distil.zero_grad()
    for part in (slice(0, 4), slice(4, 8)):
        (distil(x[part], y[part]).loss / 2).backward()
    for name, p in distil.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-3, atol=1e-5)


def test_images_are_converted_for_the_teacher() -> None:
    x, y = batch()
    student, teacher = student_of("resnet"), teacher_of("vit")
    half = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    other = ((0.1, 0.2, 0.3), (1.0, 0.5, 2.0))
    seen: list[Tensor] = []
    distil = ScaleKD(student, teacher, image_size=64, student_statistics=half, teacher_statistics=other)
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    distil(x, y)
    pixels = x * 0.25 + 0.5
    expected = (pixels - torch.tensor(other[0]).view(-1, 1, 1)) / torch.tensor(other[1]).view(-1, 1, 1)
    torch.testing.assert_close(seen[0], expected)
    smaller = ScaleKD(student, teacher_of("vit", (32, 32)), image_size=64, teacher_size=(32, 32))
    assert torch.isfinite(smaller(x, y).loss)


def test_other_image_sizes_than_it_was_made_for() -> None:
    distil = ScaleKD(student_of("resnet"), teacher_of("convnext"))
    for size in ((64, 64), (96, 64), (128, 160)):
        assert torch.isfinite(distil(*batch(2, size)).loss)


def test_copies_share_the_teacher_and_it_moves_along() -> None:
    distil = objective()
    twin = copy.deepcopy(distil)
    assert twin.tail.teacher is distil.tail.teacher
    assert twin.backbone is not distil.backbone
    distil.double()
    x, y = batch()
    assert distil(x.double(), y).loss.dtype == torch.float64


def test_the_teacher_comes_back_from_where_a_copy_has_taken_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An average that is kept on another device is such a copy. Without one here, the move itself is watched."""
    distil = objective()
    teacher, moves = distil.tail.teacher, []

    def move(device: torch.device) -> None:
        moves.append(device)
        raise InterruptedError

    monkeypatch.setattr(teacher, "to", move)
    x, y = batch()
    targets = distil.tail.targets(x)
    distil(x, y)
    assert moves == []
    elsewhere = torch.empty(4, 32, 8, 8, device="meta")
    for call in (lambda: distil.tail.targets(x.to("meta")), lambda: distil.tail(elsewhere, targets)):
        with pytest.raises(InterruptedError):
            call()
    assert moves == [torch.device("meta")] * 2


def test_bf16_autocast_is_finite_and_close() -> None:
    x, y = batch()
    distil = objective("convnext", "swin")
    exact = distil(x, y).loss
    with torch.autocast("cpu", torch.bfloat16):
        rough = distil(x, y).loss
    rough.backward()
    torch.testing.assert_close(rough, exact, rtol=5e-2, atol=5e-2)
    assert all(torch.isfinite(p.grad).all() for p in distil.parameters())


def test_the_export_is_the_plain_student(tmp_path: Path) -> None:
    distil = objective()
    distil.export(tmp_path / "student.safetensors", name="resnet10t", num_classes=CLASSES)
    plain = timm.create_model("resnet10t", num_classes=CLASSES)
    plain.load_state_dict(load_file(tmp_path / "student.safetensors"), strict=True)
    x, _ = batch()
    assert torch.equal(plain.eval()(x), distil.backbone.eval()(x))
    assert {"spatial3.queries", "frequency4.key_position"} < distil.no_weight_decay()


def test_a_name_as_student_gets_the_teachers_classes() -> None:
    distil = ScaleKD("resnet10t", teacher_of("vit"), image_size=64)
    assert distil.backbone.num_classes == CLASSES


def test_what_cannot_be_is_one_line() -> None:
    student, teacher = student_of("resnet"), teacher_of("vit")
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (student, {"teacher": student_of("mobilenet")}, NoTail, "no tail is known of a MobileNetV3"),
        (
            student,
            {"teacher": "vit_tiny_patch16_224"},
            TypeError,
            "a module with its trained weights loaded, .*not 'vit",
        ),
        (student, {"heads": 5}, ValueError, "heads=5 does not divide the teacher's 32 channels"),
        (student, {"kd_weight": 1.5}, ValueError, "kd_weight must be between 0 and 1"),
        (student, {"kd_temperature": 0}, ValueError, "kd_temperature must be greater than 0"),
        (
            timm.create_model("resnet10t", num_classes=7),
            {},
            ValueError,
            "the student has 7 classes and the teacher 5",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU()),
            {"kd_weight": 0},
            NoStages,
            "one feature map only",
        ),
    ]
    for model, how, kind, message in cases:
        how = {"teacher": teacher, "image_size": 64} | how
        with pytest.raises(kind, match=message) as error:
            ScaleKD(model, **how)
        assert "\n" not in str(error.value)
    free = ScaleKD(timm.create_model("resnet10t", num_classes=7), teacher, kd_weight=0.0, image_size=64)
    assert torch.isfinite(free(*batch()).loss)
    googlenet = torchvision.models.googlenet(weights=None, num_classes=5, init_weights=False)
    with pytest.raises(ValueError, match=r"GoogLeNet must return logits .* aux_logits=False"):
        ScaleKD(googlenet, teacher, image_size=64)(*batch())
    blind = TeacherTail(teacher, [*teacher.blocks[3:], teacher.norm], "tokens", 1)
    teacher.num_classes = 7
    distil = ScaleKD(timm.create_model("resnet10t", num_classes=7), teacher, tail=blind, image_size=64)
    with pytest.raises(ValueError, match=r"the teacher gives \(4, 5\) and the student \(4, 7\)"):
        distil(*batch())
