"""Values that pass between the caller, the driver and the workers of a training run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.config.method import digest_of
from pipeline.config.schema import TrainJob
from pipeline.runs.records import RunRecord, RunScores, TrainSummary
from pipeline.runs.score import Score
from pipeline.runs.stored_run import StoredCheckpoint, StoredRun


class Evaluation(Protocol):
    """The functions of `pipeline.evaluation.run_scores` that training calls. Training does not import evaluation."""

    def check(self, job: TrainJob) -> None:
        """Check before training that scores can be computed. Raises SaganError where they cannot."""

    def score_checkpoint(self, job: TrainJob, checkpoint: StoredCheckpoint, run_id: str) -> Score:
        """Score one checkpoint, record and log the score, and register the model if it is the run's best."""

    def higher_is_better(self, job: TrainJob) -> bool:
        """Return whether a higher value of the score that ranks the job's checkpoints is better."""

    def protected(self, job: TrainJob) -> set[str]:
        """Return the names of the checkpoints that retention must keep."""

    def finalise(self, job: TrainJob, run_id: str) -> RunScores:
        """Score the checkpoints that are due, move the champion and compute the final score."""


@dataclass
class TrainingRun:
    """A training run that is about to start or to resume."""

    job: TrainJob
    """The complete job. The collection and the environment have filled in the values that the job file left open."""
    stored: StoredRun
    tracking_uri: str
    record: RunRecord
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
    status: Any
    """Handle of the `RunStatus` actor."""
    method_digest: str
    score_in_line: Callable[[StoredCheckpoint], Score] | None
    """Scores a complete checkpoint; None where tasks beside training score checkpoints."""
