"""The servers of infra.local: there when asked for, closed to strangers, gone afterwards whatever ended their owner."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

import infra.local.server_process
from infra.local import end_with_parent
from infra.local.server_process import BIN, CHECKOUT
from infra.local.servers import S3, Credentials, MlflowServer, Ray
from pipeline import doctor
from pipeline.errors import EnvironmentFault
from pipeline.tracking.mlflow_run import MlflowRun, default_uri

pytestmark = pytest.mark.system

# A process that owns a server, says which processes that makes, and waits.
OWNER = """
import sys, signal
from infra.local.state_folder import end_on_sigterm
from infra.local.servers import S3
end_on_sigterm()
try:
    with S3(sys.argv[1]) as server:
        print(server.scratch, *server.pids, flush=True)
        signal.pause()
except KeyboardInterrupt:
    print("left in order", flush=True)
"""


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether it came true in time; generous, since machines are loaded."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def client(server: S3, credentials: Credentials) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=server.url,
        aws_access_key_id=credentials.key_id,
        aws_secret_access_key=credentials.secret,
        region_name="us-east-1",
    )


def test_s3_serves_what_was_written_before_and_is_gone_afterwards(tmp_path):
    with S3(tmp_path / "data") as server:
        bucket = server.bucket("images")
        assert bucket == "s3://images"
        client(server, server.credentials).put_object(Bucket="images", Key="a/b", Body=b"pixels")
        pids = server.pids
        assert len(pids) == 2
        assert all(runs(pid) for pid in pids)
    assert not any(runs(pid) for pid in pids)
    with S3(tmp_path / "data") as again:
        assert again.bucket("images") == bucket
        assert client(again, again.credentials).get_object(Bucket="images", Key="a/b")["Body"].read() == b"pixels"
        assert again.credentials != server.credentials


def test_s3_refuses_a_wrong_secret_and_an_unknown_key(s3):
    for credentials, code in (
        (Credentials(key_id=s3.credentials.key_id), "SignatureDoesNotMatch"),
        (Credentials(secret=s3.credentials.secret), "InvalidAccessKeyId"),
    ):
        with pytest.raises(ClientError, match=code):
            client(s3, credentials).list_buckets()


def test_the_secret_is_on_no_command_line(s3):
    lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in s3.pids]
    assert any("rclone" in line for line in lines)
    assert not any(s3.credentials.secret in line for line in lines)


def test_a_taken_port_is_said_and_nothing_is_left(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = S3(tmp_path, port=port)
        with pytest.raises(EnvironmentFault, match=f"port {port} of 127.0.0.1 is taken"), server:
            pass
        assert server.pids == []


def test_a_port_lost_to_somebody_else_in_the_meantime_is_replaced(tmp_path, monkeypatch):
    free = infra.local.server_process.free_port()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        ports = iter([other.getsockname()[1], free])
        monkeypatch.setattr(infra.local.server_process, "free_port", lambda: next(ports))
        with S3(tmp_path) as server:
            assert server.port == free


def test_a_server_that_cannot_start_says_why(tmp_path):
    broken = MlflowServer(tmp_path, env={"MLFLOW_LOGGING_LEVEL": "no such level"})
    with pytest.raises(EnvironmentFault, match=r"(?s)the MLflow server did not start.*NO SUCH LEVEL"), broken:
        pass
    assert broken.pids == []


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_server_outlives_its_owner(tmp_path, signum):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout
    with owner.stdout as printed:
        scratch, *rest = printed.readline().split()
        pids = [int(pid) for pid in rest]
        assert len(pids) == 2
        assert all(runs(pid) for pid in pids)
        owner.send_signal(signum)
        assert printed.read() == ("" if signum == signal.SIGKILL else "left in order\n")
    owner.wait()
    assert until(lambda: not any(runs(pid) for pid in pids))
    assert not Path(scratch).exists()


def test_grandchildren_in_sessions_of_their_own_end_too(tmp_path):
    """As Ray's do: a server whose child has left its process group and ignores SIGTERM."""
    stubborn = 'trap "" TERM; echo $$; while :; do sleep 1; done'
    command = ["sh", "-c", f"setsid sh -c '{stubborn}' & wait"]
    held = subprocess.Popen(
        [sys.executable, end_with_parent.__file__, str(os.getpid()), str(tmp_path), "0.2", *command],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert held.stdout
    with held.stdout as printed:
        grandchild = int(printed.readline())
    held.terminate()
    held.wait()
    assert not runs(grandchild)


def test_kept_credentials_are_the_owners_alone(tmp_path):
    path = tmp_path / "below" / "credentials"
    made = Credentials.kept(path)
    assert Credentials.kept(path) == made
    assert path.stat().st_mode & 0o777 == 0o600
    assert made.secret not in repr(made)


def finding(name: str) -> doctor.Check:
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


JOB = """#!/usr/bin/env -S python
import os, signal, sys, time
import pipeline
print("runs with", sys.executable, "in", os.getcwd(), "and", os.environ["AWS_ENDPOINT_URL"], flush=True)
def leave(*_):
    print("left in order", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
if "wait" in sys.argv:
    print("waiting", flush=True)
    while True:
        signal.pause()
"""


@pytest.mark.xdist_group("ray")
def test_ray_runs_executable_jobs_from_the_checkout_stops_them_and_leaves(s3, tmp_path, monkeypatch):
    script = tmp_path / "job"
    script.write_text(JOB)
    script.chmod(0o755)
    submit = [str(BIN / "ray"), "job", "submit", "--", str(script)]
    with Ray(cpus=1, env=s3.env) as head:
        environment = os.environ | head.env | {"PYTHONUNBUFFERED": "1"}  # the client would keep lines back in a pipe
        done = subprocess.run(submit, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"runs with {sys.executable} in {CHECKOUT} and {s3.url}" in done.stdout

        waiting = subprocess.Popen([*submit, "wait"], env=environment, stdout=subprocess.PIPE, text=True)
        assert waiting.stdout
        assert any("waiting" in line for line in waiting.stdout)
        (stopped,) = head.stop_jobs()
        assert "left in order" in waiting.communicate()[0]
        assert head.jobs()[stopped] == "STOPPED"
        said = (head.scratch / f"ray/session_latest/logs/jobs/supervisor-{stopped}.log").read_text()
        assert "terminated gracefully" in said  # and not killed after RAY_JOB_STOP_WAIT_TIME_S

        strangers = environment | {"RAY_AUTH_TOKEN": "0" * 64}
        refused = subprocess.run(submit, env=strangers, capture_output=True, text=True)
        assert refused.returncode
        assert "RAY_AUTH_TOKEN" in refused.stderr
        for name, value in head.env.items():
            monkeypatch.setenv(name, value)
        assert finding("Ray").status == "ok"
        pids = head.pids
        assert len(pids) > 5
    assert not any(runs(pid) for pid in pids)
    assert finding("Ray").status == "fail"
