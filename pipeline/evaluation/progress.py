"""A bar on a terminal; elsewhere one line at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator

from torch import Tensor

log = logging.getLogger(__name__)


def shown(parts: Iterable[tuple[Tensor, ...]], total: int, what: str) -> Iterator[tuple[Tensor, ...]]:
    """`parts`, whose first tensors have `total` rows together, with their progress shown."""
    from rich.console import Console
    from rich.progress import Progress

    start = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=total)
        for part in parts:
            yield part
            progress.advance(task, len(part[0]))
    log.info("%s: %d images in %.1f s", what, total, time.monotonic() - start)
