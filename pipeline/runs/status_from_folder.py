"""What a run is doing, from its folder alone: neither the cluster nor MLflow is asked."""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import BaseModel

from pipeline.errors import UsageError, shown_url
from pipeline.runs.best_checkpoint import best_score
from pipeline.runs.checkpoints import StoredCheckpoint
from pipeline.runs.json_records import RUNNING, RunState, ScoreRecord, TrainSummary, Wait
from pipeline.runs.owner import OwnerSeen, look_at_owner
from pipeline.runs.spending import Spending, shown_amount
from pipeline.runs.stored_run import StoredRun, StoredStudy, StoredSweep, open_folder
from pipeline.storage import file_sets, files

State = Literal["starting", "training", "scoring", "finished", "stopped", "failed", "driver died", "unknown"]
_WORKING = ("starting", "training", "scoring")


class CheckpointSeen(BaseModel):
    """A complete checkpoint."""

    name: str
    kimg: float
    age_s: float
    """Seconds since it was complete, by the clock of this machine."""


class ScoreSeen(BaseModel):
    """The score of a checkpoint."""

    metric: str
    """Name of the metric, with the hash of the protocol."""
    value: float | None
    kimg: float

    def __str__(self) -> str:
        value = "not finite" if self.value is None else f"{self.value:.4g}"
        return f"{self.metric} {value} at {self.kimg:.1f} kimg"


class RunView(BaseModel):
    """What a training run is doing, as far as its folder says."""

    name: str
    state: State
    kimg: float
    """Position in thousands of images."""
    total_kimg: float | None
    """Position at which the run ends; None where no driver has said it."""
    images_per_s: float | None
    checkpoint: CheckpointSeen | None
    """The newest complete checkpoint."""
    score: ScoreSeen | None
    """The newest score."""
    best: ScoreSeen | None
    """The best score of those that can be compared with the newest."""
    waits: list[Wait]
    restarts: int
    images_lost: int
    spending: Spending | None
    """What the run has spent; None where no driver has said it."""
    budget_hours: float | None
    """Device hours at which the run ends; None without a budget."""
    driver: OwnerSeen | None
    """The newest driver; None where the run has had none."""
    last_error: str | None
    last_error_age_s: float | None
    said_s: float | None
    """Seconds since the driver wrote this, by the clock of this machine; None where no driver has."""

    def rows(self) -> dict[str, Any]:
        """Return the view for people, by title."""
        total = "" if self.total_kimg is None else f" of {self.total_kimg:g}"
        speed = "" if self.images_per_s is None else f", {self.images_per_s:.0f} images/s at the last log"
        newest, driver = self.checkpoint, self.driver
        life = driver and ("alive" if driver.alive else "gone")
        return {
            "run": self.name,
            "state": self.state,
            "position": f"{self.kimg:.1f}{total} kimg{speed}",
            "checkpoint": newest and f"{newest.name}, {_shown(newest.age_s)} old",
            "score": self.score and str(self.score),
            "best score": self.best and str(self.best),
            "waiting": [wait.line for wait in self.waits],
            "restarts": self.restarts,
            "images lost": self.images_lost,
            **(self.spending.rows() if self.spending else {}),
            "budget": None if self.budget_hours is None else f"{shown_amount(self.budget_hours)} device hours",
            "driver": driver and f"process {driver.pid} on {driver.host}, {life}; last sign {_shown(driver.age_s)} ago",
            "last error": self.last_error and f"{self.last_error} ({_shown(self.last_error_age_s or 0.0)} ago)",
            "written": None if self.said_s is None else f"{_shown(self.said_s)} ago",
        }


class TrialView(BaseModel):
    """A trial of a sweep."""

    name: str
    outcome: str
    score: float | None
    kimg: float


