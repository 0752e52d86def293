"""Access to files by URL: a plain path, s3://bucket/key, or another URL that fsspec supports.

Every URL is taken literally: no character of a key is a pattern. No call uses a cached listing, and every call ends in
bounded time. A call raises FileNotFoundError where the object does not exist, and EnvironmentFault where the storage
cannot be reached or is full. It raises LastingFault, which is an EnvironmentFault, where the storage refuses access. A
limit on the size of an object is enforced while its bytes arrive, since a server need not tell the truth about sizes.
s3fs is not fork-safe, so each process creates its own client.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import fsspec
from fsspec.asyn import sync
from fsspec.callbacks import Callback
from fsspec.core import strip_protocol
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import CorruptError, EnvironmentFault, LastingFault, SaganError
from pipeline.storage.scratch_folder import ScratchFolder

_CONNECT_S, _SILENCE_S = 5, 20  # seconds: limits for opening a connection, and for a server that sends nothing
_SLOWEST = 50_000  # bytes per second: a slower download fails
_ATTEMPTS = 4
_SETTLING_S = 1.0  # seconds after which a created object is read again where creation has no condition
_PIECE = 2**20  # bytes of a local copy
_DELETIONS = 8  # keys of a folder that are deleted at the same time
_FULL = (errno.ENOSPC, errno.EDQUOT)


def join(url: str, *parts: str) -> str:
    """Return the URL of a path below `url`."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def name(url: str) -> str:
    """Return the last part of a URL."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def is_local(url: str) -> bool:
    """Return whether a URL is a path on this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """Return the absolute path of a local URL (see `is_local`)."""
    return Path(url.removeprefix("file://")).expanduser().absolute()


