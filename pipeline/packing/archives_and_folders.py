"""A tree of files: the contents of a folder, a bucket or a tar, from which a layout is recognised.

Tars are read in place. Each tar is a folder of the tree, whether it lies in a folder, in a bucket or in another tar.
Links in a folder are followed. Links in a tar are followed inside the tar.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from posixpath import splitext
from typing import IO, Any, NamedTuple

from PIL import Image

from pipeline.collection.image_codec import FORMATS
from pipeline.collection.parse_labels import LABELS, MOST_LABEL_BYTES
from pipeline.collection.shard_file import tar_members
from pipeline.compute.threads import map_ahead
from pipeline.errors import EnvironmentFault, UsageError
from pipeline.storage import files
from pipeline.storage.validate_json import printable

Image.init()  # registers the suffixes of all formats
IMAGES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
"""Suffixes of files that are taken for images."""
_OTHER_IMAGES = {
    *(Image.registered_extensions().keys() - IMAGES),
    *(".heic", ".heif", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".svg", ".jxl"),
}
# Folders and files that storage devices and operating systems make. They hold thumbnails or deleted files.
_SYSTEM = {
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "@__thumb", "#recycle", "#snapshot", "$recycle.bin"),
    *("system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini"),
}
MOST_IMAGE_BYTES = 10**9
"""Greatest size of an image file."""
_MOST_NESTED = 8  # tars in tars
_MOST_LINKS = 40  # links on the way to a file, as in Linux
_DEEPEST = 200  # folders in a path of a tar
_MOST_FACTOR, _MOST_FREE = 10, 100_000  # links may repeat the entries of a source so often, and so many always
_POINTER = b"version https://git-lfs"


class Place(NamedTuple):
    """Where the bytes of a file are.

    Attributes:
        url: URL of the object that contains them.
        offset: First byte in the object; None: the file is the whole object.
        size: Number of bytes; None: the file is the whole object.
        data: The bytes themselves, where they have been read already.
        missing: Whether the file is a link to a file that does not exist.
    """

    url: str
    offset: int | None = None
    size: int | None = None
    data: bytes | None = None
    missing: bool = False

    def read(self, most: int = MOST_IMAGE_BYTES) -> bytes:
        """Return the bytes of the file.

        Raises ValueError where the file is known to have more than `most` bytes, FileNotFoundError, EnvironmentFault.
        """
        if self.missing:
            raise FileNotFoundError(self.url)
        if self.data is not None:
            return self.data
        size = self.size
        if size is None and files.is_local(self.url):
            size = files.size(self.url)
        if size is not None and size > most:
            raise ValueError(f"the file has {size:,} bytes, more than the limit of {most:,}")
        if self.offset is None or self.size is None:
            return files.read_bytes(self.url)
        data = files.read_bytes(self.url, self.offset, self.offset + self.size)
        if len(data) != self.size:
            raise EnvironmentFault(
                f"{self.url}: the server sent {len(data):,} bytes where {self.size:,} were requested",
                "download the file and pack the copy",
            )
        return data


@dataclass(frozen=True)
class Tree:
    """The files below a URL.

    Attributes:
        url: URL of the folder, tar or file.
        places: Place of each file, by its path below `url`.
        tars: Paths of the folders that are tars, without `.tar`.
        unusable: Reason for each entry that is no readable file, by its path.
        cleanup: Deletes the local copies.
        copies: URLs of objects that were copied to this machine.
    """

    url: str
    places: dict[str, Place]
    tars: list[str]
    unusable: dict[str, str] = field(default_factory=dict)
    cleanup: ExitStack = field(default_factory=ExitStack)
    copies: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, url: str) -> Tree:
        """List all files of a folder or a tar, or a single Parquet file.

        Raises UsageError where `url` is none of these, EnvironmentFault where storage fails.
        """
        tree = cls(url, {}, [])
        with ExitStack() as on_failure:
            on_failure.callback(tree.cleanup.close)
            if suffix(url) == ".tar":
                tree._add("", _tar_files(tree._seekable(url)))
            elif suffix(url) == ".parquet":
                tree.places[files.name(url)] = Place(tree._seekable(url))
            else:
                tree._add_folder()
            on_failure.pop_all()
        return tree

    def read(self, path: str) -> bytes:
        """Return the bytes of the file at a path. Raises FileNotFoundError, EnvironmentFault."""
        return self.places[path].read()

    @cached_property
    def images(self) -> list[str]:
        """Paths of all images that are neither hidden nor made by a storage device, sorted."""
        return sorted(path for path in self.places if suffix(path) in IMAGES and ignored(path) is None)

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

    def left_out(self, taken: Iterable[str], reasons: Mapping[str, str]) -> dict[str, str]:
        """Return the reason for each file that is not among `taken`, by its path.

        Args:
            taken: Paths of the files that are used.
            reasons: Reasons that the layout knows, by path.
        """
        rest = self.places.keys() - set(taken)
        return self.unusable | {path: reasons.get(path) or _reason(path) for path in rest}

    def _seekable(self, url: str) -> str:
        """Return `url`, or the URL of a local copy where its server cannot send a part of an object.

        Raises UsageError where there is no object, EnvironmentFault where storage fails.
        """
        try:
            if files.sends_parts(url):
                return url
        except FileNotFoundError:
            raise UsageError(f"{url} does not exist", "correct the path or URL") from None
        folder = self.cleanup.enter_context(files.temporary_folder("copy"))
        files.download(url, folder / files.name(url))
        self.copies.append(url)
        return str(folder / files.name(url))

    def _add(self, folder: str, contents: Iterable[tuple[str, Place | str]]) -> None:
        """Add files and reasons by path. `folder` precedes every path."""
        for path, place in contents:
            if isinstance(place, Place):
                self.places[folder + path] = place
            else:
                self.unusable[folder + path] = place

    def _add_folder(self) -> None:
        url = self.url
        if files.is_local(url):
            found = dict(_folder_files(files.local_path(url)))
        else:
            listed = (path for path in files.list_files(url) if not path.endswith("/"))
            found = {path: Place(f"{url.rstrip('/')}/{path}") for path in listed}  # a key may begin with a slash
        if not found:
            if not files.exists(url):
                raise UsageError(f"{url} does not exist", "correct the path or URL")
            if not files.is_folder(url):
                raise UsageError(f"{url} is neither a folder nor a tar", "unpack it first, or correct the path or URL")
        tars = sorted(path for path, place in found.items() if _is_tar(path) and isinstance(place, Place))
        urls = [self._seekable(place.url) for tar in tars if isinstance(place := found.pop(tar), Place)]
        self._add("", found.items())
        for tar, contents in zip(tars, map_ahead(lambda tar: list(_tar_files(tar)), urls, 8, 16), strict=True):
            self._add(tar.removesuffix(".tar") + "/", contents)
        self.tars.extend(tar.removesuffix(".tar") for tar in tars)


def suffix(path: str) -> str:
    """Return the suffix of a path in lower case, with its dot."""
    return splitext(path)[1].lower()


def folders_of(path: str) -> list[str]:
    """Return the names of the folders of a path, the outermost first."""
    return [part for part in path.split("/")[:-1] if part]


def ignored(path: str) -> str | None:
    """Return the reason why a file of this name is never an image of the source; None where it may be one."""
    parts = path.split("/")
    if any(part.lower() in _SYSTEM for part in parts):
        return "made by a storage device or an operating system"
    if any(part.startswith((".", "__MACOSX")) for part in parts):
        return "hidden"
    return None


def _reason(path: str) -> str:
    """Return why a file that no layout uses is left out."""
    if reason := ignored(path):
        return reason
    if suffix(path) in _OTHER_IMAGES:
        return "unsupported format"
    return "not part of the data set" if suffix(path) in IMAGES else "not an image"


def _is_tar(path: str) -> bool:
    return path.endswith(".tar") and ignored(path) is None


Entry = tuple[str, Place | str]
"""Path of a file, and its place or the reason why it cannot be read."""


def _walk(
    root: Any, children: Callable[[Any], Iterable[tuple[str, Any]]], identity: Callable[[Any], Any]
) -> Iterator[Entry]:
    """List the files below a folder. A link to a folder that contains it is left out.

    Args:
        root: The folder.
        children: Returns name and content of each entry of a folder, with links followed: a Place, the reason why there
            is none, or another folder.
        identity: Returns the same value for the same folder, also where a link leads to it.

    Raises UsageError where links repeat folders so often that no person can mean it.
    """
    seen: set[Any] = set()
    entries = repeated = 0
    folders: list[tuple[Any, str, frozenset[Any]]] = [(root, "", frozenset())]
    while folders:
        folder, prefix, above = folders.pop()
        key = identity(folder)
        if key in above:
            continue
        first = key not in seen
        seen.add(key)
        for name, entry in children(folder):
            entries, repeated = entries + first, repeated + (not first)
            if repeated > _MOST_FACTOR * entries + _MOST_FREE:
                raise UsageError(f"links at {printable(prefix)} repeat the same files too often", "remove these links")
            if isinstance(entry, Place | str):
                yield prefix + name, entry
            else:
                folders.append((entry, f"{prefix}{name}/", above | {key}))


def _folder_files(root: Path) -> Iterator[Entry]:
    """List the files below a local folder. Links are followed. Raises EnvironmentFault."""
    if root.is_dir():
        yield from _walk(root, partial(_children, root), os.path.realpath)


def _children(root: Path, folder: Path) -> Iterator[tuple[str, Path | Place | str]]:
    """Yield the entries of a local folder at or below `root`, as `_walk` takes them. Raises EnvironmentFault."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        if ignored("/".join(folder.relative_to(root).parts)) is not None:  # lost+found belongs to root
            return
        raise EnvironmentFault(f"{folder}: {error.strerror}", "allow this user to list the folder") from error
    for name in names:
        path = folder / name
        try:
            mode = path.stat().st_mode
        except OSError:  # a link to nothing or to itself
            yield name, Place(str(path), missing=True)
            continue
        if stat.S_ISDIR(mode):
            yield name, path
        else:
            yield name, Place(str(path)) if stat.S_ISREG(mode) else "not a regular file"


