"""Every method on a network of every family, found by running it: two images of noise, one update, or the refusal.

    python benchmarks/backbone_matrix.py          # what is missing in results/backbone_matrix.json; then docs/matrix.md
    python benchmarks/backbone_matrix.py NAME ... # these rows, or columns, again

The networks: of every module of timm and every family of torchvision the one with the fewest parameters, some that are
often asked for, and those of tests/backbones/hand_written.py, which stand for your own. Objectives are built as the
recipes build them, weights are random, and teacher, decoder and heads are small. An error that is not leaven's own line
is written as DEFECT.
"""

import copy
import gc
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from matrix_table import table
from timing import machine
from torch import Tensor, nn

from leaven.backbones import create
from leaven.backbones.build import _timm
from leaven.callbacks import Callback, EvoNorm, NoEffectWarning, TrAct, attach
from leaven.curricula import EfficientTrain, Schedule, Stage
from leaven.pretext import RotNet, ScaleKD, SparK, Supervised, UntrainedWarning, extract_features, knn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "backbones"))  # of the hand-written networks
RESULTS = ROOT / "benchmarks" / "results" / "backbone_matrix.json"
PAGE = ROOT / "docs" / "matrix.md"

ROOMS = ("backbones", "pretext", "callbacks", "curricula", "bayes")
TEACHER = "vit_tiny_patch16_224"
ASKED_FOR = ("inception_next_atto", "convit_tiny", "pvt_v2_b0", "inception_v4", "inception_resnet_v2")
# The smallest of these modules are large: they are built with fewer blocks or channels.
SMALLER = {
    "beit": "beit_base_patch16_224 depth=4",
    "deepseek_vit": "deepseek_vit_412m depth=4",
    "gemma4_vit": "gemma4_vit_167m depth=4",
    "mobilenetv5": "mobilenetv5_base channel_multiplier=0.25",
    "naflexvit": "naflexvit_base_patch16_parfac_gap depth=4",
    "nasnet": "nasnetalarge num_features=1056",
    "qwen3_vit": "qwen3_vit_88m depth=4",
    "vgg": "vgg11 mlp_ratio=0.125",
    "vision_transformer_sam": "samvit_base_patch16_224 depth=4",
}
CLASSES, MOST = 10, 90e6
SMALL = (64, 128, 112)  # for patches of 16 and of 14
LABELS = torch.tensor([1, 7])
THIRDS = Schedule((Stage(1 / 3, 160), Stage(2 / 3, 192), Stage(1.0, 224)))


def network(name: str, size: int, classes: int = 0) -> nn.Module:
    """As recipes build it, but always the same; a fresh copy."""
    return copy.deepcopy(built(name, size, classes))


@lru_cache(maxsize=4)
def built(name: str, size: int, classes: int) -> nn.Module:
    torch.manual_seed(0)
    name, *settings = name.split()
    if settings:
        pairs = (setting.split("=") for setting in settings)
        return _timm(name, {"num_classes": classes} | {key: json.loads(value) for key, value in pairs}, size)
    return create(name, num_classes=classes, image_size=size)


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def updated(objective: nn.Module, *batch: Any, callbacks: tuple[Callback, ...] = (), updates: int = 1) -> str:
    """Train for so many updates; what is to be said about it."""
    objective.train()
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
    with attach(objective, optimizer, *callbacks, total_steps=updates):
        for _ in range(updates):
            optimizer.zero_grad()
            loss = objective(*batch).loss
            loss.backward()
            optimizer.step()
    if not torch.isfinite(loss):
        return f"DEFECT: the loss is {float(loss)}"
    named: Any = getattr(objective, "_ddp_params_and_buffers_to_ignore", ())
    left = [
        n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None and n not in named
    ]
    return f"no gradient reaches {len(left)} of its parameters, such as {left[0]}" if left else ""


def supervised(name: str, size: int) -> Supervised:
    return Supervised(network(name, size, CLASSES), smoothing=0.1)


