"""Functions run in threads of this process. tests/system/test_packing_on_cluster.py runs them in tasks of Ray."""

from __future__ import annotations

import os
import threading
from contextlib import closing

import pytest

from pipeline.compute.tasks import map_parallel

CPUS = os.cpu_count() or 1


def test_results_come_in_the_order_of_the_items() -> None:
    """The first item waits for the second where there are two threads."""
    second = threading.Event()

    def scaled(item: int, factor: int, offset: int) -> int:
        if CPUS > 1 and item == 0:
            assert second.wait(60)
        if item == 1:
            second.set()
        return factor * item + offset

    assert list(map_parallel(scaled, range(100), (3, 1), on_cluster=False)) == [3 * i + 1 for i in range(100)]


def test_an_exception_is_raised_at_its_item() -> None:
    def inverse(item: int) -> float:
        return 1 / (item - 5)

    results = map_parallel(inverse, range(10), (), on_cluster=False)
    assert [next(results) for _ in range(5)] == [1 / (i - 5) for i in range(5)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_few_more_are_computed_than_are_taken() -> None:
    called = []

    def note(item: int) -> int:
        called.append(item)
        return item

    with closing(map_parallel(note, range(10_000), (), on_cluster=False)) as results:
        assert called == []
        assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert sorted(called) == list(range(len(called)))
    assert 3 <= len(called) <= 3 + 2 * CPUS + 1