@dataclass
class _Folder:
    """A folder of a tar: its files, folders and links by name. A tar in the tar is a folder too."""

    entries: dict[str, _Folder | _Link | Place] = field(default_factory=dict)
    above: _Folder | None = None  # None for a tar
    is_tar: bool = False


@dataclass(frozen=True)
class _Link:
    target: str

    def parts(self) -> list[str]:
        """Return the names in the target, the last one first. Raises _LeavesTar."""
        if self.target.startswith("/"):
            raise _LeavesTar
        return self.target.split("/")[::-1]


class _LeavesTar(Exception):
    """A path leads out of the tar."""


def _tar_files(url: str) -> list[Entry]:
    """List the files of a tar. Raises UsageError where it is missing or no plain tar, EnvironmentFault."""
    unusable: dict[str, str] = {}

    def children(folder: _Folder) -> Iterator[tuple[str, _Folder | Place | str]]:
        for name, entry in folder.entries.items():
            found = entry
            if isinstance(entry, _Link):
                try:
                    found = _target(folder, entry) or Place(url, missing=True)
                except _LeavesTar:
                    yield name, "a link that leads out of the tar"
                    continue
            assert not isinstance(found, _Link)
            yield name.removesuffix(".tar") if isinstance(found, _Folder) and found.is_tar else name, found

    try:
        with files.reading(url) as file:
            root = _read_tar(file, url, 0, "", unusable)
        return [*_walk(root, children, id), *unusable.items()]
    except FileNotFoundError:
        raise UsageError(f"{url} does not exist", "correct the path or URL") from None
    except (tarfile.TarError, ValueError, EOFError) as error:
        require_no_pointer(url)
        raise UsageError(f"{url} cannot be read as a plain tar: {error}", "decompress it, or replace it") from None


