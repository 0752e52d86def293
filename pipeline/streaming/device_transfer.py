"""Copies a batch to the device and converts it to the input of the discriminator."""

from __future__ import annotations

from functools import lru_cache

import torch

from pipeline.streaming.augmentation import mirror_at_random
from pipeline.streaming.stream import Batch
from sagan.device import on_device


def to_device(batch: Batch, device: torch.device | str, flip_seed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images and labels of a batch on `device`.

    Images become float32 [b, 3, H, W] in [−1, 1]: x = u8 · (2 / 255) − 1. Labels are int64 [b].

    Args:
        batch: The batch to copy.
        device: The device of the returned tensors.
        flip_seed: Seed of `mirror_at_random`. None: no image is mirrored.
    """
    device = torch.device(device)
    images = _copy_to_cuda(batch.images, device) if device.type == "cuda" else batch.images.to(device)
    if flip_seed is not None:
        images = mirror_at_random(images, batch.positions, flip_seed)
    return images.to(torch.float32).mul_(2 / 255).sub_(1), on_device(batch.labels, device)


def _copy_to_cuda(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return page-locked `images` on a CUDA device.

    The copy runs on a stream of its own. It overlaps with the kernels that were queued before.
    """
    copying, computing = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        copied = images.to(device, non_blocking=True)
    computing.wait_stream(copying)
    # Keeps the allocator from giving this memory to the next copy while kernels still read it.
    copied.record_stream(computing)
    return copied


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
