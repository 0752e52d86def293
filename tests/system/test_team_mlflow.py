"""MLflow for a team, as infra/mlflow/README.md tells to set it up: its commands run here, against a real Postgres."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from infra.local.server_process import BIN, CHECKOUT, PATH, Server, answers
from pipeline.errors import CorruptError, EnvironmentFault
from pipeline.pruning.prune import Prune
from pipeline.storage import files
from pipeline.tracking import registry
from pipeline.tracking.champion import promote, promote_best
from pipeline.tracking.mlflow_run import MlflowRun, client
from pipeline.tracking.registry import CHAMPION
from sagan.config import ModelConfig, OptimConfig
from sagan.train_state import TrainState
from sagan.trained_model import Model
from tests.conftest import TestS3
from tests.document_blocks import block
from tests.progress_timeout import progress_seen
from tests.system.postgres import Postgres, postgres_programs

pytestmark = [pytest.mark.system, pytest.mark.slow]

PAGE_IN_BROWSER = "https://mlflow.example.com"
PAGE = "infra/mlflow/README.md"
ADMIN = ("admin", secrets.token_urlsafe(20))
JOBS = ("jobs", secrets.token_urlsafe(20))
PERSON = ("person", secrets.token_urlsafe(20))
SECRET_KEY = secrets.token_hex(32)


class TeamMlflow(Server):
    """`serve.sh` of a database and a bucket."""

    name = "MLflow for a team"

    def __init__(self, database: dict[str, str], bucket: str, first: bool) -> None:
        admin = {"MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1]} if first else {}
        super().__init__(env={**database, **admin, "MLFLOW_ARTIFACTS_DESTINATION": bucket})

    def command(self) -> list[str]:
        return [str(CHECKOUT / "infra/mlflow/serve.sh")]

    def environment(self) -> dict[str, str]:
        return {
            "MLFLOW_FLASK_SERVER_SECRET_KEY": SECRET_KEY,
            "MLFLOW_SERVER_ALLOWED_HOSTS": f"127.0.0.1:{self.port}",
            "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": PAGE_IN_BROWSER,
            "MLFLOW_HOST": "127.0.0.1",
            "MLFLOW_PORT": str(self.port),
            "MLFLOW_WORKERS": "2",
        }

    def ready(self) -> bool:
        return answers(f"{self.uri}/health")

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def status(self, headers: dict[str, str]) -> int:
        """Status of the answer to a search for experiments, as the page in the browser sends it."""
        search = f"http://127.0.0.1:{self.port}/api/2.0/mlflow/experiments/search"
        try:
            with urllib.request.urlopen(urllib.request.Request(search, b"{}", headers)) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    if (programs := postgres_programs()) is None:
        pytest.skip("Postgres is not installed (Debian's package `postgresql`)")
    if not find_spec("psycopg2"):
        pytest.skip("the driver for Postgres is not installed: pip install 'sagan[team]'")
    with Postgres(programs) as server:
        yield server


@pytest.fixture(scope="module")
def database(postgres: Postgres) -> dict[str, str]:
    """Settings of the server's database, which the command of the page makes."""
    password = secrets.token_urlsafe(20)
    run_block("database", {**postgres.env, "MLFLOW_DB_PASSWORD": password})
    return postgres.of_user("mlflow", password, "mlflow")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is ready to register."""
    networks = ModelConfig(resolution=32, num_classes=10, z_dim=16, channels_g=8, channels_d=8)
    folder = tmp_path_factory.mktemp("model")
    Model.from_state(TrainState(networks, OptimConfig(), 0), standing_images=32).save(folder)
    Image.new("RGB", (32, 32)).save(folder / "samples.png")
    return folder


def run_block(name: str, env: dict[str, str], folder: Path = CHECKOUT) -> None:
    """Run a command of the page."""
    shell = ["bash", "-e", "-o", "pipefail", "-c", block(PAGE, name)]
    subprocess.run(shell, check=True, cwd=folder, env=os.environ | {"PATH": PATH} | env)
    progress_seen()


def log_in(patch: pytest.MonkeyPatch, user: tuple[str, str]) -> None:
    patch.setenv("MLFLOW_TRACKING_USERNAME", user[0])
    patch.setenv("MLFLOW_TRACKING_PASSWORD", user[1])


def add_users(server: TeamMlflow, patch: pytest.MonkeyPatch) -> None:
    log_in(patch, ADMIN)
    patch.setenv("MLFLOW_TRACKING_URI", server.uri)
    patch.setenv("JOBS_PASSWORD", JOBS[1])
    patch.setenv("PERSON_PASSWORD", PERSON[1])
    another = 'users.create_user("person", os.environ["PERSON_PASSWORD"])'
    subprocess.run([sys.executable, "-c", f"{block(PAGE, 'users')}\n{another}"], check=True)
    progress_seen()


def test_a_team_logs_registers_and_pulls_and_finds_all_after_a_restore(
    s3: TestS3,
    postgres: Postgres,
    database: dict[str, str],
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket, backup, restored_bucket = (
        s3.bucket(f"{name}-{uuid.uuid4().hex[:8]}") for name in ("mlflow", "backup", "new")
    )
    metrics = [(1000, 2.5), (2000, 1.5)]
    with TeamMlflow(database, bucket, first=True) as server:
        arguments = b"\0".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in server.pids)
        assert not any(secret.encode() in arguments for secret in (ADMIN[1], SECRET_KEY, database["PGPASSWORD"]))
        assert server.status({}) == server.status({"Origin": PAGE_IN_BROWSER}) == 401
        assert server.status({"Origin": "https://elsewhere.example.com"}) == 403
        assert server.status({"Host": "elsewhere.example.com"}) == 403
        add_users(server, monkeypatch)

        log_in(monkeypatch, JOBS)
        tracker = MlflowRun.start(server.uri, "sagan", "tiny", None, {"train.batch": 8}, {"kind": "train"}, None)
        for step, value in metrics:
            tracker.log({"loss_d": value}, step, step)
        tracker.log_file(exported / "samples.png", "grids")
        assert tracker.close(timeout_s=60) == 0
        for number in (1, 2):
            tags = {"metric": "fd/1", "fd/1": str(3 - number), "better": "lower"}
            tags |= {
                "checkpoint": f"{s3.bucket()}/runs/tiny/checkpoints/{number}",
                "checkpoint_sha256": 64 * str(number),
            }
            assert registry.register(server.uri, "tiny", exported, tracker.run_id, tags) == number
        assert promote_best(server.uri, "tiny") == 2
        source = client(server.uri).get_model_version("tiny", "1").source
        assert source.startswith("mlflow-artifacts:/"), "clients have no key of the bucket"

        log_in(monkeypatch, PERSON)
        pulled = registry.pull(server.uri, "models:/tiny@champion", tmp_path / "pulled")
        assert (pulled / "generator.safetensors").read_bytes() == (exported / "generator.safetensors").read_bytes()
        for change in (
            lambda: promote(server.uri, "tiny", 1, "mine"),
            lambda: MlflowRun.start(server.uri, "sagan", "mine", None, {}, {}, None),
            lambda: registry.register(server.uri, "tiny", exported, tracker.run_id, {"checkpoint_sha256": 64 * "3"}),
        ):
            with pytest.raises(EnvironmentFault, match="403|Permission denied"):
                change()
        MlflowRun.start(server.uri, "mine", "mine", None, {}, {}, None).close(timeout_s=10)

        log_in(monkeypatch, ADMIN)
        models = {file.split("/models/")[1].split("/")[0] for file in files.list_files(bucket) if "/models/" in file}
        assert len(models) == 2
        prune = Prune(server.uri, s3.bucket(), keep_versions=1)
        (deleted,) = prune.delete(prune.plan(), print)
        assert (deleted.name, deleted.goes) == ("models:/tiny/1", True)
        (left,) = models - {source.split("/models/")[1].split("/")[0]}
        assert {f.split("/models/")[1].split("/")[0] for f in files.list_files(bucket) if "/models/" in f} == {left}

        names = {"BUCKET": bucket.removeprefix("s3://"), "BACKUP": backup.removeprefix("s3://")}
        run_block("backup", {**database, **names}, tmp_path)

    subprocess.run(
        [str(postgres.programs / "createdb"), "--owner=mlflow", "restored"], check=True, env=os.environ | postgres.env
    )
    there = {**database, "PGDATABASE": "restored"}
    (tmp_path / "there").mkdir()
    names = {"BUCKET": restored_bucket.removeprefix("s3://"), "BACKUP": backup.removeprefix("s3://")}
    run_block("restore", {**there, **names}, tmp_path / "there")
    run_block("upgrade", there)
    with TeamMlflow(there, restored_bucket, first=False) as server:
        log_in(monkeypatch, PERSON)
        again = registry.pull(server.uri, "models:/tiny@champion", tmp_path / "again")
        assert (again / "generator.safetensors").read_bytes() == (pulled / "generator.safetensors").read_bytes()
        history = client(server.uri).get_metric_history(tracker.run_id, "loss_d")
        assert [(point.step, point.value) for point in history] == metrics
        log_in(monkeypatch, JOBS)
        assert registry.champion_of(server.uri, "tiny", CHAMPION).number == 2  # type: ignore[union-attr]
        tags = {"checkpoint_sha256": 64 * "3"}
        assert registry.register(server.uri, "tiny", exported, tracker.run_id, tags) == 3, "numbers are not used again"

        log_in(monkeypatch, ADMIN)  # what the page says of `mlflow gc`
        client(server.uri).delete_logged_model(left)
        stores = ["--backend-store-uri", "postgresql+psycopg2:///", "--artifacts-destination", restored_bucket]
        gc = [str(BIN / "mlflow"), "gc", *stores, "--tracking-uri", server.uri]
        subprocess.run(gc, check=True, env=os.environ | there)
        with pytest.raises((CorruptError, EnvironmentFault)):
            registry.pull(server.uri, "models:/tiny@champion", tmp_path / "gone")