def require_no_pointer(url: str) -> None:
    """Raise UsageError where a file is a pointer of Git LFS. Raises FileNotFoundError, EnvironmentFault."""
    with files.reading(url) as file:
        is_pointer = file.read(len(_POINTER)) == _POINTER
    if is_pointer:
        raise UsageError(f"{url} is a pointer of Git LFS and not the file", "run `git lfs pull` in its repository")


def _read_tar(file: IO[bytes], url: str, base: int, prefix: str, unusable: dict[str, str], depth: int = 0) -> _Folder:
    """Read the members of a tar that begins at byte `base` of the object `url`.

    Adds the reason for each member that cannot be used to `unusable`; `prefix` precedes its path. Raises UsageError for
    an image or a label whose bytes are not stored as they are.
    """
    if depth > _MOST_NESTED:
        raise UsageError(f"{url}: {printable(prefix)} is a tar in more than {_MOST_NESTED} tars", "unpack it")
    root = _Folder(is_tar=True)
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        for member in tar_members(tar):
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            path = "/".join(parts)
            if not parts:
                continue
            if ".." in parts:
                unusable[prefix + path] = "its path leads out of the tar"
                continue
            if (folder := _make_folders(root, parts[:-1])) is None:
                unusable[prefix + path] = "it lies in a folder that is a file, a link or too deep"
                continue
            name = parts[-1]
            entry: _Folder | _Link | Place | str | None = None
            if member.isdir():
                _make_folders(folder, [name])
            elif member.issym():
                entry = _Link(member.linkname)
            elif member.islnk():
                entry = _linked(root, member.linkname) or "a link to a file that is not in the tar"
            elif member.issparse():
                if suffix(path) in {*IMAGES, *LABELS, ".tar"}:
                    raise UsageError(f"{url}: {printable(path)} is sparse", "write the tar without --sparse")
                entry = "a sparse file"
            elif not member.isreg():
                entry = "not a regular file"
            elif _is_tar(path):
                content = _content(tar, member)
                start = base + member.offset_data
                entry = _read_tar(content, url, start, f"{prefix}{path.removesuffix('.tar')}/", unusable, depth + 1)
            else:
                small = suffix(path) in LABELS and member.size <= MOST_LABEL_BYTES and ignored(path) is None
                data = _content(tar, member).read() if small else None  # later, each would cost a request of its own
                entry = Place(url, base + member.offset_data, member.size, data)
            if isinstance(entry, str):
                unusable[prefix + path] = entry
            elif entry is not None:
                folder.entries[name] = entry
    return root


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    assert content is not None  # the member is a regular file
    return content


