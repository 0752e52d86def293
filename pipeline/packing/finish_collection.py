"""The last steps of packing and of indexing: index, names, preview and manifest, a summary and warnings."""

from __future__ import annotations

import hashlib
import io
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from pydantic import TypeAdapter, ValidationError

from pipeline.collection.manifest import FORMAT, INDEX, KEYS, MANIFEST, ClassNames, Collection, Shard, manifest_bytes
from pipeline.collection.preview import preview
from pipeline.collection.shard_file import Sample
from pipeline.errors import UsageError, counted, shown_url
from pipeline.packing.archives_and_folders import suffix
from pipeline.packing.image_source import LeftOut, Source, tally
from pipeline.storage import files
from pipeline.storage.file_sets import FileEntry
from pipeline.storage.validate_json import PlainName, printable

_SHIPPED = Path(__file__).resolve().parents[2] / "jobs"
# The packing section of a collection. It contains paths, on which the digest of the manifest must not depend.
SECTION = "pack.json"
PREVIEW = "preview.png"
_LISTED = 20  # packing stops after this many broken images beyond max_broken, so that one run lists many of them
_NAMED = 20  # classes that are printed with their labels
_UNEVEN = 20  # ratio between the sizes of two classes from which on packing warns
# Largest number of images for which the next command sets data.augment. Zhao et al. 2020 trained BigGAN and StyleGAN2
# on parts of CIFAR-10, CIFAR-100 and FFHQ. With 10 000 images, DiffAugment lowered FID by 33 to 49 %. With all 50 000
# images of CIFAR, it lowered FID by 7 to 11 %. With all 70 000 of FFHQ, it raised FID by 11 % (tables of their
# repository, mit-han-lab/data-efficient-gans).
_SMALL = 10_000
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
        keys: Names of the images, as `printable` returns them.
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


def storable_class_names(source: Source) -> list[str]:
    """Return the class names of a source as a manifest has them: unprintable letters are escaped.

    Raises UsageError where a manifest cannot have the names of its classes or splits.
    """
    names = [printable(name) for name in source.class_names]
    try:
        TypeAdapter(ClassNames).validate_python(names)
        TypeAdapter(list[PlainName]).validate_python(list(source.splits))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        reason = problem["msg"].removeprefix("Value error, ")
        raise UsageError(
            f"the source has a class or a split {problem['input']!r:.200}: {reason}", "rename it"
        ) from error
    return names


