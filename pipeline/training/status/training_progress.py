"""Progress of training runs for people: a bar for each run on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.config.schema import TrainJob
from pipeline.errors import counted
from pipeline.training.status.run_status import Status

LINE_SECONDS = 10.0  # seconds between two lines where the output is not a terminal


class Screen:
    """The stdout of one command, on which the consoles of its runs print.

    Args:
        several: Whether runs train side by side. Each line then begins with the name of its run.
    """

    def __init__(self, several: bool = False) -> None:
        self.several = several
        self.output = RichConsole()
        name: list[ProgressColumn] = [TextColumn("{task.description}")] if several else []
        elapsed: list[ProgressColumn] = [] if several else [TimeElapsedColumn()]
        self.progress = Progress(
            *name,
            TextColumn("{task.fields[kimg]}"),
            BarColumn(),
            TextColumn("{task.fields[metrics]}"),
            *elapsed,
            TimeRemainingColumn(),
            console=self.output,
            disable=not self.output.is_terminal,
        )

    def __enter__(self) -> Screen:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.stop()


class Console:
    """Prints the lines and the progress of one run to a screen."""

    def __init__(self, job: TrainJob, screen: Screen) -> None:
        self.job, self.screen = job, screen
        self.shown_lines = 0
        self.last_line = 0.0
        self.started: tuple[float, int] | None = None

    def __enter__(self) -> Console:
        total = 1000 * self.job.train.kimg
        self.task = self.screen.progress.add_task(self.job.name, total=total, kimg="starting workers", metrics="")
        if not self.screen.output.is_terminal:
            self._print(f"starting {_workers(self.job)} …")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.screen.several:
            self.screen.progress.remove_task(self.task)  # the bars are those of the runs that train

    def show(self, now: Status) -> None:
        """Print the lines that are new in `now`, and the progress."""
        for line in now.lines[self.shown_lines :]:
            self._print(line)
        self.shown_lines = len(now.lines)
        if not now.metrics:
            return
        kimg = f"{now.images / 1000:.1f}/{self.job.train.kimg:g} kimg"
        if self.screen.output.is_terminal:
            metrics = f"{now.metrics['images_per_s']:.0f} img/s" if self.screen.several else _short(now.metrics)
            self.screen.progress.update(self.task, completed=now.images, kimg=kimg, metrics=metrics)
        elif time.monotonic() - self.last_line > LINE_SECONDS:
            self.last_line = time.monotonic()
            self._print(f"{kimg}  {_short(now.metrics)}{self._left(now)}")

    def _left(self, now: Status) -> str:
        if self.started is None:
            self.started = (time.monotonic(), now.images)
        seconds, images = time.monotonic() - self.started[0], now.images - self.started[1]
        if images <= 0:
            return ""
        left = int((1000 * self.job.train.kimg - now.images) * seconds / images)
        return f"  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"

    def _print(self, line: str) -> None:
        line = f"{self.job.name}: {line}" if self.screen.several else line
        if self.screen.output.is_terminal:
            self.screen.output.print(escape(line), highlight=False)
        else:
            print(line, flush=True)


def _short(metrics: dict[str, float]) -> str:
    return (
        f"D {metrics['loss_d']:.3f}  G {metrics['loss_g']:+.3f}  {metrics['images_per_s']:.0f} img/s  "
        f"data {metrics['data_wait_share']:.0%}  checkpoints {metrics['checkpoint_share']:.0%}  "
        f"scores {metrics['evaluation_share']:.0%}"
    )


def _workers(job: TrainJob) -> str:
    """Return the number of workers, or the range of it, with its noun."""
    train = job.train
    if train.changes_size:
        return f"{train.least_workers} to {train.workers} workers"
    return counted(train.workers, "worker")
