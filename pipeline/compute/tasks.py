"""Calls of functions in tasks of a Ray cluster or in threads of this process."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache
from typing import Any, TypeVar

from pipeline.compute.resources import cluster_resources, visible_gpus
from pipeline.compute.root_cause import result
from pipeline.compute.threads import map_ahead
from pipeline.errors import counted

T = TypeVar("T")
R = TypeVar("R")


def map_parallel(
    function: Callable[..., R], items: Iterable[T], common: tuple[Any, ...], on_cluster: bool
) -> Generator[R, None, None]:
    """Yield `function(item, *common)` for each of `items`, in order.

    Args:
        function: Function to call.
        items: One item per call.
        common: Further arguments, equal in all calls. They are sent to the cluster once.
        on_cluster: If true, tasks of the connected Ray cluster call the function, with one CPU each. Otherwise threads
            of this process call it.

    The calls run ahead of the consumer by about twice the number of CPUs. An exception of the function is raised in
    place of the result of its item.
    """
    if not on_cluster:
        cpus = os.cpu_count() or 1
        yield from map_ahead(lambda item: function(item, *common), items, cpus, 2 * cpus)
        return
    import ray

    task = ray.remote(num_cpus=1, **visible_gpus(0))(_run)
    references = tuple(ray.put(value) for value in common)
    cpus = max(1, int(cluster_resources()["CPU"]))
    print(f"running in tasks of the Ray cluster, which has {counted(cpus, 'CPU')}", file=sys.stderr, flush=True)
    pending: deque[Any] = deque()
    try:
        for item in items:
            pending.append(task.remote(function, item, references))
            if len(pending) > 2 * cpus:
                yield result(pending.popleft())
        while pending:
            yield result(pending.popleft())
    finally:
        for reference in pending:
            ray.cancel(reference)


def run_as_task(function: Callable[..., R], *arguments: Any, cpus: float, gpus: float) -> R:
    """Call `function` in a task of the connected Ray cluster and return the result.

    The task reserves `cpus` CPUs and `gpus` GPUs. Raises the exceptions of the function, and ProcessDied.
    """
    import ray

    value: R = result(ray.remote(num_cpus=cpus, **visible_gpus(gpus))(function).remote(*arguments))
    return value


class BackgroundTask:
    """A call of `function` in a task of the connected Ray cluster, while the caller goes on.

    The task reserves `cpus` CPUs and `gpus` GPUs. It is not repeated where its process dies.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, cpus: float, gpus: float) -> None:
        import ray

        options = {"num_cpus": cpus, **visible_gpus(gpus), "max_retries": 0, "num_returns": "streaming"}
        # Without "DEFAULT", Ray would place the task in the placement group of a sweep's trial.
        task = ray.remote(scheduling_strategy="DEFAULT", **options)(_call)
        self._values = task.remote(function, arguments)  # None at the beginning, and then the result

    def has_begun(self) -> bool:
        """Return whether the call has had its resources. The call does not wait."""
        import ray

        return bool(ray.wait([self._values], timeout=0)[0])

    def is_done(self, timeout_s: float = 0.0) -> bool:
        """Return whether the call has ended, after at most `timeout_s` seconds of waiting."""
        import ray

        return bool(ray.wait([self._values.completed()], timeout=timeout_s)[0])

    def result(self) -> Any:
        """Wait for the call and return its result. Raises the exceptions of the function, and ProcessDied."""
        *_, value = [result(reference) for reference in self._values]
        return value

    def cancel(self) -> None:
        """End the task's process."""
        import ray

        ray.cancel(self._values, force=True)


def _call(function: Callable[..., R], arguments: tuple[Any, ...]) -> Generator[R | None, None, None]:
    yield None
    yield function(*arguments)


def _run(function: Callable[..., R], item: T, references: tuple[Any, ...]) -> R:
    return function(item, *_fetched(references))


@lru_cache(maxsize=1)
def _fetched(references: tuple[Any, ...]) -> list[Any]:
    """Return the objects. A process fetches them once for all its tasks; a list of a million images takes seconds."""
    import ray

    return list(ray.get(list(references)))
