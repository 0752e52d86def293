"""`sagan doctor` tells which server, disk or variable does not work, and what to do about it."""

from __future__ import annotations

import shutil
import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from infra.local.servers import S3
from pipeline.doctor import doctor
from pipeline.doctor.check import Check
from pipeline.errors import EnvironmentFault
from pipeline.tracking.mlflow_run import MlflowRun, default_uri

pytestmark = pytest.mark.system


def finding(name: str) -> Check:
    return next(check for check in doctor.checks() if check.name == name)


def test_doctor_tells_a_wrong_secret_from_a_server_that_is_down(tmp_path, monkeypatch, capsys):
    with S3(tmp_path) as server:
        server.bucket("images")
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        up = finding("S3")
        assert up.status == "ok"
        assert "images" in up.found
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        wrong = finding("S3")
        assert (wrong.status, wrong.remedy) == ("fail", "correct AWS_SECRET_ACCESS_KEY")
        assert "secret key does not match" in wrong.found
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.credentials.secret)
    down = finding("S3")
    assert down.status == "fail"
    assert "cannot be reached" in down.found
    assert server.credentials.secret not in f"{up}{wrong}{down}"
    assert doctor.run(cluster=False, json=True) == 3
    assert '"name": "S3"' in capsys.readouterr().out


@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", "RAY_API_SERVER_ADDRESS"])
def test_doctor_reports_what_does_not_answer(monkeypatch, variable):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv(variable, f"http://127.0.0.1:{port}")
    found = finding({"MLFLOW_TRACKING_URI": "MLflow", "RAY_API_SERVER_ADDRESS": "Ray"}[variable])
    assert found.status == "fail"
    assert variable in found.remedy


def test_doctor_does_not_wait_for_what_never_answers(monkeypatch):
    """A server that accepts and says nothing, while everything else is still reported."""
    monkeypatch.setattr(doctor, "PATIENCE_S", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mute.getsockname()[1]}")
        found = {check.name: check for check in doctor.checks()}
    assert found["MLflow"].status == "fail"
    assert found["disk"].status in ("ok", "warn")


@pytest.mark.parametrize("place", ["mlruns", "old schema", "a text"])
def test_doctor_asks_mlflow_as_a_job_does(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns" if place == "mlruns" else "sqlite:///given.db")
    if place == "old schema":
        MlflowRun.start(f"sqlite:///{tmp_path}/new.db", "e", "r", None, {}, {}, None).close(10)
        shutil.copy("new.db", "given.db")
        with closing(sqlite3.connect("given.db")) as database, database:
            database.execute("update alembic_version set version_num = '451aebb31d03'")
    if place == "a text":
        Path("given.db").write_text("not a database, " * 100)
    found = finding("MLflow")
    assert found.status == "fail"
    assert ("sqlite:///FILE" if place == "mlruns" else "mlflow db upgrade") in found.remedy, found
    with pytest.raises(EnvironmentFault) as caught:
        MlflowRun.start(default_uri(), "e", "r", None, {}, {}, None)
    assert caught.value.message.partition(" (")[0] == found.found.partition(" (")[0], "a job says the same"


def test_doctor_makes_no_database(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert finding("MLflow").status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_doctor_names_a_host_that_the_server_refuses(mlflow_server, monkeypatch):
    port = mlflow_server.uri.rpartition(":")[2]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{socket.gethostname()}.example:{port}")
    monkeypatch.setenv("http_proxy", mlflow_server.uri)  # every name leads to the server
    monkeypatch.setenv("no_proxy", "")
    found = finding("MLflow")
    assert found.status == "fail"
    assert "--allowed-hosts" in found.remedy, found


def test_mlflow_server_keeps_runs_and_answers_the_doctor(mlflow_server, monkeypatch):
    from mlflow import MlflowClient

    tracking = MlflowClient(mlflow_server.uri)
    run = tracking.create_run(tracking.create_experiment("local"))
    tracking.log_metric(run.info.run_id, "fid", 12.0, step=3)
    assert tracking.get_run(run.info.run_id).data.metrics == {"fid": 12.0}
    assert run.info.artifact_uri.startswith("s3://")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    assert finding("MLflow").status == "ok"
