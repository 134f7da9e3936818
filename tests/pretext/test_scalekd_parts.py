"""Projector, teacher's tail and student's taps, each against what it must equal."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaven.backbones import NoStages, features
from leaven.pretext.scalekd import (
    CrossAttentionProjector,
    NoTail,
    TeacherTail,
    find_taps,
    tapped,
    two_stages,
)
from tests.pretext.scalekd_networks import STUDENTS, TEACHERS, student_of, teacher_of

SIZES = [(64, 64), (64, 96)]


# --- projector -----------------------------------------------------------------------------------------------------


def cap(**how: object) -> CrossAttentionProjector:
    torch.manual_seed(0)
    settings = {"key_grid": (3, 4), "query_grid": (2, 3), "heads": 2} | how
    return CrossAttentionProjector(6, 8, **settings).double()  # type: ignore[arg-type]


def by_hand(module: CrossAttentionProjector, features: Tensor, queries: Tensor | None = None) -> Tensor:
    """Image by image, head by head, position by position."""
    conv = F.conv2d(features, module.conv.weight, module.conv.bias, padding=1)
    mean, var = conv.mean((0, 2, 3)), conv.var((0, 2, 3), correction=0)
    z = (conv - mean[:, None, None]) / (var[:, None, None] + module.norm.eps).sqrt()
    z = (z * module.norm.weight[:, None, None] + module.norm.bias[:, None, None]).relu() + module.key_position
    asked = module.queries.expand(len(features), -1, -1, -1) if queries is None else queries
    out = torch.empty_like(asked)
    size = asked.shape[1] // module.heads
    for b in range(len(features)):
        keys = [z[b, :, i, j] for i in range(z.shape[2]) for j in range(z.shape[3])]
        for i in range(asked.shape[2]):
            for j in range(asked.shape[3]):
                q = module.q(module.query_map(asked[b, :, i, j]).relu())
                mixed = []
                for head in range(module.heads):
                    part = slice(head * size, head * size + size)
                    logits = torch.stack([module.k(key)[part] @ q[part] for key in keys])
                    weights = (module.tau * size**-0.5 * logits).softmax(0)
                    mixed.append(sum(w * module.v(key)[part] for w, key in zip(weights, keys, strict=True)))
                a = module.out_norm(module.out(torch.cat(mixed)))
                hidden = (module.feed_forward[0].weight @ a + module.feed_forward[0].bias).relu()
                out[b, :, i, j] = a + module.feed_forward[2].weight @ hidden + module.feed_forward[2].bias
    return out


def test_the_projector_follows_the_equations() -> None:
    module, x = cap(), torch.randn(2, 6, 3, 4).double()
    torch.testing.assert_close(module(x), by_hand(module, x), rtol=1e-9, atol=1e-9)
    given = torch.randn(2, 8, 3, 3).double()
    torch.testing.assert_close(module(x, given), by_hand(module, x, given), rtol=1e-9, atol=1e-9)


def test_outputs_go_with_the_queries_and_do_not_know_the_order_of_keys() -> None:
    module, x, q = cap().eval(), torch.randn(2, 6, 3, 4).double(), torch.randn(2, 8, 2, 3).double()
    out = module(x, q)
    torch.testing.assert_close(module(x, q.flip(3)), out.flip(3))
    with torch.no_grad():
        module.key_position.zero_()
        module.conv.weight.zero_()
        module.conv.weight[:, :, 1, 1] = torch.eye(6)
    torch.testing.assert_close(module(x.flip(2), q), module(x, q))
    module.tau = 0.0
    same = module(x, q).flatten(2)
    torch.testing.assert_close(same, same[:, :, :1].expand_as(same))


def test_other_grids_and_layer_norm() -> None:
    module = cap(norm="layer")
    x = torch.randn(2, 6, 5, 6).double()
    assert module(x, grid=(4, 5)).shape == (2, 8, 4, 5)
    torch.testing.assert_close(module(x)[:1], module(x[:1]))  # no batch in it
    with pytest.raises(ValueError, match="no queries of its own"):
        cap(query_grid=None)(x)
    with pytest.raises(ValueError, match="heads=3 does not divide the teacher's 8 channels"):
        cap(heads=3)


# --- tail ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TEACHERS)
def test_the_tail_continues_the_teacher(name: str, size: tuple[int, int]) -> None:
    """From the teacher's own map it gives the teacher's last map, for one view and for two at once."""
    teacher = teacher_of(name, size)
    tail = TeacherTail.of(teacher.train())
    x = torch.randn(
        2, 3, *size, generator=torch.Generator().manual_seed(0)
    )  # as many as heads: not to be mixed up
    targets = tail.targets(x)
    assert not teacher.training
    assert torch.equal(targets.logits, teacher(x))
    entry = targets.as_map(tail)
    assert entry.shape[2:] == targets.grid
    torch.testing.assert_close(tail(entry, targets), targets.map, rtol=1e-5, atol=1e-5)
    both = tail(torch.cat([entry, torch.zeros_like(entry)]), targets)
    torch.testing.assert_close(both[:2], targets.map, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(both[2:], targets.map, rtol=0.1, atol=0.1)
    if "convnext" not in name:  # timm's own final map, normed, where it has one
        normed = teacher.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
        if normed.shape == targets.map.shape and not isinstance(teacher.norm, nn.Identity):
            torch.testing.assert_close(targets.map, normed, rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_the_tail_and_not_into_it() -> None:
    teacher = teacher_of("vit")
    tail = TeacherTail.of(teacher)
    targets = tail.targets(torch.randn(2, 3, 64, 64))
    tokens = targets.as_map(tail).clone().requires_grad_()
    tail(tokens, targets).square().sum().backward()
    assert tokens.grad is not None
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not targets.map.requires_grad
    assert copy.deepcopy(tail) is tail


def test_what_has_no_tail_is_named() -> None:
    with pytest.raises(NoTail, match="no tail is known of a ResNet: take a Swin"):
        TeacherTail.of(student_of("resnet"))
    teacher = teacher_of("vit")
    with pytest.raises(NoTail, match="of 2, 1 calls"):
        TeacherTail(teacher, [teacher.blocks[3], nn.Identity(), teacher.norm], "tokens", 1).targets(
            torch.randn(1, 3, 64, 64)
        )
    with pytest.raises(NoTail, match="a layer or more"):
        TeacherTail(teacher, [])


def test_a_tail_of_ones_own() -> None:
    body = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 2, 2))
    teacher = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    tail = TeacherTail(teacher, [body[1], body[2]], "nchw")
    targets = tail.targets(torch.randn(2, 3, 16, 24))
    assert targets.grid == (4, 6)
    assert targets.map.shape == (2, 6, 2, 3)
    torch.testing.assert_close(tail(targets.as_map(tail), targets), targets.map)


# --- taps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", STUDENTS)
def test_taps_give_the_maps_and_the_logits_of_one_call(name: str, size: tuple[int, int]) -> None:
    student = student_of(name, size).eval()
    stages = two_stages(student, size)
    taps = find_taps(student, stages, size)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    logits, maps = tapped(student, taps, x)
    torch.testing.assert_close(logits, student(x))
    for found, expected in zip(maps, features(student, x, stages), strict=True):
        torch.testing.assert_close(found, expected)
    assert not any(module._forward_hooks for module in student.modules())


def test_a_map_of_a_fresh_residual_network_is_its_last_blocks() -> None:
    """Blocks that start as the identity give equal maps: the tap must be on the last of them."""
    student = student_of("resnet")
    assert [tap.name for tap in find_taps(student, two_stages(student))] == ["layer3", "layer4"]


def test_a_map_that_the_student_overwrites_is_that_of_the_module() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4))
            self.second = nn.Sequential(nn.Conv2d(4, 6, 2, 2), nn.BatchNorm2d(6))
            self.fc = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            for part in (self.first, self.second):
                x = F.relu(part(x), inplace=True)
            return self.fc(x.mean((2, 3)))

    student, x = InPlace().eval(), torch.randn(2, 3, 32, 32)
    stages = two_stages(student)
    logits, maps = tapped(student, find_taps(student, stages), x)
    assert torch.equal(logits, student(x))
    for found, expected in zip(maps, features(student, x, stages), strict=True):
        assert expected.min() < 0
        assert torch.equal(found, expected)


def test_students_without_two_maps_are_named() -> None:
    with pytest.raises(NoStages):
        two_stages(nn.Sequential(nn.Flatten(), nn.LazyLinear(5)))
    with pytest.raises(NoStages, match="one feature map only"):
        two_stages(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
