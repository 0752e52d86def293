"""The run's one shared memory: a small Ray actor between the driver and rank 0."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import SaganError


@dataclass
class Snapshot:
    """What the driver shows and decides upon."""

    images: int = 0
    starts: int = 0
    images_lost: int = 0
    resumed_from: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    committed: list[str] = field(default_factory=list)
    scores: list[tuple[int, str, float | None]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    stopped: bool = False
    failure: SaganError | None = None
    train_seconds: float = 0.0


class RunStatus:
    """Lives on the driver's node, dies with the driver; workers and evaluation tasks tell it what happened."""

    def __init__(self, images: int, starts: int, images_lost: int) -> None:
        """What an earlier driver of the run had reached, how often workers were started, and what was lost."""
        self._now = Snapshot(images=images, starts=starts, images_lost=images_lost)
        self._stop = False

    def group_started(self, images: int, checkpoint: str | None, train_seconds: float) -> None:
        """A worker group begins at `images`; what was done beyond it is lost and counted."""
        now = self._now
        now.starts += 1
        now.images_lost += max(0, now.images - images)
        if checkpoint:
            now.resumed_from = checkpoint
            done = f"; {now.images / 1000:.1f} kimg had been done" if now.images > images else ""
            now.events.append(f"resumed from {checkpoint}{done}")
        elif now.starts > 1:
            now.events.append(
                f"started over, since no checkpoint stood yet; {now.images / 1000:.1f} kimg had been done"
            )
        now.images, now.train_seconds = images, train_seconds

    def progress(self, images: int, metrics: dict[str, float] | None = None, train_seconds: float = 0.0) -> bool:
        """Note a completed step; returns whether the run is asked to stop."""
        self._now.images = images
        if metrics is not None:
            self._now.metrics, self._now.train_seconds = metrics, train_seconds
        return self._stop

    def committed(self, checkpoint: str) -> None:
        self._now.committed.append(checkpoint)
        self._now.events.append(f"checkpoint {checkpoint}")

    def scored(self, images: int, key: str, value: float | None) -> None:
        self._now.scores.append((images, key, value))
        shown = "not finite" if value is None else f"{value:.4g}"
        self._now.events.append(f"score at {images / 1000:.1f} kimg: {key} {shown}")

    def failed(self, error: SaganError) -> None:
        """Something that no restart would mend."""
        self._now.failure = error

    def note(self, message: str) -> None:
        self._now.events.append(message)

    def request_stop(self) -> None:
        self._stop = True

    def stopped(self) -> None:
        """The last checkpoint of a run that was asked to stop is committed."""
        self._now.stopped = True

    def snapshot(self) -> Snapshot:
        return self._now


def create(images: int, starts: int, images_lost: int) -> Any:
    """A handle to a new RunStatus actor. It takes no CPU."""
    import ray

    return ray.remote(RunStatus).options(num_cpus=0).remote(images, starts, images_lost)


class Rate:
    """Where rank 0's time goes since the last log: data wait, checkpoints, scores in line; the rest is the step."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.data = self.checkpoint = self.evaluation = 0.0

    def metrics(self, images: int) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return {
            "images_per_s": images / seconds,
            "data_wait_share": self.data / seconds,
            "checkpoint_share": self.checkpoint / seconds,
            "evaluation_share": self.evaluation / seconds,
        }
