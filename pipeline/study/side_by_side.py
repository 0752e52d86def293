"""Runs side by side: each in a thread of this driver, as many at once as may start."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Queue

from pipeline.errors import InterruptedRun
from pipeline.training.stop_signals import stop_signals

_POLL_S = 0.2
_LEAVING_S = 30.0  # longest wait for a thread after a second signal


@dataclass
class StopRequest:
    """What the runs are asked. A run that trains calls it several times a second.

    Attributes:
        asked: Whether the runs must write checkpoints and stop.
        at_once: Whether they must end at once. The call then raises KeyboardInterrupt.
    """

    asked: bool = False
    at_once: bool = False

    def __call__(self) -> bool:
        if self.at_once:
            raise KeyboardInterrupt
        return self.asked


def run_side_by_side(
    owner: str,
    runs: Mapping[str, Callable[[StopRequest], None]],
    may_start: Callable[[int], bool],
    on_end: Callable[[str, int], None],
) -> None:
    """Call functions in threads, in their order, as many at once as may start. Return when all have returned.

    After SIGINT or SIGTERM no other function is called, and those that run are asked to stop. After a second signal
    they end at once. Where a function raises an exception, no other is called, and those that run go on to their end.

    Args:
        owner: What the runs belong to, for a message.
        runs: Functions by name.
        may_start: Returns whether another function may be called beside a number of running ones. It is asked several
            times a second.
        on_end: Called in this thread with (name, number of functions that still run) after a function has returned.

    Raises InterruptedRun where the runs were stopped, and otherwise the first exception of a function.
    """
    waiting, running, stop = list(runs), set[str](), StopRequest()
    # No SimpleQueue: a signal whose handler returns after the timeout makes its `get` wait without end (CPython 3.11).
    ended: Queue[tuple[str, BaseException | None]] = Queue()
    threads, errors = list[threading.Thread](), list[BaseException]()

    def call(name: str) -> None:
        error: BaseException | None = None
        try:
            runs[name](stop)
        except BaseException as raised:
            error = raised
        ended.put((name, error))

    try:
        with stop_signals("the runs that train write checkpoints and stop") as signals:
            while running or (waiting and not (errors or signals)):
                stop.asked = bool(signals)
                if waiting and not (errors or signals) and may_start(len(running)):
                    name = waiting.pop(0)
                    running.add(name)
                    threads.append(threading.Thread(target=call, args=(name,), name=name, daemon=True))
                    threads[-1].start()
                with suppress(Empty):
                    name, error = ended.get(timeout=_POLL_S)
                    running.remove(name)
                    if error is None:
                        on_end(name, len(running))
                        continue
                    errors.append(error)
                    if running and not isinstance(error, InterruptedRun):
                        print(f"{name} has failed, and the runs beside it go on to their end: {error}", flush=True)
    except KeyboardInterrupt:
        stop.at_once = True
        for thread in threads:
            thread.join(_LEAVING_S)
        raise
    if failed := [error for error in errors if not isinstance(error, InterruptedRun)]:
        raise failed[0]
    if errors or waiting:
        raise InterruptedRun(
            f"{owner} was stopped; its runs have kept their checkpoints", "run the same command again to resume"
        )
