"""Progress of long work: the amount done, the rate and the remaining time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Report = Callable[[int, int | None], None]
"""A function that is called with (amount done, total amount). The total is None where it is unknown."""

# Without a terminal:
_LINE_S = 10.0  # seconds between two lines, and from the start to the first line
_SHORT_S = 1.0  # work that takes fewer seconds prints nothing


@contextmanager
def progress(
    what: str, total: int | None, unit: str = "images", report: Report | None = None
) -> Iterator[Callable[[int], None]]:
    """Yield `advance(amount)`. The caller calls it with each amount of work that is done.

    A terminal shows a bar. Other outputs get a line every ten seconds, and one at the end of work that took a second or
    more. Both go to stderr, because stdout is for the results of a command.

    Args:
        what: Name of the work.
        total: Total amount; None where it is unknown.
        unit: Unit of the amounts.
        report: Replaces the bar and the lines.
    """
    console = Console(stderr=True)
    if report is not None:
        yield _counting(report, total)
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), _Rate(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total, unit=unit)
            yield lambda amount: bar.advance(task, amount)
    else:
        lines = _Lines(what, unit, console)
        yield _counting(lines.show, total)
        lines.end()


def _counting(report: Report, total: int | None) -> Callable[[int], None]:
    """Return a function that adds amounts and calls `report` with their sum."""
    done = 0

    def advance(amount: int) -> None:
        nonlocal done
        done += amount
        report(done, total)

    return advance


class _Rate(ProgressColumn):
    """Amount done, and amount per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:,.0f} {task.fields['unit']}, {task.speed or 0:,.0f}/s")


class _Lines:
    """Prints lines where there is no terminal."""

    def __init__(self, what: str, unit: str, console: Console) -> None:
        self._what, self._unit, self._console = what, unit, console
        self._started = self._shown = time.monotonic()
        self._done = 0

    def show(self, done: int, total: int | None) -> None:
        self._done, now = done, time.monotonic()
        if now - self._shown < _LINE_S:
            return
        self._shown = now
        rate = done / (now - self._started)
        left = f", {(total - done) / rate:,.0f} s left" if total is not None and rate else ""
        of = "" if total is None else f" of {total:,}"
        self._print(f"{self._what}: {done:,}{of} {self._unit}, {rate:,.0f}/s{left}")

    def end(self) -> None:
        if self._shown == self._started and time.monotonic() - self._started < _SHORT_S:
            return
        self._print(f"{self._what}: {self._done:,} {self._unit} in {time.monotonic() - self._started:.1f} s")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)
