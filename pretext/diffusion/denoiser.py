"""Train a diffusion model: predict the noise."""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaven.backbones import save
from leaven.pretext.diffusion.schedule import Schedule
from leaven.pretext.output import Output


class Denoiser(nn.Module):
    """The mean squared error of predicted noise, at times drawn for every image.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, NeurIPS 2020, equation 14.

    Args:
        backbone: called as ``backbone(x_t, t)``; of more channels than the images have, the first are the noise.
        schedule: by default `Schedule.linear`.
    """

    def __init__(self, backbone: nn.Module, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.backbone, self.schedule = backbone, schedule or Schedule.linear()

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Output:
        """The loss of one draw of time and noise for each image.

        Args:
            images: (B, C, H, W), scaled to [-1, 1].
            generator: of the CPU, so that the draw is the same on every device; None takes the global one.
        """
        t = torch.randint(len(self.schedule), (len(images),), generator=generator)
        noise = torch.randn(images.shape, generator=generator).to(images)
        found = self.predict(self.schedule.add_noise(images, noise, t), t.to(images.device))
        return Output(F.mse_loss(found.float(), noise.float()), {})

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise (B, C, H, W) in images x (B, C, H, W) at times t (B,)."""
        found = self.backbone(x, t)
        found = found if isinstance(found, Tensor) else found[0]
        noise: Tensor = found[:, : x.shape[1]]
        return noise

    @torch.no_grad()
    def sample(
        self, shape: tuple[int, int, int, int], steps: int = 50, generator: torch.Generator | None = None
    ) -> Tensor:
        """Images out of noise, without further noise on the way.

        Source: Song et al., Denoising Diffusion Implicit Models, ICLR 2021, equation 12 with sigma = 0; what an image
        is guessed to be is kept within [-1, 1].

        Args:
            shape: (B, C, H, W) of what is drawn.
            steps: passes of the network.
            generator: of the CPU; None takes the global one.
        """
        device = next(self.backbone.parameters()).device
        x = torch.randn(shape, generator=generator).to(device)
        times = torch.linspace(len(self.schedule) - 1, 0, steps).round().long().tolist()
        for now, then in zip(times, [*times[1:], None], strict=True):
            abar = float(self.schedule.alphas_cumprod[now])
            abar_then = 1.0 if then is None else float(self.schedule.alphas_cumprod[then])
            noise = self.predict(x, torch.full((len(x),), now, device=device))
            guess = ((x - (1 - abar) ** 0.5 * noise) / abar**0.5).clamp(-1, 1)
            # A schedule may leave the image whole at t = 0: what is left there is no noise.
            noise = (x - abar**0.5 * guess) / max((1 - abar) ** 0.5, 1e-6)
            x = abar_then**0.5 * guess + (1 - abar_then) ** 0.5 * noise
        return x

    def export(self, path: str | os.PathLike[str], *, name: str | None = None, **metadata: Any) -> None:
        """Write the network's weights; see `leaven.backbones.save`."""
        save(self.backbone, path, name=name, metadata={"method": "DDPM", **metadata})
