"""Verification of a collection: every hash, index entry, label and pixel."""

from __future__ import annotations

import numpy as np

from pipeline.collection.image_codec import decode_into
from pipeline.collection.manifest import Collection
from pipeline.collection.shard_file import read_shard
from pipeline.compute.tasks import map_parallel
from pipeline.errors import CorruptError
from pipeline.progress import Report, progress
from pipeline.storage import files
from pipeline.storage.file_sets import FileEntry
from pipeline.storage.validate_json import printable


def verify_collection(url: str, report: Report | None = None, *, on_cluster: bool = False) -> Collection:
    """Check every hash, index entry and label of the collection at `url`, and decode every image.

    Prints the names of images that cannot be decoded, one a line, as `sagan pack --exclude` reads them.

    Args:
        url: URL of the collection.
        report: Replaces the progress bar.
        on_cluster: Use tasks of the connected Ray cluster where the collection is not on this machine.

    Raises CorruptError that lists every damaged shard and sample with the reason, UsageError where there is no
    collection, and EnvironmentFault where storage fails.
    """
    collection = Collection.open(url)
    bad: list[str] = []
    ids: list[int] = []
    with progress("verifying", len(collection.labels), report=report) as advance:
        numbers, use_tasks = range(len(collection.shards)), on_cluster and not files.is_local(url)
        shards = map_parallel(_bad_in_shard, numbers, (collection,), use_tasks)
        for shard, (reasons, bad_ids) in zip(collection.shards, shards, strict=True):
            bad += reasons
            ids += bad_ids
            advance(shard.count)
    if ids or collection.keys is not None:
        try:
            names = collection.names_at_source()
        except CorruptError as error:
            bad.append(error.message)
        else:
            for i in ids:
                print(names[i])
    if bad:
        raise CorruptError(
            "\n  ".join([f"{url} is damaged:", *bad]),
            "pack the collection again, and leave out images that are still bad with --exclude",
        )
    return collection


def _bad_in_shard(number: int, collection: Collection) -> tuple[list[str], list[int]]:
    """Return the faults of one shard, and the ids of its samples that cannot be decoded."""
    shard = collection.shards[number]
    ids = np.flatnonzero(collection.shard == number)
    with files.temporary_folder("verify") as folder:
        path = folder / shard.name
        try:
            files.download(collection.shard_url(shard), path, most=shard.size)
            by_offset = {sample.offset: sample for sample in read_shard(path)}
        except FileNotFoundError:
            return [f"{shard.name}: missing"], []
        except CorruptError as error:
            return [f"{shard.name}: {printable(error.message)}"], []
        bad, bad_ids = [], []
        if FileEntry.of(path).sha256 != shard.sha256:
            bad.append(f"{shard.name}: its SHA-256 differs from the manifest")
        pixels = np.empty((collection.resolution, collection.resolution, 3), dtype=np.uint8)
        for i in ids.tolist():
            offset, length, label = int(collection.offset[i]), int(collection.length[i]), int(collection.labels[i])
            sample = by_offset.get(offset)
            name = f"{shard.name}: {printable(sample.name) if sample else f'sample at byte {offset}'}"
            if sample is None or sample.length != length or not _same_label(sample.label, label, collection):
                bad.append(f"{name}: its position or label differs from the index")
            try:
                decode_into(files.read_bytes(str(path), offset, offset + length), pixels)
            except ValueError as reason:
                bad.append(f"{name}: {printable(str(reason))}")
                bad_ids.append(i)
        return bad, bad_ids


def _same_label(in_shard: int | str | None, label: int, collection: Collection) -> bool:
    """Return whether the label in a shard equals the label of the index.

    A shard holds a class index, a class name, or no label, which means 0. In a shard that another program wrote, a
    number may be the name of the class.
    """
    name = printable(str(int(in_shard)) if isinstance(in_shard, bool) else str(in_shard))
    if in_shard is not None and name in collection.class_names[label : label + 1]:
        return True
    return not isinstance(in_shard, str) and (in_shard or 0) == label
