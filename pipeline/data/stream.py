"""Batches of one worker, from any position on, for ever: fetched, verified and decoded ahead of the trainer.

Threads take whole batches; processes share nothing but the cache on disk. All that a resume needs is the position.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from time import perf_counter
from typing import Any, Self

import numpy as np
import torch

from pipeline.config.schema import DataSection
from pipeline.data.cache import ShardCache
from pipeline.data.images import EXTENSIONS, decode_into
from pipeline.data.index import Collection
from pipeline.data.order import Order
from pipeline.data.threads import map_ahead
from pipeline.errors import CorruptError, SaganError, UsageError
from sagan.world import World

_FETCHES = 8  # shards that are fetched side by side, so that a slow answer delays none of the others
_IDLE_S = 1.0  # a full disk waits so long for room that a pausing worker holds
_BLOCK = 2**24  # bytes of memory that are asked for at a time, for as many batches as they hold


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
        self._collection, self._split, self._world, self._data = collection, split, world, data
        self._first_id = collection.ids(split).start
        self._order = Order(collection.shard_sizes(split), seed, data.lanes, data.window)
        _check_room(collection, split, data)
        self._cache = ShardCache(data.cache, data.cache_gb, data.patience_s, note)
        self._running: Generator[Any, None, None] | None = None
        self._position = 0  # where the next batch of `batches` begins

    def batches(self, start: int, batch: int) -> Iterator[Batch]:
        """The shares of the global batches [start, start + batch), [start + batch, start + 2 batch), …, for ever.

        One iteration at a time: another call ends the one before. Raises CorruptError and EnvironmentFault at the batch
        that cannot be had.
        """
        self._stop()
        self._position = start
        self._running = self._run(start, batch)
        return self._running

    def samples(self, start: int, batch: int) -> Iterator[dict[str, Any]]:
        """What `batches` gives, one by one and still encoded: a first stage for webdataset's DataPipeline.

            wds.DataPipeline(partial(stream.samples, 0, 64), wds.map(decode), wds.batched(64))

        Samples are webdataset's: __key__ (the sample's id), __url__, jpg, png or webp, and cls where there are classes.
        Of K processes of a DataLoader each gives every K-th batch; batched like here, they come in the order of
        `batches`. One iteration at a time, errors as there; a stream that runs threads cannot be forked.
        """
        self._stop()
        self._running = self._run_samples(start, batch)
        return self._running

    def state_dict(self) -> dict[str, Any]:
        """All that `resume` needs, on any number of workers and threads: one integer, and of what it is a position."""
        order = {"split": self._split, "seed": self._order.seed, "lanes": self._data.lanes, "window": self._data.window}
        return {"position": self._position, "collection": self._collection.digest, "order": order}

    def resume(self, state: dict[str, Any], batch: int) -> Iterator[Batch]:
        """`batches` from where a `state_dict` was taken.

        Raises UsageError where it was taken of another collection or order: its position is another sample here.
        """
        ours = self.state_dict()
        for what in ("collection", "order"):
            if state[what] != ours[what]:
                raise UsageError(
                    f"the position was taken in {what} {state[what]}, this stream has {what} {ours[what]}",
                    "open the stream with the same collection, split, seed, data.lanes and data.window, or begin anew",
                )
        return self.batches(state["position"], batch)

    def close(self) -> None:
        """End all threads and let go of the cache. The stream cannot be used any more."""
        self._cache.close()
        self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def _run(self, start: int, batch: int) -> Generator[Batch, None, None]:
        memory = _Memory(-(-batch // self._world.size), self._collection.resolution)
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

    def _prefetch(self, start: int) -> _Prefetch:
        return _Prefetch(self._shards, self._open, self._cache.close_idle, start, self._stride, self._horizon)

    def _read(self, memory: _Memory, positions: range) -> tuple[range, torch.Tensor, torch.Tensor]:
        return positions, *_read(self._collection, self._cache, memory, self._ids(positions))

    def _ids(self, positions: range) -> np.ndarray:
        return self._first_id + self._order.samples(positions)

    @property
    def _stride(self) -> int:
        return max(1, self._horizon // 4)

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

    shards: those of the stride from a position on. open: fetches one. idle: called every second without anything to do.
    Failures are left to the batch that they concern.
    """

    def __init__(
        self,
        shards: Callable[[int], list[int]],
        open_: Callable[[int], None],
        idle: Callable[[], None],
        start: int,
        stride: int,
        horizon: int,
    ) -> None:
        self._shards, self._open, self._idle, self._stride, self._horizon = shards, open_, idle, stride, horizon
        self._start = self._reached = self._wanted = start
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
        self._reached = position
        if position >= self._wanted:  # waking a thread costs as much as decoding some images
            with self._changed:
                self._changed.notify()

    def _walk(self) -> None:
        for _ in map_ahead(self._fetch, self._needed(), _FETCHES, _FETCHES):
            pass

    def _fetch(self, shard: int) -> None:
        with suppress(SaganError):
            self._open(shard)

    def _needed(self) -> Iterator[int]:
        before: set[int] = set()
        for first in itertools.count(self._start, self._stride):
            if not self._may_fetch(first):
                return
            shards = self._shards(first)
            yield from (shard for shard in shards if shard not in before)
            before = set(shards)

    def _may_fetch(self, first: int) -> bool:
        """Wait until `first` is near enough. False where the stream has ended meanwhile."""
        with self._changed:
            self._wanted = first - self._horizon
            while not self._changed.wait_for(lambda: self._ended or self._wanted <= self._reached, timeout=_IDLE_S):
                self._idle()
            return not self._ended


