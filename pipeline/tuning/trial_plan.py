"""The trials that a sweep still runs, and the records of them in storage."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.config.schema import TrainJob, TuneJob
from pipeline.errors import InterruptedRun
from pipeline.runs.json_records import FINISHED, STOPPED_EARLY, Trial, TrialRecord
from pipeline.runs.stored_run import StoredSweep
from pipeline.tuning.draw_points import Point, start, to_resume, to_start


@dataclass(frozen=True)
class TrialStart:
    """What a trial needs at its start. All values are plain, because Ray Tune passes them to the trial's process.

    Attributes:
        run: Name of the trial's run.
        point: Point of the trial.
        values: Other values of the trial's job that differ from the base job, by dotted key.
        tags: Tags of the trial's MLflow run.
        kept: Names of checkpoints of the run that other trials start from.
    """

    run: str
    point: Point
    values: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrialResult:
    """The last report of a trial.

    Attributes:
        score: Value of the score; None without one.
        kimg: Position of the score.
        failure: Reason why the trial has ended without a score, or why it could not go on; None without such a reason.
    """

    score: float | None
    kimg: float
    failure: str | None = None


class TrialPlan(Protocol):
    """Which trials a sweep still runs. A plan records each of them when it starts and when it ends."""

    @property
    def left(self) -> int:
        """Number of trials that must still start."""

    @property
    def waits(self) -> bool:
        """Whether the next trial depends on trials that run."""

    @property
    def line(self) -> str | None:
        """What a sweep that exists already has done, for people; None for a new sweep."""

    def start(self, trial_id: str) -> TrialStart:
        """Record the start of the next trial, for which Ray Tune has an id. There must be one. Raises EnvironmentFault.

        The record is written before the trial starts, since its run would have no owner without a record.
        """

    def end(self, name: str, result: TrialResult) -> None:
        """Record the end of a trial. Raises CorruptError, EnvironmentFault."""

    def give_up(self, name: str) -> None:
        """Note that a trial cannot go on under this driver."""

    def conclude(self, started: Collection[str], failed: Mapping[str, TrialResult]) -> list[Trial]:
        """Return the trials of the sweep after its search.

        Args:
            started: Names of the trials that this driver has started.
            failed: Last reports of the trials that this driver gave up, by name.

        Raises EnvironmentFault. Raises InterruptedRun where a trial has no end, and BudgetSpent where the trials that
        depend on each other cannot go on without a larger budget.
        """


class IndependentTrials:
    """The plan of a sweep whose trials do not start from each other.

    Args:
        sweep: The sweep job.
        base: Base job of the trials.
        stored: Folder of the sweep.
        records: Records of the trials so far.
        higher_is_better: Direction of the score.
    """

    def __init__(
        self,
        sweep: TuneJob,
        base: TrainJob,
        stored: StoredSweep,
        records: Sequence[TrialRecord],
        higher_is_better: bool,
    ) -> None:
        self._sweep, self._base, self._stored, self._higher_is_better = sweep, base, stored, higher_is_better
        self._records = {record.trial.name: record for record in records}
        self._to_resume = deque(to_resume(sweep, records))

    @property
    def left(self) -> int:
        return len(self._to_resume) + self._new

    @property
    def _new(self) -> int:
        return len(to_start(self._sweep, list(self._records.values())))

    @property
    def waits(self) -> bool:
        return False

    @property
    def line(self) -> str | None:
        if not self._records:
            return None
        ended = sum(record.ended for record in self._records.values())
        return f"{ended} trials have ended, {len(self._to_resume)} go on, {self._new} are new"

    def start(self, trial_id: str) -> TrialStart:
        if self._to_resume:
            record = self._to_resume.popleft()
        else:
            name = f"{self._sweep.name}-{trial_id}"
            record = start(self._sweep, list(self._records.values()), name, self._higher_is_better)
            self._write(record)
        return TrialStart(record.trial.name, record.trial.point)

    def end(self, name: str, result: TrialResult) -> None:
        outcome = result.failure or (FINISHED if result.kimg >= self._base.train.kimg else STOPPED_EARLY)
        self._write(with_result(self._records[name], result, outcome, ended=True))
        print(f"trial {name} has ended at {result.kimg:g} kimg: {outcome}", flush=True)

    def give_up(self, name: str) -> None:
        """Do nothing. The other trials do not depend on it."""

    def conclude(self, started: Collection[str], failed: Mapping[str, TrialResult]) -> list[Trial]:
        for name, result in failed.items():
            self._write(with_result(self._records[name], result, f"failed: {result.failure}", ended=False))
        if running := [name for name in started if not self._records[name].ended and name not in failed]:
            raise InterruptedRun(
                f"the sweep {self._sweep.name} was stopped; {len(running)} of its trials had not ended",
                "run the same command again to resume",
            )
        records = sorted(self._records.values(), key=lambda record: record.number)
        return [record.trial for record in records if record.ended or record.trial.name in failed]

    def _write(self, record: TrialRecord) -> None:
        self._records[record.trial.name] = record
        self._stored.write_trial_record(record)


def with_result(record: TrialRecord, result: TrialResult, outcome: str, *, ended: bool) -> TrialRecord:
    """Return the record of a trial with its last report."""
    trial = record.trial.model_copy(update={"score": result.score, "kimg": result.kimg, "outcome": outcome})
    return record.model_copy(update={"ended": ended, "trial": trial})
