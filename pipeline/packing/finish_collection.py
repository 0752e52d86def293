"""The last steps of packing and of indexing: index, names, preview and manifest, a summary and warnings."""

from __future__ import annotations

import hashlib
import io
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from pipeline.collection.manifest import FORMAT, INDEX, KEYS, MANIFEST, Collection, Shard
from pipeline.collection.preview import preview
from pipeline.collection.shard_file import Sample
from pipeline.errors import UsageError, shown_url
from pipeline.packing.image_source import Source
from pipeline.storage import files
from pipeline.storage.file_sets import FileEntry

# The packing section of a collection. It contains paths, on which the digest of the manifest must not depend.
SECTION = "pack.json"
PREVIEW = "preview.png"
_LISTED = 20  # packing stops after this many broken images beyond max_broken, so that one run lists many of them
_UNEVEN = 20  # ratio between the sizes of two classes from which on packing warns
# By resolution: least number of classes → the job to suggest.
_JOBS = {
    32: {0: "cifar10"},
    64: {0: "celeba64", 2: "tiny-imagenet", 500: "imagenet64"},
    128: {0: "celeba128", 2: "imagenet128"},
    256: {0: "lsun256", 2: "imagenet256"},
}


@dataclass(frozen=True)
class ShardPlan:
    """The images that one shard is to hold.

    Attributes:
        name: Name of the shard.
        split: Split that the images belong to.
        ids: int64 [n], indices of the images in the source.
        numbers: int64 [n], numbers of the images in the order of packing, from which their keys are made.
    """

    name: str
    split: str
    ids: np.ndarray
    numbers: np.ndarray


@dataclass(frozen=True)
class PackedShard:
    """A complete shard and its n samples in their order.

    Attributes:
        shard: Entry of the shard in the manifest.
        keys: Names of the images, as `printable_key` returns them.
        places: int64 [n, 3], the offset, length and label of each sample.
        digests: uint64 [n], the first eight bytes of the SHA-256 of each image's bytes.
        broken: One line for each image that was left out, with the reason.
    """

    shard: Shard
    keys: list[str]
    places: np.ndarray
    digests: np.ndarray
    broken: list[str]

    @classmethod
    def of(
        cls, path: Path, part: ShardPlan, samples: list[Sample], labels: np.ndarray, keys: list[str], broken: list[str]
    ) -> PackedShard:
        """Describe the tar at `path`.

        Args:
            path: Local file of the shard.
            part: Plan of the shard.
            samples: Samples of the tar that belong to the collection.
            labels: int64 [n], label of each sample.
            keys: Name of each sample's image.
            broken: One line for each image that was left out, with the reason.
        """
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


def printable_key(key: str) -> str:
    """Return the name of an image on one line, as messages and `--exclude` have it. Unprintable letters are escaped."""
    if key.isprintable():
        return key
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in key)


def select_images(source: Source, excluded: set[str]) -> np.ndarray:
    """Return bool [n]: whether each image is to be packed. Raises UsageError for a name that no image has."""
    lines = [printable_key(key) for key in source.keys]
    if unknown := sorted(excluded.difference(lines)):
        raise UsageError(
            f"{_count(len(unknown), 'image')} to leave out cannot be found in the source: {', '.join(unknown[:5])}",
            "write the names into the file exactly as `sagan verify` and `sagan pack` print them",
        )
    return np.array([line not in excluded for line in lines])


def gather(
    shards: Iterable[PackedShard], total: int, max_broken: int, advance: Callable[[int], None]
) -> list[PackedShard]:
    """Collect the packed shards and count their broken images.

    Args:
        shards: The shards, as they are completed.
        total: Number of images in all of them.
        max_broken: Number of broken images that are tolerated.
        advance: Called with the number of images of each shard.

    Raises UsageError with the broken images where there are more than `max_broken`, or where no image is left.
    """
    gathered, broken, done = [], [], 0
    with closing(iter(shards)) as running:  # type: ignore[type-var]
        for shard in running:
            gathered.append(shard)
            broken += shard.broken
            done += len(shard.keys) + len(shard.broken)
            advance(len(shard.keys) + len(shard.broken))
            if len(broken) > max_broken + _LISTED:
                break
    if len(broken) > max_broken:
        count = f"{len(broken)}" if done == total else f"at least {len(broken)}"
        raise UsageError(
            "\n  ".join([f"{count} images cannot be used; max_broken allows {max_broken}:", *broken]),
            "repair or delete these images, list them in a file for --exclude, or tolerate them with "
            f"max_broken={len(broken)}",
        )
    if not any(shard.keys for shard in gathered):
        raise UsageError(f"none of the {total} images can be used", "; ".join(broken[:_LISTED]))
    return gathered


