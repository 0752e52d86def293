"""An ordered map in threads that runs a bounded number of items ahead of the consumer."""

from __future__ import annotations

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
    """
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
