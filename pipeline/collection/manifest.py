"""A packed collection, read from its manifest and its index.

A collection is a folder of shards (plain WebDataset tars) and these files:

- `manifest.json`: Shards, splits, class names, resolution, encoding, and the SHA-256 of the index. It is written last.
- `index.safetensors`: Arrays with one element per sample: `shard` int32, `offset` int64, `length` int32, `label` int32.
  Offset and length give the bytes of the image in its shard.
- `keys.txt`: One line per sample, the name of the image at its source.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import safetensors.numpy

from pipeline.errors import CorruptError, UsageError
from pipeline.storage import files

MANIFEST, INDEX, KEYS, FORMAT = "manifest.json", "index.safetensors", "keys.txt", 1


@dataclass(frozen=True)
class Shard:
    """One shard of a collection.

    Attributes:
        name: Name of the tar in the collection's folder.
        size: Size in bytes.
        sha256: SHA-256 in hex.
        count: Number of samples.
        split: Split that its samples belong to.
    """

    name: str
    size: int
    sha256: str
    count: int
    split: str


@dataclass(frozen=True, eq=False)
class Collection:
    """Samples 0 to N − 1, in the order of the shards. The samples of a split are contiguous.

    Attributes:
        url: URL of the collection's folder.
        digest: SHA-256 of the manifest's bytes in hex. It identifies every pixel and label.
        resolution: Pixels per side.
        encoding: `jpeg`, `png` or `webp`.
        class_names: Names of the classes by label; empty where there are no classes.
        shards: Shards in their order.
        splits: Sample ids of each split, by its name.
        shard: int32 [N], number of each sample's shard.
        offset: int64 [N], first byte of each image in its shard.
        length: int32 [N], length of each image in bytes.
        labels: int64 [N], label of each sample; 0 where there are no classes.
    """

    url: str
    digest: str
    resolution: int
    encoding: str
    class_names: list[str]
    shards: list[Shard]
    splits: dict[str, range]
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    labels: np.ndarray

    @classmethod
    def open(cls, url: str) -> Collection:
        """Read and verify the manifest and the index at a URL.

        Raises UsageError where there is no collection, CorruptError where manifest or index is damaged, and
        EnvironmentFault where storage fails.
        """
        try:
            data = files.read_bytes(files.join(url, MANIFEST))
        except FileNotFoundError:
            raise UsageError(f"{url} holds no packed collection", f"pack one there: sagan pack SOURCE {url}") from None
        return cls.of(url, data)

    @classmethod
    def of(cls, url: str, data: bytes) -> Collection:
        """Build the collection at `url` from the bytes of its manifest. Raises what `open` raises."""
        try:
            manifest = json.loads(data)
            if (format_ := manifest["format"]) != FORMAT:
                raise UsageError(f"{url} has format {format_}; this version reads {FORMAT}", "use a matching version")
            shards = [Shard(**shard) for shard in manifest["shards"]]
            index = _read_index(url, manifest["index"])
            collection = cls(
                url=url,
                digest=hashlib.sha256(data).hexdigest(),
                resolution=int(manifest["resolution"]),
                encoding=str(manifest["encoding"]),
                class_names=list(manifest["class_names"]),
                shards=shards,
                splits=_split_ranges(shards),
                shard=index["shard"],
                offset=index["offset"],
                length=index["length"],
                labels=index["label"].astype(np.int64),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"{url}/{MANIFEST} is not the manifest of a collection: {error!r}") from error
        if not np.array_equal(np.bincount(collection.shard, minlength=len(shards)), [s.count for s in shards]):
            raise CorruptError(f"{url}: {INDEX} and {MANIFEST} give different numbers of samples per shard")
        return collection

    @property
    def num_classes(self) -> int:
        """Number of classes for a conditional network. It is 0 where the collection has no classes or only one."""
        return len(self.class_names) if len(self.class_names) > 1 else 0

    def size(self, split: str) -> int:
        """Return the number of samples of a split. Raises UsageError where there is no split of this name."""
        return len(self.ids(split))

    def ids(self, split: str) -> range:
        """Return the sample ids of a split. Raises UsageError where there is no split of this name."""
        if split not in self.splits:
            raise UsageError(f"{self.url} has no split {split!r}", f"choose one of: {', '.join(self.splits)}")
        return self.splits[split]

    def evenly_spaced_ids(self, split: str, count: int) -> np.ndarray:
        """Return min(count, size) sample ids, int64, that are evenly spaced over a split."""
        ids = np.asarray(self.ids(split))
        return ids[np.arange(min(count, len(ids))) * len(ids) // min(count, len(ids))]

    def shard_sizes(self, split: str) -> list[int]:
        """Return the number of samples of each shard of a split, in the order of the sample ids."""
        return [shard.count for shard in self.shards if shard.split == split]

    def shard_url(self, shard: Shard) -> str:
        """Return the URL of a shard."""
        return files.join(self.url, shard.name)


def _split_ranges(shards: list[Shard]) -> dict[str, range]:
    """Return the sample ids of each split. Raises ValueError where the shards of a split are not contiguous."""
    ranges: dict[str, range] = {}
    start = 0
    for shard in shards:
        first = ranges.get(shard.split, range(start, start))
        if first.stop != start:
            raise ValueError(f"the shards of split {shard.split!r} are not contiguous")
        start += shard.count
        ranges[shard.split] = range(first.start, start)
    return ranges


def _read_index(url: str, entry: dict[str, object]) -> dict[str, np.ndarray]:
    """Read the index and compare it with its entry in the manifest. Raises CorruptError, EnvironmentFault."""
    try:
        data = files.read_bytes(files.join(url, INDEX))
    except FileNotFoundError:
        raise CorruptError(f"{url}/{INDEX} is missing, though the manifest names it") from None
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CorruptError(f"{url}/{INDEX} differs from its SHA-256 in the manifest", "pack the collection again")
    return safetensors.numpy.load(data)
