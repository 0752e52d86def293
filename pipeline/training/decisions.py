"""What to do next, as data: small pure functions of what was observed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pipeline.config.schema import TrainJob


def due(before: int, after: int, kimg: float) -> bool:
    """Whether a step from `before` to `after` images crosses a multiple of `kimg` thousand images."""
    interval = 1000 * kimg
    return after // interval > before // interval


@dataclass(frozen=True)
class StepBorder:
    """What is to be done between two steps."""

    log: bool
    checkpoint: bool
    evaluate: bool
    stop: bool
    early: bool
    """Whether that is before the end."""


def at_border(job: TrainJob, before: int, after: int, stop_requested: bool) -> StepBorder:
    """A run ends at `train.kimg` or where it is asked to; either way with a checkpoint, and its last one is scored."""
    finished = after >= 1000 * job.train.kimg
    evaluate = finished or due(before, after, job.evaluate.kimg)
    stop = finished or stop_requested
    checkpoint = stop or evaluate or due(before, after, job.checkpoint.kimg)
    return StepBorder(
        log=checkpoint or due(before, after, job.train.log_kimg),  # what diverged must not become a checkpoint
        checkpoint=checkpoint,
        evaluate=evaluate,
        stop=stop,
        early=stop and not finished,
    )


def superfluous(checkpoints: Sequence[str], keep: int, protected: Collection[str]) -> list[str]:
    """The checkpoints (oldest first) to delete: all but the newest `keep` and the protected."""
    return [name for name in checkpoints[:-keep] if name not in protected]
