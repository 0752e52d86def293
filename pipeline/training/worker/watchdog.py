"""Reports that a worker is alive, and where in the code it waits, if it completes no step for a long time."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from pipeline.training.status.messages import ALIVE_S, Alive, Message, Noted

_CODE = str(Path(__file__).parents[3]) + os.sep
_FRAMES = 4  # innermost calls of this project that a line names


class Watchdog:
    """A thread that looks at the time of the last step, and tells the driver every 5 s that the process runs.

    Args:
        rank: Rank of this worker.
        limit_s: Seconds without a step after which it says where the calling thread is. It says it again after twice,
            four times, … as long.
        tell: Called with messages for the driver.
    """

    def __init__(self, rank: int, limit_s: float, tell: Callable[[Message], None]) -> None:
        self._rank, self._limit_s, self._tell = rank, limit_s, tell
        self._process = f"process {os.getpid()} on {socket.gethostname()}"
        self._images, self._own_s = 0, 0.0
        self._watched = threading.get_ident()
        self._began = time.monotonic()
        self._next_s = limit_s
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def step(self, images: int, own_s: float) -> None:
        """Record a step that ends at position `images`, or another sign that the worker gets on.

        `own_s` is how long the rank works in a step without waiting for others, in seconds.
        """
        self._images, self._own_s = images, own_s
        self._began, self._next_s = time.monotonic(), self._limit_s

    def close(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(self._limit_s / 4, ALIVE_S)):
            self._tell(Alive(self._rank, self._process, self._images, self._own_s))
            seconds = time.monotonic() - self._began
            if seconds > self._next_s:
                self._next_s *= 2
                self._tell(
                    Noted(
                        f"rank {self._rank}, {self._process}, has completed no step for {seconds:.0f} s; it is in "
                        f"{place_of(self._watched)}"
                    )
                )


def place_of(thread: int) -> str:
    """Return the last call of a thread of this process, and the calls of this project that led to it."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "a thread that has ended"
    calls = traceback.extract_stack(frame)
    own = [call for call in calls[:-1] if call.filename.startswith(_CODE) and "site-packages" not in call.filename]
    named = [calls[-1], *reversed(own[-_FRAMES:])]
    return " ← ".join(f"{call.filename.removeprefix(_CODE)}:{call.lineno} {call.name}" for call in named)
