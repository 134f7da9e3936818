"""How deep each parameter lies, in the groups that layer-wise learning rate decay wants."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from leaven.backbones.classifier import classifier_names
from leaven.backbones.probe import ImageSize, candidate_images, first_that_runs, untouched
from leaven.backbones.trace import Call, trace

Block = list[str]  # names of its parameters

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def layer_groups(model: nn.Module, image_size: ImageSize = None) -> dict[str, int]:
    """The depth of every parameter: 0 for the stem, then one number per group of blocks, the classifier the highest.

    The blocks of a stage are shared out evenly in groups of at most three, or of at most four where a stage has
    more than thirty: 6 groups for ResNet-50 and ConvNeXt-T, 12 for ResNet-101 and ConvNeXt-S, 13 for ResNet-152,
    17 for ResNet-200, as in SparK's fine-tuning code. A transformer's block is a group by itself, as in BEiT and MAE.
    Layers between blocks belong to the next one, those at the end to the last one or to the classifier.

    Which blocks there are: timm's networks say it (`group_matcher`, whose own groups are single blocks: there a decay
    of 0.7 would all but freeze the stem of a ResNet-50). Any other network is run once, on a small image.

    Args:
        model: a plain network. It is left untouched.
        image_size: side of the image to run on, where the net insists on one.

    Returns:
        Parameter name -> depth, for all parameters.
    """
    heads = tuple(f"{name}." for name in classifier_names(model))
    names = [name for name, _ in model.named_parameters()]
    head = {name for name in names if heads and name.startswith(heads)}
    if hasattr(model, "group_matcher"):
        stages, head = _declared(model, head)
    else:
        stages = _traced(model, head, image_size)
    most = 4 if max(map(len, stages), default=0) > 30 else 3
    groups = [group for blocks in stages for group in _shared_out(blocks, most)]
    depth = {name: number for number, group in enumerate(groups, 1) for name in group}
    return {name: len(groups) + 1 if name in head else depth.get(name, 0) for name in names}


def _shared_out(blocks: Sequence[Block], most: int) -> Iterator[Block]:
    """Neighbouring blocks joined, at most `most` at a time, as evenly as can be, the larger groups first."""
    parts = -(-len(blocks) // most)
    size, rest = divmod(len(blocks), parts)
    taken = 0
    for part in range(parts):
        stop = taken + size + (part < rest)
        yield [name for block in blocks[taken:stop] for name in block]
        taken = stop


def _declared(model: nn.Module, head: set[str]) -> tuple[list[list[Block]], set[str]]:
    """The blocks of each stage as a timm network groups them, and what it counts to its head."""
    from timm.models import group_parameters

    matcher: Any = model.group_matcher
    fine, coarse = (group_parameters(model, matcher(coarse=c), reverse=True) for c in (False, True))
    blocks, stage = defaultdict[int, Block](list), dict[int, int]()
    for name, number in fine.items():
        blocks[number].append(name)
        stage[number] = min(coarse[name], stage.get(number, coarse[name]))
    last = {fine[name] for name in head}  # with the norm before the classifier
    order = [number for number in sorted(blocks) if number != 0 and number not in last]
    stages = [[blocks[number] for number in group] for _, group in groupby(order, key=lambda n: stage[n])]
    return stages, {name for number in last for name in blocks[number]}


def _traced(model: nn.Module, head: set[str], image_size: ImageSize) -> list[list[Block]]:
    """The blocks of each stage, in the order in which they run; a stage is what gives maps of one reduction."""
    with untouched(model), torch.no_grad():
        images = candidate_images(model, image_size)
        _, root = first_that_runs(lambda image: trace(model, image, ""), images)
    units, placed = list[tuple[bool, Any, Block]](), set(head)
    for call in _closed(model, root):
        module = model.get_submodule(call.name)
        names = [f"{call.name}.{name}" for name, _ in module.named_parameters()]
        if names := [name for name in names if name not in placed]:
            reduction = call.gives or (units[-1][1] if units and _is_layer(module) else call.name)
            units.append((not _is_layer(module), reduction, names))
            placed.update(names)
    if not any(is_block for is_block, _, _ in units):  # VGG: every layer is a block
        units = [(number > 0, key, names) for number, (_, key, names) in enumerate(units)]
    blocks, waiting = list[tuple[Any, Block]](), Block()
    for is_block, key, names in units:
        waiting += names
        if is_block:
            blocks.append((key, waiting))
            waiting = []
        elif not blocks and key == units[0][1]:
            waiting = []  # the stem: what comes before all blocks, at the reduction of the very first layer
    if blocks:
        blocks[-1][1].extend(waiting)
    return [[block for _, block in group] for _, group in groupby(blocks, key=lambda pair: pair[0])]


def _closed(model: nn.Module, call: Call) -> Iterator[Call]:
    """The calls below `call` that are blocks or layers, in order, containers of blocks opened."""
    for child in call.children:
        module = model.get_submodule(child.name)
        if next(module.parameters(), None) is None:
            continue
        if _holds_blocks(module):
            yield from _closed(model, child)
        else:
            yield child


def _holds_blocks(module: nn.Module) -> bool:
    """A sequence of more than a layer, or around a sequence of blocks of one class: a stage, a trunk."""
    if isinstance(module, _CONTAINERS):
        return not _is_layer(module)
    sequences = [list(child.children()) for child in module.children() if isinstance(child, _CONTAINERS)]
    kinds = [[type(block) for block in sequence if not _is_layer(block)] for sequence in sequences]
    return any(len(kind) > 1 and len(set(kind)) == 1 for kind in kinds)


def _is_layer(module: nn.Module) -> bool:
    """At most one weight that is not a scale or a shift: a convolution and its norm, but no block."""
    return sum(parameter.ndim > 1 for parameter in module.parameters()) <= 1
