"""Check a collection to the last pixel."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from pipeline.data.images import decode_into
from pipeline.data.index import KEYS, Collection, read_shard
from pipeline.data.progress import Report, reporting
from pipeline.data.spread import spread
from pipeline.errors import CorruptError
from pipeline.storage import files
from pipeline.storage.fileset import FileEntry


def verify(url: str, progress: Report | None = None) -> Collection:
    """Check every hash, place and label, and decode every image, of the collection at `url`.

    Names of bad images are printed as `--exclude` takes them. Raises CorruptError naming each bad shard and sample with
    the reason, UsageError where there is no collection, EnvironmentFault.
    """
    collection = Collection.open(url)
    bad: list[str] = []
    ids: list[int] = []
    done = 0
    with reporting("verifying", progress) as report:
        shards = spread(_bad_in_shard, range(len(collection.shards)), (collection,), files.is_local(url))
        for shard, (reasons, bad_ids) in zip(collection.shards, shards, strict=True):
            bad += reasons
            ids += bad_ids
            done += shard.count
            report(done, len(collection.labels))
    if ids:
        try:
            names = files.read_bytes(files.join(url, KEYS)).decode().split("\n")
            print("\n".join(names[i] for i in ids))
        except FileNotFoundError:
            bad.append(f"{KEYS} is missing: which images these are is not known")
    if bad:
        raise CorruptError(
            "\n  ".join([f"{url} is damaged:", *bad]),
            "pack it again; images that stay bad can be left out by --exclude",
        )
    return collection


def _bad_in_shard(number: int, collection: Collection) -> tuple[list[str], list[int]]:
    """What is wrong with one shard, and the ids of its samples that cannot be used."""
    shard = collection.shards[number]
    ids = np.flatnonzero(collection.shard == number)
    with tempfile.TemporaryDirectory(prefix="sagan-verify-") as folder:
        path = Path(folder) / shard.name
        try:
            files.download(collection.shard_url(shard), path)
            found = {sample.offset: sample for sample in read_shard(path)}
        except FileNotFoundError:
            return [f"{shard.name}: missing"], []
        except CorruptError as error:
            return [f"{shard.name}: {error}"], []
        bad, bad_ids = [], []
        if FileEntry.of(path).sha256 != shard.sha256:
            bad.append(f"{shard.name}: its SHA-256 is not the manifest's")
        data = path.read_bytes()
        pixels = np.empty((collection.resolution, collection.resolution, 3), dtype=np.uint8)
        for i in ids.tolist():
            offset, length, label = int(collection.offset[i]), int(collection.length[i]), int(collection.labels[i])
            sample = found.get(offset)
            name = f"{shard.name}: {sample.name if sample else f'sample at byte {offset}'}"
            if sample is None or sample.length != length or not _is(sample.label, label, collection):
                bad.append(f"{name}: place or label are not the index's")
            try:
                decode_into(data[offset : offset + length], pixels)
            except ValueError as reason:
                bad.append(f"{name}: {reason}")
                bad_ids.append(i)
        return bad, bad_ids


def _is(stated: int | str | None, label: int, collection: Collection) -> bool:
    """Whether what a shard says of a class is that label: a number, the class's name, or nothing, which is 0."""
    if isinstance(stated, str):
        return stated == collection.class_names[label]
    return (stated or 0) == label
