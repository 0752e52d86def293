"""The time-out of a test bounds silence, not the test: a slow test on a busy machine goes on while it makes progress.

pytest-timeout calls these hooks. `timeout` in pyproject.toml is a number of seconds. A test fails at the end of the
first such period without progress. Progress is a fixture that was made, a line of a driven process (`progress_seen`),
or a file that was written below pytest's temporary folder, where the S3 server, the tracker and the runs of the tests
keep their files. A process that only computes shows none of these. It fails after as many seconds of CPU time, however
long they take.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import pytest_timeout

from infra.local.end_with_parent import descendants

_COMPUTING = 0.02  # CPUs that a process uses at least while it computes on a busy machine; one that waits uses less


class _Watch:
    """Watch one test: fail it at the end of a period of silence."""

    def __init__(self, item: pytest.Item, settings: Any) -> None:
        self._item, self._settings = item, settings
        self._folder: Path = item.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        signal.signal(signal.SIGALRM, self._on_alarm)
        # Programs of earlier tests have ended or use little. To look for them takes milliseconds, in each of thousands.
        self._begin(sum(os.times()[:4]))

    def _begin(self, cpu: float) -> None:
        """Begin a new period without progress."""
        self.seen = False
        self._began, self._cpu_at_start = time.time(), cpu
        self._arm(cpu)

    def cancel(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def _arm(self, cpu: float) -> None:
        self._cpu = cpu
        signal.setitimer(signal.ITIMER_REAL, self._settings.timeout)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        limit, cpu = self._settings.timeout, _cpu_seconds()
        if self.seen or any(changed >= self._began for changed in _times(self._folder)):
            self._begin(cpu)
        elif cpu - self._cpu_at_start < limit and cpu - self._cpu > _COMPUTING * limit:
            self._arm(cpu)
        else:
            pytest_timeout.timeout_sigalrm(self._item, self._settings)


_watch: _Watch | None = None


def progress_seen() -> None:
    """Say that the running test makes progress."""
    if _watch is not None:
        _watch.seen = True


@pytest.hookimpl
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool:
    global _watch
    _watch = _Watch(item, settings)
    return True


@pytest.hookimpl
def pytest_timeout_cancel_timer(item: pytest.Item) -> bool:
    global _watch
    if _watch is not None:
        _watch.cancel()
        _watch = None
    return True


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Generator[None, Any, Any]:
    made = yield
    progress_seen()
    return made


def _times(folder: Path) -> Iterator[float]:
    """Yield the times at which the files below a folder were changed."""
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(f"{parent}/{name}").st_mtime
            except OSError:  # deleted in the meantime
                continue


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of the processes below it, without servers, which lead own sessions."""
    total, session = sum(os.times()[:4]), os.getsid(0)
    for pid in descendants(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # ended in the meantime
            continue
        if int(fields[3]) == session:
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
