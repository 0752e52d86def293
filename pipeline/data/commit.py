"""How every way of making a collection ends: index, names, preview, and the manifest, last of all; and what is odd."""

from __future__ import annotations

import hashlib
import io
import json
import shlex
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from pipeline.data.index import FORMAT, INDEX, KEYS, MANIFEST, Collection, Sample, Shard
from pipeline.data.preview import preview
from pipeline.data.progress import Report
from pipeline.data.tree import Source
from pipeline.errors import UsageError
from pipeline.storage import files
from pipeline.storage.fileset import FileEntry

SECTION = "pack.json"  # the section of a collection; not of the manifest, whose digest must not depend on paths
PREVIEW = "preview.png"
_LISTED = 20  # broken images that are looked for beyond the tolerated ones, so that they are mended in one go
_UNEVEN = 20  # a class with so many times the images of another is worth a word
# By resolution: the job for each number of classes from which on it fits.
_JOBS = {
    32: {0: "cifar10"},
    64: {0: "celeba64", 2: "tiny-imagenet", 500: "imagenet64"},
    128: {0: "celeba128", 2: "imagenet128"},
    256: {0: "lsun256", 2: "imagenet256"},
}


@dataclass(frozen=True)
class Slice:
    """The images of one shard: indices `ids` of a source, and their `numbers` among all that were listed."""

    name: str
    split: str
    ids: np.ndarray
    numbers: np.ndarray


@dataclass(frozen=True)
class Done:
    """A shard that stands, and its samples in their order.

    keys: as `line_of` has them. places: int64 [n, 3], offset, length, label. digests: uint64 [n], of the images' bytes.
    broken: a line for each image that was left out, with the reason.
    """

    shard: Shard
    keys: list[str]
    places: np.ndarray
    digests: np.ndarray
    broken: list[str]

    @classmethod
    def of(
        cls, path: Path, part: Slice, samples: list[Sample], labels: np.ndarray, keys: list[str], broken: list[str]
    ) -> Done:
        """`samples` are those of the tar at `path` that count; `labels` and `keys` are theirs."""
        entry, data = FileEntry.of(path), path.read_bytes()
        images = [data[sample.offset : sample.offset + sample.length] for sample in samples]
        digests = [int.from_bytes(hashlib.sha256(image).digest()[:8], "little") for image in images]
        places = [(sample.offset, sample.length, label) for sample, label in zip(samples, labels, strict=True)]
        return cls(
            Shard(part.name, entry.size, entry.sha256, len(samples), part.split),
            keys,
            np.array(places, dtype=np.int64).reshape(-1, 3),
            np.array(digests, dtype=np.uint64),
            broken,
        )


def line_of(key: str) -> str:
    """The name of an image on one line, for people and for `--exclude`: what cannot be printed is escaped."""
    if key.isprintable():
        return key
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in key)


def taken(source: Source, excluded: set[str]) -> np.ndarray:
    """bool [n]: which images are not left out. Raises UsageError for a name that no image has."""
    lines = [line_of(key) for key in source.keys]
    if unknown := sorted(excluded.difference(lines)):
        raise UsageError(
            f"{_count(len(unknown), 'image')} to leave out cannot be found in the source: {', '.join(unknown[:5])}",
            "take the names as `sagan verify` and `sagan pack` print them",
        )
    return np.array([line not in excluded for line in lines])


def gather(shards: Iterable[Done], total: int, max_broken: int, report: Report) -> list[Done]:
    """All of them, without empty ones. Raises UsageError with the broken images where these are too many."""
    gathered, broken, done = [], [], 0
    with closing(iter(shards)) as running:  # type: ignore[type-var]
        for shard in running:
            gathered.append(shard)
            broken += shard.broken
            done += len(shard.keys) + len(shard.broken)
            report(done, total)
            if len(broken) > max_broken + _LISTED:
                break
    if len(broken) > max_broken:
        found = f"{len(broken)}" if done == total else f"at least {len(broken)}"
        raise UsageError(
            "\n  ".join([f"{found} images cannot be decoded, {max_broken} are tolerated:", *broken]),
            f"mend or delete them, name them in a file for --exclude, or tolerate them: max_broken={len(broken)}",
        )
    if not any(shard.keys for shard in gathered):
        raise UsageError(f"not one of {total} images could be decoded", "; ".join(broken[:_LISTED]))
    return gathered


