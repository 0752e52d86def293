"""Indexing of WebDataset shards that another program wrote. The shards themselves are not changed."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.collection.image_codec import EXTENSIONS, size_of_stored
from pipeline.collection.manifest import MOST_IMAGE_BYTES, Collection
from pipeline.collection.shard_file import read_shard
from pipeline.compute.tasks import map_parallel
from pipeline.config.schema import PackSection
from pipeline.errors import UsageError
from pipeline.packing.archives_and_folders import suffix
from pipeline.packing.finish_collection import (
    PackedShard,
    ShardPlan,
    finish_collection,
    gather,
    select_images,
    storable_class_names,
)
from pipeline.packing.image_source import Source
from pipeline.packing.recognise import open_source
from pipeline.progress import Report, progress
from pipeline.storage import files
from pipeline.storage.filesystems import comparable
from pipeline.storage.validate_json import printable
from sagan.config import RESOLUTIONS

_REMEDY = "pack the images instead of indexing them: sagan pack SOURCE DESTINATION"


def index_shards(
    url: str,
    section: PackSection,
    excluded: set[str],
    record: dict[str, Any],
    report: Report | None,
    on_cluster: bool,
) -> Collection:
    """Turn the shards at `url` into a collection by writing an index and a manifest beside them.

    Args:
        url: URL of the folder that holds the shards.
        section: Its `source` must be the same folder.
        excluded: Names of the images to leave out.
        record: The section as it is stored in the collection.
        report: Replaces the progress bar.
        on_cluster: Use tasks of the connected Ray cluster where the shards are not on this machine.

    Raises UsageError where `source` is another folder, where the folder holds no shards, or where the images have no
    supported resolution. Raises EnvironmentFault where storage fails.
    """
    if not isinstance(section.source, str) or comparable(section.source) != comparable(url):
        raise UsageError(f"{section.source} cannot be indexed at {url}", "give one URL: shards are indexed in place")
    source = open_source(url)
    if source.kind != "WebDataset":
        raise UsageError(f"{url} holds no WebDataset shards but {source.kind}", _REMEDY)
    class_names = storable_class_names(source)
    try:
        resolution, _ = size_of_stored(source.read(0))
    except ValueError as reason:
        raise UsageError(f"{printable(source.keys[0])} cannot be read: {printable(str(reason))}", _REMEDY) from reason
    if resolution not in RESOLUTIONS:
        raise UsageError(f"the images are {resolution} pixels wide; the width must be one of {RESOLUTIONS}", _REMEDY)
    parts = _parts(source, excluded)
    if elsewhere := sorted({part.name for part in parts} - set(files.list_names(url))):
        raise UsageError(f"{elsewhere[0]} is not directly in {url}", "give the URL of the folder that holds the shards")
    total = sum(len(part.ids) for part in parts)
    with progress("indexing", total, report=report) as advance:
        shards = map_parallel(_index_shard, parts, (source, url, resolution), on_cluster and not files.is_local(url))
        done = gather(shards, total, section.max_broken, advance)
    encodings = {extension: encoding for encoding, extension in EXTENSIONS.items()} | {"jpeg": "jpeg"}
    facts = {
        "source": source.kind,
        "resolution": resolution,
        "encoding": encodings[suffix(source.keys[0]).removeprefix(".")],
        "class_names": class_names,
    }
    return finish_collection(url, record, facts, done, source)


def _parts(source: Source, excluded: set[str]) -> list[ShardPlan]:
    """Return a plan for each shard. The shards of a split are contiguous."""
    parts = []
    shard_of = np.array([key.partition("/")[0] for key in source.keys])
    wanted = select_images(source, excluded)
    for split, ids in source.splits.items():
        for name in np.unique(shard_of[ids]):
            mine = ids[(shard_of[ids] == name) & wanted[ids]]
            if len(mine):
                parts.append(ShardPlan(f"{name}.tar", split, mine, mine))
    return parts


def _index_shard(part: ShardPlan, source: Source, url: str, resolution: int) -> PackedShard:
    """Find the images of a shard. An image of another size is broken.

    Images are opened but not decoded; `sagan verify` decodes them.
    """
    broken, labels, keys, samples = [], [], [], []
    with files.temporary_folder("index") as folder:
        path = folder / part.name
        files.download(files.join(url, part.name), path)
        sample_of = {f"{path.stem}/{sample.name}": sample for sample in read_shard(path)}
        data = path.read_bytes()
        for i in part.ids:
            key = source.keys[i]
            sample = sample_of.get(key)
            if sample is None:
                broken.append(f"{printable(key)}: a link or a suffix that training does not read; pack it instead")
                continue
            try:
                size = size_of_stored(data[sample.offset : sample.offset + sample.length])
            except ValueError as reason:
                broken.append(f"{printable(key)}: {printable(str(reason))}")
                continue
            if sample.length > MOST_IMAGE_BYTES:
                broken.append(f"{printable(key)}: {sample.length:,} bytes; at most {MOST_IMAGE_BYTES:,} are read")
                continue
            if size != (resolution, resolution):
                broken.append(f"{printable(key)}: {size[0]} x {size[1]} pixels, not {resolution} x {resolution}")
                continue
            samples.append(sample)
            labels.append(source.labels[i])
            keys.append(printable(key))
        return PackedShard.of(path, part, samples, np.array(labels, dtype=np.int64), keys, broken)
