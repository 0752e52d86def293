"""A bar on a terminal; elsewhere one line at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Shows how many of `total` images are done: as many more as what is yielded is called with."""
    from rich.console import Console
    from rich.progress import Progress

    start = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda images: bar.advance(task, images)
    log.info("%s: %d images in %.1f s", what, total, time.monotonic() - start)
