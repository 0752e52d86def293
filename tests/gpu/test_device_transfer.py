"""Batches reach a CUDA device unharmed while it is busy. Needs what streaming needs."""

import pytest
import torch

pytest.importorskip("simplejpeg")

from pipeline.streaming.device_transfer import to_device
from pipeline.streaming.stream import Batch


def batch_at(start):
    numbers = torch.Generator().manual_seed(start)
    images = torch.randint(0, 256, (64, 3, 128, 128), dtype=torch.uint8, generator=numbers)
    return Batch(range(start, start + 64), images.contiguous(memory_format=torch.channels_last), torch.arange(64), 0.0)


def pinned(batch):
    return Batch(batch.positions, batch.images.pin_memory(), batch.labels, 0.0)


def test_batches_copied_beside_kernels_equal_the_cpus():
    """Nothing holds a batch once it has been handed over, and memory is used again on both sides."""
    work = torch.randn(4096, 4096, device="cuda")
    sums = []
    for start in range(0, 20 * 64, 64):
        work = work @ work / 64
        images, labels = to_device(pinned(batch_at(start)), "cuda", flip_seed=3)
        sums.append((images.double() * torch.arange(1, 129, device="cuda")).sum() + labels.sum())
    for start, found in zip(range(0, 20 * 64, 64), sums, strict=True):
        images, labels = to_device(batch_at(start), "cpu", flip_seed=3)
        expected = (images.double() * torch.arange(1, 129)).sum() + labels.sum()
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-6)