class SweepView(BaseModel):
    """What a sweep is doing, as far as its folder says."""

    name: str
    state: Literal["finished", "not finished"]
    trials: list[TrialView]
    spending: Spending
    """What the trials have spent."""

    def rows(self) -> dict[str, Any]:
        """Return the view for people, by title."""
        trials = {
            trial.name: f"{trial.outcome}, {trial.kimg:.1f} kimg"
            + ("" if trial.score is None else f", score {trial.score:.4g}")
            for trial in self.trials
        }
        return {"sweep": self.name, "state": self.state, **self.spending.rows(), **trials}


class StudyRunView(BaseModel):
    """A run of a study that has begun and has not ended."""

    name: str
    state: State
    kimg: float
    """Position in thousands of images."""
    total_kimg: float
    images_per_s: float | None
    waits: list[Wait]

    def __str__(self) -> str:
        speed = "" if self.images_per_s is None else f", {self.images_per_s:.0f} images/s"
        waits = "".join(f"; {wait.line}" for wait in self.waits)
        return f"{self.state}, {self.kimg:.1f} of {self.total_kimg:g} kimg{speed}{waits}"


class StudyView(BaseModel):
    """What a study is doing, as far as its folder and the folders of its runs say."""

    name: str
    state: Literal["finished", "not finished"]
    runs: int
    """Number of runs."""
    ended: int
    """Number of runs that have ended."""
    diverged: list[str]
    """Names of runs that diverged, which have ended."""
    begun: list[StudyRunView]
    """Runs that have begun and have not ended."""
    next_run: str | None
    """Name of the first run that has not begun; None where all have."""
    tuned: dict[str, dict[str, Any]]
    """Values that the sweep of a row chose, by row and dotted key."""
    table: str | None
    """URL of the tables as CSV; None before they are written."""
    spending: Spending
    """What the runs have spent."""

    def rows(self) -> dict[str, Any]:
        """Return the view for people, by title."""
        return {
            "study": self.name,
            "state": self.state,
            "runs": f"{self.ended} of {self.runs} have ended",
            "diverged": self.diverged,
            **{run.name: str(run) for run in self.begun},
            "next run": self.next_run,
            **{f"tuned {row}": _shown_point(point) for row, point in self.tuned.items()},
            **self.spending.rows(),
            "table": self.table,
        }


def look_at_run(url: str) -> RunView | SweepView | StudyView:
    """Return what the run, the sweep or the study in the folder `url` is doing. Nothing is changed.

    Raises UsageError where there is none, CorruptError where a record is not valid, and EnvironmentFault.
    """
    folder = open_folder(url)
    if folder is None:
        names = ", ".join(files.list_names(url.rstrip("/").rpartition("/")[0] or ".")[:20])
        raise UsageError(f"there is no run in {url}", f"its folder has: {names}" if names else "give the run's URL")
    if isinstance(folder, StoredStudy):
        return _study(folder)
    return _sweep(folder) if isinstance(folder, StoredSweep) else _run(folder)


def _run(stored: StoredRun) -> RunView:
    record, told, summary = stored.record(), stored.state(), stored.summary()
    owner, checkpoints, scores = look_at_owner(stored.owners_url), stored.checkpoints(), stored.scores()
    assert record is not None, "the folder was opened by it"
    newest = checkpoints[-1] if checkpoints else None
    if _has_ended(summary, told) and not (owner is not None and owner.alive):
        state: State = "finished"  # also where the driver ended before it could say so
    else:
        state = "unknown" if told is None else _state(told, owner)
    images = max(told.images if told else 0, newest.images if newest else 0, summary.images if summary else 0)
    return RunView(
        name=record.name,
        state=state,
        kimg=images / 1000,
        total_kimg=told and told.kimg,
        images_per_s=told and told.images_per_s,
        checkpoint=newest and _checkpoint(newest),
        score=_score(max(scores, key=lambda score: score.time_ms, default=None)),
        best=_score(best_score(scores)),
        waits=told.waits if told and state in _WORKING else [],
        restarts=max(told.restarts if told else 0, record.starts - 1, 0),
        images_lost=max(told.images_lost if told else 0, record.images_lost),
        spending=stored.spending(),
        budget_hours=told and told.budget_hours,
        driver=owner,
        last_error=told and told.last_error,
        last_error_age_s=_age_s(told.last_error_s if told else None),
        said_s=_age_s(told.time_s if told else None),
    )


