"""The status of a run: a Ray actor through which the driver, the workers and the evaluation tasks exchange values."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import SaganError


@dataclass
class Snapshot:
    """The status of a run at one moment.

    Attributes:
        images: Position of the run.
        starts: Number of worker-group starts, over all drivers of the run.
        images_lost: Images that were trained on after the checkpoint from which a later worker group resumed.
        resumed_from: Name of the last checkpoint from which workers resumed; None where none did.
        metrics: Metrics of the last log.
        uploaded: Names of the checkpoints that this driver's workers completed.
        scores: (position in images, name of the metric, value) of every score. The value is None where the model
            generates images that are not finite.
        events: Messages for the console, the oldest first.
        stopped: Whether the run was asked to stop and its last checkpoint is complete.
        failure: An error that a restart of the workers would not correct.
        train_seconds: Seconds of training up to `images`.
    """

    images: int = 0
    starts: int = 0
    images_lost: int = 0
    resumed_from: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    uploaded: list[str] = field(default_factory=list)
    scores: list[tuple[int, str, float | None]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    stopped: bool = False
    failure: SaganError | None = None
    train_seconds: float = 0.0


class RunStatus:
    """A Ray actor that holds the status of a run. It lives on the driver's node and ends with the driver.

    Workers and evaluation tasks report events to it. The driver reads snapshots.
    """

    def __init__(self, images: int, starts: int, images_lost: int) -> None:
        """Initialise the status with values of earlier drivers of the run.

        Args:
            images: Position that an earlier driver reached.
            starts: Number of worker-group starts so far.
            images_lost: Number of lost images so far.
        """
        self._now = Snapshot(images=images, starts=starts, images_lost=images_lost)
        self._stop = False

    def group_started(self, images: int, checkpoint: str | None, train_seconds: float) -> None:
        """Record that a worker group starts at position `images`.

        Images that an earlier group trained on beyond this position are added to `images_lost`.
        """
        now = self._now
        now.starts += 1
        now.images_lost += max(0, now.images - images)
        if checkpoint:
            now.resumed_from = checkpoint
            reached = f"; the run had reached {now.images / 1000:.1f} kimg" if now.images > images else ""
            now.events.append(f"resumed from {checkpoint}{reached}")
        elif now.starts > 1:
            now.events.append(
                f"started over, because no checkpoint was complete; the run had reached {now.images / 1000:.1f} kimg"
            )
        now.images, now.train_seconds = images, train_seconds

    def progress(self, images: int, metrics: dict[str, float] | None = None, train_seconds: float = 0.0) -> bool:
        """Record a completed step. Return whether the run is asked to stop.

        A log passes `metrics` and `train_seconds`. Without `metrics`, `train_seconds` is ignored.
        """
        self._now.images = images
        if metrics is not None:
            self._now.metrics, self._now.train_seconds = metrics, train_seconds
        return self._stop

    def uploaded(self, checkpoint: str) -> None:
        """Record that the checkpoint of this name is complete."""
        self._now.uploaded.append(checkpoint)
        self._now.events.append(f"checkpoint {checkpoint}")

    def scored(self, images: int, metric: str, value: float | None) -> None:
        """Record the score of the checkpoint at position `images`. `value` is None for images that are not finite."""
        self._now.scores.append((images, metric, value))
        text = "not finite" if value is None else f"{value:.4g}"
        self._now.events.append(f"score at {images / 1000:.1f} kimg: {metric} {text}")

    def failed(self, error: SaganError) -> None:
        """Record an error that a restart of the workers would not correct."""
        self._now.failure = error

    def note(self, message: str) -> None:
        """Show the message on the driver's console."""
        self._now.events.append(message)

    def request_stop(self) -> None:
        """Ask the workers to stop after the current step."""
        self._stop = True

    def stopped(self) -> None:
        """Record that the last checkpoint of a run that was asked to stop is complete."""
        self._now.stopped = True

    def snapshot(self) -> Snapshot:
        """Return the status as it is now."""
        return self._now


def create_status(images: int, starts: int, images_lost: int) -> Any:
    """Create a `RunStatus` actor and return its handle. The actor reserves no CPU."""
    import ray

    return ray.remote(RunStatus).options(num_cpus=0).remote(images, starts, images_lost)


class TimeShares:
    """Shares of the time of rank 0 since the last log: waiting for data, checkpoints, and scores on rank 0.

    The remaining time is spent in steps.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.data = self.checkpoint = self.evaluation = 0.0

    def metrics(self, images: int) -> dict[str, float]:
        """Return images per second over `images` images, and the shares, in [0, 1]."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return {
            "images_per_s": images / seconds,
            "data_wait_share": self.data / seconds,
            "checkpoint_share": self.checkpoint / seconds,
            "evaluation_share": self.evaluation / seconds,
        }
