"""How long a rank works in a step, without what it waits for others. A rank that works much longer holds all up."""

from __future__ import annotations

import time
from types import TracebackType

_SHARE = 0.1  # of the last step in the mean: the mean covers about the last ten steps


class OwnTime:
    """Takes the time of steps. It is a context in which a rank waits for other ranks or for its device.

    On a GPU, it is the time of the host: reading images, and giving work to the device.

    Attributes:
        seconds: Mean of the last steps, without waiting; 0.0 before the second step.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._waited = 0.0
        self._began: float | None = None
        self._wait_began = 0.0

    def __enter__(self) -> None:
        self._wait_began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._waited += time.perf_counter() - self._wait_began

    def begin_step(self) -> None:
        """Begin the next step."""
        self._began, self._waited = time.perf_counter(), 0.0

    def end_step(self) -> None:
        """End the step that has begun."""
        assert self._began is not None, "a step has begun"
        own = time.perf_counter() - self._began - self._waited
        self.seconds += (_SHARE if self.seconds else 1.0) * (own - self.seconds)
