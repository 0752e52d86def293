"""Writing a run's checkpoints and finding the newest good one.

Our manifests are the one authority on which checkpoint is the latest; Ray's own record lags by a report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import CorruptError
from pipeline.storage import fileset
from pipeline.storage.run_folder import RunFolder
from sagan.state import TENSORS, TrainState

FACTS, METRICS = "checkpoint.json", "metrics.jsonl"


def write(local: Path, state: TrainState, metrics: Path, facts: dict[str, Any]) -> str:
    """Put a checkpoint's files into a local folder; returns its name."""
    state.save(local)
    (local / METRICS).write_bytes(metrics.read_bytes() if metrics.exists() else b"")
    (local / FACTS).write_text(json.dumps({"images": state.images, **facts}, indent=1))
    with (local / TENSORS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{state.images:012d}-{digest[:8]}"


def commit(local: Path, folder: RunFolder, name: str) -> None:
    """Upload a written checkpoint, its manifest last. Once is enough, twice is harmless."""
    if fileset.read_manifest(folder.checkpoint(name)) is None:
        fileset.commit(local, folder.checkpoint(name))


def fetch_newest(folder: RunFolder, local: Path, warn: Callable[[str], None]) -> str | None:
    """Bring the newest good checkpoint into `local` and return its name, if any; damaged ones are passed over."""
    for name in reversed(folder.checkpoints()):
        try:
            fileset.fetch(folder.checkpoint(name), local)
        except CorruptError as error:
            warn(f"checkpoint {name} is damaged and was passed over: {error.message}")
        else:
            return name
    return None
