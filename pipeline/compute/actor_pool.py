"""A pool of Ray actors that hold equal objects and share the calls of a method."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

from pipeline.compute.resources import visible_gpus
from pipeline.compute.root_cause import result

_QUEUED = 2  # calls that wait at each actor, so that an actor is not idle while a result is fetched


class ActorPool:
    """A pool of `count` actors. Each actor calls `make()` in its process and holds the object that it returns.

    An actor that dies is started again, and its calls are repeated.
    """

    def __init__(self, make: Callable[[], Any], count: int, cpus: float, gpus: float) -> None:
        """Start the actors. Each actor reserves `cpus` CPUs and `gpus` GPUs."""
        import ray

        options = {"num_cpus": cpus, **visible_gpus(gpus), "max_restarts": -1, "max_task_retries": -1}
        actor = ray.remote(PoolActor).options(**options)
        self._make = [ray.put(make)]  # an actor that is started again fetches it again
        self._actors = [actor.remote(self._make) for _ in range(count)]

    def map(self, method: str, shared: Any, items: Sequence[Any], **options: Any) -> Iterator[Any]:
        """Yield `object.method(shared, item, **options)` for each of `items`, in order.

        `shared` is sent to each actor once. Raises the exceptions of the method, and ProcessDied where no actor starts.
        """
        import ray

        # Ray would fetch a bare reference for every call. It does not fetch a reference in a list, so the actor fetches
        # the value once and keeps it.
        reference, pending = [ray.put(shared)], deque[Any]()
        for actor, item in zip(cycle(self._actors), items, strict=False):
            pending.append(actor.call.remote(method, reference, item, options))
            if len(pending) > _QUEUED * len(self._actors):
                yield result(pending.popleft())
        while pending:
            yield result(pending.popleft())

    def stop(self) -> None:
        """End the actors' processes."""
        import ray

        for actor in self._actors:
            ray.kill(actor)


class PoolActor:
    """One process of an `ActorPool`."""

    def __init__(self, make: list[Any]) -> None:
        import ray

        self._object = ray.get(make[0])()
        self._reference: Any = None
        self._shared: Any = None

    def call(self, method: str, reference: list[Any], item: Any, options: dict[str, Any]) -> Any:
        """Return `object.method(shared, item, **options)`, where `reference[0]` refers to `shared`."""
        import ray

        if self._reference != reference[0]:
            self._reference, self._shared = reference[0], ray.get(reference[0])
        return getattr(self._object, method)(self._shared, item, **options)
