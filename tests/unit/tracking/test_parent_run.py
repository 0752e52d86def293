"""The status of the MLflow run of a sweep or a study: while it runs, after its end, and after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.schema import TrainJob
from pipeline.errors import EnvironmentFault, InterruptedRun
from pipeline.runs.json_records import StudyRecord
from pipeline.tracking.mlflow_run import client
from pipeline.tracking.parent_run import ParentRun, parent_run


@pytest.fixture
def job(tracking: str, tmp_path: Path) -> TrainJob:
    values = {"name": "j", "data": {"train": "/images"}, "train": {"kimg": 1, "batch": 16}}
    return TrainJob.model_validate(values | {"checkpoint": {"root": f"{tmp_path}/runs"}, "track": {"uri": tracking}})


def recorded(run: ParentRun) -> StudyRecord:
    return StudyRecord(name="s", mlflow_run_id=run.mlflow_run_id, earlier_mlflow_run_ids=run.earlier_mlflow_run_ids)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InterruptedRun("the study s was stopped", ""), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
        (EnvironmentFault("storage is away", ""), "FAILED"),
    ],
)
def test_an_interrupted_run_is_killed_or_failed_and_runs_again_when_it_is_resumed(
    job: TrainJob, tracking: str, error: BaseException, status: str
) -> None:
    def seen(run: ParentRun) -> str:
        return str(client(tracking).get_run(run.mlflow_run_id).info.status)

    started: list[ParentRun] = []

    def end() -> None:
        with parent_run(job, "s", None, kind="study", params={"rows.a": {}}) as run:
            started.append(run)
            assert seen(run) == "RUNNING"
            raise error

    with pytest.raises(type(error)):
        end()
    (first,) = started
    assert seen(first) == status
    with parent_run(job, "s", recorded(first), kind="study", params={}) as second:
        assert second == first
        assert seen(first) == "RUNNING"
    assert seen(first) == "FINISHED"


def test_a_run_that_is_deleted_is_replaced_and_its_id_is_kept(job: TrainJob, tracking: str) -> None:
    with parent_run(job, "s", None, kind="study", params={}) as first:
        pass
    client(tracking).delete_run(first.mlflow_run_id)
    with parent_run(job, "s", recorded(first), kind="study", params={}, parent="p") as second:
        assert second.earlier_mlflow_run_ids == [first.mlflow_run_id]
        assert second.mlflow_run_id != first.mlflow_run_id
    assert client(tracking).get_run(second.mlflow_run_id).data.tags["mlflow.parentRunId"] == "p"
