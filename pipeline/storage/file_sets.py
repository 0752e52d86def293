"""Immutable sets of files. The manifest of a set has the size and the SHA-256 of each file, and is written last.

A set exists once its manifest exists. A crash before that leaves unused files, but never a damaged set. Readers verify
each file by its SHA-256. Somebody else may have written a set: its manifest is validated before a value of it is used,
and no more bytes of a file are fetched than the manifest says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, StrictInt

from pipeline.errors import CorruptError, SaganError
from pipeline.storage import files, validate_json
from pipeline.storage.validate_json import RelativePath, Sha256, Size

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class FileEntry:
    """Entry of a file in a manifest: its size in bytes and its SHA-256 in hex."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    size: Size
    sha256: Sha256

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Compute the entry of a local file."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _without_folders(entries: dict[str, FileEntry]) -> dict[str, FileEntry]:
    for name in entries:
        if folder := next((str(above) for above in PurePosixPath(name).parents if str(above) in entries), None):
            raise ValueError(f"{folder} is both a file and a folder")
    return entries


class _Stored(BaseModel):
    """The JSON object of a manifest. Keys that are not fields are facts."""

    model_config = ConfigDict(extra="allow")

    format: StrictInt
    files: Annotated[dict[RelativePath, FileEntry], AfterValidator(_without_folders)]


@dataclass(frozen=True)
class Manifest:
    """The manifest of a set of files.

    Attributes:
        files: Entry of each file, by its path relative to the manifest, with `/`.
        facts: Other keys of the manifest, JSON values that the writer of the set gave.
    """

    files: dict[str, FileEntry]
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, **facts: Any) -> Manifest:
        """Compute the manifest of every file below a local folder."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return cls({path.relative_to(folder).as_posix(): FileEntry.of(path) for path in paths}, facts)

    def to_bytes(self) -> bytes:
        """Return the manifest as JSON. The same contents give the same bytes."""
        entries = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in self.files.items()}
        value = {"format": FORMAT, "files": entries, **self.facts}
        return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, url: str) -> Manifest:
        """Parse and validate the manifest that was read from `url`.

        Raises CorruptError, which names the field, where it is no manifest of this format.
        """
        values = validate_json.parse(data, url, "a manifest")
        if (format_ := values.get("format", FORMAT)) != FORMAT:
            raise CorruptError(f"{url} has format {format_!r}; this version reads {FORMAT}", "use a matching version")
        stored = validate_json.validate(_Stored, values, url, "a manifest")
        return cls(stored.files, dict(stored.model_extra or {}))

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest's bytes in hex. It identifies the set and its contents."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def upload_set(folder: Path, url: str, **facts: Any) -> Manifest:
    """Upload every file below `folder` to `url`, then the manifest with the entries and `facts`.

    Where `url` holds the same set already, nothing is uploaded. A manifest that is not valid is replaced. Raises
    SaganError where `url` holds another set, and EnvironmentFault where storage fails.
    """
    manifest = Manifest.of(folder, **facts)
    if (existing := valid_manifest(url)) is not None:
        if existing.to_bytes() != manifest.to_bytes():
            raise SaganError(f"{url} already holds another set of files; a set is never changed", "choose another URL")
        return existing
    for name in manifest.files:
        files.upload(folder / name, files.join(url, name))
    files.write_bytes(files.join(url, MANIFEST), manifest.to_bytes())
    return manifest


def read_manifest(url: str) -> Manifest | None:
    """Return the manifest of the set at `url`; None where there is no set. Raises CorruptError, EnvironmentFault."""
    manifest_url = files.join(url, MANIFEST)
    try:
        return Manifest.from_bytes(validate_json.read(manifest_url), manifest_url)
    except FileNotFoundError:
        return None


def valid_manifest(url: str) -> Manifest | None:
    """Return the manifest of the set at `url`; None where there is none or it is not valid. Raises EnvironmentFault."""
    try:
        return read_manifest(url)
    except CorruptError:
        return None


def fetch_set(url: str, folder: Path, names: Collection[str] | None = None) -> Manifest:
    """Download the set at `url` into `folder` and verify every file. With `names`, do it for these files of the set.

    Raises FileNotFoundError where there is no set, CorruptError that names a damaged or missing file, and
    EnvironmentFault where storage fails.
    """
    manifest = _require(url)
    for name, entry in manifest.files.items():
        if names is None or name in names:
            _fetch_file(files.join(url, name), folder / name, entry)
    return manifest


def verify_set(url: str) -> Manifest:
    """Download and verify every file of the set at `url`, and keep none. Raises what `fetch_set` raises."""
    manifest = _require(url)
    with files.temporary_folder("verify") as folder:
        for name, entry in manifest.files.items():
            local = folder / PurePosixPath(name).name
            _fetch_file(files.join(url, name), local, entry)
            local.unlink()
    return manifest


def check_local_set(folder: Path, *, complete: bool = False) -> None:
    """Compare the files in a local folder with its manifest, where it has one.

    Args:
        folder: The folder.
        complete: Whether a file that the manifest does not list is an error.

    Raises CorruptError that names a file that is missing, changed or not listed.
    """
    manifest = read_manifest(str(folder))
    if manifest is None:
        return
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CorruptError(f"{path} is missing, though {MANIFEST} names it")
        if FileEntry.of(path) != entry:
            raise CorruptError(f"{path} is not the file that {MANIFEST} names: it was changed")
    unknown = Manifest.of(folder).files.keys() - manifest.files.keys() - {MANIFEST}
    if complete and unknown:
        raise CorruptError(f"{folder / min(unknown)} was added: {MANIFEST} does not name it")


def remove_set(url: str) -> None:
    """Delete the set at `url`. The manifest is deleted first, so that a crash does not leave an incomplete set.

    Raises EnvironmentFault where storage fails.
    """
    files.delete(files.join(url, MANIFEST))
    files.delete(url)


def _require(url: str) -> Manifest:
    """Return the manifest of the set at `url`. Raises FileNotFoundError where there is no set."""
    manifest = read_manifest(url)
    if manifest is None:
        raise FileNotFoundError(f"{url} holds no {MANIFEST}")
    return manifest


def _fetch_file(url: str, local: Path, expected: FileEntry) -> None:
    """Download a file and compare it with its entry. Raises CorruptError, EnvironmentFault."""
    local.parent.mkdir(parents=True, exist_ok=True)
    try:
        files.download(url, local, most=expected.size)
    except FileNotFoundError:
        raise CorruptError(f"{url} is missing, though its manifest names it") from None
    except CorruptError:
        local.unlink(missing_ok=True)
        raise
    if (actual := FileEntry.of(local)) != expected:
        local.unlink()
        raise CorruptError(
            f"{url} differs from its manifest: {actual.size} bytes, SHA-256 {actual.sha256[:16]}…, "
            f"instead of {expected.size} bytes, SHA-256 {expected.sha256[:16]}…"
        )