def finish_collection(
    destination: str, section: dict[str, Any], facts: dict[str, Any], shards: list[PackedShard], notes: list[str]
) -> Collection:
    """Write the files beside the shards, the manifest last; print a summary, warnings and the next command.

    Args:
        destination: URL of the collection.
        section: The packing section. It is stored, so that the next packing can be compared with it.
        facts: Entries of the manifest: source, seed, resolution, encoding, class_names and others.
        shards: The complete shards in their order.
        notes: What to print about files of the source that were not packed.
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
        print(f"note: {printable_key(note)}")
    _summarise(collection)
    digests = np.concatenate([shard.digests for shard in shards])
    for warning in [*_oddities(collection), *_duplicates(collection, digests, keys)]:
        print(f"warning: {warning}")
    print(f"look at {shown_url(files.join(destination, PREVIEW))}")
    print(f"next: {shown_url(next_command(collection))}")
    return collection


def _summarise(collection: Collection) -> None:
    """Print the classes, splits and size of a collection."""
    names = collection.class_names
    shown = ", ".join(map(printable_key, names[:5])) + (", …" if len(names) > 5 else "")
    print(f"{len(names)} classes: {shown}" if names else "no classes: a model of this collection trains without labels")
    for split in collection.splits:
        shards = collection.shard_sizes(split)
        print(f"{split}: {_count(sum(shards), 'image')} in {_count(len(shards), 'shard')}")
    megabytes = sum(shard.size for shard in collection.shards) / 1e6
    print(f"{collection.resolution} px, {collection.encoding}, {megabytes:,.1f} MB, digest {collection.digest[:8]}")


def _count(n: int, what: str) -> str:
    """Return a number with its noun, in the plural where it is not 1."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def next_command(collection: Collection) -> str:
    """Return the command that trains on the collection with the job for its resolution and number of classes."""
    fitting = _JOBS[collection.resolution]
    job = fitting[max(least for least in fitting if least <= collection.num_classes)]
    return f"sagan run jobs/{job}.yaml {shlex.quote(f'data.train={collection.url}')}"


def _oddities(collection: Collection) -> list[str]:
    """Return a warning for everything unusual about the classes."""
    names, odd = [printable_key(name) for name in collection.class_names], []
    if len(names) == 1:
        odd.append(f"there is only one class, {names[0]!r}: a model of this collection trains without labels")
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
                "generated images of rare classes will be poor"
            )
    return odd


def _duplicates(collection: Collection, digests: np.ndarray, keys: list[str]) -> list[str]:
    """Return warnings about images whose packed bytes equal those of an earlier image."""
    _, first, group, counts = np.unique(digests, return_index=True, return_inverse=True, return_counts=True)
    again = np.setdiff1d(np.flatnonzero(counts[group] > 1), first)
    if not len(again):
        return []
    split_of = np.concatenate([np.full(len(ids), n) for n, ids in enumerate(collection.splits.values())])
    original = first[group[again]]
    examples = [f"{keys[i]} = {keys[j]}" for i, j in zip(again[:2], original[:2], strict=True)]
    warnings = [
        f"{_count(len(again), 'image')} with the same bytes as an earlier image, for example {', '.join(examples)}"
    ]
    if across := int((split_of[again] != split_of[original]).sum()):
        warnings.append(f"{across:,} of them are in two splits: training would use held-out images")
    if differing := int((collection.labels[again] != collection.labels[original]).sum()):
        warnings.append(f"{differing:,} of them have another label than the earlier image")
    return warnings
