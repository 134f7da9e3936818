"""Which teachers and students ScaleKD takes, found by trying: random weights, one step each.

    python benchmarks/scalekd_matrix.py              # results/scalekd_matrix.json, and a table in words

A teacher is tried with one student, a student with one teacher: neither knows the other but by the shapes of its maps
(tests/pretext/test_scalekd.py has all pairs of ten teachers and six students).
"""

import json
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from timing import machine

from leaven.backbones import create
from leaven.pretext import ScaleKD

TEACHERS = (
    "swin_tiny_patch4_window7_224", "swin_s3_tiny_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224",
    "vit_tiny_patch16_224", "vit_base_patch16_clip_224", "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_so150m_patch16_reg4_gap_256",
    "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224",
    "beit_base_patch16_224", "beitv2_base_patch16_224", "eva02_tiny_patch14_224", "eva_large_patch14_196",
    "convnext_atto", "convnextv2_atto", "davit_tiny", "maxvit_tiny_tf_224", "mixer_s32_224",
    "xcit_nano_12_p16_224", "volo_d1_224", "cait_xxs24_224", "hiera_tiny_224", "pvt_v2_b0", "caformer_s18",
    "resnet18", "mobilenetv3_small_050",
)  # fmt: skip
STUDENTS = (
    "resnet18", "resnet50d", "convnext_atto", "mobilenetv1_100", "mobilenetv3_small_050", "efficientnet_b0",
    "regnety_002", "densenet121", "repvgg_a0", "inception_next_atto", "inception_v4", "hrnet_w18_small",
    "ghostnet_100", "fastvit_t8", "edgenext_xx_small", "poolformer_s12", "caformer_s18", "pvt_v2_b0",
    "swin_tiny_patch4_window7_224", "davit_tiny", "maxvit_tiny_tf_224", "coatnet_0_rw_224", "hiera_tiny_224",
    "levit_128s", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "mixer_s32_224", "gmlp_s16_224",
    "xcit_nano_12_p16_224", "volo_d1_224", "convit_tiny", "cait_xxs24_224", "vgg11", "tv:alexnet",
    "tv:squeezenet1_1", "tv:shufflenet_v2_x0_5", "tv:mnasnet0_5", "tv:swin_t", "tv:vit_b_16",
)  # fmt: skip
TEACHER, STUDENT = "vit_tiny_patch16_224", "resnet18"
TRIES = {
    "teachers": (TEACHERS, lambda name: (STUDENT, name)),
    "students": (STUDENTS, lambda name: (name, TEACHER)),
}


def side(name: str) -> int:
    """The size that a network was made for, where it insists on one."""
    if name.startswith("tv:"):
        return 224
    config: dict[str, Any] = timm.models.get_pretrained_cfg(name).to_dict()
    return int(config["input_size"][-1]) if config.get("fixed_input_size") else 224


def tried(student: str, teacher: str) -> str:
    """ "works", or why not."""
    size, own = side(student), side(teacher)
    torch.manual_seed(0)
    try:
        pupil = create(student, num_classes=10, image_size=size)
        taught = create(teacher, num_classes=10, image_size=own)
        distil = ScaleKD(pupil, taught, image_size=size, teacher_size=None if own == size else (own, own))
        output = distil.train()(torch.randn(2, 3, size, size), torch.tensor([0, 1]))
        output.loss.backward()
        without = [name for name, p in distil.named_parameters() if p.requires_grad and p.grad is None]
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    if without:
        return f"works; no gradient reaches {len(without)} of its parameters, such as {without[0]}"
    return "works" if torch.isfinite(output.loss) else "not finite"


def main() -> None:
    warnings.simplefilter("ignore")
    report: dict[str, Any] = {"machine": machine("cpu")}
    lines = []
    for kind, (names, pair) in TRIES.items():
        report[kind] = {}
        lines += [f"| {kind[:-1]} | |", "| --- | --- |"]
        for name in names:
            report[kind][name] = tried(*pair(name))
            lines.append(f"| {name} | {report[kind][name]} |")
            print(lines[-1], flush=True)
    path = Path(__file__).parent / "results" / "scalekd_matrix.json"
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
