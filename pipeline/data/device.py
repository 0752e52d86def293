"""From the bytes of a batch to what the discriminator is given."""

from __future__ import annotations

import torch

from pipeline.data.stream import Batch
from sagan.random import flips


def to_device(batch: Batch, device: torch.device | str, flip_seed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 [b, 3, H, W] in [−1, 1], int64 [b]) on `device`: x = u8 · (2 / 255) − 1.

    With a `flip_seed`, each image is mirrored with probability one half, decided by its position in the run.
    """
    images = batch.images.to(device, non_blocking=True)
    if flip_seed is not None:
        mirrored = flips(flip_seed, batch.positions).to(device)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images.to(torch.float32) * (2 / 255) - 1, batch.labels.to(device, non_blocking=True)
