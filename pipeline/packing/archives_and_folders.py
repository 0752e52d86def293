"""A tree of files: the contents of a folder, a bucket or a tar, from which a layout is recognised.

Tars are read in place. Each tar is a folder of the tree, whether it lies in a folder, in a bucket or in another tar.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from posixpath import splitext
from typing import IO, NamedTuple

from pipeline.compute.threads import map_ahead
from pipeline.errors import UsageError
from pipeline.storage import files

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}
"""Suffixes of files that are taken for images."""
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "heldout"}
"""Names of folders that are taken for splits."""
# Members with labels are read while a tar is listed. Later, each would cost a request of its own.
_LABELS = (".cls", ".json")


class Place(NamedTuple):
    """Where the bytes of a file are.

    Attributes:
        url: URL of the object that contains them.
        offset: First byte in the object; None: the file is the whole object.
        size: Number of bytes; None: the file is the whole object.
        data: The bytes themselves, where they have been read already.
    """

    url: str
    offset: int | None = None
    size: int | None = None
    data: bytes | None = None

    def read(self) -> bytes:
        """Return the bytes of the file. Raises FileNotFoundError, EnvironmentFault."""
        if self.data is not None:
            return self.data
        if self.offset is None or self.size is None:
            return files.read_bytes(self.url)
        return files.read_bytes(self.url, self.offset, self.offset + self.size)


@dataclass(frozen=True)
class Tree:
    """The files below a URL.

    Attributes:
        url: URL of the folder, tar or file.
        places: Place of each file, by its path below `url`.
        tars: Paths of the folders that are tars, without `.tar`.
    """

    url: str
    places: dict[str, Place]
    tars: list[str]

    @classmethod
    def open(cls, url: str) -> Tree:
        """List all files of a folder or a tar, or a single Parquet file.

        Raises UsageError where `url` is none of these, EnvironmentFault where storage fails.
        """
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
        """Return the bytes of the file at a path. Raises FileNotFoundError, EnvironmentFault."""
        return self.places[path].read()

    @cached_property
    def images(self) -> list[str]:
        """Paths of all images that are not hidden, sorted."""
        return sorted(path for path in self.places if suffix(path) in IMAGES and not hidden(path))

    def text(self, name: str) -> str | None:
        """Return the text of the file with this name in the tree or beside it; None where there is no such file."""
        shortest = min((path for path in self.places if PurePosixPath(path).name == name), key=len, default=None)
        above = self.url.rstrip("/").rpartition("/")[0]
        if shortest or above.endswith("/"):  # a bucket has no folder above it
            return self.read(shortest).decode() if shortest else None
        try:
            return files.read_bytes(files.join(above if "/" in self.url else ".", name)).decode()
        except FileNotFoundError:
            return None


def suffix(path: str) -> str:
    """Return the suffix of a path in lower case, with its dot."""
    return splitext(path)[1].lower()


def hidden(path: str) -> bool:
    """Return whether a part of the path begins with a dot or with __MACOSX."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(path).parts)


def split_in(path: str) -> str:
    """Return the split that a path names, as in data/train-00000-of-00005.parquet; `train` where it names none."""
    return next((word for word in re.split(r"[-_./]", path.lower()) if word in SPLITS), "train")


def _listed(url: str) -> dict[str, Place]:
    """List the files of a tar. Raises UsageError where it is missing or no plain tar, EnvironmentFault."""
    try:
        with files.reading(url) as file:
            return dict(_members(file, url, 0, ""))
    except FileNotFoundError:
        raise UsageError(f"{url} does not exist", "correct the path or URL") from None
    except tarfile.ReadError as error:
        raise UsageError(f"{url} cannot be read as a plain tar: {error}", "decompress it, or replace it") from None


def _members(file: IO[bytes], url: str, base: int, folder: str) -> Iterator[tuple[str, Place]]:
    """Yield path and place of each file of a tar that begins at byte `base` of the object `url`.

    A tar inside the tar is listed as a folder. `folder` precedes every path.
    """
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
