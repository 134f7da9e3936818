"""A deep kernel machine in place of a backbone's classifier."""

import os
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaven.backbones import create, save
from leaven.backbones.probe import ImageSize
from leaven.bayes.deep_kernel_machine.machine import DeepKernelMachine
from leaven.bayes.deep_kernel_machine.prediction import Prediction
from leaven.pretext import Output, extract_features
from leaven.pretext.features import last_map, pooled_features, try_features


class DKMHead(nn.Module):
    """A deep kernel machine on the pooled features of any backbone, as an objective.

    Features are those of `leaven.pretext.extract_features`, each image's normalised over channels, since Gram matrices
    grow with squared norms. With a frozen backbone nothing but the head is trained; it is quicker then to extract the
    features once and to train a `DeepKernelMachine` on `normalised` ones. Trained together on few labels, deep heads
    overfit: measure before you unfreeze.

        head = DKMHead("resnet18", 10, n_data=len(train))
        head.init_inducing(loader)
        loss = head(images, labels).loss
        probs = head.predict(images).probs()

    Args:
        backbone: a name for `leaven.backbones.create`, or your own module.
        out_features: classes, or outputs.
        n_data: images in the whole training set, over all processes.
        freeze: keep the backbone as it is, in eval mode; False trains it together with the head.
        image_size: where the backbone insists on one.
        likelihood, **machine: see `DeepKernelMachine`; nu is `out_features` unless it is given, since the log
            likelihood that it is held against grows with the outputs.

    Attributes:
        machine: the `DeepKernelMachine`.

    Raises:
        ValueError: a backbone that gives no features, arguments out of range.
    """

    def __init__(
        self,
        backbone: nn.Module | str,
        out_features: int,
        n_data: int,
        *,
        freeze: bool = True,
        image_size: ImageSize = None,
        likelihood: Literal["gaussian", "categorical"] = "categorical",
        **machine: Any,
    ) -> None:
        super().__init__()
        if n_data < 1:
            raise ValueError(f"n_data must be at least 1, got {n_data}")
        self.backbone = create(backbone, image_size=image_size)
        self.n_data, self.frozen = n_data, freeze
        self.maps = last_map(self.backbone, image_size)
        example, unused = try_features(self.backbone, self.maps, image_size)
        machine = {"nu": float(out_features)} | machine
        self.machine = DeepKernelMachine(example.shape[1], out_features, likelihood=likelihood, **machine)
        self.machine.to(example.device)
        if freeze:
            self.backbone.requires_grad_(False).eval()
        # DistributedDataParallel reads this: a classifier that the backbone came with gets no gradient here.
        self._ddp_params_and_buffers_to_ignore = [f"backbone.{name}" for name in unused]

    def train(self, mode: bool = True) -> "DKMHead":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def init_inducing(
        self, loader: Iterable[Any], how: Literal["kmeans", "random"] = "kmeans", seed: int = 0
    ) -> None:
        """Take the inducing points from the features of images; call it once, before training.

        Args:
            loader: of batches of images, or of tuples that start with them; a few thousand images are enough.
            how, seed: see `DeepKernelMachine.init_inducing`.

        Raises:
            ValueError: see `DeepKernelMachine.init_inducing`.
        """
        self.machine.init_inducing(normalised(extract_features(self.backbone, loader)), how, seed)

    def predict(self, images: Tensor) -> Prediction:
        """The outputs' functions at images (B, C, H, W), normalised."""
        prediction: Prediction = self.machine(self.features(images))
        return prediction

    def features(self, images: Tensor) -> Tensor:
        """(B, D), normalised over D, with gradient unless the backbone is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return normalised(pooled_features(self.backbone, images, self.maps))

    def forward(self, images: Tensor, targets: Tensor) -> Output:
        """Minus the variational objective, per image.

        Args:
            images: (B, C, H, W), normalised.
            targets: class indices (B,), or real targets (B, C), see `likelihood`.

        Returns:
            The loss. Logs: `kl`, the divergences' share of it, and `top1` of classes or `rmse` of real targets.

        Raises:
            ValueError: targets that do not fit.
        """
        if self.training and len(images) > self.n_data:  # who draws with replacement may have that
            warnings.warn(
                f"DKMHead trains on a batch of {len(images)} images with n_data={self.n_data}: n_data is the number "
                "of images in the whole training set, that divergences are divided by",
                UserWarning,
                stacklevel=2,
            )
        prediction = self.predict(images)
        loss = self.machine.loss_of(prediction, targets, self.n_data)
        mean = prediction.mean.detach()
        with torch.no_grad():
            logs = {"kl": self.machine.kl().float() / self.n_data}
        if self.machine.likelihood == "categorical":
            logs["top1"] = (mean.argmax(1) == targets).float().mean()
        else:
            logs["rmse"] = (mean - targets.view_as(mean)).square().mean().sqrt().float()
        return Output(loss, logs)

    def param_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """For an optimizer: the backbone's parameters; the head's without weight decay, with Adam's beta2 of 0.9.

        Args:
            lr: of both.
            weight_decay: of the backbone.
        """
        own = [p for p in self.backbone.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = (
            [{"params": own, "lr": lr, "weight_decay": weight_decay}] if own else []
        )
        head = [p for p in self.machine.parameters() if p.requires_grad]
        return [*groups, {"params": head, "lr": lr, "weight_decay": 0.0, "betas": (0.9, 0.9)}]

    def no_weight_decay(self) -> set[str]:
        """The names that timm's networks want without weight decay, and all of the head's."""
        own: Any = getattr(self.backbone, "no_weight_decay", tuple)
        return {f"backbone.{name}" for name in own()} | {
            f"machine.{n}" for n, _ in self.machine.named_parameters()
        }

    def export(self, path: str | os.PathLike[str], *, name: str | None = None, **metadata: Any) -> None:
        """Write the backbone's weights; see `leaven.backbones.save`. The head is in the state_dict."""
        save(self.backbone, path, name=name, metadata=metadata)


def normalised(features: Tensor) -> Tensor:
    """Features (B, D) with mean 0 and mean square 1 over D, in float32 at least."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.layer_norm(features, features.shape[-1:])
