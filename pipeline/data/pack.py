"""Pack images into shards: every image decoded once, made square and upright, written in a seeded permutation.

The same images and the same section give the same bytes, wherever they lie: a folder, its tar and a bucket pack alike.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
import safetensors.numpy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from webdataset import TarWriter

from pipeline.config.schema import PackSection
from pipeline.data.images import EXTENSIONS, decode_into, prepare
from pipeline.data.index import FORMAT, INDEX, MANIFEST, Collection, Shard, read_shard
from pipeline.data.order import PACKING, permutation
from pipeline.data.sources import Source, open_source
from pipeline.data.threads import map_ahead
from pipeline.errors import CorruptError, UsageError
from pipeline.storage import files
from pipeline.storage.fileset import FileEntry

T = TypeVar("T")
Report = Callable[[int, int], None]  # (images done, images in all)

# The section that a collection was packed by. Beside the manifest, whose digest must not depend on paths.
_SECTION = "pack.json"
_LISTED = 20  # broken images that are looked for beyond the tolerated ones, so that they are mended in one go


def pack(destination: str, section: PackSection, progress: Report | None = None) -> Collection:
    """Pack `section.source` into shards at the URL `destination`; says what it did and what to do next.

    Nothing is done where the same section has been packed there. `progress` replaces the progress bar. Raises
    UsageError (no images, too many broken ones, another collection at `destination`), EnvironmentFault.
    """
    encoding = section.encoding or ("png" if section.resolution == 32 else "jpeg")
    section = section.model_copy(update={"encoding": encoding})
    if files.exists(files.join(destination, MANIFEST)):
        return _standing(destination, section)
    files.check_writable(destination)
    source = open_source(section.source)
    shards: list[Shard] = []
    index: list[np.ndarray] = []
    broken: list[str] = []
    with _reporting("packing", progress) as report, tempfile.TemporaryDirectory(prefix="sagan-pack-") as folder:
        images = _prepared(source, section, encoding, broken, report)
        for split, of_split in itertools.groupby(images, key=lambda image: image[0]):
            for number, chunk in enumerate(_chunks(of_split, section.shard_images)):
                path = Path(folder) / f"{split}-{number:05d}.tar"
                labels = [label for _, label, _ in chunk] if source.class_names else None
                first_key = sum(shard.count for shard in shards)
                _write_shard(path, first_key, [data for _, _, data in chunk], labels, EXTENSIONS[encoding])
                index.append(np.array([(len(shards), s.offset, s.length, s.label or 0) for s in read_shard(path)]))
                entry = FileEntry.of(path)
                shards.append(Shard(path.name, entry.size, entry.sha256, len(chunk), split))
                files.upload(path, files.join(destination, path.name))
                path.unlink()
    if not shards:
        raise UsageError(f"not one of {len(source.keys)} images could be decoded", "look at the reasons above")
    _commit(destination, section, source, shards, np.concatenate(index))
    collection = Collection.open(destination)
    _summarise(collection, broken)
    return collection


def verify(url: str, progress: Report | None = None) -> Collection:
    """Check every hash, place and label, and decode every image, of the collection at `url`.

    Raises CorruptError naming each bad shard and sample, UsageError where there is no collection, EnvironmentFault.
    """
    collection = Collection.open(url)
    bad: list[str] = []
    first = 0
    with _reporting("verifying", progress) as report, tempfile.TemporaryDirectory(prefix="sagan-verify-") as folder:
        for shard in collection.shards:
            ids = range(first, first + shard.count)
            bad += _bad_in_shard(collection, shard, ids, Path(folder) / shard.name)
            first = ids.stop
            report(first, len(collection.labels))
    if bad:
        raise CorruptError("\n  ".join([f"{url} is damaged:", *bad]), "delete it and pack it again")
    return collection


def _standing(destination: str, section: PackSection) -> Collection:
    """The collection that is there, where it was packed by the same section. Raises UsageError where it was not."""
    wanted = section.model_dump(exclude={"max_broken"})
    try:
        found = files.read_json(files.join(destination, _SECTION))
    except FileNotFoundError:
        found = {}
    if differing := [key for key in wanted if found.get(key) != wanted[key]]:
        listed = ", ".join(f"{key} {found.get(key)!r} instead of {wanted[key]!r}" for key in differing)
        raise UsageError(
            f"{destination} already holds a collection that was packed otherwise: {listed}",
            "choose another destination; collections never change",
        )
    collection = Collection.open(destination)
    print(f"{destination} has been packed already, by the same section: {len(collection.labels):,} images")
    return collection


def _prepared(
    source: Source, section: PackSection, encoding: str, broken: list[str], report: Report
) -> Iterator[tuple[str, int, bytes]]:
    """(split, label, file) of every image in the order of the shards; what cannot be decoded goes to `broken`.

    Raises UsageError where that is too much.
    """
    order = (
        (split, int(i))
        for number, (split, ids) in enumerate(source.splits.items())
        for i in ids[permutation(len(ids), section.seed, PACKING, number)]
    )

    def prepared(place: tuple[str, int]) -> tuple[str, int, bytes | ValueError]:
        split, i = place
        try:
            return split, i, prepare(source.read(i), section.resolution, encoding, section.quality)
        except ValueError as reason:
            return split, i, reason

    threads = os.cpu_count() or 1
    for done, (split, i, image) in enumerate(map_ahead(prepared, order, threads, 4 * threads), start=1):
        if isinstance(image, bytes):
            yield split, int(source.labels[i]), image
        else:
            broken.append(f"{source.keys[i]}: {image}")
            if len(broken) == section.max_broken + _LISTED:
                break
        report(done, len(source.keys))
    if len(broken) > section.max_broken:
        raise UsageError(
            "\n  ".join([f"{len(broken)} images cannot be decoded, {section.max_broken} are tolerated:", *broken]),
            f"mend or delete them, or tolerate them: max_broken={len(broken)}",
        )


def _chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    return iter(lambda: list(itertools.islice(items, size)), [])


def _write_shard(path: Path, first_key: int, images: list[bytes], labels: list[int] | None, extension: str) -> None:
    """A WebDataset tar with counted keys, the same bytes for the same samples."""
    with path.open("wb") as file, TarWriter(file, user="sagan", group="sagan", mtime=0, encoder=False) as tar:
        for number, image in enumerate(images):
            sample = {"__key__": f"{first_key + number:08d}", extension: image}
            tar.write(sample | ({"cls": str(labels[number]).encode()} if labels else {}))


def _commit(destination: str, section: PackSection, source: Source, shards: list[Shard], index: np.ndarray) -> None:
    """Write index, section and, last of all, the manifest."""
    columns: dict[str, np.ndarray] = {
        "shard": index[:, 0].astype(np.int32),
        "offset": index[:, 1].astype(np.int64),
        "length": index[:, 2].astype(np.int32),
        "label": index[:, 3].astype(np.int32),
    }
    data = safetensors.numpy.save(columns)
    files.write_bytes(files.join(destination, INDEX), data)
    files.write_json(files.join(destination, _SECTION), section.model_dump())
    manifest = {
        "format": FORMAT,
        "source": source.kind,
        "seed": section.seed,
        "resolution": section.resolution,
        "encoding": section.encoding,
        "quality": section.quality if section.encoding == "jpeg" else None,
        "class_names": source.class_names,
        "samples": len(index),
        "splits": {split: sum(shard.count for shard in shards if shard.split == split) for split in source.splits},
        "shards": [asdict(shard) for shard in shards],
        "index": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()},
    }
    files.write_json(files.join(destination, MANIFEST), manifest)


def _bad_in_shard(collection: Collection, shard: Shard, ids: range, path: Path) -> list[str]:
    """What is wrong with one shard, sample by sample where its bytes are readable at all."""
    try:
        files.download(collection.shard_url(shard), path)
        found = list(read_shard(path))
    except FileNotFoundError:
        return [f"{shard.name}: missing"]
    except CorruptError as error:
        return [f"{shard.name}: {error}"]
    bad = []
    if FileEntry.of(path).sha256 != shard.sha256:
        bad.append(f"{shard.name}: its SHA-256 is not the manifest's")
    if len(found) != shard.count:
        return [*bad, f"{shard.name}: {len(found)} samples instead of {shard.count}"]
    data = path.read_bytes()
    pixels = np.empty((collection.resolution, collection.resolution, 3), dtype=np.uint8)
    for sample, i in zip(found, ids, strict=True):
        place = (sample.offset, sample.length, sample.label or 0)
        if place != (collection.offset[i], collection.length[i], collection.labels[i]):
            bad.append(f"{shard.name}: {sample.key}: place or label are not the index's")
        try:
            decode_into(data[sample.offset : sample.offset + sample.length], pixels)
        except ValueError as reason:
            bad.append(f"{shard.name}: {sample.key}: {reason}")
    path.unlink()
    return bad


@contextmanager
def _reporting(doing: str, progress: Report | None) -> Iterator[Report]:
    """`progress` itself; or a bar on a terminal, else a line per quarter."""
    console = Console()
    if progress is not None:
        yield progress
    elif console.is_terminal:
        columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(doing)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:

        def line(done: int, total: int) -> None:
            if 4 * done // total > 4 * (done - 1) // total:
                print(f"{doing}: {done:,} of {total:,} images", flush=True)

        yield line


def _summarise(collection: Collection, broken: list[str]) -> None:
    for image in broken:
        print(f"left out: {image}")
    names = collection.class_names
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    print(f"{len(names)} classes: {shown}" if names else "no classes: a model of these trains without labels")
    for split in collection.splits:
        print(f"{split}: {collection.size(split):,} images in {len(collection.shard_sizes(split)):,} shards")
    megabytes = sum(shard.size for shard in collection.shards) / 1e6
    print(f"{collection.resolution} px, {collection.encoding}, {megabytes:,.1f} MB, digest {collection.digest[:8]}")
    job = "cifar10" if collection.resolution == 32 else "imagenet128"
    print(f"next: sagan run jobs/{job}.yaml data.train={collection.url}")
