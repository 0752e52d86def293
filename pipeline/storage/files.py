"""Files by URL: a plain path, s3://bucket/key, or whatever else fsspec knows.

Calls are fresh (no listing cache), bounded in time, and fail in two ways only: FileNotFoundError where there is no such
object, EnvironmentFault where the storage is not there or is full (LastingFault where it does not let us in). s3fs is
not fork-safe, so each process makes its own client, in the process that uses it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import fsspec
from fsspec.callbacks import Callback
from fsspec.core import strip_protocol
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import EnvironmentFault, LastingFault

# What decides which client is meant: a changed variable (another endpoint, repaired keys) makes another client.
_IDENTITY = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
)
_CONNECT_S, _SILENCE_S = 5, 20  # so long a connection may take, and a server may be silent
_SLOWEST = 50_000  # bytes per second: what trickles more slowly than this has as good as stopped
_ATTEMPTS = 4
_FULL = (errno.ENOSPC, errno.EDQUOT)


def join(url: str, *parts: str) -> str:
    """`url` with `parts` below it."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def name(url: str) -> str:
    """The last part of a URL."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The absolute path of a URL that `is_local`."""
    return Path(url.removeprefix("file://")).expanduser().absolute()


def read_bytes(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """The whole object, or its bytes start … stop − 1. Raises FileNotFoundError, EnvironmentFault."""
    with _storage(url) as (fs, path):
        if not isinstance(fs, LocalFileSystem):
            return bytes(fs.cat_file(path, start=start, end=stop))
        with Path(path).open("rb") as file:  # a third of the time, where images are small
            file.seek(start or 0)
            return file.read(-1 if stop is None else stop - (start or 0))


def read_json(url: str) -> Any:
    """The object, parsed. Raises FileNotFoundError, EnvironmentFault, json.JSONDecodeError."""
    return json.loads(read_bytes(url))


def write_bytes(url: str, data: bytes) -> None:
    """Write an object whole: readers see the old one, or none, or the new one. Raises EnvironmentFault."""
    with _storage(url) as (fs, path):
        if isinstance(fs, LocalFileSystem):
            _replace(Path(path), lambda temp: temp.write_bytes(data))
        else:
            fs.pipe_file(path, data)


def write_json(url: str, value: Any) -> None:
    """Write `value` as JSON, the same bytes for the same value."""
    write_bytes(url, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


@contextmanager
def reading(url: str) -> Iterator[IO[bytes]]:
    """The object as a file that can seek; read from start to end it comes in large pieces.

    Raises FileNotFoundError, EnvironmentFault, the latter also for what fails while it is read.
    """
    with _storage(url) as (fs, path):
        local = isinstance(fs, LocalFileSystem)
        file = Path(path).open("rb") if local else fs.open(path, "rb", block_size=16 * 2**20)  # noqa: SIM115
    try:
        yield file
    except OSError as error:
        raise _fault(url, error) from error
    finally:
        file.close()


def exists(url: str) -> bool:
    """Whether there is an object or a folder. Raises EnvironmentFault (also where there is no such bucket)."""
    with _storage(url) as (fs, path):
        try:
            fs.info(path)
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise
            return False
        return True


def size(url: str) -> int | None:
    """Bytes of an object; None where its server does not say. Raises FileNotFoundError, EnvironmentFault."""
    with _storage(url) as (fs, path):
        found: int | None = fs.info(path)["size"]
        return found


def list_names(url: str) -> list[str]:
    """Names directly below a folder, sorted; [] where there is none. Raises EnvironmentFault."""
    with _storage(url) as (fs, path):
        return sorted(
            name(entry) for entry in _missing_is_empty(fs.ls, path, detail=False) if entry.rstrip("/") != path
        )


def list_files(url: str) -> list[str]:
    """Paths of all files at any depth below a folder, relative to it, sorted. Raises EnvironmentFault."""
    if is_local(url):  # fsspec does not follow links, and a folder of classes may be made of them
        root = local_path(url)
        with _storage(url):
            return sorted(path.relative_to(root).as_posix() for path in _walk(root, frozenset()))
    with _storage(url) as (fs, path):
        folder = path.rstrip("/") + "/"
        found = _missing_is_empty(fs.find, path)
        return sorted(file.removeprefix(folder) for file in found if file.startswith(folder))


def upload(local: Path, url: str) -> None:
    """Copy a local file to a URL. Raises EnvironmentFault."""
    with _storage(url) as (fs, path):
        if isinstance(fs, LocalFileSystem):
            _replace(Path(path), lambda temp: shutil.copyfile(local, temp))
        else:
            fs.put_file(str(local), path)


def download(
    url: str, local: Path, attempts: int = _ATTEMPTS, advance: Callable[[int], None] = lambda bytes_: None
) -> None:
    """Copy an object to a local file, whose folder exists. With 1 attempt, trying again is left to the caller.

    `advance` is told of the bytes as they come.

    Raises FileNotFoundError, EnvironmentFault.
    """
    with _storage(url, attempts) as (fs, path):
        try:
            fs.get_file(path, str(local), callback=_Pace(url, advance))
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise EnvironmentFault(
                f"{local.parent}: no space left for {url}", "free some space there, or choose another place"
            ) from error


def delete(url: str) -> None:
    """Delete an object, or a folder with all below it; nothing where there is none. Raises EnvironmentFault."""
    with _storage(url) as (fs, path):
        _missing_is_empty(fs.rm, path, recursive=True)


def check_writable(url: str) -> None:
    """Write and delete an object below `url`, so that what is wrong with it is said before anything starts.

    Raises EnvironmentFault.
    """
    probe = join(url, f".writable-{uuid4().hex}")
    write_bytes(probe, b"")
    delete(probe)


def filesystem(url: str, attempts: int = _ATTEMPTS) -> tuple[Any, str]:
    """This process's fsspec file system for a URL, and the path in it, for libraries that want these. It pickles."""
    if is_local(url):
        return _filesystem("file", (), os.getpid(), 1), str(local_path(url))
    protocol, _, _ = url.partition("://")
    identity = tuple(os.environ.get(variable) for variable in _IDENTITY)
    return _filesystem(protocol, identity, os.getpid(), attempts), strip_protocol(url)


@contextmanager
def _storage(url: str, attempts: int = _ATTEMPTS) -> Iterator[tuple[Any, str]]:
    """The file system of a URL and the path in it; its failures become ours."""
    try:
        fs, path = filesystem(url, attempts)
    except (ImportError, ValueError) as error:
        raise EnvironmentFault(
            f"{url}: {error}", "install the fsspec package for this kind of URL, or correct it"
        ) from error
    try:
        yield fs, path
    except EnvironmentFault:
        raise
    except Exception as error:
        if _code(error) == "403":  # the answer to a HEAD has no body and so no reason: ask in a way that has one
            try:
                fs.ls(path.partition("/")[0])
            except Exception as reason:
                error = reason
        links_to_itself = isinstance(error, OSError) and error.errno == errno.ELOOP
        if links_to_itself or (isinstance(error, FileNotFoundError) and _code(error) != "NoSuchBucket"):
            raise FileNotFoundError(f"{url} does not exist") from error
        raise _fault(url, error) from error


@lru_cache(maxsize=16)
def _filesystem(protocol: str, identity: tuple[str | None, ...], pid: int, attempts: int) -> Any:
    """One file system per process and identity, both of which serve as the key alone, and number of attempts."""
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(sock_connect=_CONNECT_S, sock_read=_SILENCE_S)  # none on the whole of a large file
        return fsspec.filesystem(protocol, skip_instance_cache=True, client_kwargs={"timeout": timeout})
    if protocol != "s3":
        return fsspec.filesystem(protocol, skip_instance_cache=True)
    # Servers other than AWS answer a part of an object with the checksum of the whole, which botocore then refuses.
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    config = {
        "connect_timeout": _CONNECT_S,
        "read_timeout": _SILENCE_S,
        "retries": {"total_max_attempts": attempts, "mode": "standard"},  # exponential, with jitter
    }
    fs = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
    fs.retries = min(attempts, 2)  # s3fs's own, around botocore's, for what breaks after the headers; its default is 5
    return fs


class _Pace(Callback):
    """Ends a download that trickles, since the time-out of reading sees silence only."""

    def __init__(self, url: str, advance: Callable[[int], None]) -> None:
        super().__init__()
        self._url, self._advance, self._began = url, advance, time.monotonic()

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self._advance(inc)
        seconds = time.monotonic() - self._began
        if seconds > _SILENCE_S and self.value < _SLOWEST * seconds:
            raise EnvironmentFault(
                f"{self._url}: {self.value / 1e3:.0f} kB came in {seconds:.0f} s, which is given up",
                "check the network and the load of the storage",
            )


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a temporary file beside `path` and rename it, so that `path` is never seen half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        write(temp)
        with temp.open("rb") as file:
            os.fsync(file.fileno())  # a manifest must not reach the disk before the files that it names
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def _walk(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """All files below a folder, links followed, but not back to a folder that they are in."""
    real = folder.resolve()
    if real in above or not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path, above | {real})
        else:
            yield path


def _missing_is_empty(call: Callable[..., Any], path: str, **options: Any) -> list[str]:
    try:
        return list(call(path, **options) or [])
    except FileNotFoundError as error:
        if _code(error) == "NoSuchBucket":
            raise
        return []


def _code(error: BaseException) -> str:
    """The S3 error code behind an exception of s3fs, "" where there is none."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _fault(url: str, error: Exception) -> EnvironmentFault:
    """Which of the things that can be wrong with storage this is, and what to do about it."""
    endpoint = (
        os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS (no AWS_ENDPOINT_URL)"
    )
    where, code = (f"{url} at {endpoint}" if url.startswith("s3://") else url), _code(error)
    if code == "NoSuchBucket":
        bucket = url.removeprefix("s3://").partition("/")[0]
        return LastingFault(
            f"{where}: bucket {bucket!r} does not exist", "create the bucket, or correct the URL or AWS_ENDPOINT_URL"
        )
    if code == "SignatureDoesNotMatch":
        return LastingFault(
            f"{where}: the secret key is wrong for this key id (SignatureDoesNotMatch)", "correct AWS_SECRET_ACCESS_KEY"
        )
    if code == "InvalidAccessKeyId":
        return LastingFault(
            f"{where}: the storage does not know this key id (InvalidAccessKeyId)", "correct AWS_ACCESS_KEY_ID"
        )
    if code.startswith("Expired") or code == "InvalidToken":
        return LastingFault(f"{where}: the credentials have expired ({code})", "get new ones and start again")
    kind = type(error).__name__
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return LastingFault(
            f"{where}: no credentials found",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or use a machine with a role",
        )
    if isinstance(error, PermissionError):
        return LastingFault(
            f"{where}: not allowed ({code or error.strerror or error})",
            "give these credentials or this user the right to list, read and write there",
        )
    if kind in ("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "FSTimeoutError") or isinstance(
        error, ConnectionError | TimeoutError
    ):
        return EnvironmentFault(
            f"{where}: the storage cannot be reached ({kind})",
            "check that the server runs, AWS_ENDPOINT_URL and the network",
        )
    if kind in ("ClientPayloadError", "IncompleteRead", "ResponseStreamingError"):
        return EnvironmentFault(f"{where}: the transfer broke off ({kind})", "check the network and the storage's log")
    if code:
        return EnvironmentFault(f"{where}: the storage answers {code}", "check its load and its log")
    if isinstance(error, OSError) and error.errno in _FULL:
        return EnvironmentFault(f"{where}: no space left", "free some space, or choose another place")
    return EnvironmentFault(
        f"{where}: {kind}: {error}", "see the cause above; `sagan doctor` checks storage step by step"
    )
