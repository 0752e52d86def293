"""Prefetching opens the shards within the horizon. In these tests every position has its own shard."""

from __future__ import annotations

import threading
from queue import Queue

from pipeline.errors import EnvironmentFault
from pipeline.streaming.prefetch import Prefetch

STRIDE, HORIZON, TIMEOUT_S = 2, 6, 60


class Shards:
    """Puts the opened shards into a queue. Opening the shard `failing` raises an error."""

    def __init__(self, failing: int | None = None) -> None:
        self.opened: Queue[int] = Queue()
        self.failing = failing
        self.idle = threading.Event()

    def of_stride(self, first: int) -> list[int]:
        return list(range(first, first + STRIDE))

    def open(self, shard: int) -> None:
        self.opened.put(shard)
        if shard == self.failing:
            raise EnvironmentFault("the storage cannot be reached", "wait")

    def take(self, count: int) -> list[int]:
        """The next `count` opened shards, sorted, since several are opened at a time."""
        return sorted(self.opened.get(timeout=TIMEOUT_S) for _ in range(count))


def prefetch(shards: Shards, start: int = 0) -> Prefetch:
    return Prefetch(shards.of_stride, shards.open, shards.idle.set, start, STRIDE, HORIZON)


def test_shards_up_to_the_horizon_are_opened_and_more_once_batches_are_done() -> None:
    shards = Shards()
    with prefetch(shards, start=10) as ahead:
        assert shards.take(8) == list(range(10, 18))  # strides that begin at most the horizon ahead
        assert shards.idle.wait(TIMEOUT_S)
        assert shards.opened.empty()
        ahead.reached(14)
        assert shards.take(4) == list(range(18, 22))
    assert shards.opened.empty()


def test_a_shard_that_two_strides_need_is_opened_once() -> None:
    shards = Shards()
    shards.of_stride = lambda first: [first // 4]  # type: ignore[method-assign]
    with prefetch(shards):
        assert shards.take(2) == [0, 1]
        assert shards.idle.wait(TIMEOUT_S)
    assert shards.opened.empty()


def test_a_shard_that_cannot_be_opened_is_left_to_its_batch() -> None:
    shards = Shards(failing=1)
    with prefetch(shards):
        assert shards.take(8) == list(range(8))


def test_the_thread_ends_with_the_block() -> None:
    before = set(threading.enumerate())
    shards = Shards()
    with prefetch(shards):
        shards.take(8)
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before
