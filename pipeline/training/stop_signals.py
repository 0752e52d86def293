"""SIGINT and SIGTERM of a driver: the first asks for an orderly end, the second ends the program."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def stop_signals(what: str) -> Iterator[list[int]]:
    """Handle SIGINT and SIGTERM inside a `with` block.

    Yields a list that receives the number of the first signal. A second signal raises KeyboardInterrupt. Outside the
    main thread no handler is installed and the list stays empty.

    Args:
        what: What happens after the first signal, for a message.
    """
    received: list[int] = []
    # A trial of a sweep or a run of a study is in another thread. The main thread handles signals there.
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, _: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print(f"received {signal.Signals(number).name}: {what} …", flush=True)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
