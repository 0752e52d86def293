"""Batches of one worker, from any position on, for ever: fetched, verified and decoded ahead of the trainer.

Threads take whole batches; processes share nothing but the cache on disk. All that a resume needs is the position.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Self

import numpy as np
import torch

from pipeline.config.schema import DataSection
from pipeline.data.cache import ShardCache
from pipeline.data.images import decode_into
from pipeline.data.index import Collection
from pipeline.data.order import Order
from pipeline.data.threads import map_ahead
from pipeline.errors import CorruptError, SaganError, UsageError
from sagan.world import World

_FETCHES = 4  # shards that are fetched side by side
_ROWS = 64  # the order is walked ahead in strides of so many rows of lanes
_CHUNK = 256  # images per tensor of `read_images`


@dataclass(frozen=True)
class Batch:
    """A worker's share of a global batch.

    positions: where in the run its images stand. images: uint8 [b, 3, H, W], channels-last in memory.
    labels: int64 [b]. wait_s: seconds that the trainer waited for it.
    """

    positions: range
    images: torch.Tensor
    labels: torch.Tensor
    wait_s: float


class Stream:
    """One worker's view of a split, in the order that `seed`, `data.lanes` and `data.window` decide.

    Raises UsageError where there is no such split, or where the cache cannot hold what is read side by side.
    """

    def __init__(
        self,
        collection: Collection,
        split: str,
        *,
        seed: int,
        world: World,
        data: DataSection,
        note: Callable[[str], None] = print,
    ) -> None:
        """`note` is told what is waited for."""
        self._collection, self._world, self._data = collection, world, data
        self._first_id = collection.ids(split).start
        self._order = Order(collection.shard_sizes(split), seed, data.lanes, data.window)
        _check_room(collection, split, data)
        self._cache = ShardCache(data.cache, data.cache_gb, data.patience_s, note)
        self._running: Generator[Batch, None, None] | None = None

    def batches(self, start: int, batch: int) -> Iterator[Batch]:
        """The shares of the global batches [start, start + batch), [start + batch, start + 2 batch), …, for ever.

        One iteration at a time: another call ends the one before. Raises CorruptError and EnvironmentFault at the batch
        that cannot be had.
        """
        self._stop()
        self._running = self._run(start, batch)
        return self._running

    def close(self) -> None:
        """End all threads and let go of the cache. The stream cannot be used any more."""
        self._cache.close()
        self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def _run(self, start: int, batch: int) -> Generator[Batch, None, None]:
        shares = (self._world.share(first, first + batch) for first in itertools.count(start, batch))
        with (
            _Prefetch(self._shards, self._open, start, self._stride, self._horizon) as prefetch,
            closing(map_ahead(self._read, shares, self._data.threads, self._data.ahead)) as read,
        ):
            while True:
                began = perf_counter()
                positions, images, labels = next(read)
                prefetch.reached(positions.start)
                yield Batch(positions, images, labels, perf_counter() - began)

    def _read(self, positions: range) -> tuple[range, torch.Tensor, torch.Tensor]:
        return positions, *_read(self._collection, self._cache, self._ids(positions))

    def _ids(self, positions: range) -> np.ndarray:
        return self._first_id + self._order.samples(positions)

    @property
    def _stride(self) -> int:
        return _ROWS * self._data.lanes

    @property
    def _horizon(self) -> int:
        """Positions to fetch ahead: the next window of every lane, or what fills a quarter of the cache."""
        mean_bytes = sum(shard.size for shard in self._collection.shards) / len(self._collection.labels)
        return min(self._data.window * self._data.lanes, int(self._data.cache_gb * 1e9 / 4 / mean_bytes))

    def _shards(self, first: int) -> list[int]:
        """Shards that this worker needs in the stride from `first` on, in the order of first use."""
        shards = self._collection.shard[self._ids(self._world.share(first, first + self._stride))]
        _, first_uses = np.unique(shards, return_index=True)
        return shards[np.sort(first_uses)].tolist()

    def _open(self, number: int) -> None:
        shard = self._collection.shards[number]
        self._cache.open(self._collection.shard_url(shard), shard).close()


def _check_room(collection: Collection, split: str, data: DataSection) -> None:
    """With less room than the windows of all lanes take, nearly every image would cost a fetch. Raises UsageError."""
    sizes = [shard.size for shard in collection.shards if shard.split == split]
    shards_per_window = math.ceil(data.window * len(sizes) / collection.size(split)) + 1
    needed = min(sum(sizes), data.lanes * shards_per_window * max(sizes))
    if needed > data.cache_gb * 1e9:
        raise UsageError(
            f"data.cache_gb is {data.cache_gb:g}, but {data.lanes} lanes with windows of {data.window} images "
            f"are read from up to {needed / 1e9:.3g} GB of shards side by side",
            "raise data.cache_gb, or lower data.window or data.lanes (these two change the order)",
        )


class _Prefetch:
    """A thread that walks the order in strides and opens shards before batches need them, up to `horizon` ahead.

    shards: those of the stride from a position on. open: fetches one. Failures are left to the batch that they concern.
    """

    def __init__(
        self, shards: Callable[[int], list[int]], open_: Callable[[int], None], start: int, stride: int, horizon: int
    ) -> None:
        self._shards, self._open, self._stride, self._horizon = shards, open_, stride, horizon
        self._start = self._reached = start
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._walk, name="prefetch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def reached(self, position: int) -> None:
        """Batches up to `position` are done."""
        with self._changed:
            self._reached = position
            self._changed.notify()

    def _walk(self) -> None:
        before: set[int] = set()
        with ThreadPoolExecutor(_FETCHES, "fetch") as pool:
            for first in itertools.count(self._start, self._stride):
                if not self._may_fetch(first):
                    return
                shards = self._shards(first)
                with suppress(SaganError):
                    list(pool.map(self._open, [shard for shard in shards if shard not in before]))
                before = set(shards)

    def _may_fetch(self, first: int) -> bool:
        """Wait until `first` is near enough. False where the stream has ended meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or first <= self._reached + self._horizon)
            return not self._ended


