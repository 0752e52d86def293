"""Receipts of complete shards, by which an interrupted packing is resumed without packing these shards again."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel

from pipeline.config.schema import PackSection
from pipeline.errors import CorruptError
from pipeline.packing.finish_collection import ShardPlan
from pipeline.packing.image_source import Source
from pipeline.storage import files, validate_json
from pipeline.storage.file_sets import FileEntry
from pipeline.storage.validate_json import Sha256, Size

_FOLDER = ".packing"
_WHAT = "the receipt of a shard"


class _Receipt(BaseModel):
    """Facts about a complete shard of an unfinished packing."""

    size: Size
    sha256: Sha256
    inputs: str
    """SHA-256 of the inputs of the shard (see `_inputs`)."""
    broken: dict[str, str]
    """Reason for each image that the shard leaves out, by its index in the source."""


def upload_complete_shard(
    path: Path, broken: dict[str, str], part: ShardPlan, source: Source, section: PackSection, destination: str
) -> None:
    """Upload the shard at `path`, and then its receipt. `broken` has the reason for each image that it leaves out."""
    files.upload(path, files.join(destination, part.name))
    receipt = asdict(FileEntry.of(path)) | {"inputs": _inputs(part, source, section), "broken": broken}
    files.write_json(_receipt_url(destination, part), receipt)


def fetch_complete_shard(
    path: Path, part: ShardPlan, source: Source, section: PackSection, destination: str
) -> dict[str, str] | None:
    """Download a complete shard that an earlier packing of the same images wrote, to `path`.

    Returns the reason for each image that the shard leaves out, by its index in the source as text. Returns None where
    there is no complete shard.
    """
    with suppress(FileNotFoundError, CorruptError):
        url = _receipt_url(destination, part)
        receipt = validate_json.validate(_Receipt, validate_json.parse(validate_json.read(url), url, _WHAT), url, _WHAT)
        known = receipt.broken.keys() <= {str(i) for i in part.ids}
        if known and receipt.inputs == _inputs(part, source, section):
            files.download(files.join(destination, part.name), path, most=receipt.size)
            if FileEntry.of(path) == FileEntry(receipt.size, receipt.sha256):
                return receipt.broken
    return None


def delete_receipts(destination: str) -> None:
    """Delete all receipts. A finished collection needs none."""
    files.delete(files.join(destination, _FOLDER))


def _inputs(part: ShardPlan, source: Source, section: PackSection) -> str:
    """Return the SHA-256 of everything that determines a shard, except the contents of its images."""
    keys = {"resolution", "encoding", "quality", "chroma"}
    images = [(int(n), source.keys[i], int(source.labels[i])) for n, i in zip(part.numbers, part.ids, strict=True)]
    text = json.dumps([section.model_dump(include=keys), bool(source.class_names), images])
    return hashlib.sha256(text.encode()).hexdigest()


def _receipt_url(destination: str, part: ShardPlan) -> str:
    return files.join(destination, _FOLDER, f"{part.name}.json")
