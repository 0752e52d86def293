"""A worker that waits is named with its place, and one that steps is not."""

from __future__ import annotations

import threading
from queue import Queue

from pipeline.training.worker.watchdog import Watchdog


def test_the_place_where_a_worker_waits_is_said() -> None:
    said: Queue[str] = Queue()
    never = threading.Event()

    def say(line: str) -> None:
        said.put(line)
        never.set()

    def wait_for_the_others() -> None:
        watchdog = Watchdog(3, 0.1, say)
        assert never.wait(60)
        watchdog.close()

    wait_for_the_others()
    line = said.get(timeout=60)
    assert line.startswith("rank 3 on ")
    assert "threading.py" in line, "the call that waits"
    assert "test_watchdog.py" in line
    assert "wait_for_the_others" in line


def test_steps_keep_it_quiet() -> None:
    said: list[str] = []
    watchdog = Watchdog(0, 30.0, said.append)
    for _ in range(100):
        watchdog.step()
    watchdog.close()
    assert said == []
