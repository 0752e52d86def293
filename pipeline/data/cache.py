"""Shards on the node's disk: verified, shared by the node's processes, bounded.

A shard's file is named by its SHA-256. It is fetched to a temporary name, hashed and only then renamed, under a lock
that makes the processes of a node fetch it once; the kernel lets go of the locks of a process that dies. Who needs room
deletes what was used longest ago; whoever has that open reads on, and lets go of it when next it fetches.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.data.index import Shard
from pipeline.errors import CorruptError, EnvironmentFault
from pipeline.storage import files

_OPEN = 128  # shards that a process keeps open: those of all lanes' windows, with some to spare
_FETCHES = 3  # times that a shard is fetched whose bytes come out wrong


class CachedShard:
    """An open, verified shard; `read` works from any thread, also after the file has been evicted."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __del__(self) -> None:  # when the last batch that reads from it is done
        os.close(self._fd)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def sha256(self) -> str:
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()

    def touch(self) -> None:
        """Note that it is being used, for whoever looks for what to evict."""
        with suppress(PermissionError):  # another user's file
            os.utime(self._fd, ns=(time.time_ns(), os.fstat(self._fd).st_mtime_ns))

    @property
    def identity(self) -> tuple[int, int, int, int]:
        """Changes when somebody writes to the file or puts another in its place."""
        stat = os.fstat(self._fd)
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

    @property
    def evicted(self) -> bool:
        return os.fstat(self._fd).st_nlink == 0


class ShardCache:
    """Shards under `folder`, at most `gigabytes` of them.

    A fetch that fails is tried again, with growing pauses, for `patience_s`. Several processes and threads may use the
    same folder.
    """

    def __init__(self, folder: str, gigabytes: float, patience_s: float = 120.0) -> None:
        self._folder = Path(folder).expanduser()
        self._bytes = int(gigabytes * 1e9)
        self._patience_s = patience_s
        self._open: OrderedDict[str, CachedShard] = OrderedDict()
        self._verified: dict[str, tuple[int, ...]] = {}  # SHA-256 → identity of the file that had it
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def open(self, url: str, shard: Shard) -> CachedShard:
        """The shard at `url`, from disk or fetched.

        Raises CorruptError where its bytes are not the manifest's however often they are fetched, or it is gone;
        EnvironmentFault where the storage cannot be reached for too long, or the bound leaves no room.
        """
        if (cached := self._held(shard.sha256)) is not None:
            return cached
        with self._exclusive(shard.sha256):
            cached = self._held(shard.sha256) or self._from_disk(shard) or self._fetched(url, shard)
        with self._lock:
            self._open[shard.sha256] = cached
            while len(self._open) > _OPEN:
                self._open.popitem(last=False)
        return cached

    def close(self) -> None:
        """Let go of all shards and end waiting fetches, with EnvironmentFault."""
        self._closed.set()
        with self._lock:
            self._open.clear()

    def _held(self, sha256: str) -> CachedShard | None:
        with self._lock:
            cached = self._open.get(sha256)
            if cached is None or cached.identity != self._verified[sha256]:
                return None
            self._open.move_to_end(sha256)
            cached.touch()
            return cached

    def _from_disk(self, shard: Shard) -> CachedShard | None:
        """The shard where the disk has it; hashed once per process, and again whenever the file has been touched."""
        path = self._folder / shard.sha256
        try:
            cached = CachedShard(os.open(path, os.O_RDONLY))
        except FileNotFoundError:
            return None
        if not self._is_right(cached, shard):
            path.unlink(missing_ok=True)
            return None
        cached.touch()
        return cached

    def _is_right(self, cached: CachedShard, shard: Shard) -> bool:
        identity = cached.identity
        if self._verified.get(shard.sha256) != identity:
            if cached.sha256() != shard.sha256:
                return False
            self._verified[shard.sha256] = identity
        return True

    def _fetched(self, url: str, shard: Shard) -> CachedShard:
        if shard.size > self._bytes:
            raise self._no_room(shard)
        deadline = time.monotonic() + self._patience_s
        # The size in the name reserves the room before the bytes are there.
        part = self._folder / f"{shard.sha256}.{shard.size}.part"
        wrong = attempt = 0
        while True:
            if self._closed.is_set():
                raise EnvironmentFault(f"{url} was not fetched: the cache has been closed")
            try:
                self._reserve(part, shard)
                files.download(url, part)
                cached = CachedShard(os.open(part, os.O_RDONLY))
                if self._is_right(cached, shard):
                    part.replace(self._folder / shard.sha256)
                    return cached
                wrong += 1
                if wrong == _FETCHES:
                    raise CorruptError(
                        f"{url} differs from its manifest ({part.stat().st_size} bytes, {shard.size} expected; "
                        f"SHA-256 {shard.sha256[:16]}… expected), fetched {wrong} times",
                        "sagan verify the collection, and pack it again where it is damaged",
                    )
            except FileNotFoundError:
                raise CorruptError(f"{url} is missing, though its manifest names it", "pack it again") from None
            except EnvironmentFault as fault:
                if time.monotonic() >= deadline:
                    raise EnvironmentFault(f"{fault.message}, for {self._patience_s:.0f} s", fault.remedy) from fault
            finally:
                part.unlink(missing_ok=True)
            self._closed.wait(min(2.0**attempt, 10.0) * random.uniform(0.1, 0.3))
            attempt += 1

    def _reserve(self, part: Path, shard: Shard) -> None:
        """Evict what was used longest ago until `shard` fits.

        Raises EnvironmentFault where other fetches leave no room.
        """
        with self._exclusive("room"):
            oldest = iter(self._by_age())
            while self._taken() + shard.size > self._bytes:
                if (path := next(oldest, None)) is None:
                    raise self._no_room(shard)
                _evict(path)
            part.touch()
        with self._lock:
            for sha256 in [sha256 for sha256, cached in self._open.items() if cached.evicted]:
                del self._open[sha256]

    def _taken(self) -> int:
        return sum(_size(path) for path in self._entries())

    def _by_age(self) -> list[Path]:
        """Entries, those first that were used longest ago."""
        ages = []
        for path in self._entries():
            with suppress(FileNotFoundError):  # another process is done with a .part
                ages.append((path.stat().st_atime_ns, path))
        return [path for _, path in sorted(ages)]

    def _entries(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if path.suffix != ".lock"]

    def _no_room(self, shard: Shard) -> EnvironmentFault:
        return EnvironmentFault(
            f"the cache {self._folder} is bound to {self._bytes / 1e9:g} GB, "
            f"which leaves no room for a shard of {shard.size / 1e6:,.1f} MB",
            "raise data.cache_gb, or pack smaller shards",
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


def _evict(path: Path) -> None:
    """Delete a shard, or what a killed fetch left, but nothing that is being fetched."""
    if path.suffix != ".part":
        path.unlink(missing_ok=True)
        return
    with path.with_name(f"{path.name.partition('.')[0]}.lock").open("w") as lock, suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
