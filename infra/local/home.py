"""What lasts on this machine from one start of the servers to the next: the quickstart's and a developer's bucket."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import NoReturn

from infra.local.server import CHECKOUT
from infra.local.servers import S3, Credentials

FOLDER = CHECKOUT / ".local"
BUCKET = "sagan"
TRACKING_DB = CHECKOUT / "runs" / "mlflow.db"


def local_s3(folder: Path = FOLDER, port: int | None = None) -> S3:
    """The S3 server with the contents and credentials of last time."""
    return S3(folder / "s3", port=port, credentials=Credentials.kept(folder / "credentials"))


def end_on_sigterm() -> None:
    """Let SIGTERM end a `with` block of servers as Ctrl-C does."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
