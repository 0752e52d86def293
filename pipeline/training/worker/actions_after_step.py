"""Decisions of the training loop: pure functions that return what the loop must do."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import TrainJob


def is_due(before: int, after: int, kimg: float) -> bool:
    """Return whether a step from position `before` to `after` crosses a multiple of `kimg` thousand images."""
    interval = 1000 * kimg
    return after // interval > before // interval


@dataclass(frozen=True)
class Actions:
    """Actions after a step, in the order in which the worker takes them."""

    log: bool
    checkpoint: bool
    score: bool
    stop: bool
    interrupted: bool
    """Whether the run stops before `train.kimg`."""


def actions_after_step(job: TrainJob, before: int, after: int, stop_requested: bool) -> Actions:
    """Return the actions after a step from position `before` to `after`, in images.

    A run ends at `train.kimg`, or earlier if a stop is requested. In both cases it writes a checkpoint. The checkpoint
    at `train.kimg` is scored.
    """
    finished = after >= 1000 * job.train.kimg
    score = finished or is_due(before, after, job.evaluate.kimg)
    stop = finished or stop_requested
    checkpoint = stop or score or is_due(before, after, job.checkpoint.kimg)
    return Actions(
        # Logging checks that the losses are finite, so a diverged state is found before it is saved.
        log=checkpoint or is_due(before, after, job.train.log_kimg),
        checkpoint=checkpoint,
        score=score,
        stop=stop,
        interrupted=stop and not finished,
    )
