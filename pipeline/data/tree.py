"""What a reader of a layout is given, a tree of files, and what it makes of it, a source of images.

Tars are opened in place: each is a folder of the tree, whether it stands in a folder, in a bucket or in another tar.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import PurePosixPath
from posixpath import splitext
from typing import IO, NamedTuple

import numpy as np

from pipeline.data.threads import map_ahead
from pipeline.errors import UsageError
from pipeline.storage import files

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "heldout"}
_LABELS = (".cls", ".json")  # read while a tar is listed: later each would be a request of its own


class Place(NamedTuple):
    """Where the bytes of a file are: offset and size in an object (None: all of it); `data` where they are at hand."""

    url: str
    offset: int | None = None
    size: int | None = None
    data: bytes | None = None

    def read(self) -> bytes:
        """Raises FileNotFoundError, EnvironmentFault."""
        if self.data is not None:
            return self.data
        if self.offset is None or self.size is None:
            return files.read_bytes(self.url)
        return files.read_bytes(self.url, self.offset, self.offset + self.size)


@dataclass(frozen=True)
class Tree:
    """Files by path below `url`; `tars` are the folders among them that are tars."""

    url: str
    places: dict[str, Place]
    tars: list[str]

    @classmethod
    def open(cls, url: str) -> Tree:
        """All files of a folder, a tar, or a single file. Raises UsageError where there is none, EnvironmentFault."""
        if suffix(url) == ".tar":
            return cls(url, _listed(url), [])
        if suffix(url) == ".parquet":
            return cls(url, {files.name(url): Place(url)}, [])
        paths = files.list_files(url)
        if not paths:
            if not files.exists(url):
                raise UsageError(f"{url} does not exist", "correct the path or URL")
            if not (files.is_local(url) and files.local_path(url).is_dir()):
                raise UsageError(f"{url} is neither a folder nor a tar", "unpack it first, or correct the path or URL")
        tars = [path for path in paths if path.endswith(".tar") and not hidden(path)]
        places = {path: Place(files.join(url, path)) for path in paths if path not in set(tars)}
        for tar, members in zip(tars, map_ahead(lambda tar: _listed(files.join(url, tar)), tars, 8, 16), strict=True):
            places |= {f"{tar.removesuffix('.tar')}/{path}": place for path, place in members.items()}
        return cls(url, places, [tar.removesuffix(".tar") for tar in tars])

    def read(self, path: str) -> bytes:
        return self.places[path].read()

    @cached_property
    def images(self) -> list[str]:
        """Paths of all images, sorted."""
        return sorted(path for path in self.places if suffix(path) in IMAGES and not hidden(path))

    def text(self, name: str) -> str | None:
        """The contents of the file of this name, anywhere in the tree or beside it."""
        found = min((path for path in self.places if PurePosixPath(path).name == name), key=len, default=None)
        above = self.url.rstrip("/").rpartition("/")[0]
        if found or above.endswith("/"):  # nothing is beside a bucket
            return self.read(found).decode() if found else None
        try:
            return files.read_bytes(files.join(above if "/" in self.url else ".", name)).decode()
        except FileNotFoundError:
            return None


@dataclass(frozen=True)
class Source:
    """Images that can be read one by one, in any order and from several threads.

    keys: the images' names. labels: the class of each, an index into class_names (0 where there are no classes).
    splits: the name of each part and the indices of its images. kind: what it is, the same wherever it lies.
    titles: what people call the classes, where that is known. notes: what people should know of what was not taken.
    here: only this machine can read it. `read` pickles where that is not so; it raises FileNotFoundError,
    EnvironmentFault.
    """

    kind: str
    keys: list[str]
    labels: np.ndarray
    class_names: list[str]
    splits: dict[str, np.ndarray]
    read: Callable[[int], bytes]
    titles: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    here: bool = False


class Row(NamedTuple):
    """One image: its name, where it is, its class (None where there are no classes), its split."""

    key: str
    place: Place
    label: str | None
    split: str


def source_of(
    kind: str, rows: Iterable[Row], class_names: list[str] | None = None, notes: Iterable[str] = (), here: bool = False
) -> Source:
    """The source of these images, sorted by key; classes are those that occur, sorted, unless `class_names` has them.

    A single split is called train. Raises UsageError where some have a class and others have none.
    """
    rows = sorted(rows, key=lambda row: row.key)
    found = {row.label for row in rows}
    if None in found and len(found) > 1:
        stray = next(row.key for row in rows if row.label is None)
        named = min(label for label in found if label is not None)
        raise UsageError(f"some images have a class ({named}, …), but {stray} is in none", "move or delete it")
    if class_names is None or found == {None}:
        class_names = sorted(label for label in found if label is not None)
    index: dict[str | None, int] = {name: i for i, name in enumerate(class_names)} | {None: 0}
    names = sorted({row.split for row in rows})
    splits = {name: np.array([i for i, row in enumerate(rows) if row.split == name]) for name in names}
    return Source(
        kind,
        keys=[row.key for row in rows],
        labels=np.array([index[row.label] for row in rows], dtype=np.int64),
        class_names=class_names,
        splits=splits if len(splits) > 1 else {"train": np.arange(len(rows))},
        read=partial(_read, [row.place for row in rows]),
        notes=list(notes),
        here=here or any(files.is_local(row.place.url) for row in rows[:1]),
    )


def _read(places: list[Place], i: int) -> bytes:
    return places[i].read()


def suffix(path: str) -> str:
    return splitext(path)[1].lower()


def hidden(path: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(path).parts)


def split_in(path: str) -> str:
    """The split that a path mentions (data/train-00000-of-00005.parquet), else train."""
    return next((word for word in re.split(r"[-_./]", path.lower()) if word in SPLITS), "train")


def _listed(url: str) -> dict[str, Place]:
    try:
        with files.reading(url) as file:
            return dict(_members(file, url, 0, ""))
    except FileNotFoundError:
        raise UsageError(f"{url} does not exist", "correct the path or URL") from None
    except tarfile.ReadError as error:
        raise UsageError(f"{url} cannot be read as a plain tar: {error}", "decompress it first, or check it") from None


def _members(file: IO[bytes], url: str, base: int, folder: str) -> Iterator[tuple[str, Place]]:
    """The files of a tar that begins at byte `base` of the object `url`."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            path, data = folder + member.name.removeprefix("./"), None
            if not member.isfile():
                continue
            if suffix(path) in (".tar", *_LABELS) and not hidden(path):
                content = tar.extractfile(member)
                assert content is not None
                if suffix(path) == ".tar":
                    yield from _members(content, url, base + member.offset_data, path.removesuffix(".tar") + "/")
                    continue
                data = content.read()
            yield path, Place(url, base + member.offset_data, member.size, data)
