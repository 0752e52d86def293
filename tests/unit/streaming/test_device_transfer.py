from __future__ import annotations

import torch

from pipeline.streaming.device_transfer import to_device
from pipeline.streaming.stream import Batch
from sagan.random import draw_flips
from sagan.ranks import World


def batch_of(positions: range) -> Batch:
    """Each image depends on its position alone."""
    images = torch.stack([torch.arange(3 * 4 * 4).reshape(3, 4, 4) * 5 + position for position in positions])
    pixels = images.to(torch.uint8).contiguous(memory_format=torch.channels_last)
    return Batch(positions, pixels, torch.tensor([p % 10 for p in positions]), 0.0)


def test_bytes_become_the_interval_from_minus_one_to_one() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    images, labels = to_device(Batch(range(1), pixels, torch.tensor([4]), 0.0), "cpu", flip_seed=None)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.double(), pixels.double() * (2 / 255) - 1, rtol=0, atol=2e-7)
    assert (images.min(), images.max()) == (-1, 1)
    assert labels.tolist() == [4]


def test_memory_stays_channels_last() -> None:
    for seed in (None, 0):
        images, _ = to_device(batch_of(range(8)), "cpu", seed)
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_mirroring_is_decided_by_the_position_in_the_run() -> None:
    positions = range(100, 140)
    plain, _ = to_device(batch_of(positions), "cpu", None)
    images, _ = to_device(batch_of(positions), "cpu", 7)
    mirrored = draw_flips(7, positions)
    assert 0 < mirrored.sum() < 40
    assert torch.equal(images[mirrored], plain[mirrored].flip(3))
    assert torch.equal(images[~mirrored], plain[~mirrored])
    for rank in range(3):
        share = World(rank, 3).share(positions.start, positions.stop)
        assert torch.equal(to_device(batch_of(share), "cpu", 7)[0], images[[p - 100 for p in share]])