def read_images(
    collection: Collection, ids: np.ndarray, cache: str, cache_gb: float, threads: int
) -> Iterator[torch.Tensor]:
    """The images of sample `ids`, in their order, in tensors uint8 [n ≤ 256, 3, H, W].

    Raises CorruptError, EnvironmentFault.
    """
    shards = ShardCache(cache, cache_gb)
    chunks = (ids[first : first + _CHUNK] for first in range(0, len(ids), _CHUNK))
    with closing(shards), closing(map_ahead(partial(_read, collection, shards), chunks, threads, threads + 1)) as read:
        for images, _ in read:
            yield images


def _read(collection: Collection, cache: ShardCache, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, uint8 [n, 3, H, W] channels-last, and labels, int64 [n], of samples."""
    side = collection.resolution
    # Page-locked where there is a GPU, so that the copy to it overlaps with computing.
    images = torch.empty((len(ids), side, side, 3), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    pixels, numbers = images.numpy(), collection.shard[ids]
    offsets, lengths = collection.offset[ids].tolist(), collection.length[ids].tolist()
    for number in np.unique(numbers):  # one shard after the other, so that no thread needs more than one at a time
        shard = collection.shards[number]
        cached = cache.open(collection.shard_url(shard), shard)
        for row in np.flatnonzero(numbers == number).tolist():
            try:
                decode_into(cached.read(offsets[row], lengths[row]), pixels[row])
            except ValueError as reason:
                where = f"{collection.shard_url(shard)}: image at byte {offsets[row]}"
                raise CorruptError(f"{where}: {reason}", "sagan verify the collection") from reason
        cached.close()  # before the next is waited for: a full disk could not evict it
    return images.permute(0, 3, 1, 2), torch.from_numpy(collection.labels[ids])
