from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import closing

from pipeline.compute.threads import map_ahead


def test_endless_items_are_computed_a_bounded_number_ahead() -> None:
    called: list[int] = []
    with closing(map_ahead(called.append, itertools.count(), threads=2, ahead=5)) as results:
        for _ in range(10):
            next(results)
    assert 10 <= len(called) <= 10 + 5


def test_calls_start_together_once_none_waits_for_a_thread() -> None:
    """Each start wakes threads, which hold up the consumer."""
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        while True:
            drawn += 1
            yield drawn

    with closing(map_ahead(lambda item: item, items(), threads=2, ahead=5)) as results:
        assert [(next(results), drawn)[1] for _ in range(9)] == [6, 6, 6, 6, 10, 10, 10, 10, 14]


def test_as_many_run_side_by_side_as_there_are_threads() -> None:
    together = threading.Barrier(3, timeout=60)
    list(map_ahead(lambda _: together.wait(), range(9), threads=3, ahead=6))


def test_closing_ends_the_threads() -> None:
    before = set(threading.enumerate())
    results = map_ahead(abs, itertools.count(), threads=2, ahead=4)
    next(results)
    assert set(threading.enumerate()) > before
    results.close()
    assert set(threading.enumerate()) == before