def spark(name: str, size: int) -> str:
    objective = SparK(network(name, size), decoder_width=64)
    whole = max(size // objective.mask_cell, 2) * objective.mask_cell  # of two cells by two at least
    objective.check_image_size(whole, whole)
    return updated(objective, images(whole))


def rotnet(name: str, size: int) -> str:
    return updated(RotNet(network(name, size), image_size=size), images(size))


def trained(name: str, size: int) -> str:
    return updated(supervised(name, size), images(size), LABELS)


def tract(name: str, size: int) -> str:
    return updated(supervised(name, size), images(size), LABELS, callbacks=(TrAct(when="step"),))


def evonorm(name: str, size: int) -> str:
    surgery = EvoNorm("s0")
    said = updated(supervised(name, size), images(size), LABELS, callbacks=(surgery,))
    left = surgery.report.skipped
    if left and surgery.report.replaced:
        said = (
            said or f"{len(left)} of {len(surgery.report.sites)} BatchNorm layers are left: {left[0].skipped}"
        )
    return said


def efficienttrain(name: str, size: int) -> str:
    curriculum = EfficientTrain(THIRDS, image_size=size)
    return updated(supervised(name, size), images(size), LABELS, callbacks=(curriculum,), updates=3)


def scalekd(name: str, size: int) -> str:
    own = size if size % 16 == 0 else 224  # whole patches
    student, teacher = network(name, size, CLASSES), network(TEACHER, own, CLASSES)
    distil = ScaleKD(student, teacher, image_size=size, teacher_size=None if size == own else (own, own))
    return updated(distil, images(size), LABELS)


def dkm(name: str, size: int) -> str:
    from leaven.bayes import DKMHead

    head = DKMHead(network(name, size), CLASSES, n_data=2, image_size=size, n_inducing=2)
    head.init_inducing(images(size))
    return updated(head, images(size), LABELS)


def prior(name: str, size: int) -> str:
    import gpytorch

    from leaven.bayes import SGHMC, FunctionalPrior, GPTarget, fit_prior
    from leaven.bayes.deep_kernel_machine import normalised
    from leaven.bayes.functional_prior import image_measure, softmax_loglik

    x = normalised(extract_features(network(name, size), images(size)))
    head = FunctionalPrior(nn.Linear(x.shape[1], CLASSES))
    target = GPTarget(gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()), outputs=CLASSES)
    fit_prior(head, target, image_measure(x, 2), "energy", steps=1, functions=4)
    drawn = SGHMC(head, softmax_loglik, x, LABELS, chains=2, burn_in=1, thin=1).run(1)
    return "" if torch.isfinite(drawn.predict(head, x)).all() else "DEFECT: draws are not finite"


def features(name: str, size: int) -> str:
    x = extract_features(network(name, size), images(size))
    knn(x, LABELS, x, LABELS, k=1)  # refuses features that are not finite
    return "" if x.std(0).max() > 0 else "DEFECT: all images have the same features"


METHODS: dict[str, Callable[[str, int], str]] = {
    "SparK": spark,
    "RotNet": rotnet,
    "supervised": trained,
    "TrAct": tract,
    "EvoNorm S0": evonorm,
    "EfficientTrain": efficienttrain,
    "ScaleKD student": scalekd,
    "DKM head": dkm,
    "functional prior": prior,
    "kNN features": features,
}


