"""EfficientTrain as a callback: low frequencies first, on the device, in anyone's training loop."""

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leaven.callbacks import AttachError, Callback, Progress, map_images
from leaven.callbacks.callback import Handle
from leaven.curricula.fourier import Size, fourier_pad
from leaven.curricula.resize import OPS, Op, rescale_boxes, rescale_masks, resize
from leaven.curricula.schedule import ET, Schedule

Resize = Callable[[Tensor, Size], Tensor]


class EfficientTrain(Callback):
    """Shrinks what the model trains on by a schedule: cheap low frequencies first, the whole images at the end.

    Works in a forward pre-hook, in training mode only; evaluation sees whole images. The model must take images of
    several sizes, and is tried at all of them when it is attached. Where images come smaller out of the loader
    already, they pass. What a hook cannot do is reported for the loop to apply at the next update, if it likes:

        for group in optimizer.param_groups:
            group["lr"] = lr * curriculum.lr_factor

    and likewise `strength` for RandAugment's magnitude and `batch_size` for the loader. As a plain function,
    ``curriculum(images, boxes=boxes, masks=masks)`` rescales targets too, whatever the mode.

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
        size: (h, w) of the coming update's images.
        strength: of its augmentation, 1 for full.
        batch_size: images of its micro-batches, None if it was not given.
        lr_factor: half a cosine from 1 to 0 on the schedule's clock, after the warm-up.

    Raises:
        ValueError: an unknown op.
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
        if isinstance(op, str) and op not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, or a function, not {op!r}")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup must be a share of the schedule, at least 0 and below 1, not {warmup}")
        self.schedule, self.op = schedule, op
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.full_batch_size, self.warmup, self.resize_back = batch_size, warmup, resize_back
        axes = [
            schedule if full == schedule.full else schedule.scaled(full, multiple) for full in self.image_size
        ]
        # Scaled sizes are rounded; when a stage begins is left to the schedule as it was given.
        self._sizes: list[Size] = [
            (rows.size, columns.size) for rows, columns in zip(*(axis.stages for axis in axes), strict=True)
        ]
        self._progress: Progress | None = None
        self.update()

    # An attribute and not a property: compiled code is guarded on `size`, which changes at the borders of stages only.
    def update(self) -> None:
        t = 0.0 if self._progress is None else self._progress.fraction
        clock = self.schedule.clock(t)
        stage = self.schedule.at(t)
        self.size = self.size_at(t)
        self.strength = self.schedule.strength(t)
        self.batch_size = self.full_batch_size and self.full_batch_size * stage.batches
        self.lr_factor = clock / self.warmup if clock < self.warmup else _half_cosine(clock, self.warmup)

    def setup(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], progress: Progress
    ) -> Iterable[Handle]:
        if not self.resize_back:
            self._try_sizes(getattr(model, "backbone", model))
        self._progress = progress
        self.update()
        yield model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

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
        self, images: Tensor, *, boxes: Tensor | None = None, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...
    def __call__(self, images: Tensor, *, boxes: Tensor | None = None, masks: Tensor | None = None) -> Any:
        """Images (B, C, H, W) as the coming update sees them; with targets, those too.

        Args:
            images: whole, or shrunk already.
            boxes: (..., 4) as x1, y1, x2, y2 in pixels of the images.
            masks: (..., H, W), label maps of any type.

        Raises:
            ValueError: images that are neither whole nor shrunk already.
        """
        old = (images.shape[-2], images.shape[-1])
        shrunk = self._shrink(images)
        if boxes is None and masks is None:
            return shrunk
        new = (shrunk.shape[-2], shrunk.shape[-1])
        return (
            shrunk,
            boxes if boxes is None or old == new else rescale_boxes(boxes, old, new),
            masks if masks is None or old == new else rescale_masks(masks, new),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"schedule": self._signature()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["schedule"] != self._signature():
            raise ValueError(
                f"the checkpoint follows another curriculum: {state['schedule']}, not {self._signature()}"
            )
        self.update()

    def logs(self) -> dict[str, float]:
        return {"size": float(self.size[0])}

    def __repr__(self) -> str:
        sizes = " ".join("x".join(map(str, size)) for size in self.shapes())
        return f"EfficientTrain({sizes}, op={self._op_name()!r})"

    def _op_name(self) -> str:
        return self.op if isinstance(self.op, str) else getattr(self.op, "__name__", repr(self.op))

    def _signature(self) -> str:
        return f"{self.shapes()} by {self._op_name()}, {self.schedule}"

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return map_images(self._shrink, args, kwargs) if module.training else None

    def _shrink(self, images: Tensor) -> Tensor:
        shape = (images.shape[-2], images.shape[-1])
        if shape != self.image_size:
            # Of any stage: where a step was skipped, the loader is ahead of the count of updates.
            if shape in self.shapes() and not self.resize_back:
                return images
            raise ValueError(
                f"EfficientTrain was built for images of {_words(self.image_size)} and got {_words(shape)}: give it "
                f"image_size={shape}"
            )
        small = resize(images, self.size, self.op) if isinstance(self.op, str) else self.op(images, self.size)
        return fourier_pad(small, self.image_size) if self.resize_back else small

    def _try_sizes(self, backbone: nn.Module) -> None:
        from leaven.backbones.probe import UNSUITABLE, candidate_images, first_that_runs, untouched

        for size in self.shapes():
            # Eagerly: a model that is to be compiled would be compiled for these images too.
            with untouched(backbone), torch.no_grad(), torch.compiler.set_stance("force_eager"):
                try:
                    first_that_runs(backbone, candidate_images(backbone, size))
                except UNSUITABLE as error:
                    reason = " ".join(str(error).split())[:200]
                    raise AttachError(
                        f"{type(backbone).__name__} does not run on images of {_words(size)} ({reason}): build timm's "
                        "ViTs with dynamic_img_size=True and its Swins with strict_img_size=False, choose a schedule "
                        "with other sizes, or give EfficientTrain resize_back=True"
                    ) from error


def _half_cosine(clock: float, warmup: float) -> float:
    return (1 + math.cos(math.pi * (clock - warmup) / (1 - warmup))) / 2


def _words(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