def commit(
    destination: str, section: dict[str, Any], facts: dict[str, Any], shards: list[Done], notes: list[str]
) -> Collection:
    """Write what stands beside the shards, the manifest last; say what there is, what is odd, and what comes next.

    `section` is kept for the next packing; `facts` go into the manifest: source, seed, resolution, encoding,
    class_names and others.
    """
    broken = [line for shard in shards for line in shard.broken]
    shards = [shard for shard in shards if shard.keys]
    columns = {
        "shard": np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.keys) for shard in shards]),
        **{
            name: np.concatenate([shard.places[:, column] for shard in shards]).astype(kind)
            for column, (name, kind) in enumerate({"offset": np.int64, "length": np.int32, "label": np.int32}.items())
        },
    }
    keys = [key for shard in shards for key in shard.keys]
    index = safetensors.numpy.save(columns)
    files.write_bytes(files.join(destination, INDEX), index)
    files.write_bytes(files.join(destination, KEYS), "".join(f"{key}\n" for key in keys).encode())
    files.write_json(files.join(destination, SECTION), section)
    sizes: Counter[str] = Counter()
    for shard in shards:
        sizes[shard.shard.split] += len(shard.keys)
    manifest = facts | {
        "format": FORMAT,
        "samples": len(keys),
        "splits": dict(sizes),
        "shards": [asdict(shard.shard) for shard in shards],
        "index": {"size": len(index), "sha256": hashlib.sha256(index).hexdigest()},
    }
    data = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
    collection = Collection.of(destination, data)
    picture = io.BytesIO()
    preview(collection).save(picture, "PNG")
    files.write_bytes(files.join(destination, PREVIEW), picture.getvalue())
    files.write_bytes(files.join(destination, MANIFEST), data)
    for line in broken:
        print(f"left out: {line}")
    for note in notes:
        print(f"note: {line_of(note)}")
    _summarise(collection)
    digests = np.concatenate([shard.digests for shard in shards])
    for warning in [*_oddities(collection), *_duplicates(collection, digests, keys)]:
        print(f"warning: {warning}")
    print(f"look at {files.join(destination, PREVIEW)}")
    print(f"next: {next_command(collection)}")
    return collection


def _summarise(collection: Collection) -> None:
    """Say what there is."""
    names = collection.class_names
    shown = ", ".join(map(line_of, names[:5])) + (", …" if len(names) > 5 else "")
    print(f"{len(names)} classes: {shown}" if names else "no classes: a model of these trains without labels")
    for split in collection.splits:
        shards = collection.shard_sizes(split)
        print(f"{split}: {_count(sum(shards), 'image')} in {_count(len(shards), 'shard')}")
    megabytes = sum(shard.size for shard in collection.shards) / 1e6
    print(f"{collection.resolution} px, {collection.encoding}, {megabytes:,.1f} MB, digest {collection.digest[:8]}")


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def next_command(collection: Collection) -> str:
    """Trains on the collection, with the job that fits its resolution and classes."""
    fitting = _JOBS[collection.resolution]
    job = fitting[max(least for least in fitting if least <= collection.classes)]
    return f"sagan run jobs/{job}.yaml {shlex.quote(f'data.train={collection.url}')}"


def _oddities(collection: Collection) -> list[str]:
    """What is odd about the classes."""
    names, odd = [line_of(name) for name in collection.class_names], []
    if len(names) == 1:
        odd.append(f"there is one class, {names[0]!r}: a model of it trains without labels")
    for split, ids in collection.splits.items() if len(names) > 1 else ():
        counts = np.bincount(collection.labels[ids.start : ids.stop], minlength=len(names))
        present = np.flatnonzero(counts)
        if len(present) == 1:
            odd.append(f"{split}: all images have the same label, {names[present[0]]!r}")
            continue
        if empty := [names[i] for i in np.flatnonzero(counts == 0)]:
            more = f" and {len(empty) - 5:,} more" if len(empty) > 5 else ""
            odd.append(f"{split}: {len(empty):,} classes have no images: {', '.join(empty[:5])}{more}")
        least, most = present[counts[present].argmin()], counts.argmax()
        if counts[most] >= _UNEVEN * counts[least]:
            odd.append(
                f"{split}: {names[most]!r} has {counts[most]:,} images, {names[least]!r} only {counts[least]:,}: "
                "samples of rare classes will be poor"
            )
    return odd


def _duplicates(collection: Collection, digests: np.ndarray, keys: list[str]) -> list[str]:
    """Images whose bytes, once packed, are those of an earlier one."""
    _, first, group, counts = np.unique(digests, return_index=True, return_inverse=True, return_counts=True)
    again = np.setdiff1d(np.flatnonzero(counts[group] > 1), first)
    if not len(again):
        return []
    split_of = np.concatenate([np.full(len(ids), n) for n, ids in enumerate(collection.splits.values())])
    original = first[group[again]]
    examples = [f"{keys[i]} = {keys[j]}" for i, j in zip(again[:2], original[:2], strict=True)]
    found = [f"{_count(len(again), 'image')} had been there before, the same to the byte: {', '.join(examples)}, …"]
    if across := int((split_of[again] != split_of[original]).sum()):
        found.append(f"{across:,} of them stand in two splits: what is held out has been trained on")
    if differing := int((collection.labels[again] != collection.labels[original]).sum()):
        found.append(f"{differing:,} of them have another label there")
    return found
