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
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from fsspec.asyn import sync
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import EnvironmentFault, SaganError
from pipeline.storage import storage_errors
from pipeline.storage.filesystems import ATTEMPTS, SILENCE_S, filesystem, forget_clients, is_local, local_path
from pipeline.storage.scratch_folder import ScratchFolder

_SLOWEST = 50_000  # bytes per second: a slower download fails
_SETTLING_S = 1.0  # seconds after which a created object is read again where creation has no condition
_PIECE = 2**20  # bytes of a local copy
_DELETIONS = 8  # keys of a folder that are deleted at the same time


def join(url: str, *parts: str) -> str:
    """Return the URL of a path below `url`."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def name(url: str) -> str:
    """Return the last part of a URL."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def read_bytes(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Return the whole object, or its bytes `start` to `stop` − 1. Raises FileNotFoundError, EnvironmentFault."""
    if stop is not None and stop <= (start or 0):
        return b""  # a request cannot have an empty range
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
            raise storage_errors.too_large(url, most)
        return data
    with temporary_folder("read") as folder:  # only a download can be stopped midway
        local = folder / "object"
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
        if storage_errors.is_full(error):
            raise
        raise storage_errors.fault(url, error) from error
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
        if not storage_errors.is_full(error):
            raise
        raise storage_errors.no_space(Path(tempfile.gettempdir()), purpose) from error
    finally:
        if scratch is not None:
            scratch.delete()


def require_room(folder: Path, needed: int, what: str) -> None:
    """Check that the disk of a local folder has `needed` bytes for `what`. The folder need not exist yet.

    Raises EnvironmentFault.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        fault = storage_errors.no_space(folder, what)
        amounts = f"{needed / 1e6:,.1f} MB are needed, and {free / 1e6:,.1f} MB are free"
        raise EnvironmentFault(f"{fault.message}: {amounts}", fault.remedy)


def exists(url: str) -> bool:
    """Return whether an object or a folder exists. Raises EnvironmentFault, also where the bucket does not exist."""
    with _storage(url) as (fs, path):
        try:
            fs.info(path)
        except FileNotFoundError as error:
            if storage_errors.s3_code(error) == "NoSuchBucket":
                raise
            return False
        return True


def is_folder(url: str) -> bool:
    """Return whether a URL is a folder on this machine. Raises EnvironmentFault."""
    if not is_local(url):
        return False
    with _storage(url) as (_, path):
        return Path(path).is_dir()


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


def list_folders(url: str) -> list[str]:
    """Return the names of the folders directly below a folder, sorted. Raises EnvironmentFault.

    Returns [] where there is no folder.
    """
    with _storage(url) as (fs, path):
        entries: list[Any] = _missing_is_empty(fs.ls, path, detail=True)
        return sorted(
            name(entry["name"])
            for entry in entries
            if entry["type"] == "directory" and entry["name"].rstrip("/") != path.rstrip("/")
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
    attempts: int = ATTEMPTS,
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
            if not storage_errors.is_full(error):
                raise
            raise storage_errors.no_space(local.parent, url) from error


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


@contextmanager
def _storage(url: str, attempts: int = ATTEMPTS) -> Iterator[tuple[Any, str]]:
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
        if storage_errors.lacks_credentials(error):
            forget_clients()
        if storage_errors.s3_code(error) == "403":
            # The response to HEAD has no body with the reason, but the response to a listing has.
            try:
                fs.ls(path.partition("/")[0])
            except Exception as reason:
                error = reason
        links_to_itself = isinstance(error, OSError) and error.errno == errno.ELOOP
        if links_to_itself or (isinstance(error, FileNotFoundError) and storage_errors.says_missing(error)):
            raise FileNotFoundError(f"{url} does not exist") from error
        raise storage_errors.fault(url, error) from error


class _Arriving(Callback):
    """A callback that ends a download that is too slow or too large.

    The read time-out ends only a download that is silent. The speed counts from the answer of the storage: a request
    that the client has repeated, because nothing came, has not slowed the download down.
    """

    def __init__(self, url: str, advance: Callable[[int], None], most: int | None) -> None:
        super().__init__()
        self._url, self._advance, self._most, self._began = url, advance, most, time.monotonic()

    def set_size(self, size: int | None) -> None:
        super().set_size(size)
        self._began = time.monotonic()  # the storage has answered
        if size is not None:
            self._check_size(size)

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self._check_size(self.value)
        self._advance(inc)
        seconds = time.monotonic() - self._began
        if seconds > SILENCE_S and self.value < _SLOWEST * seconds:
            raise EnvironmentFault(
                f"{self._url}: the download is too slow ({self.value / 1e3:.0f} kB in {seconds:.0f} s) and was stopped",
                "check the network and the load of the storage",
            )

    def _check_size(self, size: int) -> None:
        if self._most is not None and size > self._most:
            raise storage_errors.too_large(self._url, self._most)


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


def _missing_is_empty(call: Callable[..., Any], path: str, **options: Any) -> list[str]:
    """Return what `call` lists; [] where the storage says that `path` does not exist."""
    try:
        return list(call(path, **options) or [])
    except FileNotFoundError as error:
        if not storage_errors.says_missing(error):
            raise
        return []