def read_bytes(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Return the whole object, or its bytes `start` to `stop` − 1. Raises FileNotFoundError, EnvironmentFault."""
    with _storage(url) as (fs, path):
        if not isinstance(fs, LocalFileSystem):
            return bytes(fs.cat_file(path, start=start, end=stop))
        with Path(path).open("rb") as file:  # takes a third of the time of fsspec for small images
            file.seek(start or 0)
            return file.read(-1 if stop is None else stop - (start or 0))


def read_at_most(url: str, most: int) -> bytes:
    """Return the whole object, which somebody else may have written.

    Raises FileNotFoundError, CorruptError where it has more than `most` bytes, and EnvironmentFault.
    """
    if is_local(url):
        with _storage(url) as (_, path), _open_regular(path) as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise _too_large(url, most)
        return data
    with tempfile.TemporaryDirectory(prefix="sagan-read-") as folder:  # only a download can be stopped midway
        local = Path(folder) / "object"
        download(url, local, most=most)
        return local.read_bytes()


def read_json(url: str) -> Any:
    """Read an object and parse it as JSON. Raises FileNotFoundError, EnvironmentFault, json.JSONDecodeError."""
    return json.loads(read_bytes(url))


def write_bytes(url: str, data: bytes) -> None:
    """Write an object atomically: no reader sees a part of it. Raises EnvironmentFault."""
    with _storage(url) as (fs, path):
        if isinstance(fs, LocalFileSystem):
            _replace(Path(path), lambda temp: temp.write_bytes(data))
        else:
            fs.pipe_file(path, data)


def create(url: str, data: bytes) -> bool:
    """Write an object only if there is none at `url`. Return whether this call created it. `data` must be unique.

    Of several callers, one gets True. A server that ignores `If-None-Match`, and storage without such a condition,
    promise less: of callers within a second, the last one gets True. Raises EnvironmentFault.
    """
    with _storage(url) as (fs, path):
        if isinstance(fs, LocalFileSystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            try:
                with Path(path).open("xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
            return True
        if fs.exists(path):
            return False
        if isinstance(fs.protocol, tuple) and "s3" in fs.protocol:
            try:
                fs.pipe_file(path, data, mode="create")
                fs.pipe_file(path, data, mode="create")  # succeeds where the server ignores the condition
            except FileExistsError:
                return bool(fs.cat_file(path) == data)
        else:
            fs.pipe_file(path, data)
        time.sleep(_SETTLING_S)
        return bool(fs.cat_file(path) == data)


def modified(url: str) -> float:
    """Return when an object was last written, in seconds by the clock of the storage.

    Raises FileNotFoundError, EnvironmentFault.
    """
    with _storage(url) as (fs, path):
        return float(fs.modified(path).timestamp())


def write_json(url: str, value: Any) -> None:
    """Write `value` as JSON. The same value gives the same bytes. Raises EnvironmentFault."""
    write_bytes(url, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


@contextmanager
def reading(url: str) -> Iterator[IO[bytes]]:
    """Open an object as a seekable file. Sequential reads request it in pieces of 16 MiB.

    Raises FileNotFoundError and EnvironmentFault. An OSError in the body of the `with` statement becomes an
    EnvironmentFault too, except that of a full disk, which the body wrote to.
    """
    with _storage(url) as (fs, path):
        local = isinstance(fs, LocalFileSystem)
        file = Path(path).open("rb") if local else fs.open(path, "rb", block_size=16 * 2**20)  # noqa: SIM115
    try:
        yield file
    except OSError as error:
        if _is_full(error):
            raise
        raise _fault(url, error) from error
    finally:
        file.close()


def sends_parts(url: str) -> bool:
    """Return whether a part of an object can be read. Some HTTP servers send whole objects only.

    Raises FileNotFoundError, EnvironmentFault.
    """
    if not url.startswith(("http://", "https://")):
        return True
    with _storage(url) as (fs, path):

        async def status() -> int:
            session = await fs.set_session()
            async with session.get(fs.encode_url(path), headers={"Range": "bytes=0-0"}) as response:
                fs._raise_not_found_for_status(response, path)
                return int(response.status)

        return int(sync(fs.loop, status)) == HTTPStatus.PARTIAL_CONTENT


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """Make a folder for temporary files on this machine's disk, and delete it at the end.

    Another process deletes it where this one is killed. Raises EnvironmentFault that names the folder and TMPDIR where
    it cannot be made, or where its disk is full in the body of the `with` statement.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise EnvironmentFault(f"no temporary folder can be written to: {error.strerror}", "set TMPDIR") from error
    scratch = None
    try:
        scratch = ScratchFolder(purpose)
        (folder := scratch.path / purpose).mkdir()
        yield folder
    except Exception as error:
        if not _is_full(error):
            raise
        raise _no_space(Path(tempfile.gettempdir()), purpose) from error
    finally:
        if scratch is not None:
            scratch.delete()


def require_room(folder: Path, needed: int, what: str) -> None:
    """Check that the disk of a local folder has `needed` bytes for `what`. The folder need not exist yet.

    Raises EnvironmentFault.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        fault = _no_space(folder, what)
        amounts = f"{needed / 1e6:,.1f} MB are needed, and {free / 1e6:,.1f} MB are free"
        raise EnvironmentFault(f"{fault.message}: {amounts}", fault.remedy)


def exists(url: str) -> bool:
    """Return whether an object or a folder exists. Raises EnvironmentFault, also where the bucket does not exist."""
    with _storage(url) as (fs, path):
        try:
            fs.info(path)
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise
            return False
        return True


def size(url: str) -> int | None:
    """Return the size of an object in bytes; None where the server does not report it.

    Raises FileNotFoundError, EnvironmentFault.
    """
    with _storage(url) as (fs, path):
        number: int | None = fs.info(path)["size"]
        return number


def list_names(url: str) -> list[str]:
    """Return the names directly below a folder, sorted; [] where there is no folder. Raises EnvironmentFault."""
    with _storage(url) as (fs, path):
        return sorted(
            name(entry) for entry in _missing_is_empty(fs.ls, path, detail=False) if entry.rstrip("/") != path
        )


def list_files(url: str) -> list[str]:
    """Return the paths of all files at any depth below a folder, relative to it, sorted. Raises EnvironmentFault."""
    if is_local(url):  # fsspec does not follow links, and class folders may be links
        root = local_path(url)
        with _storage(url):
            return sorted(path.relative_to(root).as_posix() for path in _walk(root, frozenset()))
    with _storage(url) as (fs, path):
        folder = path.rstrip("/") + "/"
        paths = _missing_is_empty(fs.find, path)
        return sorted(file.removeprefix(folder) for file in paths if file.startswith(folder))


def upload(local: Path, url: str) -> None:
    """Copy a local file to a URL. Raises EnvironmentFault."""
    with _storage(url) as (fs, path):
        if isinstance(fs, LocalFileSystem):
            _replace(Path(path), lambda temp: shutil.copyfile(local, temp))
        else:
            fs.put_file(str(local), path)


def download(
    url: str,
    local: Path,
    attempts: int = _ATTEMPTS,
    advance: Callable[[int], None] = lambda bytes_: None,
    *,
    most: int | None = None,
) -> None:
    """Copy an object to a local file.

    Args:
        url: URL of the object.
        local: Path of the file. Its folder must exist.
        attempts: How often a request is tried. A caller that retries itself gives 1.
        advance: Called with the number of bytes of each piece that arrives.
        most: Largest size that the object may have. The copy stops at the piece that exceeds it.

    Raises FileNotFoundError where there is no object, CorruptError where it has more than `most` bytes, and
    EnvironmentFault where the storage fails or where the local disk is full. `local` is incomplete then.
    """
    with _storage(url, attempts) as (fs, path):
        arriving = _Arriving(url, advance, most)
        try:
            if isinstance(fs, LocalFileSystem):
                with _open_regular(path) as source, local.open("wb") as target:
                    while piece := source.read(_PIECE):
                        target.write(piece)
                        arriving.relative_update(len(piece))
            else:
                fs.get_file(path, str(local), callback=arriving)
        except OSError as error:
            if not _is_full(error):
                raise
            raise _no_space(local.parent, url) from error


def delete(url: str) -> None:
    """Delete an object, or a folder and everything below it, where it exists. Raises EnvironmentFault.

    The URL is taken literally. `rm` of fsspec takes `[`, `*` and `?` as a pattern, so each key is deleted by itself.
    """
    with _storage(url) as (fs, path):
        if isinstance(fs, LocalFileSystem):
            _missing_is_empty(fs.rm, path, recursive=True)
            return
        keys = {path, *_missing_is_empty(fs.find, path)}
        with ThreadPoolExecutor(_DELETIONS) as threads:
            list(threads.map(lambda key: _missing_is_empty(fs.rm_file, key), keys))


def check_writable(url: str) -> None:
    """Check that objects can be written and deleted below `url`, before long work starts. Raises EnvironmentFault."""
    probe = join(url, f".writable-{uuid4().hex}")
    write_bytes(probe, b"")
    delete(probe)


def filesystem(url: str, attempts: int = _ATTEMPTS) -> tuple[Any, str]:
    """Return this process's fsspec file system for a URL, and the path in it. The file system can be pickled."""
    if is_local(url):
        return _filesystem("file", (), os.getpid(), 1), str(local_path(url))
    protocol, _, _ = url.partition("://")
    # Servers other than AWS answer a range request with the checksum of the whole object. botocore would reject it.
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    return _filesystem(protocol, _settings(), os.getpid(), attempts), strip_protocol(url)


def _settings() -> tuple[tuple[str, str], ...]:
    """Return the environment variables that a client reads when it is created.

    A changed value, such as a corrected key or another proxy, needs another client.
    """
    names = ("HOME", *(name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")))
    return tuple((name, os.environ.get(name, "")) for name in sorted(names))


@contextmanager
def _storage(url: str, attempts: int = _ATTEMPTS) -> Iterator[tuple[Any, str]]:
    """Yield the file system of a URL and the path in it.

    Failures in the body of the `with` statement become FileNotFoundError or EnvironmentFault.
    """
    try:
        fs, path = filesystem(url, attempts)
    except (ImportError, ValueError) as error:
        raise EnvironmentFault(
            f"{url}: {error}", "correct the URL, or install the package that fsspec needs for this kind of URL"
        ) from error
    try:
        yield fs, path
    except SaganError:
        raise
    except Exception as error:
        if _code(error) == "403":  # the response to HEAD has no body with the reason, but the response to a listing has
            try:
                fs.ls(path.partition("/")[0])
            except Exception as reason:
                error = reason
        links_to_itself = isinstance(error, OSError) and error.errno == errno.ELOOP
        if links_to_itself or (isinstance(error, FileNotFoundError) and _code(error) != "NoSuchBucket"):
            raise FileNotFoundError(f"{url} does not exist") from error
        raise _fault(url, error) from error


@lru_cache(maxsize=16)
def _filesystem(protocol: str, settings: tuple[tuple[str, str], ...], pid: int, attempts: int) -> Any:
    """Create a file system. `settings` and `pid` are used only as keys of the cache."""
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(sock_connect=_CONNECT_S, sock_read=_SILENCE_S)  # no limit for a whole large file
        headers = {"Accept-Encoding": "identity"}  # a compressed object would hide its size
        client = {"timeout": timeout, "headers": headers}
        return fsspec.filesystem(protocol, skip_instance_cache=True, client_kwargs=client)
    if protocol != "s3":
        return fsspec.filesystem(protocol, skip_instance_cache=True)
    config = {
        "connect_timeout": _CONNECT_S,
        "read_timeout": _SILENCE_S,
        "retries": {"total_max_attempts": attempts, "mode": "standard"},  # exponential back-off with jitter
    }
    fs = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
    fs.retries = min(attempts, 2)  # s3fs's retries, beside botocore's, of bodies that break off; default 5
    return fs


class _Arriving(Callback):
    """A callback that ends a download that is too slow or too large.

    The read time-out ends only a download that is silent.
    """

    def __init__(self, url: str, advance: Callable[[int], None], most: int | None) -> None:
        super().__init__()
        self._url, self._advance, self._most, self._began = url, advance, most, time.monotonic()

    def set_size(self, size: int | None) -> None:
        super().set_size(size)
        if size is not None:
            self._check_size(size)

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self._check_size(self.value)
        self._advance(inc)
        seconds = time.monotonic() - self._began
        if seconds > _SILENCE_S and self.value < _SLOWEST * seconds:
            raise EnvironmentFault(
                f"{self._url}: the download is too slow ({self.value / 1e3:.0f} kB in {seconds:.0f} s) and was stopped",
                "check the network and the load of the storage",
            )

    def _check_size(self, size: int) -> None:
        if self._most is not None and size > self._most:
            raise _too_large(self._url, self._most)


def _too_large(url: str, most: int) -> CorruptError:
    return CorruptError(f"{url} is larger than it may be: it has more than {most:,} bytes and was not read further")


def _open_regular(path: str) -> IO[bytes]:
    """Open a local file for reading. Raises OSError where it is a pipe or a device, which may have no end."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would block until it has a writer
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    raise OSError(errno.EINVAL, "it is not a regular file", path)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a temporary file beside `path` and rename it, so that no reader sees an incomplete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        write(temp)
        with temp.open("rb") as file:
            os.fsync(file.fileno())  # a manifest must not reach the disk before the files that it lists
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def _walk(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """Yield all files below a folder. Links are followed, except a link to a folder that contains it."""
    real = folder.resolve()
    if real in above or not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path, above | {real})
        else:
            yield path


def _is_full(error: BaseException) -> bool:
    """Return whether an exception says that a disk is full. safetensors raises exceptions that are no OSError."""
    return (isinstance(error, OSError) and error.errno in _FULL) or "(os error 28)" in str(error)


def _no_space(folder: Path, what: str) -> EnvironmentFault:
    """Return the EnvironmentFault that says that a folder of this machine has no space for something."""
    is_temporary = folder.is_relative_to(tempfile.gettempdir())
    remedy = "set TMPDIR to a folder with more space" if is_temporary else "choose another folder"
    return EnvironmentFault(f"{folder}: no space left for {what}", f"free some space there, or {remedy}")


def _missing_is_empty(call: Callable[..., Any], path: str, **options: Any) -> list[str]:
    """Return what `call` lists; [] where `path` does not exist. Raises where the bucket does not exist."""
    try:
        return list(call(path, **options) or [])
    except FileNotFoundError as error:
        if _code(error) == "NoSuchBucket":
            raise
        return []


def _code(error: BaseException) -> str:
    """Return the S3 error code of an exception of s3fs; "" where it has none."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _fault(url: str, error: Exception) -> EnvironmentFault:
    """Return the EnvironmentFault that describes an exception of a file system, with its remedy."""
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
            f"{where}: the secret key does not match the key id (SignatureDoesNotMatch)",
            "correct AWS_SECRET_ACCESS_KEY",
        )
    if code == "InvalidAccessKeyId":
        return LastingFault(
            f"{where}: the storage does not know this key id (InvalidAccessKeyId)", "correct AWS_ACCESS_KEY_ID"
        )
    if code.startswith("Expired") or code == "InvalidToken":
        return LastingFault(f"{where}: the credentials have expired ({code})", "get new credentials and start again")
    kind = type(error).__name__
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return LastingFault(
            f"{where}: no credentials found",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or use a machine that has a role",
        )
    if isinstance(error, PermissionError):
        return LastingFault(
            f"{where}: access denied ({code or error.strerror or error})",
            "allow these credentials or this user to list, read and write there",
        )
    if kind in ("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "FSTimeoutError") or isinstance(
        error, ConnectionError | TimeoutError
    ):
        return EnvironmentFault(
            f"{where}: the storage cannot be reached ({kind})",
            "check that the server runs, and check AWS_ENDPOINT_URL and the network",
        )
    if kind in ("ClientPayloadError", "IncompleteRead", "ResponseStreamingError"):
        return EnvironmentFault(f"{where}: the transfer broke off ({kind})", "check the network and the storage's log")
    if code:
        return EnvironmentFault(f"{where}: the storage answers {code}", "check the storage's load and its log")
    if _is_full(error):
        return EnvironmentFault(f"{where}: no space left", "free some space, or choose another place")
    return EnvironmentFault(f"{where}: {kind}: {error}", "run `sagan doctor`, which checks storage step by step")
