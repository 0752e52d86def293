from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.collection.manifest import Collection
from pipeline.errors import CorruptError
from pipeline.streaming.read_images import BatchMemory, read_images


def test_any_ids_come_in_their_order(packed: Collection, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 60, 600)
    tensors = list(read_images(packed, ids, f"{tmp_path}/cache", 1.0, threads=2))
    assert [len(images) for images in tensors] == [256, 256, 88]
    (everything,) = read_images(packed, np.arange(60), f"{tmp_path}/cache", 1.0, threads=1)
    assert torch.equal(torch.cat(tensors), everything[torch.from_numpy(ids)])
    assert len({image.numpy().tobytes() for image in everything}) == 60


def test_an_image_that_cannot_be_decoded_is_named_by_its_shard(packed: Collection, tmp_path: Path) -> None:
    """The index has wrong offsets, and the hash of the shard is right."""
    shifted = replace(packed, offset=packed.offset + 8)
    with pytest.raises(CorruptError, match=r"train-0000\d\.tar"):
        next(read_images(shifted, np.arange(8), f"{tmp_path}/cache", 1.0, threads=1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch manages page-locked memory")
def test_memory_is_reused_when_no_view_of_it_is_left() -> None:
    memory = BatchMemory(images=4096, side=64)  # so large that memory for one batch is allocated at a time
    first = memory.take(5)
    assert (first.shape, first.dtype) == ((5, 64, 64, 3), torch.uint8)
    view, place = first[2:3].permute(0, 3, 1, 2), first.data_ptr()
    del first
    assert memory.take(5).data_ptr() != place
    del view
    assert place in {memory.take(5).data_ptr() for _ in range(2)}
