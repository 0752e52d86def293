"""A packed collection: what its manifest and its index say, verified.

Beside the shards (plain WebDataset tars) stand `manifest.json`, written last, and `index.safetensors`: per sample
`shard` int32, `offset` int64 of the image's bytes in its shard, `length` int32 of them, `label` int32. `keys.txt` has a
line per sample, the name of the image at its source.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from webdataset.tariterators import base_plus_ext

from pipeline.data.images import EXTENSIONS
from pipeline.errors import CorruptError, UsageError
from pipeline.storage import files

MANIFEST, INDEX, KEYS, FORMAT = "manifest.json", "index.safetensors", "keys.txt", 1
_IMAGES = {*EXTENSIONS.values(), "jpeg"}


@dataclass(frozen=True)
class Shard:
    """One tar: its name beside the manifest, bytes, SHA-256 in hex, samples, and the split that they belong to."""

    name: str
    size: int
    sha256: str
    count: int
    split: str


class Sample(NamedTuple):
    """One sample of a shard: the image's name in it, where its bytes are, its label (None where there is none).

    Shards of others may have words as labels.
    """

    name: str
    offset: int
    length: int
    label: int | str | None


@dataclass(frozen=True, eq=False)
class Collection:
    """Samples 0 … N−1 in the order in which they lie in the shards; those of a split follow each other.

    digest: SHA-256 of the manifest's bytes; it identifies every pixel and label. class_names: empty where there are no
    classes. shard, offset, length: int32, int64, int32 [N], see above. labels: int64 [N], 0 where there are no classes.
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
        """Read and verify manifest and index.

        Raises UsageError where there is no collection, CorruptError, EnvironmentFault.
        """
        try:
            data = files.read_bytes(files.join(url, MANIFEST))
        except FileNotFoundError:
            raise UsageError(f"{url} holds no packed collection", f"pack one there: sagan pack SOURCE {url}") from None
        return cls.of(url, data)

    @classmethod
    def of(cls, url: str, data: bytes) -> Collection:
        """As `open`, with the manifest's bytes at hand."""
        try:
            manifest = json.loads(data)
            if (found := manifest["format"]) != FORMAT:
                raise UsageError(f"{url} has format {found}; this version reads {FORMAT}", "use a matching version")
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
            raise CorruptError(f"{url}: {INDEX} does not agree with {MANIFEST} on the samples of each shard")
        return collection

    @property
    def classes(self) -> int:
        """Number of classes that a network can be conditioned on: 0 where there are none, or only one."""
        return len(self.class_names) if len(self.class_names) > 1 else 0

    def size(self, split: str) -> int:
        """Number of samples. Raises UsageError for a split that is not there."""
        return len(self.ids(split))

    def ids(self, split: str) -> range:
        """Sample ids of a split. Raises UsageError for one that is not there."""
        if split not in self.splits:
            raise UsageError(f"{self.url} has no split {split!r}", f"choose one of: {', '.join(self.splits)}")
        return self.splits[split]

    def shard_sizes(self, split: str) -> list[int]:
        """Samples in each shard of a split, in the order of its ids."""
        return [shard.count for shard in self.shards if shard.split == split]

    def shard_url(self, shard: Shard) -> str:
        return files.join(self.url, shard.name)


def read_shard(path: Path) -> list[Sample]:
    """The samples of a WebDataset tar, in their order. Raises CorruptError where it is not one."""
    images: dict[str, Sample] = {}
    labels: dict[str, int | str | None] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)
                if extension and extension.lower() in _IMAGES:
                    images[key] = Sample(member.name.removeprefix("./"), member.offset_data, member.size, None)
                elif extension in ("cls", "json") and (file := tar.extractfile(member)):
                    labels[key] = label_of(f".{extension}", file.read())
    except (tarfile.ReadError, ValueError) as error:
        raise CorruptError(f"{path.name} is not a shard: {error}") from error
    return [sample._replace(label=labels.get(key)) for key, sample in images.items()]


def label_of(extension: str, data: bytes) -> int | str | None:
    """What a member of a WebDataset sample says of its class: `.cls` a number or a word, `.json` a key `label`.

    Raises ValueError where a .json is none.
    """
    if extension == ".json":
        stated = json.loads(data)
        value = stated.get("label", stated.get("cls")) if isinstance(stated, dict) else None
    else:
        value = data.decode().strip() if extension == ".cls" else None
    if isinstance(value, str) and value.isdigit():
        return int(value)
    return value if isinstance(value, int | str) else None


def _split_ranges(shards: list[Shard]) -> dict[str, range]:
    ranges: dict[str, range] = {}
    start = 0
    for shard in shards:
        first = ranges.get(shard.split, range(start, start))
        if first.stop != start:
            raise ValueError(f"the shards of split {shard.split!r} do not follow each other")
        start += shard.count
        ranges[shard.split] = range(first.start, start)
    return ranges


def _read_index(url: str, entry: dict[str, object]) -> dict[str, np.ndarray]:
    try:
        data = files.read_bytes(files.join(url, INDEX))
    except FileNotFoundError:
        raise CorruptError(f"{url}/{INDEX} is missing, though the manifest names it") from None
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CorruptError(f"{url}/{INDEX} differs from what the manifest says", "pack the collection again")
    return safetensors.numpy.load(data)
