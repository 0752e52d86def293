"""Batches reach the simulated GPU without a wait of the host, and extractors compute there what they compute here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.evaluation.extractors.extractor_file import extractor_from_file
from pipeline.streaming.device_transfer import to_device
from pipeline.streaming.stream import Batch
from tests.simulated_gpu import simulated_gpu
from tests.simulated_gpu.simulated_gpu import Record, host


@pytest.fixture(autouse=True)
def record() -> Iterator[Record]:
    with Record() as record:
        yield record


def pixels(n: int) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=numbers)
    return images.contiguous(memory_format=torch.channels_last)


def test_a_batch_reaches_the_device_without_a_wait(record: Record) -> None:
    images, labels = to_device(Batch(range(8), pixels(8).pin_memory(), torch.arange(8), 0.0), simulated_gpu.NAME, 3)
    expected, _ = to_device(Batch(range(8), pixels(8), torch.arange(8), 0.0), "cpu", 3)
    assert torch.equal(host(images), expected)
    assert torch.equal(host(labels), torch.arange(8))
    assert not record.syncs
    assert not record.pageable


class Tiny(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.to(torch.float32).mean((2, 3)) + torch.ones(3)  # a program names the CPU for the new tensor
        return x, x[:, :2]


def test_a_program_exported_on_a_cpu_runs_on_the_device(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(Tiny(), (pixels(2),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "tiny.pt2")
    ours, theirs = (
        extractor_from_file(str(tmp_path / "tiny.pt2"), 32, device, trusted=True)
        for device in (simulated_gpu.NAME, "cpu")
    )
    for n in (2, 5):
        for found, expected in zip(ours(pixels(n)), theirs(pixels(n)), strict=True):
            assert torch.equal(host(found), expected)
