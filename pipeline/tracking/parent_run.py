"""The MLflow run of a sweep or a study. The MLflow runs of its training runs are its children."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import TrainJob
from pipeline.errors import InterruptedRun
from pipeline.runs.json_records import StudyRecord, SweepRecord
from pipeline.tracking.mlflow_run import MlflowRun, artifact_location, tracking_uri


@dataclass(frozen=True)
class ParentRun:
    """The MLflow run of a sweep or a study, as its record names it.

    Attributes:
        mlflow_run_id: Id of the MLflow run.
        earlier_mlflow_run_ids: Ids of MLflow runs that did not exist any more at a resume, the oldest first.
    """

    mlflow_run_id: str
    earlier_mlflow_run_ids: list[str]


@contextmanager
def parent_run(
    job: TrainJob,
    name: str,
    record: SweepRecord | StudyRecord | None,
    *,
    kind: str,
    params: dict[str, Any],
    parent: str | None = None,
) -> Iterator[ParentRun]:
    """Start the MLflow run of a sweep or a study or resume it, and set its status at the end of the `with` block.

    The run is RUNNING inside the block. It is FINISHED after it, KILLED where the block was interrupted, and FAILED
    where it raised another exception.

    Args:
        job: A job of the sweep's trials or of the study's runs.
        name: Name of the sweep or the study.
        record: Its record; None where it is new.
        kind: "tune" or "study".
        params: Params of the MLflow run, by key.
        parent: Id of the MLflow run of which this run is a child.

    Raises EnvironmentFault where MLflow cannot be used at the start.
    """
    uri = tracking_uri(job)
    tracker = MlflowRun.start(
        uri,
        job.track.experiment,
        name,
        record.mlflow_run_id if record else None,
        params=params,
        tags={"kind": kind},
        artifacts=artifact_location(job),
        parent=parent,
    )
    tracker.close(timeout_s=30)
    earlier = record.earlier_mlflow_run_ids if record else []
    if record and record.mlflow_run_id != tracker.run_id:
        earlier = [*earlier, record.mlflow_run_id]
    status = "FAILED"
    try:
        yield ParentRun(tracker.run_id, earlier)
        status = "FINISHED"
    except (InterruptedRun, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        MlflowRun(uri, tracker.run_id).finish(status)
