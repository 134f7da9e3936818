"""EfficientTrain++'s replay buffer: fewer images to decode while they are small and cheap to train on."""

from typing import Any

import torch
from torch import Tensor


class ReplayBuffer:
    """The last so many samples of the loader; each batch is filled up with some of them, drawn with replacement.

    Lives on the CPU, or where its batches do; it takes as much memory as `capacity` samples. It starts empty, and is
    not saved: after a resume it fills again, so a run with one does not resume bit for bit.

    Source: EfficientTrain++, TPAMI 2024 (arXiv 2405.08768), section on training with few CPUs.

    Args:
        capacity: samples to keep.

    Raises:
        ValueError: a capacity below 1.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a replay buffer holds at least one sample, not {capacity}")
        self.capacity = capacity
        self.parts: list[
            Tensor
        ] = []  # (capacity, ...) each, written in a ring: nothing is copied to make room
        self.written = 0

    def __len__(self) -> int:
        return min(self.written, self.capacity)

    def extend(self, batch: Any, replay: int, generator: torch.Generator) -> Any:
        """The new samples, followed by `replay - 1` times as many drawn from the buffer, the new ones in it.

        Args:
            batch: a list or tuple of tensors with the samples along the first dimension.
            replay: 1 gives the batch back, and empties the buffer: its images are not needed any more.
            generator: on the CPU; what is drawn depends on it and on the batches before.
        """
        if replay == 1:
            self.parts, self.written = [], 0
            return batch
        new = list(batch)
        # At first, and where the images have another size now.
        if not self.parts or any(a.shape[1:] != b.shape[1:] for a, b in zip(self.parts, new, strict=True)):
            self.parts = [part.new_empty(self.capacity, *part.shape[1:]) for part in new]
            self.written = 0
        places = torch.arange(self.written, self.written + len(new[0]))[-self.capacity :] % self.capacity
        for kept, part in zip(self.parts, new, strict=True):
            kept[places.to(kept.device)] = part[-self.capacity :]
        self.written += len(new[0])
        drawn = torch.randint(len(self), ((replay - 1) * len(new[0]),), generator=generator)
        return type(batch)(
            torch.cat([part, kept[drawn.to(kept.device)]]) for part, kept in zip(new, self.parts, strict=True)
        )
