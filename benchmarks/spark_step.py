"""SparK's encoder and whole training step: packed, on spconv, the plain dense network and masked dense operations.

    python benchmarks/spark_step.py                    # times, memory; results/spark_step-<machine>.json
    python benchmarks/spark_step.py --compile          # the same encoders under torch.compile as well

"masked" restates in our own words how the method is usually run (keyu-tian/SparK; Tian et al. 2023): every
convolution and pool is dense and its output multiplied by the mask expanded to that layer; norms gather the visible
positions by index, normalise, and scatter them back; squeeze-and-excitation is left as it is. It serves as the
alternative of every ratio. Times are interleaved medians; peak memory is of a process of its own per cell of the table.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timing import interleaved, machine, result_file
from torch import Tensor, nn

from leaven.backbones import features
from leaven.pretext.spark import SparK, sample_mask
from leaven.pretext.spark.geometry import Geometry
from leaven.pretext.spark.masking import visible_ids
from leaven.pretext.spark.packed import packed_encode

NETS = ("convnext_tiny", "resnet50", "efficientnet_b0", "regnety_008")
VARIANTS = ("packed", "spconv", "dense", "masked")
MASK: dict[str, Tensor] = {}  # the usual implementation keeps it in a global


def expanded(like: Tensor, channels_last: bool = False) -> Tensor:
    """The mask at a layer's resolution, anew for every layer."""
    height, width = like.shape[1:3] if channels_last else like.shape[2:4]
    mask = MASK["now"]
    mask = mask.repeat_interleave(height // mask.shape[1], 1).repeat_interleave(width // mask.shape[2], 2)
    return mask.unsqueeze(3 if channels_last else 1)


class MaskedConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        return out if out.shape[-1] == 1 else out * expanded(out)  # 1x1: squeeze-and-excitation


class MaskedMaxPool2d(nn.MaxPool2d):
    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        return out * expanded(out)


def on_visible(x: Tensor, norm: Callable[[Tensor], Tensor], channels_last: bool) -> Tensor:
    rows = x if channels_last else x.permute(0, 2, 3, 1)
    at = expanded(x, channels_last).squeeze(3 if channels_last else 1).nonzero(as_tuple=True)
    values = norm(rows[at])
    out = torch.zeros_like(rows, dtype=values.dtype)
    out[at] = values
    return out if channels_last else out.permute(0, 3, 1, 2)


def masked_batch_norm(self: Any, x: Tensor) -> Tensor:
    def norm(v: Tensor) -> Tensor:
        moments, affine = (self.running_mean, self.running_var), (self.weight, self.bias)
        return F.batch_norm(v, *moments, *affine, self.training, self.momentum, self.eps)

    if x.shape[-1] == 1:
        return norm(x)
    x = on_visible(x, norm, channels_last=False)
    return self.act(self.drop(x)) if hasattr(self, "act") else x


def masked_layer_norm(self: Any, x: Tensor) -> Tensor:
    last = not isinstance(self, timm.layers.LayerNorm2d)
    return on_visible(
        x, lambda v: F.layer_norm(v, self.normalized_shape, self.weight, self.bias, self.eps), last
    )


def mask_as_usual(net: nn.Module) -> nn.Module:
    """Swap classes in place so that the network runs under ``MASK``."""
    for module in net.modules():
        kind = type(module)
        if kind is nn.Conv2d:
            module.__class__ = MaskedConv2d
        elif kind is nn.MaxPool2d:
            module.__class__ = MaskedMaxPool2d
        elif isinstance(module, nn.BatchNorm2d):
            module.__class__ = type("Masked", (kind,), {"forward": masked_batch_norm})
        elif isinstance(module, nn.LayerNorm):
            module.__class__ = type("Masked", (kind,), {"forward": masked_layer_norm})
        elif kind.__name__ == "ConvNeXtBlock":  # its MLP runs everywhere; masked before the residual sum
            module.mlp.register_forward_hook(lambda _, __, out: out * expanded(out, channels_last=True))
    return net


class Encoder(nn.Module):
    """One variant as a module from (images, mask, ids) to the visible values of every map; all compile alike."""

    def __init__(self, net: str, variant: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        spark = SparK(net, decoder_width=256, backend="packed")
        self.backbone, self.stages, self.variant, self.cell = (
            spark.backbone,
            spark.stages,
            variant,
            spark.mask_cell,
        )
        if variant == "masked":
            mask_as_usual(self.backbone)

    def forward(self, images: Tensor, mask: Tensor, ids: Tensor) -> list[tuple[Tensor, int]]:
        geo = Geometry(ids, (mask.shape[1], mask.shape[2]), spconv=self.variant == "spconv")
        if self.variant in ("packed", "spconv"):
            return packed_encode(self.backbone, images, geo, self.stages)
        if self.variant == "masked":
            MASK["now"] = mask
            images = images * expanded(images)
        maps = features(self.backbone, images, self.stages)
        sides = [self.cell // stage.reduction for stage in self.stages]
        return [(geo.gather(m, r), r) for m, r in zip(maps, sides, strict=True)]


def encoder_step(
    net: str, variant: str, data: tuple[Tensor, ...], compiled: bool = False
) -> Callable[[], None]:
    encoder = Encoder(net, variant).to(data[0].device)
    if compiled and variant == "masked":
        # torch 2.14 compiles the pieces between its graph breaks so that in-place activations overwrite what the
        # backward pass needs, and raises.
        for module in encoder.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
    call: Any = torch.compile(encoder, fullgraph=variant != "masked") if compiled else encoder

    def step() -> None:
        encoder.zero_grad(set_to_none=True)
        sum(v.float().square().mean() for v, _ in call(*data)).backward()

    return step


def whole_step(net: str, variant: str, data: tuple[Tensor, ...], width: int) -> Callable[[], None]:
    spark = SparK(net, decoder_width=width, backend="packed").to(data[0].device)
    if variant == "spconv":
        spark.backend = "spconv"
    elif variant != "packed":
        encoder = Encoder(net, variant).to(data[0].device)
        spark.backbone = encoder.backbone
        spark._encode = lambda images, mask, geo: encoder(images, mask, geo.ids)  # type: ignore[method-assign]

    def step() -> None:
        spark.zero_grad(set_to_none=True)
        spark(data[0], data[1]).loss.backward()

    return step


def make_data(args: argparse.Namespace) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, generator=generator)
    side = args.image_size // 32
    mask = sample_mask(args.batch_size, (side, side), 0.6, generator)
    return tuple(t.to(args.device) for t in (images, mask, visible_ids(mask)))


def peak_memory(net: str, variant: str, part: str, args: argparse.Namespace) -> None:
    """Run three steps in this process and print the growth of its peak memory in MiB."""
    import torch._dynamo  # here and not while the objective tries its backbone out

    data = make_data(args)
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    baseline = resident(status, "VmRSS")
    step = (
        encoder_step(net, variant, data) if part == "encoder" else whole_step(net, variant, data, int(part))
    )
    # Forget the peaks of importing and of trying the backbone out, which would hide a small step's.
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif clear.exists():
        clear.write_text("5")
    for _ in range(3):
        step()
    if args.device == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        print(resident(status, "VmHWM") - baseline)


def resident(status: Path, which: str) -> float:
    """Resident memory of this process in MiB: VmRSS now, VmHWM at its peak."""
    if status.exists():
        return int(status.read_text().split(f"{which}:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--image-size", type=int, default=160, help="a multiple of 32; 160 gives 10 of 25 visible cells"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 768])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action="store_true", help="also the encoders under torch.compile (minutes each)"
    )
    parser.add_argument(
        "--output", type=Path, help="default: results/spark_step-MACHINE.json beside this script"
    )
    parser.add_argument("--memory-of", nargs=3, metavar=("NET", "VARIANT", "PART"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        return peak_memory(*args.memory_of, args)

    data = make_data(args)
    visible = data[2].shape[1] / (args.image_size // 32) ** 2
    settings = {"batch_size": args.batch_size, "image_size": args.image_size, "visible": visible}
    result: dict[str, Any] = {
        "machine": machine(args.device),
        "settings": settings | {"repeats": args.repeats},
        "nets": {},
    }
    output = args.output or result_file(__file__, args.device)
    output.parent.mkdir(parents=True, exist_ok=True)
    timing: dict[str, Any] = {"base": "masked", "repeats": args.repeats, "device": args.device}
    for net in args.nets:
        parts: dict[str, Any] = {}
        parts["encoder"] = interleaved({v: encoder_step(net, v, data) for v in VARIANTS}, **timing)
        for width in args.widths:
            parts[f"step, decoder {width}"] = interleaved(
                {v: whole_step(net, v, data, width) for v in VARIANTS}, **timing
            )
        if args.compile:
            torch._dynamo.reset()
            parts["encoder, compiled"] = interleaved(
                {v: encoder_step(net, v, data, True) for v in VARIANTS if v != "spconv"}, **timing
            )
        for part in ("encoder", *map(str, args.widths)):
            name = part if part == "encoder" else f"step, decoder {part}"
            for variant in VARIANTS:
                command = [
                    sys.executable,
                    __file__,
                    "--memory-of",
                    net,
                    variant,
                    part,
                    "--device",
                    args.device,
                ]
                command += ["--batch-size", str(args.batch_size), "--image-size", str(args.image_size)]
                command += ["--threads", str(args.threads)]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                parts[name][variant]["peak_memory_mib"] = round(float(printed.split()[-1]))
            for variant in VARIANTS:
                mine, masked = (parts[name][v]["peak_memory_mib"] for v in (variant, "masked"))
                parts[name][variant]["memory_ratio_to_masked"] = round(mine / max(masked, 1), 3)
        result["nets"][net] = parts
        output.write_text(json.dumps(result, indent=1) + "\n")
        for name, rows in parts.items():
            print(f"{net}, {name}")
            for variant, row in rows.items():
                print(f"  {variant:7} {json.dumps(row)}")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