def _make_folders(root: _Folder, parts: list[str]) -> _Folder | None:
    """Return the folder at a path of a tar, and make it where it is missing. Returns None where it cannot be made."""
    folder = root
    for part in parts:
        inner = folder.entries.setdefault(part, _Folder(above=folder))
        if not isinstance(inner, _Folder) or inner.is_tar or len(parts) > _DEEPEST:
            return None
        folder = inner
    return folder


def _linked(root: _Folder, path: str) -> _Folder | _Link | Place | None:
    """Return the file to which a hard link of a tar leads; None where there is none."""
    entry: _Folder | _Link | Place | None = root
    for part in path.split("/"):
        if part not in ("", "."):
            entry = entry.entries.get(part) if isinstance(entry, _Folder) else None
    return None if isinstance(entry, _Folder) and not entry.is_tar else entry


def _target(folder: _Folder, link: _Link) -> _Folder | Place | None:
    """Return the target of a link in a folder of a tar; None where there is none. Raises _LeavesTar."""
    at: _Folder | Place | None = folder
    parts, links = link.parts(), 1
    while parts:
        part = parts.pop()
        if part in ("", "."):
            continue
        if not isinstance(at, _Folder):
            return None
        if part == "..":
            if at.above is None:
                raise _LeavesTar
            at = at.above
            continue
        entry = at.entries.get(part)
        if not isinstance(entry, _Link):
            at = entry
            continue
        links += 1
        if links > _MOST_LINKS:
            return None
        parts += entry.parts()
    return at
