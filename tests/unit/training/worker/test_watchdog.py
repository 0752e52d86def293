"""A worker that waits is named with its place, and one that steps is not."""

from __future__ import annotations

import threading
from queue import Queue

from pipeline.training.status.messages import Message, Noted
from pipeline.training.worker.watchdog import Watchdog


def test_the_place_where_a_worker_waits_is_said() -> None:
    said: Queue[str] = Queue()
    never = threading.Event()

    def tell(message: Message) -> None:
        if isinstance(message, Noted):
            said.put(message.line)
            never.set()

    def wait_for_the_others() -> None:
        watchdog = Watchdog(3, 0.1, tell)
        assert never.wait(60)
        watchdog.close()

    wait_for_the_others()
    line = said.get(timeout=60)
    assert line.startswith("rank 3, process ")
    assert "threading.py" in line, "the call that waits"
    assert "test_watchdog.py" in line
    assert "wait_for_the_others" in line


def test_steps_keep_it_quiet() -> None:
    said: list[Message] = []
    watchdog = Watchdog(0, 30.0, said.append)
    for step in range(100):
        watchdog.step(32 * step, 0.1)
    watchdog.close()
    assert not [message for message in said if isinstance(message, Noted)]
