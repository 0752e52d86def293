"""An ordered map in threads that runs a bounded number of items ahead of the consumer."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int) -> Generator[R, None, None]:
    """Yield `function(item)` for each of `items`, in order. The calls run in threads.

    Args:
        function: Function to call.
        items: Items, which may be endless.
        threads: Number of threads.
        ahead: Number of calls that may be started beyond the one whose result is due.

    An exception of the function is raised in place of the result of its item. Closing the generator ends the threads.

    The generator starts calls only when no call waits for a thread, and then as many as it may. A thread that wakes up
    holds up the consumer for about a millisecond, because both need Python's interpreter. The threads thus wake up
    after several results where `ahead` exceeds `threads`.
    """
    source, pending = iter(items), deque[Future[R]]()
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                if len(pending) <= threads:
                    new = itertools.islice(source, ahead + 1 - len(pending))
                    pending.extend(pool.submit(function, item) for item in new)
                if not pending:
                    return
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
