"""A packed collection, read from its manifest and its index.

A collection is a folder of shards (plain WebDataset tars) and these files:

- `manifest.json`: Shards, splits, class names, resolution, encoding, and size and SHA-256 of the other two files. It is
  written last.
- `index.safetensors`: Arrays with one element per sample: `shard` int32, `offset` int64, `length` int32, `label` int32.
  Offset and length give the bytes of the image in its shard.
- `keys.txt`: One line per sample, the name of the image at its source.

Somebody else may have packed the collection. Everything is validated here, where it is opened, before a value is used
as a path, a size or an index. The rest of the program relies on that.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
import safetensors.numpy
from pydantic import AfterValidator, BaseModel, Field, StrictInt

from pipeline.collection.image_codec import EXTENSIONS
from pipeline.errors import CorruptError, UsageError
from pipeline.storage import files, validate_json
from pipeline.storage.file_sets import FileEntry
from pipeline.storage.validate_json import PlainName, Sha256, Size
from sagan.config import MOST_CLASSES, RESOLUTIONS

MANIFEST, INDEX, KEYS, FORMAT = "manifest.json", "index.safetensors", "keys.txt", 1
MOST_IMAGE_BYTES = 2**24
"""Largest size of a stored image. An uncompressed image of 256 px has 0.2 MB."""
_MOST_SAMPLES = 10**8
_COLUMNS = {"shard": np.int32, "offset": np.int64, "length": np.int32, "label": np.int32}
_INDEX_BYTES, _INDEX_HEADER = sum(np.dtype(kind).itemsize for kind in _COLUMNS.values()), 2**16
_LONGEST_LINE = 2**16  # bytes of a line of keys.txt

Item = TypeVar("Item")


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("it has letters that cannot be printed")
    return name


def _unique(names: list[str]) -> list[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{name!r} occurs twice")
        seen.add(name)
    return names


def _tar(name: str) -> str:
    if not name.endswith(".tar"):
        raise ValueError("a shard's name must end in .tar")
    return name


def _one_of(*known: Item) -> AfterValidator:
    def check(value: Item) -> Item:
        if value not in known:
            raise ValueError(f"it is {value!r}; it must be one of {', '.join(map(str, known))}")
        return value

    return AfterValidator(check)


ClassName = Annotated[str, Field(strict=True, min_length=1, max_length=1000), AfterValidator(_printable)]
ClassNames = Annotated[list[ClassName], Field(max_length=MOST_CLASSES), AfterValidator(_unique)]
"""Names of classes: printable, and no two alike."""


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

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Annotated[PlainName, AfterValidator(_tar)]
    size: Size
    sha256: Sha256
    count: Annotated[Size, Field(ge=1)]
    split: PlainName


def _consistent(shards: list[Shard]) -> list[Shard]:
    _unique([shard.name for shard in shards])
    if (samples := sum(shard.count for shard in shards)) > _MOST_SAMPLES:
        raise ValueError(f"they have {samples:,} samples; at most {_MOST_SAMPLES:,} are supported")
    _split_ranges(shards)
    return shards


class _Manifest(BaseModel):
    """The fields of a manifest that readers use. It has more, for people."""

    format: StrictInt
    resolution: Annotated[StrictInt, _one_of(*RESOLUTIONS)]
    encoding: Annotated[str, _one_of(*EXTENSIONS)]
    class_names: ClassNames
    shards: Annotated[list[Shard], Field(min_length=1), AfterValidator(_consistent)]
    index: FileEntry
    keys: FileEntry | None = None
    """None in collections that version 0.1.0 packed. Nothing is taken from their keys.txt."""


@dataclass(frozen=True, eq=False)
class Collection:
    """Samples 0 to N − 1, in the order of the shards. The samples of a split are contiguous.

    Attributes:
        url: URL of the collection's folder.
        digest: SHA-256 in hex of the manifest without the entry of keys.txt. It identifies every pixel and label. It
            does not depend on the path of the source, as keys.txt does.
        resolution: Pixels per side.
        encoding: `jpeg`, `png` or `webp`.
        class_names: Names of the classes by label; empty where there are no classes.
        shards: Shards in their order.
        splits: Sample ids of each split, by its name.
        shard: int32 [N], number of each sample's shard.
        offset: int64 [N], first byte of each image in its shard.
        length: int32 [N], length of each image in bytes.
        labels: int64 [N], label of each sample; 0 where there are no classes.
        keys: Entry of keys.txt in the manifest; None where the manifest has none.
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
    keys: FileEntry | None

    @classmethod
    def open(cls, url: str) -> Collection:
        """Read and verify the manifest and the index at a URL.

        Raises UsageError where there is no collection, CorruptError where manifest or index is damaged, and
        EnvironmentFault where storage fails.
        """
        try:
            data = validate_json.read(files.join(url, MANIFEST))
        except FileNotFoundError:
            raise UsageError(f"{url} holds no packed collection", f"pack one there: sagan pack SOURCE {url}") from None
        return cls.of(url, data)

    @classmethod
    def of(cls, url: str, data: bytes) -> Collection:
        """Build the collection at `url` from the bytes of its manifest. Raises what `open` raises."""
        where, what = files.join(url, MANIFEST), "the manifest of a collection"
        values = validate_json.parse(data, where, what)
        if (format_ := values.get("format", FORMAT)) != FORMAT:
            raise UsageError(f"{url} has format {format_!r}; this version reads {FORMAT}", "use a matching version")
        manifest = validate_json.validate(_Manifest, values, where, what)
        index = _read_index(files.join(url, INDEX), manifest)
        return cls(
            url=url,
            digest=_digest(values),
            resolution=manifest.resolution,
            encoding=manifest.encoding,
            class_names=manifest.class_names,
            shards=manifest.shards,
            splits=_split_ranges(manifest.shards),
            shard=index["shard"],
            offset=index["offset"],
            length=index["length"],
            labels=index["label"].astype(np.int64),
            keys=manifest.keys,
        )

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

    def names_at_source(self) -> list[str]:
        """Return the name of each sample's image at its source, as keys.txt has them.

        Raises CorruptError where the manifest does not cover keys.txt or keys.txt is damaged, and EnvironmentFault.
        """
        where = files.join(self.url, KEYS)
        if self.keys is None:
            raise CorruptError(
                f"{where} is not read, since the manifest has no SHA-256 of it (version 0.1.0 wrote none)",
                "pack the collection again, at another URL, to have the names of its images verified",
            )
        lines = _read_entry(where, self.keys, len(self.labels) * _LONGEST_LINE).decode(errors="replace").split("\n")
        if len(lines) != len(self.labels) + 1 or lines.pop() or not all(map(str.isprintable, lines)):
            raise CorruptError(f"{where} does not have one printable line for each of {len(self.labels):,} samples")
        return lines


