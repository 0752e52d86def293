"""The checkpoints of a run in storage: write, upload, list, read, and fetch the newest good one.

A checkpoint is complete when it has a manifest. The manifests decide which checkpoint is the newest. Ray's own list of
checkpoints is one report behind.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel

from pipeline.errors import CorruptError
from pipeline.runs.json_records import CheckpointFacts
from pipeline.storage import file_sets, files, validate_json
from pipeline.storage.validate_json import Size
from sagan.train_state import TENSORS, SavedState, TrainState

CHECKPOINT_FACTS = "checkpoint.json"
METRICS = "metrics.jsonl"
_NAME = re.compile(r"[0-9]{12}-[0-9a-f]{8}")
_MOST_METRICS = 2**30  # bytes
_REST = 2**20  # bytes of a checkpoint beside its tensors and metrics, at most about so many


class LoggedPoint(BaseModel):
    """One line of `metrics.jsonl`: metrics that were logged at a position of the run."""

    step: Size
    time_ms: Size
    metrics: dict[str, float]


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint at a URL.

    Its name is `<images, 12 digits>-<first 8 digits of the state's digest>`, so names sort by position.
    """

    url: str

    @property
    def name(self) -> str:
        return files.name(self.url)

    @property
    def images(self) -> int:
        """Position of the run, taken from the name."""
        return int(self.name.split("-")[0])

    def is_complete(self) -> bool:
        """Return whether the checkpoint has a valid manifest. Raises EnvironmentFault."""
        return file_sets.valid_manifest(self.url) is not None

    def facts(self) -> CheckpointFacts:
        """Return the contents of `checkpoint.json`. Raises CorruptError, also where it is missing, EnvironmentFault."""
        url = files.join(self.url, CHECKPOINT_FACTS)
        if (facts := CheckpointFacts.read(url)) is None:
            raise CorruptError(f"{url} is missing: this is no complete checkpoint")
        return facts

    def metrics(self) -> bytes:
        """Return `metrics.jsonl`: one JSON line for every point that was logged up to this position.

        Raises CorruptError, also where the file is missing, and EnvironmentFault.
        """
        url = files.join(self.url, METRICS)
        try:
            return files.read_at_most(url, _MOST_METRICS)
        except FileNotFoundError as error:
            raise CorruptError(f"{url} is missing: this is no complete checkpoint") from error

    def last_point(self) -> LoggedPoint | None:
        """Return the last line of `metrics.jsonl`; None where nothing was logged. Raises what `metrics` raises."""
        lines, url, what = self.metrics().splitlines(), files.join(self.url, METRICS), "a list of logged points"
        if not lines:
            return None
        return validate_json.validate(LoggedPoint, validate_json.parse(lines[-1], url, what), url, what)


def complete_checkpoints(url: str) -> list[StoredCheckpoint]:
    """Return the complete checkpoints below `url`, the oldest first. Raises EnvironmentFault.

    Folders with other names than those of checkpoints are ignored.
    """
    return [checkpoint for checkpoint in _all_checkpoints(url) if checkpoint.is_complete()]


def abandoned_checkpoints(url: str) -> list[StoredCheckpoint]:
    """Return the incomplete checkpoints below `url` that are not newer than the newest complete one, the oldest first.

    Nobody uploads them any more. Raises EnvironmentFault.
    """
    found = _all_checkpoints(url)
    complete = [checkpoint for checkpoint in found if checkpoint.is_complete()]
    return [
        checkpoint
        for checkpoint in found
        if complete and checkpoint not in complete and checkpoint.images <= complete[-1].images
    ]


def _all_checkpoints(url: str) -> list[StoredCheckpoint]:
    names = filter(_NAME.fullmatch, sorted(files.list_names(url)))
    return [StoredCheckpoint(files.join(url, name)) for name in names]


