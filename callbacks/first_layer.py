"""One layer under TrAct: which second moment its coming gradient is to be multiplied with."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leaven.callbacks.callback import Handle, NoEffectWarning
from leaven.callbacks.second_moment import patch_second_moment, solved

# Updates between looks at whether a moment could not be used: on a GPU each look waits for it.
LOOK = 50


def weight_of(layer: nn.Module) -> nn.Parameter:
    """Of a layer that `reason_against` has nothing against."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


class _Moment(NamedTuple):
    """The second moment of what the layer saw in one forward pass: the sum's numbers and the count, in a row."""

    key: object
    packed: Tensor
    work: Any  # that sums it over processes

    def arrived(self, device: torch.device) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.packed.to(device)


class _Sums(NamedTuple):
    """Over the micro-batches of an update."""

    counted: frozenset[object]  # keys of the moments in the sum
    packed: Tensor
    raw: Tensor | None  # gradient as it came
    given: Tensor | None  # what .grad was given for it


class FirstLayer:
    """One layer under TrAct: the second moment that its coming gradient is to be multiplied with."""

    def __init__(
        self, layer: nn.Module, name: str, lam: Callable[[], float], whole_step: bool, sync: bool
    ) -> None:
        self.layer, self.name, self.lam = layer, name, lam
        self.weight = weight_of(layer)
        self.whole_step, self.sync = whole_step, sync
        # Moments of forward passes that a backward pass has come back to, with the number of that backward pass.
        self.met: list[tuple[int, _Moment]] = []
        self.bad: Tensor | None = None  # whether a moment could not be used
        self.warned = False
        self.silent = True  # no gradient since the last look
        # Of the micro-batches of this update, and the same with the gradient that is on its way to .grad.
        self.sums: _Sums | None = None
        self.coming: _Sums | None = None
        self.left: tuple[int, int] | None = None  # .grad as the last backward pass left it

    def hooks(self) -> Iterator[Handle]:
        # Breaks a compiled graph, whose constants the sums would be otherwise. No decorator: it imports the compiler.
        after_forward = torch.compiler.disable(self.after_forward)
        yield self.layer.register_forward_hook(after_forward, with_kwargs=True)
        yield self.weight.register_hook(self.precondition)
        if self.whole_step:
            yield self.weight.register_post_accumulate_grad_hook(self.remember)

    def after_forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """The moment of this pass; it counts once a gradient of its output comes by."""
        if not (layer.training and output.requires_grad and self.weight.requires_grad):
            return
        # By the layer itself: DataParallel calls replicas, whose weights are no parameters.
        if self.layer.weight is not self.weight:
            self.warn(
                f"TrAct leaves gradients of {self.name} as they are: its weight is another than when it was attached"
            )
            return
        total, count = patch_second_moment(args[0] if args else kwargs["input"], self.layer)
        # The count travels with the sum.
        packed = torch.cat([total.flatten(), total.new_tensor([count])])
        work: Any = None
        if self.sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            work = dist.all_reduce(packed, async_op=True)  # awaited at the end of the backward pass
        moment = _Moment(object(), packed, work)
        output.register_hook(lambda _: self.met.append((torch._C._current_graph_task_id(), moment)))

    def precondition(self, gradient: Tensor) -> Tensor:
        this, self.silent = torch._C._current_graph_task_id(), False
        # Others are of backward passes that did not reach the weight, as for a gradient of the images.
        met = [moment for number, moment in self.met if number == this]
        self.met.clear()
        if not met:
            self.warn(
                f"TrAct leaves a gradient of {self.name} as it is: the forward pass was in eval mode, or went around "
                "the layer's hooks, as that of a model does that was compiled and called before it was attached, or "
                "the loss does not depend on what the layer puts out"
            )
            return gradient
        grad = self.weight.grad
        before = self.sums if grad is not None and self.left == _identity(grad) else None
        if not self.whole_step or before is None:
            before = _Sums(frozenset(), torch.zeros_like(met[0].packed, device=gradient.device), None, None)
        new = [moment for moment in met if moment.key not in before.counted]
        packed = before.packed + sum(moment.arrived(gradient.device) for moment in new)
        raw = gradient if before.raw is None else before.raw + gradient
        now = self.times_inverse(raw, packed)
        if self.whole_step:
            self.coming = _Sums(before.counted | {moment.key for moment in new}, packed, raw, now)
        return now if before.given is None else now - before.given

    def times_inverse(self, gradient: Tensor, packed: Tensor) -> Tensor:
        groups = getattr(self.layer, "groups", 1)
        n = gradient[0].numel()
        result, good = solved(gradient, (packed[:-1] / packed[-1]).view(groups, n, n), self.lam())
        self.bad = ~good if self.bad is None else self.bad | ~good
        return result

    def remember(self, weight: Tensor) -> None:
        """Whoever touches .grad from here on (zeroes, unscales, clips it) ends the update's accumulation."""
        assert weight.grad is not None
        if self.coming is not None:  # not of torch.autograd.grad, which leaves .grad alone
            self.sums, self.coming = self.coming, None
        self.left = _identity(weight.grad)

    def report(self) -> None:
        if self.bad is not None and bool(self.bad):
            self.warn(
                f"TrAct left gradients of {self.name} as they are: its inputs were not finite, or too large to solve "
                "with: give it normalised images"
            )

    def report_silence(self) -> None:
        if self.silent:
            self.warn(
                f"TrAct has seen no gradient of {self.name} in {LOOK} updates: was the layer replaced or frozen?"
            )
        self.silent = True

    def remove(self) -> None:
        """The end of the training is the last time to say so."""
        self.report()

    def warn(self, line: str) -> None:
        if not self.warned:
            warnings.warn(line, NoEffectWarning, stacklevel=2)
        self.warned = True


def _identity(grad: Tensor) -> tuple[int, int]:
    return id(grad), grad._version