def read_digest(url: str) -> str | None:
    """Return the digest of the collection at a URL without its index; None where there is no manifest.

    Raises CorruptError, EnvironmentFault.
    """
    where = files.join(url, MANIFEST)
    try:
        return _digest(validate_json.parse(validate_json.read(where), where, "the manifest of a collection"))
    except FileNotFoundError:
        return None


def _digest(values: dict[str, Any]) -> str:
    """Return `Collection.digest` of the values of a manifest."""
    return hashlib.sha256(manifest_bytes({key: values[key] for key in values if key != "keys"})).hexdigest()


def manifest_bytes(values: dict[str, Any]) -> bytes:
    """Return a manifest as JSON. The same values give the same bytes."""
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


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


def _read_entry(url: str, entry: FileEntry, most: int) -> bytes:
    """Read a file beside the manifest and compare it with its entry. Raises CorruptError, EnvironmentFault.

    Args:
        url: URL of the file.
        entry: Entry of the file in the manifest.
        most: Largest size that is plausible for the number of samples.
    """
    if entry.size > most:
        raise CorruptError(f"{url}: the manifest says {entry.size:,} bytes, but at most {most:,} are possible")
    try:
        data = files.read_at_most(url, entry.size)
    except FileNotFoundError:
        raise CorruptError(f"{url} is missing, though the manifest names it") from None
    if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise CorruptError(f"{url} differs from its size or SHA-256 in the manifest", "pack the collection again")
    return data


def _read_index(url: str, manifest: _Manifest) -> dict[str, np.ndarray]:
    """Read the index and check every value of it. Raises CorruptError that names the column, and EnvironmentFault."""
    counts = [shard.count for shard in manifest.shards]
    samples = sum(counts)
    data = _read_entry(url, manifest.index, samples * _INDEX_BYTES + _INDEX_HEADER)
    try:
        columns = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:  # also for unknown dtypes
        raise CorruptError(f"{url} is not an index: {validate_json.printable(repr(error))}") from error
    if columns.keys() != _COLUMNS.keys():
        raise CorruptError(f"{url} is not an index: its columns must be {', '.join(_COLUMNS)}")
    for name, kind in _COLUMNS.items():
        if columns[name].dtype != kind or columns[name].shape != (samples,):
            raise CorruptError(
                f"{url}: {name} is {columns[name].dtype} {list(columns[name].shape)}, not "
                f"{np.dtype(kind)} [{samples}], the number of samples in the manifest"
            )
    shard, offset, length, label = (columns[name] for name in _COLUMNS)
    if not np.array_equal(shard, np.repeat(np.arange(len(counts), dtype=np.int32), counts)):
        raise CorruptError(f"{url}: shard differs from the order and the counts of the shards in the manifest")
    sizes = np.repeat(np.array([s.size for s in manifest.shards], dtype=np.int64), counts)
    for name, wrong, rule in (
        ("length", (length < 1) | (length > MOST_IMAGE_BYTES), f"must be from 1 to {MOST_IMAGE_BYTES:,}"),
        ("offset", (offset < 0) | (offset > sizes - length), "must give bytes inside the shard"),
        ("label", (label < 0) | (label >= max(1, len(manifest.class_names))), "must be the number of a class"),
    ):
        if wrong.any():
            i = int(wrong.argmax())
            raise CorruptError(f"{url}: {name} of sample {i} is {columns[name][i]}; it {rule}")
    return columns
