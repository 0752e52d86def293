"""From the bytes of a batch to what the discriminator is given."""

from __future__ import annotations

from functools import lru_cache

import torch

from pipeline.data.stream import Batch
from sagan.random import flips
from sagan.world import on_device


def to_device(batch: Batch, device: torch.device | str, flip_seed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 [b, 3, H, W] in [−1, 1], int64 [b]) on `device`: x = u8 · (2 / 255) − 1.

    With a `flip_seed`, each image is mirrored with probability one half, decided by its position in the run.
    """
    device = torch.device(device)
    images = _beside_kernels(batch.images, device) if device.type == "cuda" else batch.images.to(device)
    if flip_seed is not None:
        mirrored = on_device(flips(flip_seed, batch.positions), device)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images.to(torch.float32) * (2 / 255) - 1, on_device(batch.labels, device)


def _beside_kernels(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Page-locked `images` on a CUDA device, copied while it computes what it was given before."""
    copying, computing = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        copied = images.to(device, non_blocking=True)
    computing.wait_stream(copying)
    copied.record_stream(computing)  # its memory is not given to the next copy before the kernels are done with it
    return copied


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
