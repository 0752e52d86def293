"""The servers of infra.local: there when asked for, closed to strangers, gone afterwards whatever ended their owner."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

import infra.local.server_process
from infra.local import end_with_parent
from infra.local.server_process import BIN, CHECKOUT, answers, free_port
from infra.local.servers import LONGEST_TMPDIR, S3, Credentials, MlflowServer, Ray
from infra.local.state_folder import local_mlflow, local_s3
from pipeline.errors import EnvironmentFault, LastingFault
from pipeline.tracking import registry
from pipeline.tracking.mlflow_run import check_tracker
from tests.system.command_process import Driver
from tests.system.test_doctor import finding

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


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
"""127.0.0.1, ::1 and ::ffff:127.0.0.1 as Linux writes them in /proc/net/tcp and /proc/net/tcp6."""


def open_to_the_network(pids: list[int]) -> tuple[int, list[str]]:
    """The number of listening sockets of the processes, and those of them that are not on loopback."""
    owners: dict[str, int] = {}
    for pid in pids:
        with suppress(OSError):  # it has ended
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    owners[str(link.readlink())] = pid
    count, exposed = 0, []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            owner = owners.get(f"socket:[{rest[5]}]")
            if state == "0A" and owner:
                count += 1
                address, port = local.split(":")
                if address not in LOOPBACK:
                    command = Path(f"/proc/{owner}/cmdline").read_text().replace("\0", " ")
                    exposed.append(f"{address} port {int(port, 16)}: {command[:200]}")
    return count, exposed


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


def test_a_free_port_is_none_that_the_kernel_gives_to_connections():
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if first < 21_000:
        pytest.skip("the kernel's range leaves no ports for servers")
    assert all(20_000 <= free_port() < first for _ in range(200))


def test_kept_credentials_are_the_owners_alone(tmp_path):
    path = tmp_path / "below" / "credentials"
    made = Credentials.kept(path)
    assert Credentials.kept(path) == made
    assert path.stat().st_mode & 0o777 == 0o600
    assert made.secret not in repr(made)


def test_mlflow_asks_for_the_login(mlflow_server, monkeypatch):
    """Another user of the machine reaches the port, and must not move `champion`."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    owner = MlflowClient(mlflow_server.uri)
    owner.create_registered_model("guarded")
    wrong = {"MLFLOW_TRACKING_USERNAME": mlflow_server.login.key_id, "MLFLOW_TRACKING_PASSWORD": "x" * 30}
    for environment in ({}, wrong):
        for name in wrong:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        stranger = MlflowClient(mlflow_server.uri)
        with pytest.raises(MlflowException, match="401|not authenticated"):
            stranger.get_registered_model("guarded")
        with pytest.raises(MlflowException, match="401|not authenticated"):
            stranger.set_registered_model_tag("guarded", "a", "b")
        with pytest.raises(LastingFault) as refused:
            check_tracker(mlflow_server.uri)
        assert "MLFLOW_TRACKING_PASSWORD" in refused.value.remedy
        with pytest.raises(EnvironmentFault) as refused:
            registry.checkpoints(mlflow_server.uri, "guarded")
        assert "log in as" in refused.value.remedy
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert mlflow_server.login.secret not in found


def test_what_is_kept_is_private(tmp_path):
    folder = tmp_path / "local"
    (tmp_path / "old/s3").mkdir(parents=True, mode=0o755)
    with local_s3(tmp_path / "old"):
        assert (tmp_path / "old/s3").stat().st_mode & 0o777 == 0o700
    with local_s3(folder) as server:
        server.bucket("images")
        login = local_mlflow(server, folder).login
    assert [path.stat().st_mode & 0o777 for path in (folder, folder / "s3")] == [0o700, 0o700]
    for name in ("credentials", "mlflow-login"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    assert local_mlflow(server, folder).login == login
    assert login.secret not in repr(login)


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


class LateNode(Ray):
    """A head whose node is held until the dashboard answers."""

    node = 0
    ready_without_node: bool | None = None

    def ready(self) -> bool:
        if not self.node and (found := [pid for pid in self.pids if is_node(pid)]):
            self.node = min(found)  # a child has the same command line until it calls exec
            os.kill(self.node, signal.SIGSTOP)
        ready = super().ready()
        login = {"Authorization": f"Bearer {self.token}"}
        if self.node and self.ready_without_node is None and answers(f"{self.address}/api/version", login):
            self.ready_without_node = ready
            os.kill(self.node, signal.SIGCONT)
        return ready


def is_node(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0].endswith("/raylet")
    except OSError:  # it has ended
        return False


@pytest.mark.xdist_group("ray")
def test_ray_has_not_started_before_its_node_has_registered():
    with LateNode(cpus=1) as head:
        assert head.ready_without_node is False


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(400)
def test_nothing_listens_beyond_loopback(s3, mlflow_server, ray_cluster, tmp_path):
    """The local servers, a local Ray, and the workers, torch's store and gloo of runs in both kinds of local Ray."""
    count, exposed = open_to_the_network([*s3.pids, *mlflow_server.pids])
    assert count == 2
    assert not exposed

    environment = {**s3.env, **mlflow_server.env, "SAGAN_BUCKET": s3.bucket()}
    on_it = environment | ray_cluster.env
    count, exposed = listeners_of_a_run(tmp_path, on_it, "on-a-cluster", lambda: ray_cluster.pids)
    assert count > 15
    assert not exposed
    count, exposed = listeners_of_a_run(tmp_path, environment, "alone", list)
    assert count > 8
    assert not exposed


def listeners_of_a_run(folder, environment, name, others):
    """`open_to_the_network` of a run that trains, with the processes below it and the others."""
    run = Driver(folder, environment, name=name)
    run.until("img/s")  # Ray's own processes have all started, and the workers have exchanged gradients
    found = open_to_the_network([*others(), run.process.pid, *end_with_parent.descendants(run.process.pid)])
    run.signal(signal.SIGINT)
    assert run.end() == 130, run.output
    return found


def test_a_temporary_folder_whose_path_is_too_long_for_sockets_is_named(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * (LONGEST_TMPDIR - len(str(tmp_path)) - 1))
    deep.mkdir()
    long = deep.with_name(deep.name + "x")
    long.mkdir()
    listens = "from multiprocessing.connection import Listener; Listener(family='AF_UNIX')"
    for folder, works in ((deep, True), (long, False)):
        done = subprocess.run([sys.executable, "-c", listens], env=os.environ | {"TMPDIR": str(folder)}, check=False)
        assert (done.returncode == 0) == works
    with pytest.raises(EnvironmentFault, match="is too long for the sockets") as caught, Ray(env={"TMPDIR": str(long)}):
        pass
    assert caught.value.remedy.startswith("set TMPDIR")
