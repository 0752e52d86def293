"""Immutable sets of files: the manifest, with sizes and SHA-256, is written last, and what has none does not exist.

So a crash at any point leaves garbage and never damage, and every reader can tell that it has what was written.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.errors import CorruptError, SaganError
from pipeline.storage import files

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class FileEntry:
    """What a file must be: size in bytes, SHA-256 in hex."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Manifest:
    """Names (relative, with /) and entries of the files of a set, and the facts that its maker stated."""

    files: dict[str, FileEntry]
    facts: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """JSON, the same bytes for the same contents."""
        entries = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in self.files.items()}
        value = {"format": FORMAT, "files": entries, **self.facts}
        return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, url: str) -> Manifest:
        """Raises CorruptError where `data` is no manifest of this format; `url` is for its message."""
        try:
            value = json.loads(data)
            if (found := value.pop("format")) != FORMAT:
                raise CorruptError(f"{url} has format {found}; this version reads {FORMAT}", "use a matching version")
            entries = {name: FileEntry(int(e["size"]), str(e["sha256"])) for name, e in value.pop("files").items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptError(f"{url} is not a manifest: {error!r}") from error
        for name in entries:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise CorruptError(f"{url} names a file outside its folder: {name!r}")
        return cls(entries, value)

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest's bytes: identifies the set and all that is in it."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def commit(folder: Path, url: str, **facts: Any) -> Manifest:
    """Upload every file below `folder`, then the manifest with `facts` beside the entries.

    Committing the same set again does nothing. Raises SaganError where another set already stands at `url`,
    EnvironmentFault.
    """
    paths = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    manifest = Manifest({name: FileEntry.of(path) for name, path in paths.items()}, facts)
    if (standing := read_manifest(url)) is not None:
        if standing.to_bytes() != manifest.to_bytes():
            raise SaganError(f"{url} already holds another set of files, and sets never change", "choose another URL")
        return standing
    for name, path in paths.items():
        files.upload(path, files.join(url, name))
    files.write_bytes(files.join(url, MANIFEST), manifest.to_bytes())
    return manifest


def read_manifest(url: str) -> Manifest | None:
    """The manifest at `url`; None where there is none: then the set does not exist. Raises CorruptError."""
    where = files.join(url, MANIFEST)
    try:
        return Manifest.from_bytes(files.read_bytes(where), where)
    except FileNotFoundError:
        return None


def fetch(url: str, folder: Path) -> Manifest:
    """Download the set into `folder`, every file verified.

    Raises FileNotFoundError where there is no set, CorruptError naming the file, EnvironmentFault.
    """
    manifest = _require(url)
    for name, entry in manifest.files.items():
        _fetch_file(files.join(url, name), folder / name, entry)
    return manifest


def verify(url: str) -> Manifest:
    """As `fetch`, keeping nothing."""
    manifest = _require(url)
    with tempfile.TemporaryDirectory(prefix="sagan-verify-") as folder:
        for name, entry in manifest.files.items():
            local = Path(folder) / PurePosixPath(name).name
            _fetch_file(files.join(url, name), local, entry)
            local.unlink()
    return manifest


def remove(url: str) -> None:
    """Delete the set, manifest first: a crash in between leaves no set rather than half of one."""
    files.delete(files.join(url, MANIFEST))
    files.delete(url)


def _require(url: str) -> Manifest:
    manifest = read_manifest(url)
    if manifest is None:
        raise FileNotFoundError(f"{url} holds no {MANIFEST}")
    return manifest


def _fetch_file(url: str, local: Path, expected: FileEntry) -> None:
    local.parent.mkdir(parents=True, exist_ok=True)
    try:
        files.download(url, local)
    except FileNotFoundError:
        raise CorruptError(f"{url} is missing, though its manifest names it") from None
    if (found := FileEntry.of(local)) != expected:
        local.unlink()
        raise CorruptError(
            f"{url} differs from its manifest: {found.size} bytes, SHA-256 {found.sha256[:16]}…, "
            f"instead of {expected.size} bytes, {expected.sha256[:16]}…"
        )
