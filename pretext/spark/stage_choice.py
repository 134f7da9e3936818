"""Which of a backbone's maps SparK uses, and which of its parts lie behind them."""

from collections.abc import Collection, Sequence, Set

from leaven.backbones import Stage
from leaven.pretext.spark.errors import SparseUnsupported


def choose_stages(found: Sequence[Stage], reductions: Sequence[int] | None) -> tuple[Stage, ...]:
    """The stages whose reductions are asked for, by default the last four from reduction 4 on.

    Raises:
        SparseUnsupported: if the backbone's reductions do not double down to pixels.
        ValueError: if a reduction asked for does not exist, or is 1: the decoder's maps are smaller than the image.
    """
    have = [stage.reduction for stage in found]
    if reductions is None:
        chosen = tuple(stage for stage in found if stage.reduction >= 4)[-4:]
    else:
        missing = sorted(set(reductions) - set(have))
        if missing or not reductions:
            raise ValueError(
                f"stages={tuple(reductions)}: no map of reduction {missing}; this backbone has {have}"
            )
        if 1 in reductions:
            raise ValueError(
                f"stages={tuple(reductions)}: a map as large as the image has no place in the decoder; leave 1 out"
            )
        chosen = tuple(stage for stage in found if stage.reduction in set(reductions))
    if not chosen or any(stage.reduction & (stage.reduction - 1) for stage in chosen):
        raise SparseUnsupported(
            f"SparK needs feature maps whose reductions are powers of two from 4 on; this backbone has {have}: "
            "choose another"
        )
    return chosen


def whole_parts(names: Set[str], parameters: Collection[str]) -> list[str]:
    """The shortest module paths below which every parameter is one of `names`; in the order of the network."""
    parts: dict[str, None] = {}
    for name in parameters:
        words = name.split(".")
        prefixes = (".".join(words[:depth]) for depth in range(1, len(words) + 1))
        for prefix in prefixes if name in names else ():
            if all(other in names for other in parameters if f"{other}.".startswith(f"{prefix}.")):
                parts[prefix] = None
                break
    return list(parts)
