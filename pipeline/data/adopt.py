"""Index WebDataset shards of others where they are: nothing of them is rewritten."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config.schema import PackSection
from pipeline.data.commit import Done, Slice, commit, gather, line_of, taken
from pipeline.data.images import EXTENSIONS
from pipeline.data.index import Collection, read_shard
from pipeline.data.progress import Report, reporting
from pipeline.data.sources import open_source
from pipeline.data.spread import spread
from pipeline.data.tree import Source, suffix
from pipeline.errors import UsageError
from pipeline.storage import files
from sagan.config import RESOLUTIONS

_REMEDY = "pack them instead of indexing them: sagan pack SOURCE DESTINATION"


def adopt(
    url: str, section: PackSection, excluded: set[str], record: dict[str, Any], progress: Report | None
) -> Collection:
    """Make the shards at `url` a collection by writing index and manifest beside them.

    Raises UsageError where they are elsewhere, no shards, or not of one resolution; EnvironmentFault.
    """
    if not isinstance(section.source, str) or _place(section.source) != _place(url):
        raise UsageError(f"{section.source} would be indexed at {url}", "indexing is done in place: give one URL")
    source = open_source(url)
    if source.kind != "WebDataset":
        raise UsageError(f"{url} holds no WebDataset shards ({source.kind})", _REMEDY)
    with Image.open(io.BytesIO(source.read(0))) as first:
        resolution = first.width
    if resolution not in RESOLUTIONS:
        raise UsageError(f"the images are {resolution} pixels wide, not one of {RESOLUTIONS}", _REMEDY)
    parts = _parts(source, excluded)
    if elsewhere := sorted({part.name for part in parts} - set(files.list_names(url))):
        raise UsageError(f"{elsewhere[0]} does not stand in {url} itself", "give the folder that holds the shards")
    with reporting("indexing", progress) as report:
        shards = spread(_index_shard, parts, (source, url, resolution), files.is_local(url))
        done = gather(shards, sum(len(part.ids) for part in parts), section.max_broken, report)
    encodings = {extension: encoding for encoding, extension in EXTENSIONS.items()} | {"jpeg": "jpeg"}
    facts = {
        "source": source.kind,
        "resolution": resolution,
        "encoding": encodings[suffix(source.keys[0]).removeprefix(".")],
        "class_names": source.class_names,
    }
    return commit(url, record, facts, done, source.notes)


def _place(url: str) -> str:
    return str(files.local_path(url)) if files.is_local(url) else url.rstrip("/")


def _parts(source: Source, excluded: set[str]) -> list[Slice]:
    """The shards, those of a split one after the other."""
    parts = []
    shard_of = np.array([key.partition("/")[0] for key in source.keys])
    wanted = taken(source, excluded)
    for split, ids in source.splits.items():
        for name in np.unique(shard_of[ids]):
            mine = ids[(shard_of[ids] == name) & wanted[ids]]
            if len(mine):
                parts.append(Slice(f"{name}.tar", split, mine, mine))
    return parts


def _index_shard(part: Slice, source: Source, url: str, resolution: int) -> Done:
    """Where its images are. One of another size is broken; whether their bytes can be decoded is for verify."""
    broken, labels, keys, samples = [], [], [], []
    with tempfile.TemporaryDirectory(prefix="sagan-index-") as folder:
        path = Path(folder) / part.name
        files.download(files.join(url, part.name), path)
        sample_of = {f"{path.stem}/{sample.name}": sample for sample in read_shard(path)}
        data = path.read_bytes()
        for i in part.ids:
            key = source.keys[i]
            sample = sample_of[key]
            try:
                with Image.open(io.BytesIO(data[sample.offset : sample.offset + sample.length])) as image:
                    size = image.size
            except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others
                broken.append(f"{line_of(key)}: cannot be opened: {error}")
                continue
            if size != (resolution, resolution):
                broken.append(f"{line_of(key)}: {size[0]} x {size[1]} pixels, not {resolution} x {resolution}")
                continue
            samples.append(sample)
            labels.append(source.labels[i])
            keys.append(line_of(key))
        return Done.of(path, part, samples, np.array(labels, dtype=np.int64), keys, broken)
