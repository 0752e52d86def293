"""Says what a run is doing to people who do not see its driver's console.

It does so in `status.json`, in tags of MLflow and in the gauges that Prometheus reads.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from pipeline.errors import BudgetSpent, CorruptError, EnvironmentFault, InterruptedRun, shown_url
from pipeline.runs.checkpoints import StoredCheckpoint
from pipeline.runs.json_records import RunState
from pipeline.runs.owner import LostRun
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.training.shared_types import TrainingRun
from pipeline.training.status.run_gauges import RunGauges
from pipeline.training.status.run_status import Status

WAITING = "waiting"
"""Tag of MLflow: what the run waits for, or `no`."""
NEWS_S = 2.0  # least seconds between two writes
POSITION_S = 30.0  # seconds between two writes where only the position has changed
_LEAVING_S = 30.0  # longest wait at the end
_LONGEST_TAG = 1000  # letters


class StatusFile:
    """Writes the state of a run while a `with` block runs, and at its end how the block has ended.

    A thread writes, so that neither storage nor MLflow holds up the driver. A write that fails is done later.

    Args:
        run: the run.
        higher_is_better: whether a higher value of the score that ranks the run's checkpoints is better.
    """

    def __init__(self, run: TrainingRun, higher_is_better: bool) -> None:
        assert run.owner is not None, "the state of a run that has ended does not change"
        self._run, self._owner = run, run.owner
        before = _stored_state(run)
        self._state = RunState(
            owner=run.owner.number,
            state="starting",
            images=run.reached,
            kimg=run.job.train.kimg,
            restarts=max(0, run.record.starts - 1),
            images_lost=run.record.images_lost,
            device_hours=run.record.device_hours,
            device_s_per_image=before and before.device_s_per_image,
            price_per_device_hour=run.job.resources.price_per_device_hour,
            budget_hours=run.job.budget_hours,
            last_error=before and before.last_error,
            last_error_s=before and before.last_error_s,
            time_s=time.time(),
        )
        self._starts = run.record.starts
        self._higher_is_better = higher_is_better
        self._gauges, self._waited = RunGauges(run.job.name), set[str]()
        self._changed, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._write_until_the_end, name="status", daemon=True)

    def __enter__(self) -> StatusFile:
        self._tracker = MlflowRun(self._run.tracking_uri, self._run.mlflow_run_id)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._change(state="finished", waits=[])
        elif isinstance(error, InterruptedRun | BudgetSpent | KeyboardInterrupt):
            self._change(state="stopped", waits=[])
        else:
            self._change(state="failed", waits=[], **_error(_first_line(error)))
        self._ended.set()
        self._changed.set()
        self._thread.join(_LEAVING_S)
        self._tracker.close(timeout_s=5)

    def follow(self, now: Status) -> None:
        """Show the status of a run that trains. The call does not wait."""
        self._change(
            state="training" if now.starts > self._starts else "starting",
            images=now.images,
            images_per_s=now.metrics.get("images_per_s"),
            waits=list(now.waits.values()),
            restarts=max(0, now.starts - 1),
            images_lost=now.images_lost,
            device_hours=now.device_hours,
            device_s_per_image=now.device_s_per_image or self._state.device_s_per_image,
            **(_error(now.last_error) if now.last_error and now.last_error != self._state.last_error else {}),
        )
        self._set_gauges(now)

    def score(self, now: Status) -> None:
        """Show that training has ended and that the last scores are computed."""
        self._change(state="scoring", images=now.images, waits=[], device_hours=now.device_hours)

    def _set_gauges(self, now: Status) -> None:
        gauges, job = self._gauges, self._run.job
        gauges.set("sagan_images", now.images)
        gauges.set("sagan_target_images", 1000 * job.train.kimg)
        gauges.set("sagan_checkpoint_interval_images", 1000 * job.checkpoint.kimg)
        gauges.set("sagan_restarts", max(0, now.starts - 1))
        gauges.set("sagan_images_lost", now.images_lost)
        gauges.set("sagan_device_hours", now.device_hours)
        gauges.set("sagan_workers", now.workers if now.nodes else 0)
        for name, value in now.metrics.items():
            gauges.set("sagan_metric", value, metric=name)
        if "images_per_s" in now.metrics:
            gauges.set("sagan_images_per_second", now.metrics["images_per_s"])
        if newest := now.uploaded[-1:] or ([now.resumed_from] if now.resumed_from else []):
            gauges.set("sagan_checkpoint_images", StoredCheckpoint(newest[0]).images)
        if scores := [(metric, value) for _, metric, value in now.scores if value is not None]:
            gauges.set("sagan_score", scores[-1][1], metric=scores[-1][0])
            gauges.set("sagan_scores_since_best", _since_best([value for _, value in scores], self._higher_is_better))
        # One name for all checkpoints, because a series is never deleted.
        since = {"checkpoint" if who.startswith("checkpoint ") else who: w.since_s for who, w in now.waits.items()}
        self._waited |= set(since)
        for who in self._waited:
            gauges.set("sagan_waiting_since_seconds", since.get(who, 0), who=who)
        for rank, seen in now.ranks.items():
            gauges.set("sagan_rank_step_seconds", seen.own_s, rank=str(rank), process=seen.process)

    def _change(self, **values: Any) -> None:
        before = self._state
        self._state = before.model_copy(update={**values, "time_s": time.time()})
        if _news(self._state) != _news(before):
            self._changed.set()

    def _write_until_the_end(self) -> None:
        tagged: dict[str, str] = {}
        while True:
            last = self._ended.is_set()
            self._changed.clear()
            state = self._state
            try:
                self._owner.require()
                self._run.stored.write_state(state)
            except EnvironmentFault:
                self._changed.set()  # written later
            except LostRun:
                return  # the file is the other driver's
            for key, value in _tags(state).items():
                if tagged.get(key) != value:
                    self._tracker.tag(key, value)
                    tagged[key] = value
            if last:
                return
            if not self._ended.wait(NEWS_S):
                self._changed.wait(POSITION_S)


def _news(state: RunState) -> dict[str, Any]:
    """Return what is written soon after it has changed."""
    return state.model_dump(exclude={"images", "images_per_s", "device_hours", "device_s_per_image", "time_s"})


def _tags(state: RunState) -> dict[str, str]:
    """Return the tags that tell people who look at MLflow what the run waits for and what it has spent."""
    waiting = "; ".join(wait.line for wait in state.waits)[:_LONGEST_TAG] or "no"
    return {WAITING: waiting, **state.spending.tags()}


def _stored_state(run: TrainingRun) -> RunState | None:
    """Return what an earlier driver has written, if it can be read."""
    with suppress(CorruptError, EnvironmentFault):
        return run.stored.state()
    return None


def _since_best(scores: list[float], higher_is_better: bool) -> int:
    """Return the number of scores after the best one."""
    best = max(scores) if higher_is_better else min(scores)
    return scores[::-1].index(best)


def _error(message: str) -> dict[str, Any]:
    return {"last_error": message, "last_error_s": time.time()}


def _first_line(error: BaseException) -> str:
    lines = shown_url(str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
