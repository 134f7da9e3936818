"""DifFormer's head: one block is the attention head, several against plain code, and what sees what."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from leaven.pretext.diffusion import (
    AttentionHead,
    Cell,
    DifFormerHead,
    DiffusionFeatures,
    FeatureCache,
    Schedule,
    UNet,
    fit_heads,
    make_head,
    write_features,
)

SHAPES = {"a": (4, 4, 4), "b": (6, 2, 3)}  # maps need not be square, nor of one size
CELLS = [Cell(t, block, 4) for t in (20, "clean") for block in SHAPES]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maps(n: int = 3) -> dict[Cell, Tensor]:
    return {cell: randn(n, *SHAPES[cell.block], seed=i) for i, cell in enumerate(CELLS)}


def shapes(of: dict[Cell, Tensor]) -> dict[Cell, torch.Size]:
    return {cell: each.shape[1:] for cell, each in of.items()}


def head(of: dict[Cell, Tensor]) -> DifFormerHead:
    """With weights everywhere: a fresh class token is 0, and norms are the same for every block."""
    torch.manual_seed(0)
    made = DifFormerHead(shapes(of), 5, width=16, heads=2)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.3 * torch.randn_like(p)
    return made.eval()


def test_of_one_block_and_one_timestep_it_is_the_attention_head() -> None:
    cell = CELLS[0]
    made, one = head({cell: maps()[cell]}), AttentionHead(4, 4, 5, width=16, heads=2)
    renamed = {
        name.replace("norms.0", "norm").replace("narrows.0", "narrow"): value
        for name, value in made.state_dict().items()
    }
    one.load_state_dict(renamed)
    assert torch.equal(made(maps()), one(maps()[cell]))


def test_several_blocks_and_timesteps_in_plain_code() -> None:
    """Sequences written out token by token, the transformer with its own attention."""
    made, given = head(maps()), maps()

    def block(layer: int, x: Tensor) -> Tensor:
        w = {name: p for name, p in made.blocks[layer].named_parameters()}
        n, length, width = x.shape
        h = F.layer_norm(x, (width,), w["norm1.weight"], w["norm1.bias"], eps=made.blocks[layer].norm1.eps)
        q, k, v = (h @ w["attn.qkv.weight"].mT).view(n, length, 3, 2, width // 2).unbind(2)
        scores = torch.einsum("nqhd,nkhd->nhqk", q, k) / (width // 2) ** 0.5
        mixed = torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), v).flatten(2)
        x = x + mixed @ w["attn.proj.weight"].mT + w["attn.proj.bias"]
        h = F.layer_norm(x, (width,), w["norm2.weight"], w["norm2.bias"], eps=made.blocks[layer].norm2.eps)
        h = F.gelu(h @ w["mlp.fc1.weight"].mT + w["mlp.fc1.bias"])
        return x + h @ w["mlp.fc2.weight"].mT + w["mlp.fc2.bias"]

    weights = made.state_dict()
    read = []
    for t in (20, "clean"):
        tokens = [made.cls.expand(3, 1, 16)]
        for i, name in enumerate(SHAPES):
            x = given[Cell(t, name, 4)]  # type: ignore[arg-type]
            mean, var = x.flatten(1).mean(1), x.flatten(1).var(1, correction=0)
            x = (x - mean.view(-1, 1, 1, 1)) / (var.view(-1, 1, 1, 1) + 1e-5).sqrt()
            x = x * weights[f"norms.{i}.weight"] + weights[f"norms.{i}.bias"]
            for row in range(x.shape[2]):
                for column in range(x.shape[3]):
                    token = x[:, :, row, column] @ weights[f"narrows.{i}.weight"][:, :, 0, 0].mT
                    tokens.append((token + weights[f"narrows.{i}.bias"]).unsqueeze(1))
        read.append(block(1, block(0, torch.cat(tokens, dim=1)))[:, 0])
    expected = torch.cat(read, dim=1) @ made.classifier.weight.mT + made.classifier.bias
    assert made.classifier.in_features == 32
    torch.testing.assert_close(made(given), expected, rtol=1e-4, atol=1e-5)


def test_places_are_not_seen_and_blocks_are_told_apart() -> None:
    made, given = head(maps()), maps()
    made.norms = torch.nn.ModuleList(
        torch.nn.Identity() for _ in SHAPES
    )  # which have a weight for every place
    mixed = {cell: x.flatten(2)[..., torch.randperm(x[0, 0].numel())].view_as(x) for cell, x in given.items()}
    torch.testing.assert_close(made(given), made(mixed), rtol=1e-4, atol=1e-5)
    swapped = given | {CELLS[0]: given[CELLS[2]], CELLS[2]: given[CELLS[0]]}  # of another timestep
    assert not torch.allclose(made(given), made(swapped), atol=1e-2)


def test_a_timestep_s_token_sees_all_blocks_of_its_own_timestep_alone() -> None:
    made = head(maps())
    with torch.no_grad():
        made.classifier.weight[:, 16:] = 0  # only that of t=20 is read
    given = {cell: each.requires_grad_() for cell, each in maps().items()}
    made(given).square().sum().backward()
    for cell, each in given.items():
        assert each.grad is not None
        assert (float(each.grad.abs().sum()) > 0) == (cell.t == 20), cell


def test_it_learns_from_two_cells_together_what_none_tells_alone() -> None:
    """The class is whether two blocks agree in sign. Beside it another head, trained in the same pass as ever."""
    signs = torch.randint(2, (120, 2), generator=torch.Generator().manual_seed(3)).float() * 2 - 1
    labels = (signs.prod(1) > 0).long()
    given = {
        cell: 0.3 * randn(120, 4, 2, 2, seed=i) + signs[:, i].view(-1, 1, 1, 1) * torch.ones(4, 1, 1)
        for i, cell in enumerate(CELLS[:2])
    }
    for each in given.values():
        each[:, 2:] *= -1  # a norm takes away what all channels share
    torch.manual_seed(0)
    made = DifFormerHead(shapes(given), 2, width=16, heads=2)
    alone = make_head("linear", 4, 2, 2)
    before = float(F.cross_entropy(made(given), labels).detach())
    fit_heads(
        {"both": made, "one": alone}, {"both": given, "one": given[CELLS[0]]}, labels, steps=200, lr=3e-3
    )
    with torch.no_grad():
        assert float(F.cross_entropy(made(given), labels)) < 0.2 * before
        assert float((alone(given[CELLS[0]]).argmax(1) == labels).float().mean()) < 0.75


def test_features_and_caches_of_them_go_in_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UNet(1, width=32, multipliers=(1, 2))
    features = DiffusionFeatures(
        model, Schedule.linear(), [5, 1], timesteps=(90, 10), pool=4, include_clean=True
    )
    x, labels = randn(6, 1, 8, 8), torch.arange(6) % 2
    given = features(x)
    made = DifFormerHead(shapes(given), 2, width=16, heads=2)
    assert made.times == ["clean", 90, 10]
    assert made.kinds == [("middle_block", 4), ("input_blocks.0", 4)]
    write_features(tmp_path, features, [(x, labels)], 6, dtype=torch.float32)
    cache = FeatureCache(tmp_path, features)
    with torch.no_grad():
        assert torch.equal(made(cache), made(given))
    fit_heads({0: made}, {0: cache}, labels, steps=2)
    with pytest.raises(ValueError, match="0: 6 maps and 5 labels"):
        fit_heads({0: made}, {0: cache}, labels[:5], steps=2)


def test_weights_come_back() -> None:
    made = head(maps())
    other = DifFormerHead(shapes(maps()), 5, width=16, heads=2).eval()
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(maps()), made(maps()))


def test_timesteps_that_differ_are_refused() -> None:
    given = shapes(maps())
    for wrong in (dict(list(given.items())[:3]), given | {CELLS[3]: torch.Size((6, 3, 3))}):
        with pytest.raises(
            ValueError, match="every timestep needs the same maps: those of t=clean, b"
        ) as error:
            DifFormerHead(wrong, 5)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no cells"):
        DifFormerHead({}, 5)


def test_shapes_and_maps_that_do_not_fit_are_one_line() -> None:
    for wrong in (maps(), {cell: each.shape for cell, each in maps().items()}):
        with pytest.raises(ValueError, match=r"^t=20, a, pool 4: the shape \(C, h, w\) .* without the batch"):
            DifFormerHead(wrong, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width=60 must be a multiple of heads=8"):
        DifFormerHead(shapes(maps()), 5, width=60)
    others = {cell._replace(pool=2): each for cell, each in maps().items()}
    with pytest.raises(
        ValueError, match="no maps of the cell t=20, a, pool 4 that this head reads, only of: t=20, a, pool 2"
    ):
        head(maps())(others)
