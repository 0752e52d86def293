"""Stops a sweep: the running trials write checkpoints, and then the search ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.compute.mailbox import Mailbox, Sender
from pipeline.errors import InterruptedRun

_POLL_S = 0.5
_LONGEST_S = 300.0  # longest wait for the checkpoints


@dataclass(frozen=True)
class TrialRuns:
    """Message of a trial: whether it trains."""

    trial: str
    trains: bool


@contextmanager
def stops_trials(mailbox: Mailbox, sweep: str) -> Iterator[None]:
    """Handle SIGINT and SIGTERM of the driver of a sweep inside a `with` block.

    After the first signal, the trials that hold the mailbox's sender are asked to stop. The block is interrupted when
    none of them trains any more, at the latest after 5 minutes. A second signal interrupts it at once. Outside the main
    thread no signal is handled.

    Raises InterruptedRun where the block was interrupted.
    """
    received: list[int] = []
    ended = threading.Event()

    def handle(number: int, _: Any) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        print(f"received {name}: the trials that run write checkpoints, then the sweep stops …", flush=True)

    def watch() -> None:
        training: set[str] = set()
        asked_s = 0.0
        while not ended.wait(_POLL_S):
            for message in mailbox.collect():
                (training.add if message.trains else training.discard)(message.trial)
            if received:
                mailbox.ask_to_stop(True)
                asked_s = asked_s or time.monotonic()
                if not training or time.monotonic() - asked_s > _LONGEST_S:
                    os.kill(os.getpid(), signal.SIGINT)  # `handle` interrupts the main thread
                    return

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    watching = threading.Thread(target=watch, name="stop-trials", daemon=True)
    watching.start()
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"the sweep {sweep} was stopped; its trials have kept their checkpoints",
            "run the same command again to resume",
        ) from None
    finally:
        ended.set()
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stopped_by(sweep: Sender, trial: str) -> Iterator[None]:
    """Tell the driver of the sweep that a trial trains inside a `with` block.

    After InterruptedRun the call does not return: the driver ends the trial's process. Ray Tune would start a trial
    that raises again.
    """
    sweep.deliver(TrialRuns(trial, trains=True))
    try:
        yield
    except InterruptedRun:
        sweep.deliver(TrialRuns(trial, trains=False))
        threading.Event().wait()
    except BaseException:
        sweep.send(TrialRuns(trial, trains=False))
        raise
    sweep.deliver(TrialRuns(trial, trains=False))