def select_images(source: Source, excluded: set[str]) -> np.ndarray:
    """Return bool [n]: whether each image is to be packed. Raises UsageError for a name that no image has."""
    lines = [printable(key) for key in source.keys]
    if unknown := sorted(excluded.difference(lines, map(printable, source.unused))):
        raise UsageError(
            f"{counted(len(unknown), 'image')} to leave out cannot be found in the source: {', '.join(unknown[:5])}",
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
    destination: str, section: dict[str, Any], facts: dict[str, Any], shards: list[PackedShard], source: Source
) -> Collection:
    """Write the files beside the shards, the manifest last.

    Prints a table of the files that were taken and left out, a summary, warnings and the next command.

    Args:
        destination: URL of the collection.
        section: The packing section. It is stored, so that the next packing can be compared with it.
        facts: Entries of the manifest: source, seed, resolution, encoding, class_names and others.
        shards: The complete shards in their order.
        source: Where the images are from.
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
    names = "".join(f"{key}\n" for key in keys).encode()
    files.write_bytes(files.join(destination, KEYS), names)
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
        "keys": {"size": len(names), "sha256": hashlib.sha256(names).hexdigest()},
    }
    data = manifest_bytes(manifest)
    collection = Collection.of(destination, data)
    picture = io.BytesIO()
    preview(collection).save(picture, "PNG")
    files.write_bytes(files.join(destination, PREVIEW), picture.getvalue())
    files.write_bytes(files.join(destination, MANIFEST), data)
    for line in broken:
        print(f"left out: {line}")
    for note in source.notes:
        print(f"note: {printable(note)}")
    print("\n".join(_files_table(source, keys, section["exclude"])))
    _summarise(collection)
    digests = np.concatenate([shard.digests for shard in shards])
    for warning in [*_oddities(collection), *_duplicates(collection, digests, keys)]:
        print(f"warning: {warning}")
    print(f"look at {shown_url(files.join(destination, PREVIEW))}")
    print(f"next: {shown_url(next_command(collection))}")
    return collection


def _files_table(source: Source, keys: list[str], excluded: Sequence[str]) -> list[str]:
    """Return the lines of a table: files that were taken, and files that were left out by reason and suffix.

    Args:
        source: Where the images are from.
        keys: Names of the packed images, as `printable` returns them.
        excluded: Names of the images that the person left out.
    """
    packed, chosen = set(keys), set(excluded)
    rest = [key for key in map(printable, source.keys) if key not in packed]
    left_out: LeftOut = tally({key: "listed in --exclude" if key in chosen else "cannot be used" for key in rest})
    left_out |= source.left_out or {}
    rows = [("taken", f"{count:,}", kind, "") for kind, count in sorted(Counter(map(suffix, keys)).items())]
    for (reason, kind), (count, first) in sorted(left_out.items()):
        rows.append(("left out", f"{count:,}", printable(kind), f"{reason}, for example {printable(first)}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        f"{what:<{widths[0]}}  {count:>{widths[1]}}  {kind or '-':<{widths[2]}}  {why}".rstrip()
        for what, count, kind, why in rows
    ]


def _summarise(collection: Collection) -> None:
    """Print the classes, splits and size of a collection."""
    names = [f"{label} = {name}" for label, name in enumerate(collection.class_names)]
    shown = ", ".join(names[:_NAMED]) + (f", … ({MANIFEST} has all)" if len(names) > _NAMED else "")
    print(f"{len(names)} classes: {shown}" if names else "no classes: a model of this collection trains without labels")
    for split in collection.splits:
        shards = collection.shard_sizes(split)
        print(f"{split}: {counted(sum(shards), 'image')} in {counted(len(shards), 'shard')}")
    megabytes = sum(shard.size for shard in collection.shards) / 1e6
    print(f"{collection.resolution} px, {collection.encoding}, {megabytes:,.1f} MB, digest {collection.digest[:8]}")


def next_command(collection: Collection) -> str:
    """Return the command that trains on the collection with the job for its resolution and number of classes.

    For at most `_SMALL` images to train on, it sets data.augment. It can be given to a shell in the current folder.
    """
    fitting = _JOBS[collection.resolution]
    name = fitting[max(least for least in fitting if least <= collection.num_classes)]
    job = _SHIPPED / f"{name}.yaml"
    values = {"data.train": collection.url}
    split = "train" if "train" in collection.splits else next(iter(collection.splits))
    if split != "train":
        values |= dict.fromkeys(("data.split", "evaluate.split"), split)
    if collection.size(split) <= _SMALL:
        values["data.augment"] = "diffaugment"
    path = job.relative_to(Path.cwd()) if job.is_relative_to(Path.cwd()) else job
    return shlex.join(["sagan", "run", str(path), *(f"{key}={value}" for key, value in values.items())])


def _oddities(collection: Collection) -> list[str]:
    """Return a warning for everything unusual about the classes."""
    names, odd = collection.class_names, []
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
        f"{counted(len(again), 'image')} with the same bytes as an earlier image, for example {', '.join(examples)}"
    ]
    if across := int((split_of[again] != split_of[original]).sum()):
        warnings.append(f"{across:,} of them are in two splits: training would use held-out images")
    if differing := int((collection.labels[again] != collection.labels[original]).sum()):
        warnings.append(f"{differing:,} of them have another label than the earlier image")
    return warnings
