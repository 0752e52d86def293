"""Decides whether and when workers start again. The budget counts starts without a newer checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import SaganError
from pipeline.training.status.messages import WorkerFailed

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0
SAME_FAILURES = 3  # groups that failed at the same position with the same kind of error


@dataclass(frozen=True)
class Start:
    """Answer to a worker group that asks for permission to start."""

    pause_s: float
    """Seconds that the group waits before it starts."""
    refusal: SaganError | None = None
    """Why the run ends instead."""


def next_start(attempts: Sequence[Sequence[WorkerFailed]], max_failures: int) -> Start:
    """Return whether the newest worker group may start, and after how long a pause.

    The first group after a checkpoint that fails is replaced at once. Then pauses grow from 5 s to 5 minutes.

    Args:
        attempts: What the workers raised, for every group since the newest checkpoint, the oldest first. The last one
            is the group that asks. A group whose processes were killed raised nothing.
        max_failures: Greatest number of groups that may fail in a row without a newer checkpoint; -1 for no limit.
    """
    failed = attempts[:-1]
    if 0 <= max_failures < len(failed):
        times = "once" if len(failed) == 1 else f"{len(failed)} times"
        return Start(0, _refusal(failed, f"the workers failed {times} without a newer checkpoint"))
    same = Counter(
        kind
        for failures in failed
        if not any(failure.waiting_helps for failure in failures)  # the others only miss the worker that waited
        for kind in {(failure.kind, failure.images) for failure in failures}
    )
    for (kind, images), count in same.items():
        if count >= SAME_FAILURES:
            return Start(0, _refusal(failed, f"workers failed {count} times at {images / 1000:.1f} kimg with {kind}"))
    pause = 0.0 if len(failed) < 2 else FIRST_PAUSE_S * 2 ** min(len(failed) - 2, 10)
    return Start(min(pause, LONGEST_PAUSE_S))


def _refusal(failed: Sequence[Sequence[WorkerFailed]], problem: str) -> SaganError:
    """Return the error that ends the run. Its class and its remedy are those of the last error that a worker raised."""
    raised = [failure.error for failures in failed for failure in failures]
    resume = "run the same command again to resume"
    if not raised:
        return SaganError(
            f"{problem}; their processes were killed", f"look for the cause, for example memory; {resume}"
        )
    # A worker that raises ends the others, which then raise errors about lost connections.
    last = next((error for error in reversed(raised) if type(error) is not SaganError), raised[-1])
    remedy = f"{last.remedy}; then {resume}" if last.remedy else f"correct the cause, then {resume}"
    return type(last)(f"{problem}; the last error: {last.message}", remedy)
