"""SparK as an objective (Tian et al., "Designing BERT for Convolutional Networks", ICLR 2023)."""

import math
import os
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from leaven.backbones import classifier_names, create, resolve, save, unused_parameters
from leaven.backbones import stages as backbone_stages
from leaven.backbones.probe import UNSUITABLE, candidate_images, first_that_runs, reason_of, untouched
from leaven.pretext.features import eval_mode
from leaven.pretext.output import Output
from leaven.pretext.spark.decoder import Densify, LightDecoder
from leaven.pretext.spark.dense import dense_encode
from leaven.pretext.spark.errors import SparseUnsupported, UntrainedWarning
from leaven.pretext.spark.geometry import Geometry
from leaven.pretext.spark.loss import masked_loss, reconstruction
from leaven.pretext.spark.masking import sample_mask, visible_count, visible_ids
from leaven.pretext.spark.packed import check_packed, packed_encode
from leaven.pretext.spark.spconv_rule import require_spconv
from leaven.pretext.spark.stage_choice import choose_stages, whole_parts
from leaven.pretext.spark.swaps import swap, unswap


class SparK(nn.Module):
    """Masked modelling with a sparse encoder on any convolutional backbone, and a light decoder.

    Source: Tian et al., Designing BERT for Convolutional Networks, ICLR 2023 (arXiv 2301.03580).

    Args:
        backbone: a name for ``leaven.backbones.create``, or your own module; it is not modified.
        mask_ratio: share of cells hidden; the realised share is a whole number of cells.
        decoder_width: at the smallest map; halves with every doubling of the side. 768 is the paper's.
        densify_norm: "bn", "ln" or "none" before the mask tokens; "auto" follows the backbone's own norm.
        backend: "packed" computes visible positions only, "dense" masks dense operations; "auto" takes packed, the
            faster wherever measured, unless only dense accepts the backbone. "spconv" is packed with spconv's index
            pairs (on CUDA its kernel) for the ungrouped convolutions of stride 1 that packed runs on dense maps.
        stages: reductions of the maps to use, such as (4, 8, 16); by default the last four from reduction 4 on. What
            lies behind the deepest one is not trained, see `untrained`.
        mask_cell: side of a mask cell in pixels, a multiple of the largest reduction used (the default).

    Attributes:
        untrained: parts of the backbone that no map used depends on, such as a classifier: they stay as they were.

    Raises:
        SparseUnsupported: if the backbone has an operation without exact sparse form; one line names it.
        ValueError: if the settings do not fit together.
    """

    # Read by `leaven.callbacks.attach`: callbacks with these slots would meet a sparse map at the first batch.
    refused_slots: ClassVar[dict[str, str]] = {
        "first-layer-gradient": "its first layer runs on visible positions only, where no hook sees whole images; "
        "attach it to the exported backbone, in the training that follows",
        "norm": "its layers run on visible positions only, and such norms have no exact form there; leave the backbone "
        "its own, as they are",
    }

    def __init__(
        self,
        backbone: str | nn.Module,
        mask_ratio: float = 0.6,
        decoder_width: int = 768,
        densify_norm: Literal["auto", "bn", "ln", "none"] = "auto",
        backend: Literal["auto", "packed", "dense", "spconv"] = "auto",
        stages: Sequence[int] | None = None,
        mask_cell: int | None = None,
    ) -> None:
        super().__init__()
        self.name = resolve(backbone) if isinstance(backbone, str) else None
        self.backbone = create(backbone)
        self.mask_ratio = mask_ratio
        self.stages = choose_stages(backbone_stages(self.backbone), stages)
        reduction = self.stages[-1].reduction
        self.mask_cell = reduction if mask_cell is None else mask_cell
        if self.mask_cell % reduction or self.mask_cell < 1:
            raise ValueError(
                f"mask_cell={self.mask_cell} is not a multiple of {reduction}, the reduction of the smallest map used; "
                "leave deeper maps out with stages= for smaller cells"
            )
        if decoder_width % reduction or decoder_width < reduction:
            raise ValueError(
                f"decoder_width={decoder_width} must be a multiple of {reduction}: it halves per level"
            )
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask ratio {mask_ratio} must be between 0 and 1")
        if backend not in ("auto", "packed", "dense", "spconv"):
            raise ValueError(f"unknown backend {backend!r}: auto, packed, dense or spconv")
        if backend == "spconv":
            require_spconv()
        if densify_norm not in ("auto", "bn", "ln", "none"):
            raise ValueError(f"unknown densify_norm {densify_norm!r}: auto, bn, ln or none")
        norm = _own_norm(self.backbone) if densify_norm == "auto" else densify_norm
        self.densify = nn.ModuleList(
            Densify(
                s.channels, decoder_width * s.reduction // reduction, norm, first=s.reduction == reduction
            )
            for s in self.stages
        )
        self.in_chans = _in_chans(self.backbone)
        self.decoder = LightDecoder(reduction, decoder_width, self.in_chans)
        self.backend, self.backend_reason = self._choose_backend(backend)
        unused = unused_parameters(self.backbone, self.stages)
        parameters = dict(self.backbone.named_parameters())
        self.untrained = whole_parts(unused, parameters)
        heads = tuple(f"{name}." for name in classifier_names(self.backbone))
        behind = sum(parameters[name].numel() for name in unused if not (heads and name.startswith(heads)))
        share = behind / max(1, sum(p.numel() for p in parameters.values()))
        if share > 0.01 and stages is None:  # less is a classifier's norm, and who names stages knows
            warnings.warn(
                f"{', '.join(self.untrained)} ({share:.0%} of the backbone's parameters) stay as they are: no map used "
                "depends on them. What is read behind them, by kNN and probes too, goes through untrained layers",
                UntrainedWarning,
                stacklevel=2,
            )
        # DistributedDataParallel reads this: layers after the last map (a classifier) get no gradient here.
        self._ddp_params_and_buffers_to_ignore = [f"backbone.{name}" for name in sorted(unused)]

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Output:
        """The loss on hidden patches.

        Args:
            images: (B, C, H, W), normalised; sides must be multiples of ``mask_cell``.
            mask: bool (B, fh, fw), True = visible, the same count in every image; drawn by the CPU generator if None.

        Raises:
            ValueError: images or a mask that do not fit, or a mask that hides nothing.
        """
        mask, geo = self._geometry(images, mask)
        if geo.keep == geo.grid[0] * geo.grid[1]:
            raise ValueError("the mask hides nothing, so that there is nothing to predict")
        prediction = self._decode(images, mask, geo)
        loss = masked_loss(prediction, images, mask)
        return Output(loss, {"loss": loss.detach(), "mask_ratio": 1 - geo.keep / (geo.grid[0] * geo.grid[1])})

    def encode(self, images: Tensor, mask: Tensor) -> list[Tensor]:
        """Dense maps (B, C, h, w) of the stages used, largest first, zeros at hidden positions.

        Args:
            images: (B, C, H, W), normalised; sides must be multiples of ``mask_cell``.
            mask: bool (B, fh, fw), True = visible, the same count in every image.

        Raises:
            ValueError: images or a mask that do not fit.
        """
        mask, geo = self._geometry(images, mask)
        return [geo.scatter(values, r) for values, r in self._encode(images, mask, geo)]

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) with their hidden patches as predicted, in the images' own units.

        In eval mode, so that norm layers learn nothing of these images; the modes come back. A predicted patch is
        standardised; its mean and deviation are taken from the hidden patch, as upstream does.
        Arguments: see `forward`.
        """
        mask, geo = self._geometry(images, mask)
        with eval_mode(self):
            return reconstruction(self._decode(images, mask, geo), images, mask)

    def export(self, path: str | os.PathLike[str], *, name: str | None = None, **metadata: Any) -> None:
        """Write the backbone's weights, which load strictly into plain timm or torchvision.

        Arguments: see `leaven.backbones.save`.
        """
        save(self.backbone, path, name=name or self.name, metadata={"method": "SparK", **metadata})

    def mask_grid(self, height: int, width: int) -> tuple[int, int]:
        """Cells (fh, fw) of an image of (height, width) pixels.

        Raises:
            ValueError: if a side is not a multiple of ``mask_cell``.
        """
        cell = self.mask_cell
        if height % cell or width % cell:
            near = [max(cell, round(side / cell) * cell) for side in (height, width)]
            raise ValueError(
                f"image size {height}x{width} is not a multiple of the mask cell {cell}; try {near[0]}x{near[1]}"
            )
        return height // cell, width // cell

    def check_image_size(self, height: int, width: int) -> None:
        """Whether masks can be drawn for images of (height, width) pixels.

        Raises:
            ValueError: a side is not a multiple of ``mask_cell``, or the ratio leaves no cell visible, or none hidden.
        """
        visible_count(math.prod(self.mask_grid(height, width)), self.mask_ratio)

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizer factory must not decay, besides one-dimensional ones."""
        return {name for name, _ in self.named_parameters() if name.endswith("mask_token")}

    def extra_repr(self) -> str:
        """The settings in force."""
        name = self.name or type(self.backbone).__name__
        return f"{name}, backend={self.backend}, mask_ratio={self.mask_ratio}, mask_cell={self.mask_cell}"

    def _geometry(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Geometry]:
        fits = images.ndim == 4 and images.shape[0] > 0 and images.shape[1] == self.in_chans
        if not fits or not images.is_floating_point():
            shape = f"{tuple(images.shape)} of {images.dtype}"
            raise ValueError(f"images must be normalised floats (B, {self.in_chans}, H, W), got {shape}")
        grid = self.mask_grid(*images.shape[-2:])
        if mask is None:
            mask = sample_mask(images.shape[0], grid, self.mask_ratio)
        if tuple(mask.shape) != (images.shape[0], *grid):
            hint = "" if mask.ndim == 3 else "; SparK takes no labels: call it with the images alone"
            raise ValueError(
                f"mask must be (B, fh, fw) = {(images.shape[0], *grid)}, got {tuple(mask.shape)}{hint}"
            )
        # In a compiled graph the count cannot be read off the mask; it is taken from the ratio and checked there.
        keep = visible_count(grid[0] * grid[1], self.mask_ratio) if torch.compiler.is_compiling() else None
        ids = visible_ids(mask, keep)
        geo = Geometry(ids.to(images.device), grid, spconv=self.backend == "spconv")
        return mask.to(images.device), geo

    def _encode(self, images: Tensor, mask: Tensor, geo: Geometry) -> list[tuple[Tensor, int]]:
        if self.backend != "dense":
            if not torch.compiler.is_compiling():
                swap(self.backbone)  # modules may have become SyncBatchNorm since the last call
            return packed_encode(self.backbone, images, geo, self.stages)
        maps = dense_encode(self.backbone, images, mask, self.stages)
        sides = [self.mask_cell // stage.reduction for stage in self.stages]
        return [(geo.gather(m, r), r) for m, r in zip(maps, sides, strict=True)]

    def _decode(self, images: Tensor, mask: Tensor, geo: Geometry) -> Tensor:
        maps: dict[int, Tensor] = {}
        packed = self._encode(images, mask, geo)
        for stage, densify, (values, r) in zip(self.stages, self.densify, packed, strict=True):
            maps[stage.reduction] = densify(values, geo, r, mask)
        reduction = self.stages[-1].reduction
        return self.decoder([maps.get(reduction >> i) for i in range(len(self.decoder.blocks))])  # type: ignore[no-any-return]

    def _choose_backend(self, backend: str) -> tuple[str, str]:
        """Try one forward and backward pass per candidate; the first that accepts the backbone serves."""
        refused: list[SparseUnsupported] = []
        for candidate in ("packed", "dense") if backend == "auto" else (backend,):
            self.backend = candidate
            try:
                with untouched(self.backbone):
                    self._probe()
                if candidate != "dense":  # which checks itself
                    spconv = candidate == "spconv"
                    check_packed(self.backbone, self.stages, self.mask_cell, self.in_chans, spconv=spconv)
            except SparseUnsupported as error:
                unswap(self.backbone)
                refused.append(error)
            except UNSUITABLE as error:  # of the backbone itself
                unswap(self.backbone)
                size = f"{self.mask_cell}x{2 * self.mask_cell}"
                name = type(self.backbone).__name__
                refused.append(SparseUnsupported(f"{name} does not run on {size} px: {reason_of(error)}"))
            else:
                reason = f"packed refused: {refused[0]}" if refused else "asked for"
                return candidate, reason if backend != "auto" or refused else "the faster wherever measured"
        advice = "choose a backbone without it"
        if "does not run" in str(refused[0]):
            advice = "choose a backbone that takes images of any size, or try a larger mask_cell"
        raise SparseUnsupported(f"{refused[0]}; {advice}") from refused[0]

    def _probe(self) -> None:
        weight = next(self.parameters())
        images = weight.new_ones(2, self.in_chans, self.mask_cell, 2 * self.mask_cell)
        ids = torch.tensor([[0], [1]], device=weight.device)
        mask = torch.eye(2, dtype=torch.bool, device=weight.device).unsqueeze(1)
        for training in (True, False):
            self.backbone.train(training)
            self._encode(images, mask, Geometry(ids, (1, 2), spconv=self.backend == "spconv"))


def _in_chans(backbone: nn.Module) -> int:
    """Channels of the images that the backbone takes."""
    with untouched(backbone), torch.no_grad():
        image, _ = first_that_runs(backbone, candidate_images(backbone, None))
    return image.shape[1]


def _own_norm(backbone: nn.Module) -> str:
    kinds = [type(module).__mro__ for module in backbone.modules()]
    if any(nn.modules.batchnorm._BatchNorm in kind for kind in kinds):
        return "bn"
    return "ln" if any(nn.LayerNorm in kind for kind in kinds) else "none"
