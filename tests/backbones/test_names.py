import subprocess
import sys

import pytest
import timm
import torchvision.models

from leaven.backbones import ALIASES, UnknownBackbone, resolve


def test_every_alias_leads_to_a_timm_model_and_hides_none() -> None:
    assert [alias for alias, name in ALIASES.items() if not timm.is_model(name)] == []
    assert [alias for alias in ALIASES if timm.is_model(alias)] == []


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("resnet50", "resnet50"),
        ("ResNet-50", "resnet50"),
        ("resnet_18", "resnet18"),
        ("convnext_t", "convnext_tiny"),
        ("convnext-s", "convnext_small"),
        ("ConvNeXt_B", "convnext_base"),
        ("convnextv2_l", "convnextv2_large"),
        ("swin_t", "swin_tiny_patch4_window7_224"),
        ("vit_s", "vit_small_patch16_224"),
        ("vit_s/16", "vit_small_patch16_224"),
        ("ViT-B/32", "vit_base_patch32_224"),
        ("deit_ti", "deit_tiny_patch16_224"),
        ("b0", "efficientnet_b0"),
        ("EfficientNet-B3", "efficientnet_b3"),
        ("effnetv2_s", "efficientnetv2_s"),
        ("regnet_y_400mf", "regnety_004"),
        ("regnetx_1.6gf", "regnetx_016"),
        ("mobilenet_v3_large", "mobilenetv3_large_100"),
        ("convnext_tiny.fb_in22k", "convnext_tiny.fb_in22k"),
        ("tv:convnext_tiny", "tv:convnext_tiny"),
        ("torch.nn:Identity", "torch.nn:Identity"),
        ("hf-hub:timm/resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k"),
    ],
)
def test_resolve(name: str, canonical: str) -> None:
    assert resolve(name) == canonical
    assert resolve(canonical) == canonical


def test_every_name_of_timm_and_torchvision_resolves_to_itself() -> None:
    assert [name for name in timm.list_models() if resolve(name) != name] == []
    names = [f"tv:{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    assert names
    assert [name for name in names if resolve(name) != name] == []


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("convnext_tinny", ["unknown backbone 'convnext_tinny'", "did you mean", "convnext_tiny"]),
        ("convnext_q", ["did you mean", "convnext_"]),
        ("googlenet", ["did you mean", "tv:googlenet"]),
        ("tv:resnet19", ["torchvision has no classification model 'resnet19'", "tv:resnet18"]),
        ("tv:fasterrcnn_resnet50_fpn", ["torchvision has no classification model"]),
        ("convnext_tiny.nonsense", ["no pretrained tag 'nonsense'", "fb_in22k"]),
        ("no_such_package_here:net", ["no module named 'no_such_package_here'", "package.module:factory"]),
        ("torch.no_such_module:net", ["no module named 'torch.no_such_module'"]),
        ("torch.nn:Identety", ["module torch.nn has no callable 'Identety'", "Identity"]),
        ("torch:__version__", ["no callable '__version__'"]),
        (":resnet18", ["':resnet18' names no module"]),
        ("torch.nn:", ["no callable ''"]),
        ("", ["unknown backbone ''"]),
    ],
)
def test_unknown_names_are_one_line_with_near_names(name: str, parts: list[str]) -> None:
    with pytest.raises(UnknownBackbone) as caught:
        resolve(name)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_name_like_nothing_gets_no_suggestion() -> None:
    with pytest.raises(UnknownBackbone, match=r"^unknown backbone '\?\?\?\?\?\?\?\?'$"):
        resolve("????????")


def test_an_import_error_inside_the_users_module_is_not_hidden(tmp_path, monkeypatch) -> None:
    (tmp_path / "needs_something.py").write_text("import no_such_dependency_of_mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency_of_mine") as caught:
        resolve("needs_something:net")
    assert not isinstance(caught.value, UnknownBackbone)


def test_importing_the_room_is_cheap() -> None:
    heavy = ["timm", "torchvision", "kornia", "gpytorch", "sklearn", "matplotlib", "safetensors.torch"]
    code = f"import sys, leaven.backbones; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
