"""The matrix of backbones and methods says what happens when it is run again."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import backbone_matrix as matrix  # noqa: E402
from matrix_table import table  # noqa: E402

REPORT = json.loads(matrix.RESULTS.read_text())
SAME_VERSIONS = (REPORT["machine"]["torch"], REPORT["machine"]["timm"]) == (
    torch.__version__,
    timm.__version__,
)
OWN = [name for name in REPORT["models"] if name.startswith("hand_written:")]
SMALL = ["starnet_s050", "edgenext_xx_small"]
SAMPLE = """
convnext_zepto_rms mobileone_s1 dla46x_c hgnetv2_b0 mobilenetv3_small_050 regnetx_002 resnet10t tv:squeezenet1_1
tv:googlenet mobilevit_xxs pvt_v2_b0 vit_tiny_patch16_224 gmlp_ti16_224 xcit_nano_12_p8_224 convit_tiny
""".split()  # noqa: SIM905


def compare(name: str) -> None:
    """Words always; whole messages, which quote torch and timm, of the same versions alone."""
    found = matrix.row(name, REPORT["models"][name][1])["cells"]
    wanted = REPORT["rows"][name]["cells"]
    if SAME_VERSIONS:
        assert found == wanted
    assert {method: said.partition(":")[0] for method, said in found.items()} == {
        method: said.partition(":")[0] for method, said in wanted.items()
    }


@pytest.mark.parametrize("name", [*OWN, *SMALL])
def test_rows_are_what_running_them_gives(name: str) -> None:
    compare(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_more_rows_are_what_running_them_gives(name: str) -> None:
    compare(name)


def test_the_page_is_made_of_the_results() -> None:
    assert matrix.PAGE.read_text() == table(REPORT)


def test_there_is_a_row_for_every_family_and_no_defect() -> None:
    assert len(OWN) >= 6
    for name, row in REPORT["rows"].items():
        assert list(row["cells"]) == list(matrix.METHODS), name
        for said in row["cells"].values():
            assert said.partition(":")[0] in ("works", "no effect", "refused", "not tried"), (name, said)
            assert "\n" not in said
    if SAME_VERSIONS:
        modules = [
            m for m in timm.list_modules() if any("test_" not in n for n in timm.list_models(module=m))
        ]
        assert set(modules) <= {family for family, _ in REPORT["models"].values()}


def test_what_is_no_refusal_of_ours_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape error of torch inside leaven's code, an error of many lines, a loss that is not finite."""
    from leaven.pretext import RotNet, Supervised

    def outcome(method: Any) -> str:
        monkeypatch.setitem(matrix.METHODS, "tried", method)
        return matrix.cell("tried", "none", [64])

    net = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(4 * 64, 5))
    images, labels = matrix.images(64), torch.tensor([0, 1])
    good = Supervised(net)
    assert outcome(lambda name, size: matrix.updated(good, images, labels)) == "works"
    rotnet = RotNet(net, head=nn.Linear(7, 4), image_size=64)
    assert outcome(lambda name, size: str(rotnet(images))).startswith("DEFECT: RuntimeError in ")
    assert outcome(lambda name, size: str(torch.cat([]))).startswith("DEFECT: ")
    said = outcome(lambda name, size: str(RotNet(net, mode="none")))  # type: ignore[arg-type]
    assert said == "refused: unknown mode 'none': all or random"
    good.spare = nn.Linear(2, 2)
    said = outcome(lambda name, size: matrix.updated(good, images, labels))
    assert said == "works: no gradient reaches 2 of its parameters, such as spare.weight"
    said = outcome(lambda name, size: matrix.updated(good, images * float("inf"), labels))
    assert said.startswith("DEFECT: the loss")


def test_large_kernels_merge_into_one() -> None:
    from tests.backbones.hand_written import DilatedReparam

    torch.manual_seed(0)
    layer, x = DilatedReparam(4), torch.randn(2, 4, 20, 20)
    layer(x)
    layer.eval()
    assert torch.allclose(layer.merge()(x), layer(x), atol=1e-5)
