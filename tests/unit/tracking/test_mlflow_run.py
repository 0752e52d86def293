from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import ClientError, EndpointConnectionError

from pipeline.errors import EnvironmentFault, LastingFault
from pipeline.tracking.mlflow_run import MlflowRun, client
from pipeline.tracking.registry import registry_errors
from tests.closed_port import closed_port, url_of


def start(uri: str, folder: Path, **changes: Any) -> MlflowRun:
    options: dict[str, Any] = {"run_id": None, "params": {}, "tags": {}, "artifacts": str(folder / "artifacts")}
    return MlflowRun.start(uri, folder.name, "run", **{**options, **changes})


def points(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(uri).get_metric_history(run_id, key)]


def test_points_arrive_with_their_steps_and_times(tracking: str, tmp_path: Path) -> None:
    tracker = start(tracking, tmp_path)
    for step in range(1200):
        tracker.log({"loss_d": step / 2, "loss_g": -1.0}, step, time_ms=1000 + step)
    assert tracker.close(timeout_s=60) == 0
    history = client(tracking).get_metric_history(tracker.run_id, "loss_d")
    assert [(m.step, m.value, m.timestamp) for m in history] == [(s, s / 2, 1000 + s) for s in range(1200)]
    assert len(points(tracking, tracker.run_id, "loss_g")) == 1200


def test_a_resumed_run_has_every_point_once(tracking: str, tmp_path: Path) -> None:
    """Some points are offered again with other times and values, as a resume does, and some were never delivered."""
    first = start(tracking, tmp_path)
    for step in (10, 20, 40):
        first.log({"loss": 1.0}, step, time_ms=step)
    first.log({"fid/12345678": 9.0}, 40, time_ms=40)
    assert first.close(timeout_s=60) == 0
    second = start(tracking, tmp_path, run_id=first.run_id)
    for step in (20, 30, 40, 50):
        second.log({"loss": 2.0}, step, time_ms=1000 + step)
    second.log({"fid/12345678": 9.5}, 30, time_ms=1030)  # an older checkpoint, scored late
    assert second.close(timeout_s=60) == 0
    assert sorted(points(tracking, first.run_id, "loss")) == [(10, 1), (20, 1), (30, 2), (40, 1), (50, 2)]
    assert sorted(points(tracking, first.run_id, "fid/12345678")) == [(30, 9.5), (40, 9)]


def test_a_resumed_run_keeps_its_params_and_runs_again(tracking: str, tmp_path: Path) -> None:
    params = {f"p{i}": i for i in range(230)}
    tracker = start(tracking, tmp_path, params=params, tags={"kind": "train"})
    tracker.finish("FINISHED")
    assert client(tracking).get_run(tracker.run_id).info.status == "FINISHED"
    again = start(tracking, tmp_path, run_id=tracker.run_id, params={**params, "p0": 99, "new": 1}, tags={"kind": "x"})
    again.close(timeout_s=10)
    run = client(tracking).get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["kind"]) == ("RUNNING", "x")
    assert run.data.params == {**{k: str(v) for k, v in params.items()}, "new": "1"}


def test_a_run_of_a_sweep_knows_its_parent(tracking: str, tmp_path: Path) -> None:
    parent = start(tracking, tmp_path)
    child = start(tracking, tmp_path, parent=parent.run_id)
    found = client(tracking).get_run(child.run_id)
    assert found.data.tags["mlflow.parentRunId"] == parent.run_id
    assert found.info.experiment_id == client(tracking).get_run(parent.run_id).info.experiment_id


def test_files_arrive_in_their_folders(tracking: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"1")
    tracker = start(tracking, tmp_path)
    tracker.log_file(tmp_path / "a.png", "grids")
    tracker.log_file(tmp_path / "a.png")
    assert tracker.close(timeout_s=30) == 0
    paths = {a.path for folder in ("", "grids") for a in client(tracking).list_artifacts(tracker.run_id, folder)}
    assert {"a.png", "grids/a.png"} <= paths


def test_one_point_that_is_refused_does_not_hold_up_the_others(
    tracking: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(tracking, tmp_path)
    tracker.log({"bad\x00name": 1.0}, 1, 1)
    tracker.log_file(tmp_path / "gone.png")
    tracker.log({"loss": 1.0, "broken": math.nan}, 2, 2)
    assert tracker.close(timeout_s=30) == 2
    assert points(tracking, tracker.run_id, "loss") == [(2, 1)]
    ((step, value),) = points(tracking, tracker.run_id, "broken")
    assert (step, math.isnan(value)) == (2, True)
    assert "gone.png" in caplog.text


def test_a_tracker_that_is_away_is_found_at_the_start(tmp_path: Path) -> None:
    with closed_port() as held, pytest.raises(EnvironmentFault) as caught:
        start(url_of(held), tmp_path)
    assert "MLflow at http://127.0.0.1" in caught.value.message
    assert "track.uri" in caught.value.remedy


def test_an_outage_is_no_refusal_whatever_the_id_of_the_run(tmp_path: Path) -> None:
    with closed_port() as held, pytest.raises(EnvironmentFault) as caught:
        start(url_of(held), tmp_path, run_id="4010a403")
    assert not isinstance(caught.value, LastingFault)


def test_a_tracker_that_is_away_later_neither_raises_nor_blocks(caplog: pytest.LogCaptureFixture) -> None:
    with closed_port() as held, caplog.at_level(logging.WARNING):
        tracker = MlflowRun(url_of(held), "some-run")
        for step in range(100):
            tracker.log({"loss": 1.0}, step, step)
        assert tracker.close(timeout_s=3) == 100
    assert sum("fails; points wait" in message for message in caplog.messages) <= 1
    assert "100 points" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        S3UploadFailedError("an upload failed"),
        EndpointConnectionError(endpoint_url="http://127.0.0.1:1"),
        ClientError({"Error": {"Code": "SlowDown"}}, "PutObject"),
    ],
)
def test_an_outage_of_the_artifact_store_is_a_fault_of_the_environment(error: Exception) -> None:
    """MLflow leaves the exceptions of its S3 client to its callers."""
    with pytest.raises(EnvironmentFault), registry_errors("http://127.0.0.1:1"):
        raise error
