"""Types that the caller, the driver and the workers of a training run share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.compute.mailbox import Sender
from pipeline.config.run_method import digest_of
from pipeline.config.schema import TrainJob
from pipeline.runs.checkpoints import StoredCheckpoint
from pipeline.runs.json_records import RunRecord, RunScores, TrainSummary
from pipeline.runs.owner import Ownership
from pipeline.runs.score_protocol import Score
from pipeline.runs.stored_run import StoredRun


@dataclass(frozen=True)
class Evaluation:
    """The functions of `pipeline.evaluation` that training calls. Training does not import evaluation."""

    check: Callable[[TrainJob], list[str]]
    """Checks before training that scores can be computed, and returns the names of their metrics. Raises SaganError
    where they cannot."""
    score_checkpoint: Callable[[TrainJob, StoredCheckpoint, str], Score]
    """Scores one checkpoint for the MLflow run of an id, records and logs the score, and registers the run's best."""
    higher_is_better: Callable[[TrainJob], bool]
    """Whether a higher value of the score that ranks the job's checkpoints is better."""
    score_due: Callable[[TrainJob, str], None]
    """Scores the checkpoints that are due and have no score."""
    finalise: Callable[[TrainJob, str], RunScores]
    """Scores the checkpoints that are due, moves the champion and computes the final score."""


@dataclass
class TrainingRun:
    """A training run that is about to start or to resume."""

    job: TrainJob
    """The complete job. The collection and the environment have filled in the values that the job file left open."""
    stored: StoredRun
    tracking_uri: str
    record: RunRecord
    owner: Ownership | None
    """This driver's ownership of the run; None for a run that has ended."""
    reached: int
    """Position of the last metrics that an earlier driver logged, in images; 0 for a new run."""
    summary: TrainSummary | None
    """None for a run that has not ended."""

    @property
    def mlflow_run_id(self) -> str:
        return self.record.mlflow_run_id

    @property
    def method_digest(self) -> str:
        return digest_of(self.record.method)


@dataclass
class Assignment:
    """The values that the driver passes to every worker."""

    job: dict[str, Any]
    """The job as plain values."""
    tracking_uri: str
    mlflow_run_id: str
    driver: Sender
    """Takes messages for the driver."""
    owner: int
    """Number of the driver as the run's owner."""
    method_digest: str
    secrets: dict[str, str]
    """Environment variables of `resources.env` that Ray must not show. The worker sets them itself."""
    score_in_line: Callable[[StoredCheckpoint], Score] | None
    """Scores a complete checkpoint; None where tasks beside training score checkpoints."""
    step_timeout_s: float
    """Longest wait of ranks for each other, in seconds."""
