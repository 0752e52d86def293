"""A cache of verified shards on the node's disk. The node's processes share it, and its size is bounded.

A shard's file is named by its SHA-256. A process downloads a shard under a temporary name, verifies its hash and then
renames it. It holds a lock meanwhile, so the processes of a node download each shard once. The kernel releases the
locks of a process that dies. The modification time of a shard's lock file says when the shard was used.

Only the user may write to the folder; a folder that other users can write to is refused. The cache touches only files
whose names it gives: another file in the folder is neither counted nor deleted. A process hashes a shard once, and
again when the file has changed. It notices a change by times and size. The user's own programs can defeat this only by
setting the clock back, since no program can set the time of a file's last change of status.

A process that needs room deletes the shards that were used longest ago. Processes that have a deleted shard open can
still read it. A deleted file takes room on the disk until every process has closed it. Therefore no thread keeps a file
open while it waits for another shard, and no thread keeps one open for long without reading it.

Failed downloads are repeated: for `patience_s` seconds where the storage is down or silent, and `_TRIES` times after
wrong bytes or a refusal. Only this module repeats downloads, so that no layer below multiplies the waiting time.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import random
import re
import shlex
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.collection.manifest import Shard
from pipeline.errors import CorruptError, EnvironmentFault, LastingFault
from pipeline.storage import files

_TRIES = 3  # attempts after errors that repeating should not cure: wrong bytes, a missing object, no access
_LONGEST_PAUSE_S = 5.0  # between two attempts
_KEPT = 128  # largest number of open files that no thread is reading
_UNNOTED_S, _NOTE_EVERY_S = 1.0, 10.0  # seconds of waiting before the first note, and between notes
# Files of the cache: a shard, named by its SHA-256, and a download in progress, whose name has its final size too
_ENTRY = re.compile(r"[0-9a-f]{64}(\.[0-9]{1,16}\.part)?")


class CachedShard:
    """An open, verified shard. One thread uses it until `close`. `read` also works after the file is evicted."""

    def __init__(self, fd: int, sha256: str, keep: Callable[[CachedShard], None]) -> None:
        self._fd, self.sha256, self._keep = fd, sha256, keep

    def close(self) -> None:
        """Return the file to the cache, which closes it or gives it to another thread. It cannot be read afterwards."""
        self._keep(self)

    def release(self) -> None:
        """Close the file, also while variables still refer to this object: the file of an evicted shard takes room."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.release()

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from byte `offset` on."""
        return os.pread(self._fd, length, offset)

    def is_intact(self) -> bool:
        """Read the whole file, and return whether its SHA-256 is the expected one."""
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256

    @property
    def identity(self) -> tuple[int, ...]:
        """Device, inode, size, and times of modification and of change of status in ns.

        They change when the file is written to or replaced. A program can set the modification time, but not the other.
        """
        status = os.fstat(self._fd)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class ShardCache:
    """Verified shards in a folder. Several processes and threads may use the same folder.

    Args:
        folder: Folder of the cache on this node. It is created where it does not exist, for this user alone.
        gigabytes: Largest total size of the shards.
        patience_s: For how many seconds a download that fails is repeated, with growing pauses.
        note: Called with a message while the cache waits for a shard.
    """

    def __init__(
        self, folder: str, gigabytes: float, patience_s: float = 300.0, note: Callable[[str], None] = print
    ) -> None:
        self._folder = Path(folder).expanduser()
        self._bytes = int(gigabytes * 1e9)
        self._patience_s, self._note = patience_s, note
        self._last_note_s = -math.inf
        self._failing_since: dict[str, float] = {}  # SHA-256 of a shard that fails → time of the first failure
        self._verified: dict[str, tuple[int, ...]] = {}  # SHA-256 → identity of the verified file
        self._idle: dict[str, CachedShard] = {}  # SHA-256 → open file, least recently used first
        self._waiting = 0  # threads that wait for a shard
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def open(self, url: str, shard: Shard) -> CachedShard:
        """Return the shard at `url` from disk, and download it where the disk lacks it.

        Raises:
            CorruptError: The bytes differ from the manifest after every attempt, or the object is missing.
            EnvironmentFault: The storage cannot be reached for `patience_s` seconds or refuses access, the disk has no
                room, the folder cannot be used or other users can write to it, or the cache is closed.
        """
        # A batch opens several shards. Each system call lets other threads take the interpreter, so reuse open files.
        if (kept := self._kept(shard)) is not None:
            return kept
        try:
            cached = self._known_on_disk(shard)
            if cached is None:
                with self._nothing_idle(), self._exclusive(shard.sha256):
                    cached = self._verified_on_disk(shard) or self._fetch(url, shard)
        except OSError as error:
            raise EnvironmentFault(
                f"the cache {self._folder} cannot be used for {url}: {error.strerror or error}",
                "set data.cache to a folder that this user may write to, on a disk that works",
            ) from error
        self._failing_since.pop(shard.sha256, None)
        self._touch(shard)
        return cached

    def close_idle(self) -> None:
        """Close the files that are kept open for the next reader. Call this regularly where reading may pause."""
        with self._lock, suppress(KeyError):
            while True:
                self._idle.popitem()[1].release()  # one by one: a reader may take one at the same moment

    def close(self) -> None:
        """Close the kept files, and keep none from now on. Downloads that wait raise EnvironmentFault."""
        with self._lock:
            self._closed.set()
        self.close_idle()

    def _kept(self, shard: Shard) -> CachedShard | None:
        cached = self._idle.pop(shard.sha256, None)
        return cached if cached is not None and self._is_known(cached) else None

    def _known_on_disk(self, shard: Shard) -> CachedShard | None:
        cached = self._on_disk(shard)
        return cached if cached is not None and self._is_known(cached) else None

    def _touch(self, shard: Shard) -> None:
        """Record that a shard is used now. Eviction goes by this time."""
        with suppress(FileNotFoundError):  # somebody has emptied the folder
            os.utime(self._lock_file(shard.sha256), ns=(time.time_ns(),) * 2, follow_symlinks=False)

    def _is_known(self, cached: CachedShard) -> bool:
        """Return whether the file was verified and has not been written to since."""
        return cached.identity == self._verified.get(cached.sha256)

    def _on_disk(self, shard: Shard) -> CachedShard | None:
        try:
            return self._opened(f"{self._folder}/{shard.sha256}", shard)
        except FileNotFoundError:
            return None

    def _opened(self, path: str | Path, shard: Shard) -> CachedShard:
        return CachedShard(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), shard.sha256, self._keep)

    def _keep(self, cached: CachedShard) -> None:
        with self._lock:
            if self._waiting or self._closed.is_set() or cached.sha256 in self._idle:
                cached.release()
                return
            self._idle[cached.sha256] = cached
            if len(self._idle) > _KEPT:
                self._idle.pop(next(iter(self._idle))).release()

    @contextmanager
    def _nothing_idle(self) -> Iterator[None]:
        """Close the kept files, and keep none open inside this context."""
        with self._lock:
            self._waiting += 1
        self.close_idle()
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1

    def _verified_on_disk(self, shard: Shard) -> CachedShard | None:
        """Return the shard from disk, or None. Delete a damaged file.

        Each process hashes a file once, and again whenever the file has changed.
        """
        cached = self._on_disk(shard)
        if cached is not None and not self._verify(cached):
            (self._folder / shard.sha256).unlink(missing_ok=True)
            return None
        return cached

    def _verify(self, cached: CachedShard) -> bool:
        """Return whether the file has the expected SHA-256."""
        if not self._is_known(cached):
            identity = cached.identity
            if not cached.is_intact():
                return False
            self._verified[cached.sha256] = identity
        return True

    def _fetch(self, url: str, shard: Shard) -> CachedShard:
        """Download the shard, and repeat attempts that fail. Raises CorruptError, EnvironmentFault."""
        if shard.size > self._bytes:
            raise self._no_room(url, shard)
        attempt = tries = 0
        while True:
            if self._closed.is_set():
                raise EnvironmentFault(f"{url} was not downloaded: the cache is closed")
            try:
                return self._fetch_once(url, shard)
            except (CorruptError, LastingFault) as error:
                tries += 1
                if tries == _TRIES:
                    raise type(error)(f"{error.message}; tried {_TRIES} times", error.remedy) from error
            except EnvironmentFault as fault:
                self._check_patience(url, shard, fault)
            # Jitter, so that the ranks of a cluster do not all return to a recovering storage at once.
            jitter = random.uniform(0.5, 1.0)  # noqa: S311 - it is no secret
            self._closed.wait(min(0.2 * 2.0**attempt, _LONGEST_PAUSE_S) * jitter)
            attempt += 1

    def _fetch_once(self, url: str, shard: Shard) -> CachedShard:
        """Download and verify the shard in one attempt. Raises CorruptError, EnvironmentFault."""
        # The size in the name reserves the room before the bytes arrive.
        part = self._folder / f"{shard.sha256}.{shard.size}.part"
        part.unlink(missing_ok=True)  # this thread holds the lock, so the process that began the file is dead
        try:
            self._reserve(part, url, shard)
            try:
                files.download(url, part, attempts=1, most=shard.size)
            except FileNotFoundError:
                raise CorruptError(
                    f"{url} is missing, though its manifest names it", "pack the collection again"
                ) from None
            cached = self._opened(part, shard)
            if not self._verify(cached):
                raise CorruptError(
                    f"{url} differs from its manifest ({part.stat().st_size} bytes, {shard.size} expected; "
                    f"SHA-256 {shard.sha256[:16]}… expected)",
                    "check the collection with `sagan verify`, and pack it again where it is damaged",
                )
            with self._exclusive("room"):  # without it, a listing of the folder may contain neither name
                part.replace(self._folder / shard.sha256)
            self._verified[shard.sha256] = cached.identity  # renaming is a change of status
            return cached
        finally:
            part.unlink(missing_ok=True)

    def _check_patience(self, url: str, shard: Shard, fault: EnvironmentFault) -> None:
        """Raise `fault` where the patience has ended; otherwise report the wait from time to time.

        The wait begins with the first failure in any thread. After prefetching has given up on a shard, the batch that
        needs the shard does not wait for the whole patience again.
        """
        now = time.monotonic()
        with self._lock:
            waited = now - self._failing_since.setdefault(shard.sha256, now)
            note_is_due = waited > _UNNOTED_S and now - self._last_note_s >= _NOTE_EVERY_S
            if note_is_due:
                self._last_note_s = now
        if waited >= self._patience_s:
            raise EnvironmentFault(
                f"{fault.message}; gave up on {url} after {waited:.0f} s",
                f"{fault.remedy}; a larger data.patience_s waits longer",
            ) from fault
        if note_is_due:
            self._note(f"still waiting for {url} after {waited:.0f} s; trying again: {fault.message}")

    def _reserve(self, part: Path, url: str, shard: Shard) -> None:
        """Evict the shards that were used longest ago until `shard` fits into the bound and onto the disk.

        Creates `part`, whose name reserves the room. Raises EnvironmentFault where nothing is left to evict.
        """
        with self._exclusive("room"):
            missing = shard.size - self._room()
            oldest = iter(self._by_age())
            while missing > 0:
                if (path := next(oldest, None)) is None:
                    raise self._no_room(url, shard)
                missing -= self._evict(path)
            part.touch(mode=0o600)
            self._touch(shard)

    def _room(self) -> int:
        """Return how many bytes another shard may take, within the bound and on the disk.

        The missing bytes of downloads in progress count as taken.
        """
        taken = arriving = 0
        for path in self._entries():
            size = _size(path)
            taken += size
            with suppress(FileNotFoundError):  # another process has ended this download
                arriving += size - path.stat().st_size
        return min(self._bytes - taken, shutil.disk_usage(self._folder).free - arriving)

    def _by_age(self) -> list[Path]:
        """Return the entries, least recently used first."""
        ages = []
        for path in self._entries():
            try:
                used_ns = self._lock_file(_sha256(path)).lstat().st_mtime_ns
            except FileNotFoundError:  # somebody has deleted it
                used_ns = 0
            ages.append((used_ns, path))
        return [path for _, path in sorted(ages)]

    def _entries(self) -> list[Path]:
        """Return the files of shards and of downloads. Other files of the folder are not the cache's."""
        with os.scandir(self._folder) as found:
            return [
                Path(entry.path)
                for entry in found
                if _ENTRY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
            ]

    def _evict(self, path: Path) -> int:
        """Delete a shard, or the file of a killed download. Return the number of freed bytes.

        A download in progress is not deleted, and the function returns 0.
        """
        size = _size(path)
        if path.suffix != ".part":
            path.unlink(missing_ok=True)
            return size
        with self._opened_lock(_sha256(path)) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return 0
            path.unlink(missing_ok=True)
            return size

    def _no_room(self, url: str, shard: Shard) -> EnvironmentFault:
        free = shutil.disk_usage(self._folder).free
        return EnvironmentFault(
            f"the cache {self._folder} has no room for {url} of {shard.size / 1e6:,.1f} MB: "
            f"its limit is {self._bytes / 1e9:g} GB, and its disk has {free / 1e9:,.3f} GB left",
            "raise data.cache_gb, free space on that disk, set data.cache to a folder on another disk, or pack smaller "
            "shards",
        )

    @contextmanager
    def _exclusive(self, name: str) -> Iterator[None]:
        """Hold the lock `name`. One thread of one process of this node holds it at a time.

        Lock files are never deleted. After a deletion two processes could hold locks of the same name.
        """
        self._require_private_folder()
        with self._opened_lock(name) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _lock_file(self, name: str) -> Path:
        return self._folder / f"{name}.lock"

    @contextmanager
    def _opened_lock(self, name: str) -> Iterator[int]:
        """Open a lock file. A link is not followed, and nothing is written to the file."""
        fd = os.open(self._lock_file(name), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            yield fd
        finally:
            os.close(fd)

    def _require_private_folder(self) -> None:
        """Create the folder where it does not exist. Raises LastingFault where other users can write to it."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self._folder.stat()
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise LastingFault(
                f"other users can write to the cache {self._folder}, so they could replace the images in it "
                f"(owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o})",
                f"run `chmod go-w {shlex.quote(str(self._folder))}`, or set data.cache to a folder of your own",
            )


def _sha256(path: Path) -> str:
    """Return the SHA-256 in the name of an entry."""
    return path.name.partition(".")[0]


def _size(path: Path) -> int:
    """Return the size of a shard in bytes. For a download in progress, this is its final size."""
    if path.suffix == ".part":
        return int(path.suffixes[-2].removeprefix("."))
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process found it damaged and deleted it
        return 0
