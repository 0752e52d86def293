"""Prefetching: a thread opens shards before batches need them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Self

from pipeline.compute.threads import map_ahead
from pipeline.errors import SaganError

_FETCHES = 8  # shards that are downloaded concurrently, so that a slow response does not delay the others
_IDLE_S = 1.0  # seconds between two calls of `idle`, which frees the room that evicted files take on a full disk


class Prefetch:
    """A thread that walks the order in strides and opens shards up to `horizon` positions ahead.

    It ignores errors. The batch that needs the shard opens it again and raises the error.

    Args:
        shards: Returns the shards of the stride that begins at a position.
        open_: Opens one shard, and downloads it where the cache lacks it.
        idle: Called every second while there is nothing to prefetch.
        start: First position.
        stride: Positions per stride.
        horizon: Positions that the thread may be ahead of `reached`.
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
        """Record that the batches before `position` are done."""
        self._reached = position
        if position >= self._wanted:  # only then, since waking a thread costs as much as decoding some images
            with self._changed:
                self._changed.notify()

    def _walk(self) -> None:
        for _ in map_ahead(self._fetch, self._needed(), _FETCHES, _FETCHES):
            pass

    def _fetch(self, shard: int) -> None:
        with suppress(SaganError):
            self._open(shard)

    def _needed(self) -> Iterator[int]:
        """Yield the shards of each stride that the stride before it does not need."""
        before: set[int] = set()
        for first in itertools.count(self._start, self._stride):
            if not self._may_fetch(first):
                return
            shards = self._shards(first)
            yield from (shard for shard in shards if shard not in before)
            before = set(shards)

    def _may_fetch(self, first: int) -> bool:
        """Wait until `first` is within the horizon. Return False where the stream ends first."""
        with self._changed:
            self._wanted = first - self._horizon
            while not self._changed.wait_for(lambda: self._ended or self._wanted <= self._reached, timeout=_IDLE_S):
                self._idle()
            return not self._ended
