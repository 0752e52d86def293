"""An endless stream of one worker's batches from any position on.

Shards are downloaded, verified and decoded ahead of training.

Each thread works on a whole batch. Processes share only the cache on disk. The position is enough to resume.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch

from pipeline.collection.image_codec import EXTENSIONS
from pipeline.collection.manifest import Collection
from pipeline.compute.threads import map_ahead
from pipeline.config.schema import DataSection
from pipeline.errors import UsageError
from pipeline.streaming.order import Order
from pipeline.streaming.prefetch import Prefetch
from pipeline.streaming.read_images import BatchMemory, read_batch
from pipeline.streaming.shard_cache import ShardCache
from sagan.ranks import World


@dataclass(frozen=True)
class Batch:
    """A worker's share of a global batch.

    Attributes:
        positions: Positions of the images in the run.
        images: uint8 [b, 3, H, W], channels-last in memory.
        labels: int64 [b].
        wait_s: Seconds that training waited for the batch.
    """

    positions: range
    images: torch.Tensor
    labels: torch.Tensor
    wait_s: float


class Stream:
    """One worker's share of a split, in the order that `seed`, `data.lanes` and `data.window` determine.

    Args:
        collection: The collection that holds the split.
        split: Name of the split.
        seed: Seed of the order.
        world: Rank of this worker and number of workers.
        data: Lanes, window, cache and threads.
        note: Called with a message while the stream waits for a shard.

    Raises UsageError where the collection has no such split, or where the cache cannot hold the shards that are read at
    the same time.
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
        self._collection, self._split, self._world, self._data = collection, split, world, data
        self._first_id = collection.ids(split).start
        self._order = Order(collection.shard_sizes(split), seed, data.lanes, data.window)
        _check_room(collection, split, data)
        self._cache = ShardCache(data.cache, data.cache_gb, data.patience_s, note)
        self._running: Generator[Any, None, None] | None = None
        self._position = 0  # of the next batch of `batches`

    def batches(self, start: int, batch: int) -> Iterator[Batch]:
        """Return an endless iterator over this worker's shares of the global batches from position `start` on.

        The global batches are [start, start + batch), [start + batch, start + 2 batch), …. A stream has one iterator at
        a time: another call ends the previous iterator. The iterator raises CorruptError or EnvironmentFault at the
        batch that cannot be read.
        """
        self._stop()
        self._position = start
        self._running = self._run(start, batch)
        return self._running

    def samples(self, start: int, batch: int) -> Iterator[dict[str, Any]]:
        """Return an iterator over the samples of `batches`, one by one and encoded.

        It is a first stage of webdataset's DataPipeline:

            wds.DataPipeline(partial(stream.samples, 0, 64), wds.map(decode), wds.batched(64))

        A sample is a dict with webdataset's keys: `__key__` (the sample id), `__url__` (URL of the shard), `jpg`, `png`
        or `webp` (the encoded image), and `cls` (the label) where the collection has classes. Each of the K processes
        of a DataLoader yields every K-th batch. `wds.batched` with the same batch size restores the order of `batches`.

        A stream has one iterator at a time. The iterator raises the errors of `batches`. A stream whose threads run
        cannot be forked.
        """
        self._stop()
        self._running = self._run_samples(start, batch)
        return self._running

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the identity of the collection and of the order.

        `resume` needs nothing else. It accepts the state on any number of workers and threads.
        """
        order = {"split": self._split, "seed": self._order.seed, "lanes": self._data.lanes, "window": self._data.window}
        return {"position": self._position, "collection": self._collection.digest, "order": order}

    def resume(self, state: dict[str, Any], batch: int) -> Iterator[Batch]:
        """Return `batches` from the position in `state`, which `state_dict` returned.

        Raises UsageError where `state` has another collection or order. Its position is then another sample.
        """
        own_state = self.state_dict()
        for what in ("collection", "order"):
            if state[what] != own_state[what]:
                raise UsageError(
                    f"the state has {what} {state[what]}, but this stream has {what} {own_state[what]}",
                    "open the stream with the same collection, split, seed, data.lanes and data.window, or start anew",
                )
        return self.batches(state["position"], batch)

    def close(self) -> None:
        """End all threads and close the cache. The stream cannot be used afterwards."""
        self._cache.close()
        self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def _run(self, start: int, batch: int) -> Generator[Batch, None, None]:
        memory = BatchMemory(-(-batch // self._world.size), self._collection.resolution)
        read_share = partial(self._read, memory)
        with (
            self._prefetch(start) as prefetch,
            closing(map_ahead(read_share, self._shares(start, batch), self._data.threads, self._data.ahead)) as read,
        ):
            for first in itertools.count(start, batch):
                began = perf_counter()
                positions, images, labels = next(read)
                prefetch.reached(first)
                self._position = first + batch
                yield Batch(positions, images, labels, perf_counter() - began)

    def _run_samples(self, start: int, batch: int) -> Generator[dict[str, Any], None, None]:
        process = torch.utils.data.get_worker_info()
        number, processes = (process.id, process.num_workers) if process else (0, 1)
        collection = self._collection
        with self._prefetch(start) as prefetch:
            for share in itertools.islice(self._shares(start, batch), number, None, processes):
                prefetch.reached(share.start)
                for i in self._ids(share).tolist():
                    shard = collection.shards[collection.shard[i]]
                    url = collection.shard_url(shard)
                    with closing(self._cache.open(url, shard)) as cached:
                        image = cached.read(int(collection.offset[i]), int(collection.length[i]))
                    label = {"cls": str(collection.labels[i]).encode()} if collection.class_names else {}
                    yield {"__key__": f"{i:08d}", "__url__": url, EXTENSIONS[collection.encoding]: image, **label}

    def _shares(self, start: int, batch: int) -> Iterator[range]:
        return (self._world.share(first, first + batch) for first in itertools.count(start, batch))

    def _prefetch(self, start: int) -> Prefetch:
        return Prefetch(self._shards, self._open, self._cache.close_idle, start, self._stride, self._horizon)

    def _read(self, memory: BatchMemory, positions: range) -> tuple[range, torch.Tensor, torch.Tensor]:
        return positions, *read_batch(self._collection, self._cache, memory, self._ids(positions))

    def _ids(self, positions: range) -> np.ndarray:
        return self._first_id + self._order.samples(positions)

    @property
    def _stride(self) -> int:
        return max(1, self._horizon // 4)

    @property
    def _horizon(self) -> int:
        """Positions to prefetch: the next window of every lane, but at most as many as fill a quarter of the cache."""
        mean_bytes = sum(shard.size for shard in self._collection.shards) / len(self._collection.labels)
        return min(self._data.window * self._data.lanes, int(self._data.cache_gb * 1e9 / 4 / mean_bytes))

    def _shards(self, first: int) -> list[int]:
        """Return the shards that this worker needs in the stride from `first` on, in the order of first use."""
        shards = self._collection.shard[self._ids(self._world.share(first, first + self._stride))]
        _, first_uses = np.unique(shards, return_index=True)
        return shards[np.sort(first_uses)].tolist()

    def _open(self, number: int) -> None:
        shard = self._collection.shards[number]
        self._cache.open(self._collection.shard_url(shard), shard).close()


def _check_room(collection: Collection, split: str, data: DataSection) -> None:
    """Raise UsageError where the cache cannot hold the windows of all lanes.

    In a smaller cache, nearly every image would cost a download.
    """
    sizes = [shard.size for shard in collection.shards if shard.split == split]
    shards_per_window = math.ceil(data.window * len(sizes) / collection.size(split)) + 1
    needed = min(sum(sizes), data.lanes * shards_per_window * max(sizes))
    if needed > data.cache_gb * 1e9:
        raise UsageError(
            f"data.cache_gb is {data.cache_gb:g}, but {data.lanes} lanes with windows of {data.window} images "
            f"need up to {needed / 1e9:.3g} GB of shards at the same time",
            "raise data.cache_gb, or lower data.window or data.lanes, which both change the order",
        )
