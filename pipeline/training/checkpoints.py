"""A run's checkpoints in storage: `<root>/<name>/checkpoints/<images, 12 digits>-<state digest8>/`, manifest last.

Our manifests are the one authority on which checkpoint is the latest; Ray's own record lags by a report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config.schema import TrainJob
from pipeline.errors import CorruptError
from pipeline.storage import files, fileset
from sagan.state import TENSORS, TrainState

FACTS, METRICS = "checkpoint.json", "metrics.jsonl"


def run_url(job: TrainJob) -> str:
    """The folder of a run."""
    return files.join(job.checkpoint.root, job.name)


def images_of(name: str) -> int:
    """The position that a checkpoint's name says."""
    return int(name.split("-")[0])


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, job: TrainJob) -> None:
        self.url = files.join(run_url(job), "checkpoints")

    def complete(self) -> list[str]:
        """Names of those whose manifest stands, oldest first."""
        return [name for name in sorted(files.list_names(self.url)) if fileset.read_manifest(self.locate(name))]

    def locate(self, name: str) -> str:
        return files.join(self.url, name)

    def write(self, folder: Path, state: TrainState, metrics: Path, facts: dict[str, Any]) -> str:
        """Put a checkpoint's files into a local folder; returns its name."""
        state.save(folder)
        (folder / METRICS).write_bytes(metrics.read_bytes() if metrics.exists() else b"")
        (folder / FACTS).write_text(json.dumps({"images": state.images, **facts}, indent=1))
        with (folder / TENSORS).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return f"{state.images:012d}-{digest[:8]}"

    def commit(self, folder: Path, name: str) -> str:
        """Upload a written checkpoint, its manifest last; returns its URL. Once is enough, twice is harmless."""
        url = self.locate(name)
        if fileset.read_manifest(url) is None:
            fileset.commit(folder, url)
        return url

    def fetch_newest(self, folder: Path, warn: Callable[[str], None]) -> str | None:
        """Bring the newest good checkpoint into `folder` and return its name, if any; damaged ones are passed over."""
        for name in reversed(self.complete()):
            try:
                fileset.fetch(self.locate(name), folder)
            except CorruptError as error:
                warn(f"checkpoint {name} is damaged and was passed over: {error.message}")
            else:
                return name
        return None

    def remove(self, name: str) -> None:
        fileset.remove(self.locate(name))