def read_images(
    collection: Collection, ids: np.ndarray, cache: str, cache_gb: float, threads: int, batch: int = 256
) -> Iterator[torch.Tensor]:
    """The images of sample `ids`, in their order, in tensors uint8 [n ≤ `batch`, 3, H, W].

    Raises CorruptError, EnvironmentFault.
    """
    shards, memory = ShardCache(cache, cache_gb), _Memory(batch, collection.resolution)
    batches = (ids[first : first + batch] for first in range(0, len(ids), batch))
    read_batch = partial(_read, collection, shards, memory)
    with closing(shards), closing(map_ahead(read_batch, batches, threads, threads + 1)) as read:
        for images, _ in read:
            yield images


class _Memory:
    """Room for batches of up to `images` of `side` pixels; used again once nobody holds a batch any more.

    Into memory of small pages decoding is a tenth slower. NumPy asks the kernel for huge ones where it needs 4 MB or
    more, so it is asked for several batches at a time.
    """

    def __init__(self, images: int, side: int) -> None:
        self._shape = (images, side, side, 3)
        self._free: list[np.ndarray] = []

    def take(self, n: int) -> torch.Tensor:
        """uint8 [n, side, side, 3], holding anything."""
        if torch.cuda.is_available():  # page-locked, so that the copy overlaps with computing; torch uses it again
            return torch.empty((n, *self._shape[1:]), dtype=torch.uint8, pin_memory=True)
        try:
            room = self._free.pop()
        except IndexError:
            room, *more = np.empty((max(1, _BLOCK // math.prod(self._shape)), *self._shape), dtype=np.uint8)
            self._free += more
        pixels = room[:n]
        weakref.finalize(pixels, self._free.append, room)  # tensors and their views keep `pixels`
        return torch.from_numpy(pixels)


def _read(
    collection: Collection, cache: ShardCache, memory: _Memory, ids: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, uint8 [n, 3, H, W] channels-last, and labels, int64 [n], of samples."""
    images = memory.take(len(ids))
    pixels = images.numpy()
    places = (collection.shard[ids], collection.offset[ids], collection.length[ids], np.arange(len(ids)))
    # One shard after the other, so that no thread needs more than one at a time.
    for number, inside in groupby(sorted(zip(*(column.tolist() for column in places), strict=True)), itemgetter(0)):
        shard = collection.shards[number]
        cached = cache.open(collection.shard_url(shard), shard)
        for _, offset, length, row in inside:
            try:
                decode_into(cached.read(offset, length), pixels[row])
            except ValueError as reason:
                where = f"{collection.shard_url(shard)}: image at byte {offset}"
                raise CorruptError(f"{where}: {reason}", "sagan verify the collection") from reason
        cached.close()  # before the next is waited for: a full disk could not evict it
    return images.permute(0, 3, 1, 2), torch.from_numpy(collection.labels[ids])
