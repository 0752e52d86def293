"""Packing of images into shards. Each image is decoded, cropped to a square and written in a seeded permutation.

The same images and the same section give the same bytes. It makes no difference whether the images lie in a folder, a
tar or a bucket, and whether threads or Ray tasks pack them. The key of an image is its number in the permutation of all
listed images, including broken and excluded ones. So a broken or excluded image changes only its own shard.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import TarWriter

from pipeline.collection.image_codec import EXTENSIONS, crop_and_encode
from pipeline.collection.manifest import MANIFEST, Collection, Shard
from pipeline.collection.shard_file import read_shard
from pipeline.compute.tasks import map_parallel
from pipeline.compute.threads import map_ahead
from pipeline.config.schema import PackSection
from pipeline.errors import UsageError, shown_url
from pipeline.packing.finish_collection import (
    SECTION,
    PackedShard,
    ShardPlan,
    finish_collection,
    gather,
    select_images,
    storable_class_names,
)
from pipeline.packing.image_source import Source
from pipeline.packing.index_webdataset import index_shards
from pipeline.packing.layouts.digits import DIGITS
from pipeline.packing.recognise import open_source
from pipeline.packing.resume_packing import delete_receipts, fetch_complete_shard, upload_complete_shard
from pipeline.progress import Report, progress
from pipeline.storage import files, validate_json
from pipeline.storage.filesystems import comparable
from pipeline.storage.validate_json import printable
from sagan.random import Purpose, permutation

_THREADS = 4  # threads per shard, so that reading from a bucket and decoding overlap


def pack(
    destination: str, section: PackSection, report: Report | None = None, *, on_cluster: bool = False
) -> Collection:
    """Pack `section.source` into shards at `destination`. Prints a summary and the next command.

    Where `destination` holds a collection that was packed by the same section, it is returned as it is. Complete shards
    of an interrupted packing are kept.

    Args:
        destination: URL of the collection.
        section: What to pack, and how.
        report: Replaces the progress bar.
        on_cluster: Use tasks of the connected Ray cluster where neither source nor destination is on this machine.

    Raises UsageError where there are no images, too many broken images, or another collection at `destination`, and
    where `destination` is a file or lies in the source. Raises EnvironmentFault where storage fails.
    """
    _require_folder(destination)
    encoding = section.encoding or ("png" if section.resolution == 32 else "jpeg")
    section = section.model_copy(update={"encoding": encoding})
    excluded = _excluded(section)
    given = section.source
    shown = shown_url(given) if isinstance(given, str) else {split: shown_url(url) for split, url in given.items()}
    record = section.model_dump(exclude={"max_broken", "max_pixels"}) | {"exclude": sorted(excluded), "source": shown}
    if files.exists(files.join(destination, MANIFEST)):
        return _existing_collection(destination, record)
    if not section.index_only:
        _require_apart(destination, section.source)
    files.check_writable(destination)
    if section.index_only:
        return index_shards(destination, section, excluded, record, report, on_cluster)
    source = open_source(section.source)
    class_names = storable_class_names(source)
    plans = list(_shard_plans(source, section, excluded))
    use_tasks = on_cluster and not source.local_only and not files.is_local(destination)
    total = sum(len(part.ids) for part in plans)
    with progress("packing", total, report=report) as advance:
        shards = map_parallel(pack_shard, plans, (source, section, destination), use_tasks)
        done = gather(shards, total, section.max_broken, advance)
    facts = {
        "source": source.kind,
        "seed": section.seed,
        "resolution": section.resolution,
        "encoding": encoding,
        "quality": section.quality if encoding == "jpeg" else None,
        "chroma": section.chroma if encoding == "jpeg" else None,
        "class_names": class_names,
    }
    collection = finish_collection(destination, record, facts, done, source)
    delete_receipts(destination)
    return collection


def pack_shard(part: ShardPlan, source: Source, section: PackSection, destination: str) -> PackedShard:
    """Write a shard and its receipt, unless `destination` has both already.

    A shard is written again where an image that was broken can be used now.
    """
    with files.temporary_folder("pack") as folder:
        path = folder / part.name
        broken = fetch_complete_shard(path, part, source, section, destination)
        if broken is None or not all(isinstance(_encoded(int(i), source, section), str) for i in broken):
            broken = _write(path, part, source, section)
            if len(broken) < len(part.ids):
                upload_complete_shard(path, broken, part, source, section, destination)
        lines = [f"{printable(source.keys[i])}: {broken[str(i)]}" for i in part.ids if str(i) in broken]
        kept = [int(i) for i in part.ids if str(i) not in broken]
        if not kept:
            nothing = np.empty((0, 3), dtype=np.int64)
            return PackedShard(Shard(part.name, 0, "", 0, part.split), [], nothing, np.empty(0, dtype=np.uint64), lines)
        keys = [printable(source.keys[i]) for i in kept]
        return PackedShard.of(path, part, read_shard(path), source.labels[kept], keys, lines)


def _excluded(section: PackSection) -> set[str]:
    """Return the names in the file `exclude`. Raises UsageError where there is no such file, or where it is no text."""
    if section.exclude is None:
        return set()
    if files.is_folder(section.exclude):
        raise UsageError(f"{section.exclude} is a folder and not a file", "correct the path in exclude")
    try:
        data = files.read_bytes(section.exclude)
        return set(filter(None, data.decode().splitlines()))
    except FileNotFoundError:
        raise UsageError(f"{section.exclude} does not exist", "correct the path or URL in exclude") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UsageError(
            f"{section.exclude}: line {line} is not UTF-8 text", "save the file with the encoding UTF-8"
        ) from None


def _existing_collection(destination: str, record: dict[str, Any]) -> Collection:
    """Return the collection at `destination`. Raises UsageError where it was packed by another section."""
    url = files.join(destination, SECTION)
    try:
        packed_by = validate_json.parse(validate_json.read(url), url, "the record of the packing options")
    except FileNotFoundError:
        packed_by = {}
    if differing := [key for key in record if packed_by.get(key) != record[key]]:
        listed = ", ".join(f"{key} {packed_by.get(key)!r} instead of {record[key]!r}" for key in differing)
        raise UsageError(
            f"{destination} already holds a collection that was packed with other options: {listed}",
            "choose another destination; a collection is never changed",
        )
    collection = Collection.open(destination)
    print(f"{shown_url(destination)} is packed already, with the same options: {len(collection.labels):,} images")
    return collection


def _require_folder(destination: str) -> None:
    """Raise UsageError where `destination` is a file of this machine or lies below one."""
    if files.is_local(destination):
        path = files.local_path(destination)
        if file := next(filter(os.path.isfile, (path, *path.parents)), None):
            raise UsageError(f"{file} is a file and not a folder", "choose another destination")


def _require_apart(destination: str, source: str | dict[str, str]) -> None:
    """Check that no shard becomes a part of the source. An interrupted packing would list it when it is repeated.

    Raises UsageError where `destination` is a folder of the source or lies in it, or where the source is a tar at
    `destination` that is named like a shard.
    """
    folder = comparable(destination)
    for url in [source] if isinstance(source, str) else source.values():
        place = comparable(url)
        if url != DIGITS and folder.is_relative_to(place):
            raise UsageError(f"shards at {destination} would lie in the source {url}", "choose another destination")
        if place.parent == folder and re.fullmatch(r".+-\d{5,}\.tar", place.name):
            raise UsageError(f"a shard could overwrite the source {url}", "choose another destination")


def _shard_plans(source: Source, section: PackSection, excluded: set[str]) -> Iterator[ShardPlan]:
    """Yield a plan for each shard. Raises UsageError where `excluded` has a name that no image has."""
    wanted = select_images(source, excluded)
    first = 0
    for split_number, (split, ids) in enumerate(source.splits.items()):
        order = ids[permutation(len(ids), section.seed, Purpose.PACKING, split_number)]
        numbers = first + np.arange(len(order))
        for shard_number, start in enumerate(range(0, len(order), section.shard_images)):
            part = slice(start, start + section.shard_images)
            kept = wanted[order[part]]
            if kept.any():
                yield ShardPlan(f"{split}-{shard_number:05d}.tar", split, order[part][kept], numbers[part][kept])
        first += len(ids)


def _write(path: Path, part: ShardPlan, source: Source, section: PackSection) -> dict[str, str]:
    """Write a shard to `path`, a WebDataset tar with the same bytes for the same samples.

    Returns the reason for each image that cannot be decoded, by its index in the source as text.
    """
    broken: dict[str, str] = {}
    extension = EXTENSIONS[section.encoding or ""]
    with path.open("wb") as file, TarWriter(file, user="sagan", group="sagan", mtime=0, encoder=False) as tar:
        images = map_ahead(lambda i: _encoded(int(i), source, section), part.ids, _THREADS, 4 * _THREADS)
        for i, number, image in zip(part.ids, part.numbers, images, strict=True):
            if isinstance(image, str):
                broken[str(i)] = image
                continue
            label = {"cls": str(source.labels[i]).encode()} if source.class_names else {}
            tar.write({"__key__": f"{number:08d}", extension: image} | label)
    return broken


def _encoded(i: int, source: Source, section: PackSection) -> bytes | str:
    """Return an image as it is stored, or the reason why it cannot be stored."""
    try:
        return crop_and_encode(
            source.read(i),
            section.resolution,
            section.encoding or "",
            section.quality,
            section.chroma,
            section.max_pixels,
        )
    except FileNotFoundError:
        return "the file does not exist"
    except ValueError as reason:
        return str(reason)
