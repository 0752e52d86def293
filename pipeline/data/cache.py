"""Shards on the node's disk: verified, shared by the node's processes, bounded.

A shard's file is named by its SHA-256. It is fetched to a temporary name, hashed and only then renamed, under a lock
that makes the processes of a node fetch it once; the kernel lets go of the locks of a process that dies. Who needs room
deletes what was used longest ago; whoever is reading that reads on. A full disk gets no room back from a file that
somebody has open: so nobody keeps one open while waiting for another, nor for long without reading it.

What fails is tried again: storage that is down or silent for as long as the patience lasts, wrong bytes and refusals a
few times. Here alone, so that no layer below multiplies the waiting.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.data.index import Shard
from pipeline.errors import CorruptError, EnvironmentFault, LastingFault
from pipeline.storage import files

_TRIES = 3  # of what should not get better by trying again: wrong bytes, a missing object, no access
_LONGEST_PAUSE_S = 5.0
_KEPT = 128  # open files that nobody is reading, at most
_UNNOTED_S, _NOTE_EVERY_S = 1.0, 10.0  # seconds of waiting that go without saying; and between two notes


class CachedShard:
    """An open, verified shard, for one thread until `close`; `read` works also after the file has been evicted."""

    def __init__(self, fd: int, sha256: str, keep: Callable[[CachedShard], None]) -> None:
        self._fd, self.sha256, self._keep = fd, sha256, keep

    def close(self) -> None:
        """Done with it: the cache may give it to another."""
        self._keep(self)

    def __del__(self) -> None:
        os.close(self._fd)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def has_its_bytes(self) -> bool:
        """Read all of it, and compare with its name."""
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256

    def touch(self, identity: tuple[int, ...]) -> None:
        """Note that it is being used, for whoever looks for what to evict."""
        with suppress(PermissionError):  # another user's file
            os.utime(self._fd, ns=(time.time_ns(), identity[-1]))

    @property
    def identity(self) -> tuple[int, ...]:
        """Changes when somebody writes to the file or puts another in its place; ends with the time of writing."""
        stat = os.fstat(self._fd)
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class ShardCache:
    """Shards under `folder`, at most `gigabytes` of them.

    A fetch that fails is tried again, with growing pauses, for `patience_s`; `note` is told what is waited for. Several
    processes and threads may use the same folder.
    """

    def __init__(
        self, folder: str, gigabytes: float, patience_s: float = 300.0, note: Callable[[str], None] = print
    ) -> None:
        self._folder = Path(folder).expanduser()
        self._bytes = int(gigabytes * 1e9)
        self._patience_s, self._note = patience_s, note
        self._noted = -math.inf
        self._failing_since: dict[str, float] = {}  # SHA-256 of a shard that does not come → when that began
        self._verified: dict[str, tuple[int, ...]] = {}  # SHA-256 → identity of the file that had it
        self._idle: dict[str, CachedShard] = {}  # SHA-256 → a file kept open, first the one that was read longest ago
        self._waiting = 0  # threads that wait for a shard
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def open(self, url: str, shard: Shard) -> CachedShard:
        """The shard at `url`, from disk or fetched.

        Raises CorruptError where its bytes are not the manifest's however often they are fetched, or it is gone;
        EnvironmentFault where the storage cannot be reached for too long or does not let us in, or there is no room.
        """
        # A batch opens several, and every call of the system lets other threads take the interpreter.
        if (kept := self._kept(shard)) is not None:
            return kept
        try:
            cached = self._known_on_disk(shard)
            if cached is None:
                with self._nothing_idle(), self._exclusive(shard.sha256):
                    cached = self._verified_on_disk(shard) or self._fetched(url, shard)
        except OSError as error:
            raise EnvironmentFault(
                f"the cache {self._folder} cannot be used for {url}: {error.strerror or error}",
                "data.cache must name a folder on a disk in order, which we may write to",
            ) from error
        self._failing_since.pop(shard.sha256, None)
        cached.touch(self._verified[shard.sha256])
        return cached

    def close_idle(self) -> None:
        """Close the files that are kept for the next reader. To be called now and then where reading may pause."""
        with self._lock:
            self._idle.clear()

    def close(self) -> None:
        """End waiting fetches, with EnvironmentFault."""
        self._closed.set()
        self.close_idle()

    def _kept(self, shard: Shard) -> CachedShard | None:
        cached = self._idle.pop(shard.sha256, None)
        return cached if cached is not None and self._is_known(cached) else None

    def _known_on_disk(self, shard: Shard) -> CachedShard | None:
        cached = self._on_disk(shard)
        return cached if cached is not None and self._is_known(cached) else None

    def _is_known(self, cached: CachedShard) -> bool:
        """Whether it has been verified, and nobody has written to it since."""
        return cached.identity == self._verified.get(cached.sha256)

    def _on_disk(self, shard: Shard) -> CachedShard | None:
        try:
            return self._opened(f"{self._folder}/{shard.sha256}", shard)
        except FileNotFoundError:
            return None

    def _opened(self, path: str | Path, shard: Shard) -> CachedShard:
        return CachedShard(os.open(path, os.O_RDONLY), shard.sha256, self._keep)

    def _keep(self, cached: CachedShard) -> None:
        with self._lock:
            if not self._waiting:
                self._idle[cached.sha256] = cached
                if len(self._idle) > _KEPT:
                    del self._idle[next(iter(self._idle))]

    @contextmanager
    def _nothing_idle(self) -> Iterator[None]:
        with self._lock:
            self._waiting += 1
            self._idle.clear()
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1

    def _verified_on_disk(self, shard: Shard) -> CachedShard | None:
        """The shard where the disk has it; hashed once per process, and again whenever the file has been touched."""
        cached = self._on_disk(shard)
        if cached is not None and not self._is_right(cached):
            (self._folder / shard.sha256).unlink(missing_ok=True)
            return None
        return cached

    def _is_right(self, cached: CachedShard) -> bool:
        if not self._is_known(cached):
            identity = cached.identity
            if not cached.has_its_bytes():
                return False
            self._verified[cached.sha256] = identity
        return True

    def _fetched(self, url: str, shard: Shard) -> CachedShard:
        """The shard from the storage, however often that takes."""
        if shard.size > self._bytes:
            raise self._no_room(url, shard)
        attempt = tries = 0
        while True:
            if self._closed.is_set():
                raise EnvironmentFault(f"{url} was not fetched: the cache has been closed")
            try:
                return self._fetch(url, shard)
            except (CorruptError, LastingFault) as error:
                tries += 1
                if tries == _TRIES:
                    raise type(error)(f"{error.message}; tried {_TRIES} times", error.remedy) from error
            except EnvironmentFault as fault:
                self._wait_on(url, shard, fault)
            # Jitter, so that the ranks of a cluster do not come back to a recovering storage all at once.
            self._closed.wait(min(0.2 * 2.0**attempt, _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0))
            attempt += 1

    def _fetch(self, url: str, shard: Shard) -> CachedShard:
        """Once. Raises CorruptError, EnvironmentFault."""
        # The size in the name reserves the room before the bytes are there.
        part = self._folder / f"{shard.sha256}.{shard.size}.part"
        part.unlink(missing_ok=True)  # we have its lock: who began it is dead
        try:
            self._reserve(part, url, shard)
            try:
                files.download(url, part, attempts=1)
            except FileNotFoundError:
                raise CorruptError(f"{url} is missing, though its manifest names it", "pack it again") from None
            cached = self._opened(part, shard)
            if not self._is_right(cached):
                raise CorruptError(
                    f"{url} differs from its manifest ({part.stat().st_size} bytes, {shard.size} expected; "
                    f"SHA-256 {shard.sha256[:16]}… expected)",
                    "sagan verify the collection, and pack it again where it is damaged",
                )
            with self._exclusive("room"):  # who lists the folder meanwhile may see neither name
                part.replace(self._folder / shard.sha256)
            return cached
        finally:
            part.unlink(missing_ok=True)

    def _wait_on(self, url: str, shard: Shard, fault: EnvironmentFault) -> None:
        """Say how long the shard has been waited for; raise `fault` where that is longer than the patience.

        It is counted from the first failure, whichever thread met it: what prefetching has given up is not waited for
        all over again by the batch that needs it.
        """
        now = time.monotonic()
        with self._lock:
            waited = now - self._failing_since.setdefault(shard.sha256, now)
            noted = waited > _UNNOTED_S and now - self._noted >= _NOTE_EVERY_S
            if noted:
                self._noted = now
        if waited >= self._patience_s:
            raise EnvironmentFault(
                f"{fault.message}; {url} was waited for {waited:.0f} s", f"{fault.remedy}; data.patience_s waits longer"
            ) from fault
        if noted:
            self._note(f"{url} has been waited for {waited:.0f} s: {fault.message}")

    def _reserve(self, part: Path, url: str, shard: Shard) -> None:
        """Evict what was used longest ago until `shard` fits into the bound and onto the disk.

        Raises EnvironmentFault where nothing is left to evict.
        """
        with self._exclusive("room"):
            missing = shard.size - self._room()
            oldest = iter(self._by_age())
            while missing > 0:
                if (path := next(oldest, None)) is None:
                    raise self._no_room(url, shard)
                missing -= _evict(path)
            part.touch()

    def _room(self) -> int:
        """Bytes that another shard may have: of the bound, and of what the disk has beside those on their way."""
        taken = coming = 0
        for path in self._entries():
            size = _size(path)
            taken += size
            with suppress(FileNotFoundError):  # another process is done with it
                coming += size - path.stat().st_size
        return min(self._bytes - taken, shutil.disk_usage(self._folder).free - coming)

    def _by_age(self) -> list[Path]:
        """Entries, those first that were used longest ago."""
        ages = []
        for path in self._entries():
            with suppress(FileNotFoundError):  # another process is done with a .part
                ages.append((path.stat().st_atime_ns, path))
        return [path for _, path in sorted(ages)]

    def _entries(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if path.suffix != ".lock"]

    def _no_room(self, url: str, shard: Shard) -> EnvironmentFault:
        free = shutil.disk_usage(self._folder).free
        return EnvironmentFault(
            f"the cache {self._folder} has no room for {url} of {shard.size / 1e6:,.1f} MB: "
            f"it is bound to {self._bytes / 1e9:g} GB, and its disk has {free / 1e9:,.3f} GB left",
            "raise data.cache_gb, free some space on that disk, name another one in data.cache, or pack smaller shards",
        )

    @contextmanager
    def _exclusive(self, name: str) -> Iterator[None]:
        """One thread of one process of this node at a time. Lock files stay: deleting them would split the lock."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _size(path: Path) -> int:
    """Bytes of a shard; of one being fetched, what it will have."""
    if path.suffix == ".part":
        return int(path.suffixes[-2].removeprefix("."))
    try:
        return path.stat().st_size
    except FileNotFoundError:  # found damaged and deleted by another process
        return 0


def _evict(path: Path) -> int:
    """Delete a shard, or what a killed fetch left, but nothing that is being fetched. Bytes that it had."""
    size = _size(path)
    if path.suffix != ".part":
        path.unlink(missing_ok=True)
        return size
    with path.with_name(f"{path.name.partition('.')[0]}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        path.unlink(missing_ok=True)
        return size
