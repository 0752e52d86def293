"""Pack images into shards: every image decoded once, made square and upright, written in a seeded permutation.

The same images and the same section give the same bytes, wherever they lie and whatever does the work: a folder, its
tar and a bucket pack alike. An image's place, and with it its key, is its place in the permutation of all that were
listed: what is broken or left out changes its own shard alone.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import TarWriter

from pipeline.config.schema import PackSection
from pipeline.data.adopt import adopt
from pipeline.data.commit import SECTION, Done, Slice, commit, gather, line_of, taken
from pipeline.data.images import EXTENSIONS, prepare
from pipeline.data.index import MANIFEST, Collection, Shard, read_shard
from pipeline.data.order import PACKING, permutation
from pipeline.data.progress import Report, reporting
from pipeline.data.sources import open_source
from pipeline.data.spread import spread
from pipeline.data.threads import map_ahead
from pipeline.data.tree import Source
from pipeline.errors import CorruptError, UsageError
from pipeline.storage import files
from pipeline.storage.fileset import FileEntry

# What has been packed so far: a receipt per shard, until the manifest stands.
_RECEIPTS = ".packing"
_THREADS = 4  # of a shard, so that reading from far away and decoding overlap


def pack(destination: str, section: PackSection, progress: Report | None = None) -> Collection:
    """Pack `section.source` into shards at the URL `destination`; says what it did and what to do next.

    Nothing is done where the same section has been packed there, and shards that an interrupted packing left whole are
    kept. `progress` replaces the progress bar. Raises UsageError (no images, too many broken ones, another collection
    at `destination`), EnvironmentFault.
    """
    encoding = section.encoding or ("png" if section.resolution == 32 else "jpeg")
    section = section.model_copy(update={"encoding": encoding})
    excluded = _excluded(section)
    record = section.model_dump(exclude={"max_broken"}) | {"exclude": sorted(excluded)}
    if files.exists(files.join(destination, MANIFEST)):
        return _standing(destination, record)
    files.check_writable(destination)
    if section.index_only:
        return adopt(destination, section, excluded, record, progress)
    source = open_source(section.source)
    slices = list(_slices(source, section, excluded))
    here = source.here or files.is_local(destination)
    with reporting("packing", progress) as report:
        shards = spread(pack_shard, slices, (source, section, destination), here)
        done = gather(shards, sum(len(part.ids) for part in slices), section.max_broken, report)
    facts = {
        "source": source.kind,
        "seed": section.seed,
        "resolution": section.resolution,
        "encoding": encoding,
        "quality": section.quality if encoding == "jpeg" else None,
        "chroma": section.chroma if encoding == "jpeg" else None,
        "class_names": source.class_names,
    }
    collection = commit(destination, record, facts, done, source.notes)
    files.delete(files.join(destination, _RECEIPTS))
    return collection


def pack_shard(part: Slice, source: Source, section: PackSection, destination: str) -> Done:
    """Write the shard and its receipt, unless both stand already."""
    with tempfile.TemporaryDirectory(prefix="sagan-pack-") as folder:
        path = Path(folder) / part.name
        broken = _standing_shard(path, part, source, section, destination)
        if broken is None:
            broken = _write(path, part, source, section)
            if len(broken) < len(part.ids):
                files.upload(path, files.join(destination, part.name))
                receipt = asdict(FileEntry.of(path)) | {"inputs": _inputs(part, source, section), "broken": broken}
                files.write_json(_receipt_url(destination, part), receipt)
        lines = [f"{line_of(source.keys[i])}: {broken[str(i)]}" for i in part.ids if str(i) in broken]
        kept = [int(i) for i in part.ids if str(i) not in broken]
        if not kept:
            nothing = np.empty((0, 3), dtype=np.int64)
            return Done(Shard(part.name, 0, "", 0, part.split), [], nothing, np.empty(0, dtype=np.uint64), lines)
        keys = [line_of(source.keys[i]) for i in kept]
        return Done.of(path, part, read_shard(path), source.labels[kept], keys, lines)


def _excluded(section: PackSection) -> set[str]:
    """The names in the file that the section leaves out. Raises UsageError where there is no such file."""
    if section.exclude is None:
        return set()
    try:
        return set(filter(None, files.read_bytes(section.exclude).decode().splitlines()))
    except FileNotFoundError:
        raise UsageError(f"{section.exclude} does not exist", "correct the name of the file to exclude by") from None


def _standing(destination: str, record: dict[str, Any]) -> Collection:
    """The collection that is there, where it was packed by the same section. Raises UsageError where it was not."""
    try:
        found = files.read_json(files.join(destination, SECTION))
    except FileNotFoundError:
        found = {}
    if differing := [key for key in record if found.get(key) != record[key]]:
        listed = ", ".join(f"{key} {found.get(key)!r} instead of {record[key]!r}" for key in differing)
        raise UsageError(
            f"{destination} already holds a collection that was packed otherwise: {listed}",
            "choose another destination; collections never change",
        )
    collection = Collection.open(destination)
    print(f"{destination} has been packed already, by the same section: {len(collection.labels):,} images")
    return collection


def _slices(source: Source, section: PackSection, excluded: set[str]) -> Iterator[Slice]:
    """All shards, images in the order in which they are written. Raises UsageError for a name that no image has."""
    wanted = taken(source, excluded)
    first = 0
    for split_number, (split, ids) in enumerate(source.splits.items()):
        order = ids[permutation(len(ids), section.seed, PACKING, split_number)]
        numbers = first + np.arange(len(order))
        for shard_number, start in enumerate(range(0, len(order), section.shard_images)):
            part = slice(start, start + section.shard_images)
            kept = wanted[order[part]]
            if kept.any():
                yield Slice(f"{split}-{shard_number:05d}.tar", split, order[part][kept], numbers[part][kept])
        first += len(ids)


def _write(path: Path, part: Slice, source: Source, section: PackSection) -> dict[str, str]:
    """A WebDataset tar, the same bytes for the same samples. Returns the reason by index for what cannot be decoded."""
    broken: dict[str, str] = {}
    extension = EXTENSIONS[section.encoding or ""]
    with path.open("wb") as file, TarWriter(file, user="sagan", group="sagan", mtime=0, encoder=False) as tar:
        images = map_ahead(lambda i: _prepared(int(i), source, section), part.ids, _THREADS, 4 * _THREADS)
        for i, number, image in zip(part.ids, part.numbers, images, strict=True):
            if isinstance(image, str):
                broken[str(i)] = image
                continue
            label = {"cls": str(source.labels[i]).encode()} if source.class_names else {}
            tar.write({"__key__": f"{number:08d}", extension: image} | label)
    return broken


def _prepared(i: int, source: Source, section: PackSection) -> bytes | str:
    """The image as it is stored, or why there is none."""
    try:
        return prepare(source.read(i), section.resolution, section.encoding or "", section.quality, section.chroma)
    except FileNotFoundError:
        return "there is no such file"
    except ValueError as reason:
        return str(reason)


def _standing_shard(
    path: Path, part: Slice, source: Source, section: PackSection, destination: str
) -> dict[str, str] | None:
    """Bring a shard to `path` that an earlier packing of the same images left whole; returns what it left out.

    None where there is no such shard, or where what was broken has been mended.
    """
    with suppress(FileNotFoundError, CorruptError, ValueError, KeyError):
        receipt = files.read_json(_receipt_url(destination, part))
        if receipt["inputs"] == _inputs(part, source, section):
            files.download(files.join(destination, part.name), path)
            is_whole = FileEntry.of(path) == FileEntry(receipt["size"], receipt["sha256"])
            if is_whole and all(isinstance(_prepared(int(i), source, section), str) for i in receipt["broken"]):
                return dict(receipt["broken"])
    return None


def _inputs(part: Slice, source: Source, section: PackSection) -> str:
    """Digest of all that decides a shard, but for what the images hold."""
    decides = {"resolution", "encoding", "quality", "chroma"}
    images = [(int(n), source.keys[i], int(source.labels[i])) for n, i in zip(part.numbers, part.ids, strict=True)]
    stated = json.dumps([section.model_dump(include=decides), bool(source.class_names), images])
    return hashlib.sha256(stated.encode()).hexdigest()


def _receipt_url(destination: str, part: Slice) -> str:
    return files.join(destination, _RECEIPTS, f"{part.name}.json")
