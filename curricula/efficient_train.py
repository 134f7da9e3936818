"""EfficientTrain as a callback: low frequencies first, on the device, in anyone's training loop."""

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leaven.callbacks import AttachError, Callback, NoEffectWarning, Progress, map_images
from leaven.callbacks.callback import Handle
from leaven.curricula.fourier import Size, fourier_crop, fourier_pad, pair
from leaven.curricula.resize import OPS, Op, rescale_boxes, rescale_masks, resize
from leaven.curricula.schedule import ET, Schedule

Resize = Callable[[Tensor, Size], Tensor]
Targets = Tensor | list[Tensor] | None
# Batches of another stage's size in a row before that is reported. One or two come from a step that was skipped.
_ODD = 3


class EfficientTrain(Callback):
    """Shrinks what the model trains on by a schedule: cheap low frequencies first, the whole images at the end.

    Works in a forward pre-hook, in training mode only; evaluation sees whole images, and so does training in eval mode,
    which a warning tells. The model must take images of
    several sizes, and is tried at all of them when it is attached, if it runs on images alone. Where images come
    smaller out of the loader already, they pass. What a hook cannot do is reported for the loop to apply at the next
    update, if it likes:

        for group in optimizer.param_groups:
            group["lr"] = lr * curriculum.lr_factor

    and likewise `strength` for RandAugment's magnitude and `batch_size` for the loader. As a plain function,
    ``curriculum(images, boxes=boxes, masks=masks)`` rescales targets too, whatever the mode. Under torch.compile the
    hook runs eagerly before the model's own graphs, one for each size at most; fullgraph=True does not allow that.

    Source: Wang et al., EfficientTrain, ICCV 2023 (arXiv 2211.09703); EfficientTrain++, TPAMI 2024 (arXiv 2405.08768).

    Args:
        schedule: `ET`, `ET_PP`, `ET_PP_DEIT` or your own. One whose full size is not that of the images is scaled.
        op: how to shrink, see `leaven.curricula.resize.resize`, or a function of images and (h, w), such as
            ``partial(fourier_crop, align="corner", nyquist="upstream")``, the paper's code.
        image_size: side or (H, W) of the whole images.
        multiple: of what a scaled schedule's sizes are: patch side, or mask cell.
        batch_size: of whole images, for the attribute `batch_size`.
        warmup: share of the schedule over which `lr_factor` rises linearly.
        resize_back: give shrunk images back at full size, for a model that takes one size only: it sees the same low
            frequencies, and saves nothing.

    Attributes:
        size: (h, w) of the coming update's images in training mode. Logged is that of the last update's, as they were.
        strength: of its augmentation, 1 for full.
        batch_size: images of its micro-batches, None if it was not given.
        lr_factor: half a cosine from 1 to 0 on the schedule's clock, after the warm-up.

    Raises:
        TypeError: a schedule or a size that is none.
        ValueError: an unknown op, or numbers that make no sense.
        AttachError: on attaching, a model that does not run at one of the sizes.
    """

    slot = "input"

    def __init__(
        self,
        schedule: Schedule = ET,
        op: Op | Resize = "fourier",
        *,
        image_size: int | Size = 224,
        multiple: int = 16,
        batch_size: int | None = None,
        warmup: float = 0.0,
        resize_back: bool = False,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule, such as leaven.curricula.ET, not {schedule!r}")
        if isinstance(op, str) and op not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, or a function, not {op!r}")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup must be a share of the schedule, at least 0 and below 1, not {warmup}")
        if multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {multiple}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.schedule, self.op = schedule, op
        # Boxes, and images that are given back at full size, go by where the crop's samples stand.
        known = op.keywords if isinstance(op, partial) and op.func is fourier_crop else {}
        self._stand = {key: known[key] for key in ("align", "boundary") if key in known}
        self.image_size = pair(image_size)
        self.full_batch_size, self.warmup, self.resize_back = batch_size, warmup, resize_back
        axes = [
            schedule if full == schedule.full else schedule.scaled(full, multiple) for full in self.image_size
        ]
        # Scaled sizes are rounded; when a stage begins is left to the schedule as it was given.
        self._sizes: list[Size] = [
            (rows.size, columns.size) for rows, columns in zip(*(axis.stages for axis in axes), strict=True)
        ]
        self._progress: Progress | None = None
        self._odd = 0
        # Of the images since the last update: as the hook gave them, as it left them in eval mode with gradients on.
        self._given: Size | None = None
        self._left: Size | None = None
        self._warned = False
        self.update()

    def update(self) -> None:
        before = self._given or self._left
        if before is not None and self._given is None:
            self._notice_eval(before)
        self._given = self._left = None
        t = 0.0 if self._progress is None else self._progress.fraction
        clock = self.schedule.clock(t)
        stage = self.schedule.at(t)
        self.size = self.size_at(t)
        self._logged = before or self.size
        self.strength = self.schedule.strength(t)
        self.batch_size = self.full_batch_size and self.full_batch_size * stage.batches
        self.lr_factor = clock / self.warmup if clock < self.warmup else _half_cosine(clock, self.warmup)

    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterable[Handle]:
        if not self.resize_back:
            self._ask(model)
            self._try_sizes(getattr(model, "backbone", model))
        self._progress = progress
        self.update()
        # Two small products run eagerly as well as compiled, and a graph of their own for each size is saved.
        before_forward = torch.compiler.disable(self._before_forward)
        yield model.register_forward_pre_hook(before_forward, with_kwargs=True)

    def size_at(self, t: float) -> Size:
        """(h, w) of the images of the update at share `t` of all updates."""
        return self._sizes[self.schedule.stages.index(self.schedule.at(t))]

    def shapes(self) -> list[Size]:
        """The sizes (h, w) that occur, in order."""
        return list(dict.fromkeys(self._sizes))

    def speedup(self) -> float:
        """How many times less the run costs than as many updates at full size, an image costing its area."""
        stages = zip(self.schedule.stages, self._sizes, strict=True)
        area = {stage.size: float(h * w) for stage, (h, w) in stages}
        return self.schedule.speedup(area.__getitem__)

    @overload
    def __call__(self, images: Tensor) -> Tensor: ...
    @overload
    def __call__(
        self, images: Tensor, *, boxes: Targets = None, masks: Targets = None
    ) -> tuple[Tensor, Targets, Targets]: ...
    def __call__(self, images: Tensor, *, boxes: Targets = None, masks: Targets = None) -> Any:
        """Images (B, C, H, W) as the coming update sees them; with targets, those too.

        Args:
            images: whole, or shrunk already.
            boxes: (..., 4) as x1, y1, x2, y2 in pixels of the images, or a list of them, one for each image.
            masks: (..., H, W), label maps of any type, or a list of them.

        Returns:
            The images; where boxes or masks are given, always three: images, boxes, masks, with None for what was not.

        Raises:
            ValueError: images that are neither whole nor shrunk already, or boxes that are none.
        """
        old = (images.shape[-2], images.shape[-1])
        shrunk = self._shrink(images)
        if boxes is None and masks is None:
            return shrunk
        new = (shrunk.shape[-2], shrunk.shape[-1])
        if old == new:
            return shrunk, boxes, masks
        return (
            shrunk,
            _each(lambda part: rescale_boxes(part, old, new, self._stand.get("align", "center")), boxes),
            _each(lambda part: rescale_masks(part, new), masks),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"schedule": self._signature()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["schedule"] != self._signature():
            raise ValueError(
                f"the checkpoint follows another curriculum: {state['schedule']}; this is {self._signature()}"
            )
        self.update()

    def logs(self) -> dict[str, float]:
        return {"size": float(self._logged[0])}

    def __repr__(self) -> str:
        sizes = " ".join("x".join(map(str, size)) for size in self.shapes())
        return f"EfficientTrain({sizes}, op={self._op_name()!r})"

    def _op_name(self) -> str:
        return self.op if isinstance(self.op, str) else _name(self.op)

    def _signature(self) -> str:
        stages = ", ".join(":".join(f"{value:g}" for value in stage) for stage in self.schedule.stages)
        strengths = " ".join(f"{strength:g}" for strength in self.schedule.strengths)
        return (
            f"{self.shapes()} by {self._op_name()}, {stages} in {self.schedule.axis}, strengths {strengths}"
        )

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module.training:
            return map_images(self._shrink_and_note, args, kwargs)
        if torch.is_grad_enabled():
            with suppress(TypeError):  # no images, which in eval mode is nobody's business
                map_images(self._note, args, kwargs)
        return None

    def _shrink_and_note(self, images: Tensor) -> Tensor:
        shrunk = self._shrink(images)
        self._given = self.size if self.resize_back else (shrunk.shape[-2], shrunk.shape[-1])
        return shrunk

    def _note(self, images: Tensor) -> Tensor:
        self._left = (images.shape[-2], images.shape[-1])
        return images

    def _shrink(self, images: Tensor) -> Tensor:
        shape = (images.shape[-2], images.shape[-1])
        if shape != self.image_size:
            # Of any stage: where a step was skipped, the loader is ahead of the count of updates.
            if shape in self.shapes() and not self.resize_back:
                self._notice(shape)
                return images
            raise ValueError(
                f"EfficientTrain was built for images of {_words(self.image_size)} and got {_words(shape)}: give it "
                f"image_size={shape}"
            )
        small = resize(images, self.size, self.op) if isinstance(self.op, str) else self.op(images, self.size)
        made = (small.shape[-2], small.shape[-1])
        if made != self.size:
            raise ValueError(
                f"op={self._op_name()} gave images of {_words(made)} for the size {_words(self.size)}"
            )
        return fourier_pad(small, self.image_size, **self._stand) if self.resize_back else small

    def _notice(self, shape: Size) -> None:
        """Images that keep coming in the size of another stage: is it the loader's doing, or a wrong image_size?"""
        if shape == self.size:
            self._odd = 0
        elif self._odd < _ODD:
            self._odd += 1
            if self._odd == _ODD:
                warnings.warn(
                    f"EfficientTrain leaves images of {_words(shape)} as they are while it stands at "
                    f"{_words(self.size)}: are your whole images {_words(self.image_size)}? Give it their image_size",
                    NoEffectWarning,
                    stacklevel=2,
                )

    def _notice_eval(self, left: Size) -> None:
        """An update came of eval mode alone: whoever freezes BatchNorm that way gets no curriculum."""
        if left != self.size and not self._warned:
            warnings.warn(
                f"EfficientTrain has left images of {_words(left)} as they are at {_words(self.size)}, for the model "
                "was trained in eval mode: call model.train(), and .eval() of the layers to freeze alone",
                NoEffectWarning,
                stacklevel=2,
            )
            self._warned = True

    def _ask(self, model: nn.Module) -> None:
        """Objectives with sizes of their own, such as SparK, say which they take."""
        check = getattr(model, "check_image_size", None)
        for size in self.shapes() if check is not None else ():
            try:
                check(*size)  # type: ignore[misc]
            except ValueError as error:
                advice = self._advice(size, getattr(model, "mask_cell", None))
                raise AttachError(
                    f"{type(model).__name__} does not take images of {_words(size)} ({error}): {advice}"
                ) from error

    def _advice(self, size: Size, cell: int | None) -> str:
        other = "choose a schedule with other sizes"
        if cell is None or not any(side % cell for side in size):
            return other
        if size == self.image_size:
            return f"give images whose sides are multiples of {cell}"
        if self.schedule.full in self.image_size:  # whose sizes are taken as they are, whatever `multiple` is
            return f"give it schedule.scaled({self.schedule.full}, {cell}), or {other}"
        return f"give EfficientTrain multiple={cell}, or {other}"

    def _try_sizes(self, backbone: nn.Module) -> None:
        from leaven.backbones.probe import UNSUITABLE, candidate_images, first_that_runs, reason_of, untouched

        unlike = (*UNSUITABLE, TypeError, IndexError, KeyError, AttributeError)

        def run(size: Size, training: bool) -> None:
            # Eagerly: a model that is to be compiled would be compiled for these images too.
            with untouched(backbone), torch.no_grad(), torch.compiler.set_stance("force_eager"):
                backbone.train(training)
                first_that_runs(lambda x: backbone(torch.cat([x, x])), candidate_images(backbone, size))

        modes = [False]
        for size in dict.fromkeys([self.image_size, *self.shapes()]):
            try:
                for training in modes:
                    run(size, training)
            except unlike as error:
                if size == self.image_size and not isinstance(error, UNSUITABLE):
                    return  # an objective that asks for more than images cannot be tried
                raise AttachError(
                    f"{type(backbone).__name__} does not run on images of {_words(size)} ({reason_of(error)}). timm's "
                    "ViTs and Swins do if built with dynamic_img_size=True or strict_img_size=False, as the recipes "
                    "build them; for a network of one size, take another, or in Python resize_back=True, which saves "
                    "nothing"
                ) from error
            if size == self.image_size:
                # Auxiliary classifiers run in training alone. So do detectors' losses, which ask for targets.
                with suppress(*unlike):
                    run(size, True)
                    modes = [False, True]


def _each(function: Callable[[Tensor], Tensor], targets: Targets) -> Targets:
    if isinstance(targets, list | tuple):
        return [function(part) for part in targets]
    return None if targets is None else function(targets)


def _name(op: Resize) -> str:
    """The same in every process."""
    if isinstance(op, partial):
        settings = [*map(repr, op.args), *(f"{key}={value!r}" for key, value in sorted(op.keywords.items()))]
        return f"{_name(op.func)}({', '.join(settings)})"
    return getattr(op, "__qualname__", type(op).__qualname__)


def _half_cosine(clock: float, warmup: float) -> float:
    return (1 + math.cos(math.pi * (clock - warmup) / (1 - warmup))) / 2


def _words(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
