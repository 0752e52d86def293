"""Readers of a packed collection that do not use the code under test."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import webdataset

from pipeline.collection.manifest import Collection
from pipeline.storage import files


def read_back(collection: Collection, split: str) -> list[dict[str, Any]]:
    """The samples of a split, as the webdataset package reads them."""
    urls = [f"{collection.url}/{shard.name}" for shard in collection.shards if shard.split == split]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset does not close the shards
        return list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))


def bytes_of(folder: str | Path) -> dict[str, bytes]:
    """The files of a collection by name, without what depends on the path of the source: names and their digest."""
    named = {"pack.json", "keys.txt", "preview.png"}
    contents = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name not in named}
    if "manifest.json" in contents:
        manifest = json.loads(contents["manifest.json"])
        del manifest["keys"]
        contents["manifest.json"] = json.dumps(manifest).encode()
    return contents


def stored(collection: Collection, i: int) -> bytes:
    """The stored file of sample `i`."""
    shard = collection.shards[collection.shard[i]]
    start = int(collection.offset[i])
    return files.read_bytes(collection.shard_url(shard), start, start + int(collection.length[i]))
