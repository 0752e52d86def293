"""A bar on a terminal; elsewhere one line at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


@contextmanager
def progress(total: int | None, what: str, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Shows how much of `total` (None: unknown) is done: as much more as what is yielded is called with."""
    from rich.console import Console
    from rich.progress import Progress

    start = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)
    log.info("%s: %d %s in %.1f s", what, bar.tasks[task].completed, unit, time.monotonic() - start)
