"""A run whose MLflow run is not there any more goes on in a new one, with every point that its checkpoints hold."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from infra.local.servers import MlflowServer
from pipeline.collection.manifest import Collection
from pipeline.config.job_file import parse_job
from pipeline.config.schema import TrackSection, TrainJob
from pipeline.errors import EnvironmentFault
from pipeline.job_runner import _evaluation
from pipeline.runs.stored_run import StoredRun
from pipeline.tracking.mlflow_run import client
from pipeline.training.driver import finish_tracking
from pipeline.training.find_or_start import find_or_start, owned
from pipeline.training.shared_types import TrainingRun
from tests.closed_port import closed_port, url_of
from tests.tracker_database import tracker_database
from tests.unit.evaluation.conftest import commit_checkpoint

POINTS = [{"step": step, "time_ms": step, "metrics": {"loss_d": step / 2}} for step in (16, 32)]


def job_in(collection: Collection, folder: Path, root: Path, **track: str) -> TrainJob:
    values = {
        "kind": "train",
        "name": "moved",
        "data": {"train": collection.url},
        "train": {"kimg": 1, "batch": 16},
        "checkpoint": {"root": str(root)},
        "evaluate": {"extractor": "classifier"},
        "track": {"uri": tracker_database(folder), **track},
    }
    job = parse_job(values, "test")
    assert isinstance(job, TrainJob)
    return job


def start_run(job: TrainJob) -> TrainingRun:
    """Find or start a run as a driver does that ends at once."""
    with ExitStack() as held:
        return find_or_start(job, _evaluation(), None, lambda stored: held.enter_context(owned(stored)))


def points(job: TrainJob, run_id: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(job.track.uri or "").get_metric_history(run_id, "loss_d")]


def test_a_run_goes_on_where_its_mlflow_run_is_not(
    packed: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = job_in(packed, tmp_path / "here", tmp_path / "runs")
    first = start_run(here).mlflow_run_id
    commit_checkpoint(here, 32, points=POINTS)
    assert start_run(here).mlflow_run_id == first
    assert points(here, first) == [], "the workers send them"
    assert not capsys.readouterr().out

    elsewhere = job_in(packed, tmp_path / "elsewhere", tmp_path / "runs")  # the default tracker of another folder
    moved = start_run(elsewhere)
    said = capsys.readouterr().out
    assert f"has no run {first}: a new MLflow run begins" in said
    assert "MLFLOW_TRACKING_URI" in said
    assert points(elsewhere, moved.mlflow_run_id) == [(16, 8), (32, 16)]
    assert moved.reached == 32
    params = client(elsewhere.track.uri or "").get_run(moved.mlflow_run_id).data.params
    assert params["train.batch"] == "16"

    client(elsewhere.track.uri or "").delete_run(moved.mlflow_run_id)
    third = start_run(elsewhere)
    assert f"mlflow runs restore --run-id {moved.mlflow_run_id}" in capsys.readouterr().out
    assert points(elsewhere, third.mlflow_run_id) == [(16, 8), (32, 16)]
    record = StoredRun.of(here).record()
    assert record is not None
    assert record.mlflow_run_id == third.mlflow_run_id
    assert record.earlier_mlflow_run_ids == [first, moved.mlflow_run_id]
    assert start_run(elsewhere).mlflow_run_id == third.mlflow_run_id


def test_a_deleted_experiment_is_named_with_what_to_do(packed: Collection, tmp_path: Path) -> None:
    job = job_in(packed, tmp_path, tmp_path / "runs", experiment="mine")
    start_run(job)
    mlflow = client(job.track.uri or "")
    number = mlflow.get_experiment_by_name("mine").experiment_id
    mlflow.delete_experiment(number)
    with pytest.raises(EnvironmentFault, match="the MLflow experiment mine is deleted") as caught:
        start_run(job)
    assert f"mlflow experiments restore --experiment-id {number}" in caught.value.remedy
    assert "track.experiment=" in caught.value.remedy
    other = job_in(packed, tmp_path, tmp_path / "runs", experiment="another")
    assert start_run(other).mlflow_run_id


# --- MLflow is down --------------------------------------------------------------------------------------------------


def test_a_run_resumes_without_mlflow_and_gets_its_points_at_the_end(
    packed: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closed_port() as held:
        job = job_in(packed, tmp_path, tmp_path / "runs").model_copy(
            update={"track": TrackSection(uri=url_of(held), experiment="e")}
        )
        _, port = held.getsockname()
        with pytest.raises(EnvironmentFault, match="cannot be used"):
            start_run(job)  # a new run needs its MLflow run
    server = MlflowServer(tmp_path / "mlflow", port=port)
    with server:
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            monkeypatch.setenv(name, server.env[name])
        first = start_run(job)
    commit_checkpoint(job, 32, points=POINTS)
    capsys.readouterr()
    resumed = start_run(job)
    assert "the run resumes without MLflow" in capsys.readouterr().out
    assert (resumed.mlflow_run_id, resumed.reached) == (first.mlflow_run_id, 32)
    with server:
        finish_tracking(resumed, "FINISHED")
        assert points(job, first.mlflow_run_id) == [(16, 8), (32, 16)]
        assert client(job.track.uri or "").get_run(first.mlflow_run_id).info.status == "FINISHED"
