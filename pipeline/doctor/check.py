"""The result of a check, and checks with a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.errors import printable, shown_url


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: Name of the check.
        status: `fail` means that jobs cannot run. `warn` means that some jobs may not run or may run worse.
        found: What the check found.
        remedy: What to do; "" where the status is `ok`.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        for name in ("found", "remedy"):
            object.__setattr__(self, name, printable(shown_url(getattr(self, name))))


def bounded(named: Mapping[str, Callable[[], Check]], patience_s: float) -> list[Check]:
    """Run all checks in parallel, each in a thread. A thread that takes longer than `patience_s` is abandoned."""
    results: dict[str, Check] = {}

    def take(name: str, check: Callable[[], Check]) -> None:
        try:
            results[name] = replace(check(), name=name)
        except Exception as error:
            results[name] = Check(
                name, "fail", f"{type(error).__name__}: {error}", "correct the cause that the message names"
            )

    threads = [threading.Thread(target=take, args=item, daemon=True) for item in named.items()]
    deadline = time.monotonic() + patience_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = "check whether a firewall drops packets, and whether the machine is overloaded"
    return [results.get(name, Check(name, "fail", f"no answer in {patience_s:.0f} s", late)) for name in named]


def ok(found: str) -> Check:
    """Return the result of a check that found no problem. `bounded` gives it its name."""
    return Check("", "ok", found)


def warn(found: str, remedy: str) -> Check:
    """Return the result of a check with which some jobs may not run or may run worse."""
    return Check("", "warn", found, remedy)


def fail(found: str, remedy: str) -> Check:
    """Return the result of a check with which jobs cannot run."""
    return Check("", "fail", found, remedy)
