"""Reads images of a collection by sample id, and decodes them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch

from pipeline.collection.image_codec import decode_into
from pipeline.collection.manifest import Collection
from pipeline.compute.threads import map_ahead
from pipeline.errors import CorruptError
from pipeline.streaming.shard_cache import ShardCache

_BLOCK = 2**24  # bytes that are allocated at a time; they hold one or more batches


def read_images(
    collection: Collection, ids: np.ndarray, cache: str, cache_gb: float, threads: int, batch: int = 256
) -> Iterator[torch.Tensor]:
    """Yield the images of the samples `ids`, in the order of `ids`, as tensors uint8 [n, 3, H, W] with n ≤ `batch`.

    Args:
        collection: The collection that holds the images.
        ids: Sample ids, int [N].
        cache: Folder of the shard cache.
        cache_gb: Size limit of that folder in gigabytes.
        threads: Number of decoding threads.
        batch: Largest number of images in one tensor.

    Raises CorruptError, EnvironmentFault.
    """
    shards, memory = ShardCache(cache, cache_gb), BatchMemory(batch, collection.resolution)
    batches = (ids[first : first + batch] for first in range(0, len(ids), batch))
    read = partial(read_batch, collection, shards, memory)
    with closing(shards), closing(map_ahead(read, batches, threads, threads + 1)) as decoded:
        for images, _ in decoded:
            yield images


class BatchMemory:
    """Memory for batches of up to `images` images of `side` px. It is reused once no reference to the batch exists.

    Decoding into memory of small pages is a tenth slower. NumPy requests huge pages from the kernel for arrays of 4 MB
    and more. One allocation therefore covers several batches.
    """

    def __init__(self, images: int, side: int) -> None:
        self._shape = (images, side, side, 3)
        self._free: list[np.ndarray] = []

    def take(self, n: int) -> torch.Tensor:
        """Return uninitialised memory for n images: uint8 [n, side, side, 3]."""
        if torch.cuda.is_available():
            # The copy of page-locked memory overlaps with computing. torch itself reuses this memory.
            return torch.empty((n, *self._shape[1:]), dtype=torch.uint8, pin_memory=True)
        try:
            room = self._free.pop()
        except IndexError:
            room, *more = np.empty((max(1, _BLOCK // math.prod(self._shape)), *self._shape), dtype=np.uint8)
            self._free += more
        pixels = room[:n]
        weakref.finalize(pixels, self._free.append, room)  # tensors and their views keep `pixels` alive
        return torch.from_numpy(pixels)


def read_batch(
    collection: Collection, cache: ShardCache, memory: BatchMemory, ids: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images and labels of the samples `ids`.

    Images are uint8 [n, 3, H, W], channels-last in memory. Labels are int64 [n]. Raises CorruptError, EnvironmentFault.
    """
    images = memory.take(len(ids))
    pixels = images.numpy()
    places = (collection.shard[ids], collection.offset[ids], collection.length[ids], np.arange(len(ids)))
    # Samples are sorted by shard, so that a thread needs only one shard at a time.
    for number, rows in groupby(sorted(zip(*(column.tolist() for column in places), strict=True)), itemgetter(0)):
        shard = collection.shards[number]
        cached = cache.open(collection.shard_url(shard), shard)
        for _, offset, length, row in rows:
            try:
                decode_into(cached.read(offset, length), pixels[row])
            except ValueError as reason:
                where = f"{collection.shard_url(shard)}: image at byte {offset}"
                raise CorruptError(f"{where}: {reason}", "check the collection with `sagan verify`") from reason
        cached.close()  # before the wait for the next shard, since an open file keeps its room on a full disk
    return images.permute(0, 3, 1, 2), torch.from_numpy(collection.labels[ids])
