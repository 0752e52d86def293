"""How far something is over all images, at which rate, and when it will be done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[int, int], None]  # (images done, images in all)

_PATIENCE_S = 30.0  # on a terminal there is a bar; elsewhere a line at each quarter, and at least this often


@contextmanager
def reporting(doing: str, given: Report | None) -> Iterator[Report]:
    """`given` itself; or a bar on a terminal, else lines. Both go to stderr: stdout is for what a command finds."""
    console = Console(stderr=True)
    started = said = time.monotonic()
    if given is not None:
        yield given
    elif console.is_terminal:
        rate = TextColumn("{task.fields[rate]:,.0f} images/s")
        columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(doing, rate=0.0)
            yield lambda done, total: bar.update(
                task, completed=done, total=total, rate=done / (time.monotonic() - started)
            )
    else:
        quarter = 0

        def line(done: int, total: int) -> None:
            nonlocal said, quarter
            now = time.monotonic()
            if 4 * done // total > quarter or now - said > _PATIENCE_S:
                said, quarter = now, 4 * done // total
                rate = done / max(now - started, 1e-3)
                left = f", {(total - done) / rate:,.0f} s left" if done < total else ""
                console.print(
                    f"{doing}: {done:,} of {total:,} images, {rate:,.0f} images/s{left}",
                    highlight=False,
                    soft_wrap=True,
                )

        yield line
