"""One function over many shards: by this process's threads, or by the tasks of a Ray cluster, in the same order."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache
from typing import Any, TypeVar

from pipeline.data.threads import map_ahead

T = TypeVar("T")
R = TypeVar("R")


def spread(
    function: Callable[..., R], items: Iterable[T], common: tuple[Any, ...], here: bool
) -> Generator[R, None, None]:
    """function(item, *common) of each of `items`, in order, few more than have been taken.

    Ray's tasks do it where this process is joined to a cluster, unless it must be done `here`: where data lies on this
    machine its threads keep all cores busy. An exception comes out at its item.
    """
    if here or not _joined_to_a_cluster():
        cpus = os.cpu_count() or 1
        yield from map_ahead(lambda item: function(item, *common), items, cpus, 2 * cpus)
        return
    import ray

    task = ray.remote(num_cpus=1)(_run)
    held = tuple(ray.put(value) for value in common)
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    print(f"by tasks of the Ray cluster, which has {cpus} CPUs", file=sys.stderr, flush=True)
    pending: deque[Any] = deque()
    try:
        for item in items:
            pending.append(task.remote(function, item, held))
            if len(pending) > 2 * cpus:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())
    finally:
        for reference in pending:
            ray.cancel(reference)


def _joined_to_a_cluster() -> bool:
    import ray

    return bool(ray.is_initialized())


def _run(function: Callable[..., R], item: T, held: tuple[Any, ...]) -> R:
    return function(item, *_fetched(held))


@lru_cache(maxsize=1)
def _fetched(held: tuple[Any, ...]) -> list[Any]:
    """Once per process and not per task: a list of a million images takes its time."""
    import ray

    return list(ray.get(list(held)))


def _result(reference: Any) -> Any:
    """Raises what the task raised."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
