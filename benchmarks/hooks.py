"""What attached callbacks cost that do nothing: 0, 1 and 4 of them, over the step of a small network.

    python benchmarks/hooks.py     # results/hooks-<machine>.json

Each idle callback has a forward pre-hook on the whole model, a forward hook and a gradient hook on its first layer,
and an empty `update`. A step alone is measured interleaved, in this process; what the hooks add is below its noise, so
they are also timed on a network of one weight, where the step is nearly nothing else.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

import timm
import torch
from timing import interleaved, machine, result_file
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from leaven.callbacks import Callback, Progress, attach
from leaven.callbacks.callback import Handle

NETS = ("resnet18", "convnext_atto")
COUNTS = (0, 1, 4)


class Idle(Callback):
    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterable[Handle]:
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        yield model.register_forward_pre_hook(self.nothing, with_kwargs=True)
        yield first.register_forward_hook(self.nothing)
        yield first.weight.register_hook(self.nothing)

    def nothing(self, *_: Any) -> None:
        return None


def step(model: nn.Module, x: Tensor, count: int) -> Callable[[], None]:
    """A training step under so many idle callbacks; None: not attached at all."""
    optimizer = SGD(model.parameters(), lr=0.0)
    idle = [Idle() for _ in range(count)]
    for number, callback in enumerate(idle):
        callback.name = f"idle {number}"
    if count:
        attach(model, optimizer, *idle, total_steps=10**9)

    def run() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for net in NETS:
        x = torch.randn(32, 3, 64, 64)
        steps = {str(count): step(timm.create_model(net, num_classes=10), x, count) for count in COUNTS}
        found[net] = interleaved(steps, base="0", repeats=15, device="cpu")
    tiny = {str(count): step(nn.Linear(1, 1), torch.ones(1, 1), count) for count in COUNTS}

    def many(run: Callable[[], None]) -> Callable[[], None]:
        return lambda: [run() for _ in range(1000)] and None

    bare = interleaved({name: many(run) for name, run in tiny.items()}, base="0", repeats=9, device="cpu")
    # A thousand steps: seconds are milliseconds each.
    cost = {n: round(1e3 * (bare[n]["median_s"] - bare["0"]["median_s"]), 1) for n in ("1", "4")}
    for net in NETS:
        share = {n: round(cost[n] * 1e-6 / found[net]["0"]["median_s"], 6) for n in cost}
        found[net]["share of the step that the hooks take"] = share
    report = {"machine": machine("cpu"), "microseconds per step": cost, "networks": found}
    result_file(__file__, "cpu").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
