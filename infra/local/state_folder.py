"""Files that are kept between starts of the local servers: the bucket, credentials and the tracking database."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import NoReturn

from infra.local.server_process import CHECKOUT
from infra.local.servers import S3, Credentials, MlflowServer

FOLDER = CHECKOUT / ".local"
BUCKET = "sagan"
TRACKING_DB = CHECKOUT / "runs" / "mlflow.db"


def local_s3(folder: Path = FOLDER, port: int | None = None) -> S3:
    """Return an S3 server with the buckets and the credentials of earlier starts."""
    return S3(folder / "s3", port=port, credentials=Credentials.kept(folder / "credentials"))


def mlflow_login_file(folder: Path = FOLDER) -> Path:
    """Return the path of the file with MLflow's user and password."""
    return folder / "mlflow-login"


def local_mlflow(s3: S3, folder: Path = FOLDER) -> MlflowServer:
    """Return an MLflow server for the tracking database, with the login of earlier starts."""
    login = Credentials.kept(mlflow_login_file(folder), MlflowServer.user)
    return MlflowServer(TRACKING_DB.parent, artifacts=f"s3://{BUCKET}/mlflow", env=s3.env, login=login)


def end_on_sigterm() -> None:
    """Make SIGTERM raise KeyboardInterrupt, as Ctrl-C does, so that it ends a `with` block of servers."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