def write_checkpoint(local: Path, state: TrainState | SavedState, metrics: bytes, facts: CheckpointFacts) -> str:
    """Write the files of a checkpoint into the local folder `local` and return the name of the checkpoint.

    Args:
        local: Empty folder.
        state: Training state.
        metrics: Contents of `metrics.jsonl`: the points that were logged so far.
        facts: Contents of `checkpoint.json`.
    """
    state.save(local)
    (local / METRICS).write_bytes(metrics)
    (local / CHECKPOINT_FACTS).write_text(facts.model_dump_json(indent=1))
    with (local / TENSORS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{state.images:012d}-{digest[:8]}"


def require_room(local: Path, url: str, state: TrainState, metrics: Path) -> None:
    """Check that there is room for a checkpoint in the local folder `local` and, where `url` is local, there too.

    Raises EnvironmentFault that names the folder.
    """
    tensors = sum(tensor.numel() * tensor.element_size() for _, tensor in state.tensors())
    needed = tensors + (metrics.stat().st_size if metrics.exists() else 0) + _REST
    if not files.is_local(url):
        files.require_room(local, needed, "a checkpoint")
        return
    folder = files.local_path(url)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    copies = 2 if existing.stat().st_dev == local.stat().st_dev else 1
    files.require_room(local, copies * needed, "a checkpoint")
    files.require_room(folder, needed, "a checkpoint")


def upload_checkpoint(local: Path, checkpoint: StoredCheckpoint) -> None:
    """Upload the files of `local`, the manifest last. A checkpoint that is complete already is not uploaded again.

    Raises EnvironmentFault.
    """
    if not checkpoint.is_complete():
        file_sets.upload_set(local, checkpoint.url)


def load_state(folder: Path, url: str, device: torch.device | str = "cpu") -> TrainState:
    """Return the training state in a local folder to which the checkpoint at `url` was downloaded.

    Raises CorruptError that names the checkpoint where it holds no training state of this version.
    """
    try:
        return TrainState.load(folder, device)
    except (FileNotFoundError, ValueError) as error:
        reason = str(error).replace(f"{folder}/", "")
        raise CorruptError(
            f"{url} is not a checkpoint of this version: {reason}",
            "use the version of sagan that wrote it, or train again",
        ) from error


def fetch_newest_checkpoint(
    url: str, local: Path, method_digest: str, warn: Callable[[str], None], may_withdraw: Callable[[], None]
) -> StoredCheckpoint | None:
    """Download the newest good checkpoint below `url` into `local` and return it; None where there is none.

    A checkpoint whose bytes differ from its manifest twice is withdrawn: its manifest is deleted, so that it no longer
    counts, and training may upload it again. Before that, `may_withdraw` is called, which may raise. A checkpoint that
    cannot be read, or whose method has another digest than `method_digest`, is skipped. In both cases, `warn` is called
    with a message. Raises EnvironmentFault.
    """
    for checkpoint in reversed(complete_checkpoints(url)):
        try:
            _fetch_twice(checkpoint, local)
        except CorruptError as error:
            may_withdraw()
            files.delete(files.join(checkpoint.url, file_sets.MANIFEST))
            warn(f"checkpoint {checkpoint.name} is damaged and is withdrawn: {error.message}")
            continue
        try:
            other_method = StoredCheckpoint(str(local)).facts().method_digest != method_digest
        except CorruptError as error:  # another version may have written it
            warn(f"checkpoint {checkpoint.name} cannot be read and is skipped: {error.message}")
            continue
        if other_method:
            warn(f"checkpoint {checkpoint.name} is of another method and is skipped")
        else:
            return checkpoint
    return None


def _fetch_twice(checkpoint: StoredCheckpoint, local: Path) -> None:
    """Download a checkpoint, once more where its bytes differ from its manifest. Raises CorruptError if both differ."""
    try:
        file_sets.fetch_set(checkpoint.url, local)
    except CorruptError:
        file_sets.fetch_set(checkpoint.url, local)
