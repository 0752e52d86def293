"""Progress of a training run for people: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.config.schema import TrainJob
from pipeline.training.status.run_status import Status

LINE_SECONDS = 10.0  # seconds between two lines where the output is not a terminal


class Console:
    """Prints the lines and the progress of one run to stdout."""

    def __init__(self, job: TrainJob) -> None:
        self.job = job
        self.shown_lines = 0
        self.last_line = 0.0
        self.started: tuple[float, int] | None = None
        self.output = RichConsole()
        self.progress = Progress(
            TextColumn("{task.fields[kimg]}"),
            BarColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.output,
            disable=not self.output.is_terminal,
        )
        total = 1000 * job.train.kimg
        self.task = self.progress.add_task(job.name, total=total, kimg="starting workers", metrics="")

    def __enter__(self) -> Console:
        self.progress.start()
        if not self.output.is_terminal:
            print(f"starting {_workers(self.job)} …", flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.stop()

    def show(self, now: Status) -> None:
        """Print the lines that are new in `now`, and the progress."""
        for line in now.lines[self.shown_lines :]:
            self._print(line)
        self.shown_lines = len(now.lines)
        if not now.metrics:
            return
        kimg = f"{now.images / 1000:.1f}/{self.job.train.kimg:g} kimg"
        if self.output.is_terminal:
            self.progress.update(self.task, completed=now.images, kimg=kimg, metrics=_short(now.metrics))
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
        if self.output.is_terminal:
            self.progress.console.print(line, highlight=False)
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
    return "1 worker" if train.workers == 1 else f"{train.workers} workers"