def refusal(error: Exception) -> str:
    """One line that leaven raises itself, or a defect: torch's errors end in leaven's code too, but at a call."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    own = any(Path(last.filename).resolve().is_relative_to(ROOT / room) for room in ROOMS)
    line = " ".join(str(error).split())
    if own and str(last.line).startswith("raise") and line and "\n" not in str(error):
        return f"refused: {line}"
    return f"DEFECT: {type(error).__name__} in {Path(last.filename).name}: {line}"


def cell(method: str, name: str, sizes: list[int]) -> str:
    """ "works", "works: NOTE", "no effect: WHY" or "refused: WHY", at the first of the sizes that works."""
    said = ""
    for size in sizes:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                note = METHODS[method](name, size)
            except Exception as error:  # whatever it is goes into the matrix
                said = refusal(error)
                if said.endswith("choose a backbone without it"):
                    break  # whatever the size
                continue
        lines = {
            kind: [str(w.message) for w in seen if w.category is kind]
            for kind in (NoEffectWarning, UntrainedWarning)
        }
        some = [line for line in lines[NoEffectWarning] if "that were replaced" in line]  # EvoNorm's, in part
        if lines[NoEffectWarning] != some:
            return f"no effect: {lines[NoEffectWarning][0]}"
        note = note or next(iter(some + lines[UntrainedWarning]), "")
        said = f"works: {note}" if note else "works"
        if note.startswith("DEFECT"):
            said = note
            continue
        return said
    return said


def sizes_of(name: str) -> list[int]:
    """The sides of images to try: the smallest that the plain network runs on, and its own."""
    own = SMALL[0]
    if name.startswith("tv:"):
        from torchvision.models import get_model_weights

        own = next(iter(get_model_weights(name.removeprefix("tv:")))).transforms().crop_size[0]
    elif ":" not in name:
        import timm

        own = int(timm.models.get_pretrained_cfg(name.split()[0]).to_dict()["input_size"][-1])
    for size in SMALL:
        try:
            network(name, size, CLASSES).train()(images(size))
        except Exception:  # in whatever way it dislikes the size
            continue
        return [size] if size >= own else [size, own]
    return [own]


def row(name: str, parameters: int, methods: Iterable[str] = METHODS) -> dict[str, Any]:
    """These methods on one network."""
    if parameters > MOST:
        said = f"not tried: {parameters / 1e6:.0f} M parameters"
        return {"sizes": [], "cells": dict.fromkeys(methods, said)}
    sizes, cells = sizes_of(name), {}
    for method in methods:
        start = time.perf_counter()
        cells[method] = cell(method, name, sizes)
        print(f"{name} {method} {time.perf_counter() - start:.1f} s: {cells[method]}", flush=True)
    return {"sizes": sizes, "cells": cells}


def count(build: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


def models() -> Iterator[tuple[str, str, int]]:
    """(family, name, parameters) of the rows; timm's are built without memory for their weights."""
    import hand_written
    import timm
    import torchvision

    for module in timm.list_modules():
        # "test_" is what timm's own tests take: nobody trains them
        names = [name for name in timm.list_models(module=module) if not name.startswith("test_")]
        names = [SMALLER[module]] if module in SMALLER else names
        sizes = [(count(partial(network, name, 224, 1000)), name) for name in names]
        if sizes:
            yield module, min(sizes)[1], min(sizes)[0]
    for name in ASKED_FOR:
        module = timm.models.model_entrypoint(name).__module__
        yield module.rpartition(".")[2], name, count(partial(network, name, 224, 1000))
    families: dict[str, list[tuple[int, str]]] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        family = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
        size = next(iter(torchvision.models.get_model_weights(name))).meta["num_params"]
        families.setdefault(family, []).append((size, f"tv:{name}"))
    for family, sizes in families.items():
        yield f"torchvision {family}", min(sizes)[1], min(sizes)[0]
    for name in hand_written.NETWORKS:
        yield "your own", f"hand_written:{name}", count(partial(network, f"hand_written:{name}", SMALL[0]))


def save(report: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    PAGE.write_text(table(report))


def main() -> None:
    torch.set_num_threads(1)
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    report["machine"] = machine("cpu")
    if "models" not in report:
        report["models"] = {name: [family, size] for family, name, size in models()}
        save(report)
    for name, (_, parameters) in report["models"].items():
        old = report["rows"].get(name, {"cells": {}})
        methods = [m for m in METHODS if m not in old["cells"] or {m, name} & set(sys.argv[1:])]
        if methods:
            found = row(name, parameters, methods)
            cells = old["cells"] | found["cells"]
            gc.collect()
            report["rows"][name] = found | {"cells": {m: cells[m] for m in METHODS}}
            save(report)


if __name__ == "__main__":
    main()
