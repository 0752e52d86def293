"""Functions that write the checkpoints of a run and fetch the newest good one.

A checkpoint is complete when it has a manifest. The manifests decide which checkpoint is the newest. Ray's own list of
checkpoints is one report behind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import CorruptError
from pipeline.runs.records import CheckpointFacts
from pipeline.runs.stored_run import CHECKPOINT_FACTS, METRICS, StoredCheckpoint, StoredRun
from pipeline.storage import file_sets
from sagan.train_state import TENSORS, TrainState


def write_checkpoint(local: Path, state: TrainState, metrics: Path, facts: CheckpointFacts) -> str:
    """Write the files of a checkpoint into the local folder `local` and return the name of the checkpoint.

    Args:
        local: Empty folder.
        state: Training state.
        metrics: File with the points that were logged so far. It may be missing.
        facts: Contents of `checkpoint.json`.
    """
    state.save(local)
    (local / METRICS).write_bytes(metrics.read_bytes() if metrics.exists() else b"")
    (local / CHECKPOINT_FACTS).write_text(facts.model_dump_json(indent=1))
    with (local / TENSORS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{state.images:012d}-{digest[:8]}"


def upload_checkpoint(local: Path, checkpoint: StoredCheckpoint) -> None:
    """Upload the files of `local`, the manifest last. A checkpoint that is complete already is not uploaded again.

    Raises EnvironmentFault.
    """
    if not checkpoint.is_complete():
        file_sets.upload_set(local, checkpoint.url)


def fetch_newest_checkpoint(run: StoredRun, local: Path, warn: Callable[[str], None]) -> StoredCheckpoint | None:
    """Download the newest good checkpoint of a run into `local` and return it; None where there is none.

    A damaged checkpoint is skipped, and `warn` is called with a message. Raises EnvironmentFault.
    """
    for checkpoint in reversed(run.checkpoints()):
        try:
            file_sets.fetch_set(checkpoint.url, local)
        except CorruptError as error:
            warn(f"checkpoint {checkpoint.name} is damaged and is skipped: {error.message}")
        else:
            return checkpoint
    return None
