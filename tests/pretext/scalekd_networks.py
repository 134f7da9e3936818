"""Small teachers of every family and small students of every kind, with random weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

Size = tuple[int, int]
CLASSES = 5
SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": 8, "num_classes": CLASSES}


def swin(size: Size, cls: Any = SwinTransformer) -> nn.Module:
    return cls(
        img_size=size, patch_size=2, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), window_size=4,
        num_classes=CLASSES, drop_path_rate=0.3,
    )  # fmt: skip


def vit(size: Size, **how: Any) -> nn.Module:
    return VisionTransformer(img_size=size, drop_path_rate=0.3, **SMALL, **how)


def eva(size: Size, **how: Any) -> nn.Module:
    return Eva(img_size=size, use_rot_pos_emb=True, drop_path_rate=0.3, **SMALL, **how)


TEACHERS: dict[str, Callable[[Size], nn.Module]] = {
    "swin": swin,
    "swinv2": partial(swin, cls=SwinTransformerV2),
    "vit": vit,
    "vit, registers, no class token": partial(vit, class_token=False, reg_tokens=2, global_pool="avg"),
    "deit3": partial(vit, no_embed_class=True, init_values=1e-6, pos_embed="learn"),
    "beit, shared relative positions": lambda size: Beit(
        img_size=size, use_abs_pos_emb=False, use_shared_rel_pos_bias=True, **SMALL
    ),
    "beit": lambda size: Beit(img_size=size, use_abs_pos_emb=False, use_rel_pos_bias=True, **SMALL),
    "eva, rotary": eva,
    "eva, registers": partial(eva, num_reg_tokens=4),
    "convnext": lambda size: ConvNeXt(
        depths=(1, 1, 2, 1), dims=(8, 16, 32, 64), num_classes=CLASSES, drop_path_rate=0.3
    ),
    "vit, patches alone": partial(vit, class_token=False, global_pool="avg"),
}


def timms(name: str, size: Size) -> nn.Module:
    sized = {"img_size": size} if "vit" in name else {}
    return timm.create_model(name, num_classes=CLASSES, **sized)


STUDENTS: dict[str, Callable[[Size], nn.Module]] = {
    "resnet": partial(timms, "resnet10t"),
    "mobilenet": partial(timms, "mobilenetv3_small_050"),
    "convnext": partial(timms, "test_convnext"),
    "vit": partial(timms, "test_vit"),
    "swin": swin,
    "torchvision": lambda size: torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=CLASSES),
}


def teacher_of(name: str, size: Size = (64, 64)) -> nn.Module:
    torch.manual_seed(1)
    model = TEACHERS[name](size)
    with torch.no_grad():
        for parameter in model.parameters():  # zero initialisations would hide mistakes
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def student_of(name: str, size: Size = (64, 64)) -> nn.Module:
    torch.manual_seed(2)
    return STUDENTS[name](size)
