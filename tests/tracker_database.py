"""Databases of MLflow for tests. MLflow takes about a second to make one, so a process makes one and copies it."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from pipeline.config.locations import sqlite_uri
from pipeline.tracking.mlflow_run import client


def tracker_database(folder: Path) -> str:
    """Return the tracking URI of `mlflow.db` in a folder. Where it does not exist, make it as MLflow does."""
    folder.mkdir(parents=True, exist_ok=True)
    database = folder / "mlflow.db"
    if not database.exists():
        database.write_bytes(_without_runs())
    return sqlite_uri(database)


@cache
def _without_runs() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "mlflow.db"
        client(sqlite_uri(database)).search_experiments()
        return database.read_bytes()