def _state(told: RunState, owner: OwnerSeen | None) -> State:
    """Return what a run is doing, from what its driver wrote last and from the driver's sign of life."""
    if owner is not None and owner.alive:
        return told.state if told.owner == owner.number else "starting"
    return "driver died" if told.state in _WORKING else told.state


def _sweep(stored: StoredSweep) -> SweepView:
    trials = [
        TrialView(name=trial.name, outcome=trial.outcome, score=trial.score, kimg=trial.kimg)
        for trial in (record.trial for record in stored.trial_records())
    ]
    summary = stored.summary()  # that of fewer trials where a larger `search.trials` continues the sweep
    ended = summary is not None and summary.trials == len(trials) and all(t.outcome != RUNNING for t in trials)
    state: Literal["finished", "not finished"] = "finished" if ended else "not finished"
    spending = Spending.total(stored.trial(trial.name).spending() for trial in trials).so_far  # trials may end early
    return SweepView(name=stored.name, state=state, trials=trials, spending=spending)


def _study(stored: StoredStudy) -> StudyView:
    record, summary = stored.record(), stored.summary()
    assert record is not None, "the folder was opened by it"
    left = [name for name in record.runs if name not in record.diverged and not _run_has_ended(stored.run(name))]
    begun = [run for name in left if (run := _run_of_study(stored.run(name))) is not None]
    waiting = [name for name in left if name not in {run.name for run in begun}]
    return StudyView(
        name=record.name,
        state="not finished" if left or summary is None else "finished",
        runs=len(record.runs),
        ended=len(record.runs) - len(left),
        diverged=list(record.diverged),
        begun=begun,
        next_run=waiting[0] if waiting else None,
        tuned=record.tuned,
        table=shown_url(stored.table_url) if summary else None,
        spending=Spending.total(stored.run(name).spending() for name in record.runs),
    )


def _run_has_ended(stored: StoredRun) -> bool:
    return _has_ended(stored.summary(), stored.state())


def _has_ended(summary: TrainSummary | None, told: RunState | None) -> bool:
    """Return whether a run has ended. A run that is continued to a longer `kimg` keeps its summary until it ends."""
    return summary is not None and (told is None or summary.images >= 1000 * told.kimg)


def _run_of_study(stored: StoredRun) -> StudyRunView | None:
    """Return what a run is doing; None where it has not begun."""
    told = stored.state()
    if told is None:
        return None
    state = _state(told, look_at_owner(stored.owners_url))
    return StudyRunView(
        name=stored.name,
        state=state,
        kimg=told.images / 1000,
        total_kimg=told.kimg,
        images_per_s=told.images_per_s if state in _WORKING else None,
        waits=told.waits if state in _WORKING else [],
    )


def _checkpoint(checkpoint: StoredCheckpoint) -> CheckpointSeen:
    complete_s = files.modified(files.join(checkpoint.url, file_sets.MANIFEST))
    return CheckpointSeen(name=checkpoint.name, kimg=checkpoint.images / 1000, age_s=max(0.0, time.time() - complete_s))


def _score(record: ScoreRecord | None) -> ScoreSeen | None:
    if record is None:
        return None
    return ScoreSeen(metric=record.score.key, value=record.score.value, kimg=record.images / 1000)


def _age_s(time_s: float | None) -> float | None:
    """Return the seconds since a Unix time, by the clock of this machine."""
    return None if time_s is None else max(0.0, time.time() - time_s)


def _shown_point(point: dict[str, Any]) -> str:
    """Return values by key as one line."""
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in point.items()
    )


def _shown(seconds: float) -> str:
    """Return a length of time with one unit."""
    for length, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
