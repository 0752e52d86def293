"""The cache against a real origin over HTTP that counts, lies, stalls or is down."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import multiprocessing
import os
import re
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from pipeline.collection.manifest import Shard
from pipeline.errors import CorruptError, EnvironmentFault
from pipeline.streaming.shard_cache import ShardCache

SIZE = 100_000


def contents(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZE)


def shard(number: int) -> Shard:
    return Shard(f"{number}.tar", SIZE, hashlib.sha256(contents(number)).hexdigest(), 1, "train")


def send(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


class Origin:
    """Serves `contents(n)` at /n.tar, counts, and answers otherwise where told to: (handler, attempt, right bytes)."""

    def __init__(self) -> None:
        self.fetches: list[str] = []
        self.answer: Callable[[BaseHTTPRequestHandler, int, bytes], None] = lambda handler, _, data: send(handler, data)
        origin = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                origin.fetches.append(self.path)
                origin.answer(self, len(origin.fetches), contents(int(self.path[1:].removesuffix(".tar"))))

            def log_message(self, *_: object) -> None:
                """Silent."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def of(self, number: int) -> str:
        return f"{self.url}/{number}.tar"


@pytest.fixture
def origin() -> Iterator[Origin]:
    origin = Origin()
    thread = threading.Thread(target=origin.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield origin
    origin.server.shutdown()
    thread.join()
    origin.server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def cache(folder: Path, shards: float = 1000, patience_s: float = 20.0) -> ShardCache:
    """With room for so many shards."""
    return ShardCache(str(folder), shards * SIZE / 1e9, patience_s)


def cached(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def read(folder: Path, url: str, number: int) -> bytes:
    """In a new cache object, as a new process would have it."""
    mine = cache(folder)
    try:
        return mine.open(url, shard(number)).read(0, SIZE)
    finally:
        mine.close()


def test_a_shard_is_fetched_once_and_then_read_from_disk(origin: Origin, folder: Path) -> None:
    first = cache(folder)
    opened = first.open(origin.of(1), shard(1))
    assert opened.read(0, SIZE) == contents(1)
    assert opened.read(700, 30) == contents(1)[700:730]
    assert first.open(origin.of(1), shard(1)).read(0, SIZE) == contents(1)
    assert read(folder, origin.of(1), 1) == contents(1)
    assert origin.fetches == ["/1.tar"]
    assert cached(folder) == {shard(1).sha256}


def _open_together(barrier: threading.Barrier, results: multiprocessing.Queue[bytes], folder: Path, url: str) -> None:
    barrier.wait()
    results.put(read(folder, url, 1))


def test_the_processes_of_a_node_fetch_a_shard_once(origin: Origin, folder: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(3), spawn.Queue()
    processes = [spawn.Process(target=_open_together, args=(barrier, results, folder, origin.of(1))) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [contents(1)] * 3
    for process in processes:
        process.join()
    assert origin.fetches == ["/1.tar"]


def test_the_threads_of_a_process_fetch_a_shard_once(origin: Origin, folder: Path) -> None:
    mine = cache(folder)
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda _: mine.open(origin.of(1), shard(1)), range(8)))
    assert all(shard.read(0, SIZE) == contents(1) for shard in opened)
    assert origin.fetches == ["/1.tar"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "empty"])
def test_a_damaged_file_is_never_used(origin: Origin, folder: Path, damage: str) -> None:
    read(folder, origin.of(1), 1)
    path, data = folder / shard(1).sha256, bytearray(contents(1))
    data[SIZE // 2] ^= damage == "flip"
    damaged = {"flip": data, "truncate": data[:-1], "extend": data + b"x", "empty": bytearray()}
    path.write_bytes(damaged[damage])
    assert read(folder, origin.of(1), 1) == contents(1)
    assert len(origin.fetches) == 2


def test_a_file_that_changes_after_it_was_verified_is_verified_again(origin: Origin, folder: Path) -> None:
    mine = cache(folder)
    mine.open(origin.of(1), shard(1))
    (folder / shard(1).sha256).write_bytes(bytes(SIZE))
    os.utime(folder / shard(1).sha256, ns=(0, 1))  # the clock of a file system may stand still between two writes
    assert mine.open(origin.of(1), shard(1)).read(0, SIZE) == contents(1)


def open_files(folder: Path) -> list[str]:
    """Names of the files below `folder` that this process has open, evicted ones too."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(link.readlink()))
    return [Path(path).name for path in found if path.startswith(str(folder)) and not path.endswith(".lock")]


def test_a_file_stays_open_for_the_next_reader_but_not_while_another_shard_is_waited_for(
    origin: Origin, folder: Path
) -> None:
    mine = cache(folder)
    mine.open(origin.of(1), shard(1)).close()
    assert open_files(folder) == [shard(1).sha256]
    mine.open(origin.of(1), shard(1)).close()
    assert open_files(folder) == [shard(1).sha256]
    during: list[list[str]] = []

    def look(handler: BaseHTTPRequestHandler, attempt: int, data: bytes) -> None:
        during.append(open_files(folder))
        send(handler, data)

    origin.answer = look
    mine.open(origin.of(2), shard(2)).close()
    assert len(during) == 1
    assert shard(1).sha256 not in during[0]
    mine.close_idle()
    assert open_files(folder) == []


def test_an_open_file_that_changes_is_verified_again(origin: Origin, folder: Path) -> None:
    mine = cache(folder)
    mine.open(origin.of(1), shard(1)).close()
    (folder / shard(1).sha256).write_bytes(bytes(SIZE))
    os.utime(folder / shard(1).sha256, ns=(0, 1))  # the clock of a file system may stand still between two writes
    assert mine.open(origin.of(1), shard(1)).read(0, SIZE) == contents(1)
    assert origin.fetches == ["/1.tar"] * 2


def test_a_byte_that_changes_is_noticed_though_the_time_is_put_back(origin: Origin, folder: Path) -> None:
    mine = cache(folder)
    mine.open(origin.of(1), shard(1)).close()
    path = folder / shard(1).sha256
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert mine.open(origin.of(1), shard(1)).read(0, SIZE) == contents(1)


def test_a_file_is_hashed_once_though_other_processes_use_it(origin: Origin, folder: Path) -> None:
    """Using a file must not look like a change of it: hashing costs as much as reading the whole shard."""
    mine = cache(folder)
    first = mine.open(origin.of(1), shard(1))
    identity = first.identity
    read(folder, origin.of(1), 1)
    assert mine.open(origin.of(1), shard(1)).identity == identity


def test_the_folder_and_its_files_are_for_the_user_alone(origin: Origin, folder: Path) -> None:
    read(folder, origin.of(1), 1)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    locks = [path for path in folder.iterdir() if path.suffix == ".lock"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in locks} == {0o600}


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o702])
def test_a_folder_that_others_can_write_to_is_refused(origin: Origin, folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(EnvironmentFault, match=f"other users can write to the cache {folder}") as caught:
        cache(folder).open(origin.of(1), shard(1))
    assert f"chmod go-w {folder}" in caught.value.remedy
    assert list(folder.iterdir()) == []
    folder.chmod(mode & ~0o022)
    assert read(folder, origin.of(1), 1) == contents(1)


@pytest.mark.parametrize("name", [shard(1).sha256, "room"])
def test_a_lock_file_that_is_a_link_is_not_followed(origin: Origin, folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "document").write_text("mine")
    folder.mkdir(mode=0o700)
    (folder / f"{name}.lock").symlink_to(tmp_path / "document")
    with pytest.raises(EnvironmentFault, match="cannot be used"):
        cache(folder).open(origin.of(1), shard(1))
    assert (tmp_path / "document").read_text() == "mine"


def test_an_object_larger_than_its_entry_is_not_fetched_to_its_end(origin: Origin, folder: Path) -> None:
    """The manifest says 0.1 MB; the server goes on until the client hangs up."""
    sent: list[int] = []

    def endless(handler: BaseHTTPRequestHandler, attempt: int, data: bytes) -> None:
        handler.send_response(200)
        handler.end_headers()  # no Content-Length
        sent.append(0)
        with contextlib.suppress(OSError):
            while sent[-1] < 2**32:
                handler.wfile.write(data)
                sent[-1] += len(data)

    origin.answer = endless
    with pytest.raises(CorruptError, match=rf"{origin.of(1)} .*more than {SIZE:,} bytes.*tried 3 times"):
        read(folder, origin.of(1), 1)
    assert max(sent) < 2**26
    assert cached(folder) == set()


def test_an_object_whose_server_announces_too_much_is_not_fetched(origin: Origin, folder: Path) -> None:
    origin.answer = lambda handler, attempt, data: send(handler, data * 2)
    with pytest.raises(CorruptError, match=f"more than {SIZE:,} bytes"):
        read(folder, origin.of(1), 1)
    assert cached(folder) == set()


def test_the_number_of_open_files_is_bounded(origin: Origin, folder: Path) -> None:
    mine = cache(folder)
    for _ in range(2):  # the first time each is waited for, and nothing is kept
        for number in range(200):
            mine.open(origin.of(number), shard(number)).close()
    assert 0 < len(open_files(folder)) <= 128


def test_wrong_bytes_are_fetched_again(origin: Origin, folder: Path) -> None:
    origin.answer = lambda handler, attempt, data: send(handler, data[::-1] if attempt == 1 else data)
    assert read(folder, origin.of(1), 1) == contents(1)
    assert len(origin.fetches) == 2


@pytest.mark.parametrize("wrong", [contents(2), contents(1)[:-1], b""])
def test_an_object_with_lasting_wrong_bytes_is_named(origin: Origin, folder: Path, wrong: bytes) -> None:
    origin.answer = lambda handler, attempt, data: send(handler, wrong)
    with pytest.raises(CorruptError, match=rf"{origin.of(1)} differs from its manifest.*tried 3 times"):
        read(folder, origin.of(1), 1)
    assert cached(folder) == set()


def test_a_missing_object_is_an_error(origin: Origin, folder: Path) -> None:
    origin.answer = lambda handler, attempt, data: handler.send_error(404)
    with pytest.raises(CorruptError, match=f"{origin.of(1)} is missing.*tried 3 times"):
        read(folder, origin.of(1), 1)
    assert len(origin.fetches) == 3


def test_a_short_outage_of_the_storage_is_waited_for(origin: Origin, folder: Path) -> None:
    origin.answer = lambda handler, attempt, data: handler.send_error(503) if attempt < 4 else send(handler, data)
    assert read(folder, origin.of(1), 1) == contents(1)
    assert len(origin.fetches) == 4


def test_a_lasting_outage_of_the_storage_is_named(origin: Origin, folder: Path) -> None:
    origin.answer = lambda handler, attempt, data: handler.send_error(503)
    impatient = cache(folder, patience_s=0.3)
    with pytest.raises(
        EnvironmentFault, match=rf"{origin.of(1)}.*503.*gave up on {origin.of(1)} after \d+ s"
    ) as caught:
        impatient.open(origin.of(1), shard(1))
    assert "data.patience_s" in caught.value.remedy
    assert cached(folder) == set()

    tried = len(origin.fetches)
    with pytest.raises(EnvironmentFault):
        impatient.open(origin.of(1), shard(1))
    assert len(origin.fetches) == tried + 1, "who comes later does not wait for it all over again"


def test_waiting_is_reported_rarely(origin: Origin, folder: Path) -> None:
    notes: list[str] = []
    noted = threading.Event()

    def note(message: str) -> None:
        notes.append(message)
        noted.set()

    def answer(handler: BaseHTTPRequestHandler, attempt: int, data: bytes) -> None:
        if noted.is_set():
            send(handler, data)
        else:
            handler.send_error(503)

    origin.answer = answer
    waiting = ShardCache(str(folder), 1.0, 60.0, note)
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda number: waiting.open(origin.of(number), shard(number)), range(4)))
    assert [shard.read(0, SIZE) for shard in opened] == [contents(number) for number in range(4)]
    (message,) = notes
    assert re.search(rf"still waiting for {origin.url}/\d\.tar after \d+ s; trying again: .*503", message)


def test_a_folder_that_cannot_be_used_is_named(origin: Origin, folder: Path) -> None:
    folder.write_bytes(b"a file where the folder should be")
    with pytest.raises(EnvironmentFault, match=f"the cache {folder} cannot be used for {origin.of(1)}") as caught:
        cache(folder).open(origin.of(1), shard(1))
    assert "data.cache" in caught.value.remedy


def test_closing_ends_a_fetch_that_waits(origin: Origin, folder: Path) -> None:
    asked = threading.Event()

    def refuse(handler: BaseHTTPRequestHandler, attempt: int, data: bytes) -> None:
        handler.send_error(503)
        asked.set()

    origin.answer = refuse
    mine = cache(folder, patience_s=3600)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(mine.open, origin.of(1), shard(1))
        assert asked.wait(60)
        mine.close()
        with pytest.raises(EnvironmentFault, match="closed"):
            opening.result(timeout=60)


def test_the_file_of_a_killed_fetch_is_cleaned_up(origin: Origin, folder: Path) -> None:
    halfway = threading.Event()

    def stall(handler: BaseHTTPRequestHandler, attempt: int, data: bytes) -> None:
        if attempt > 1:
            send(handler, data)
            return
        handler.send_response(200)
        handler.send_header("Content-Length", str(SIZE))
        handler.end_headers()
        handler.wfile.write(data[: SIZE // 2])
        halfway.set()
        handler.rfile.read()  # until the client is gone

    origin.answer = stall
    process = multiprocessing.get_context("spawn").Process(target=read, args=(folder, origin.of(1), 1))
    process.start()
    assert halfway.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert [name for name in cached(folder) if name.endswith(".part")], "the test must leave something to clean"

    tight = cache(folder, shards=1.5)
    assert tight.open(origin.of(2), shard(2)).read(0, SIZE) == contents(2), "a dead fetch takes no room"
    assert read(folder, origin.of(1), 1) == contents(1)
    assert not [name for name in cached(folder) if name.endswith(".part")]


def files_open_in(folder: Path) -> list[Path]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # other threads of this process close theirs meanwhile
            found.append(link.readlink())
    return [target for target in found if target.parent == folder]


class TestBound:
    def test_the_least_recently_used_shards_are_evicted_first(self, origin: Origin, folder: Path) -> None:
        mine = cache(folder, shards=3)
        for number in (1, 2, 3, 1):
            mine.open(origin.of(number), shard(number))
        mine.open(origin.of(4), shard(4))
        assert cached(folder) == {shard(number).sha256 for number in (1, 3, 4)}
        mine.open(origin.of(5), shard(5))
        assert cached(folder) == {shard(number).sha256 for number in (1, 4, 5)}

    def test_concurrent_fetches_respect_the_bound(self, origin: Origin, folder: Path) -> None:
        most = 0

        def measure(handler: BaseHTTPRequestHandler, attempt: int, data: bytes) -> None:
            nonlocal most
            with (folder / "room.lock").open("w") as lock:  # or a listing sees what goes and what comes in its place
                fcntl.flock(lock, fcntl.LOCK_EX)
                most = max(most, len({name.partition(".")[0] for name in cached(folder)}))
            send(handler, data)

        origin.answer = measure
        mine = cache(folder, shards=4)
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(lambda i: mine.open(origin.of(i % 8), shard(i % 8)).read(0, SIZE), range(64)))
        assert read == [contents(i % 8) for i in range(64)]
        assert most == 4

    def test_eviction_respects_other_processes_and_does_not_disturb_readers(self, origin: Origin, folder: Path) -> None:
        theirs, mine = cache(folder, shards=2), cache(folder, shards=2)
        used = theirs.open(origin.of(1), shard(1))
        mine.open(origin.of(2), shard(2))
        theirs.open(origin.of(1), shard(1))
        mine.open(origin.of(3), shard(3))
        assert cached(folder) == {shard(1).sha256, shard(3).sha256}
        mine.open(origin.of(4), shard(4))
        assert shard(1).sha256 not in cached(folder)
        assert used.read(0, SIZE) == contents(1)
        assert theirs.open(origin.of(1), shard(1)).read(0, SIZE) == contents(1)
        assert len(origin.fetches) == 5

    def test_an_unread_file_is_not_kept_open(self, origin: Origin, folder: Path) -> None:
        """Else the bytes of an evicted file would stay on the disk, and nobody would count them."""
        mine = cache(folder, shards=3)
        reading = mine.open(origin.of(0), shard(0))
        mine.open(origin.of(1), shard(1))
        assert files_open_in(folder) == [folder / shard(0).sha256]
        del reading
        assert files_open_in(folder) == []

    def test_a_file_given_back_is_closed_while_the_cache_waits_for_another(self, origin: Origin, folder: Path) -> None:
        """Variables of a waiting thread still refer to it, so that counting references would not close it."""
        mine = cache(folder, shards=1)
        given_back = mine.open(origin.of(0), shard(0))
        given_back.close()
        assert files_open_in(folder) == [folder / shard(0).sha256], "it is kept for the next reader"
        _later = mine.open(origin.of(1), shard(1))
        assert [path.name for path in files_open_in(folder)] == [shard(1).sha256]

    def test_a_closed_cache_keeps_no_file_that_is_given_back_later(self, origin: Origin, folder: Path) -> None:
        """Reading threads end after the cache is closed. Their files would take room until Python collects garbage."""
        mine = cache(folder)
        read_meanwhile = mine.open(origin.of(0), shard(0))
        mine.close()
        read_meanwhile.close()
        assert files_open_in(folder) == []

    def test_of_two_open_files_of_a_shard_one_is_kept(self, origin: Origin, folder: Path) -> None:
        mine = cache(folder)
        first, second = mine.open(origin.of(0), shard(0)), mine.open(origin.of(0), shard(0))
        first.close()
        second.close()
        assert files_open_in(folder) == [folder / shard(0).sha256]
        assert mine.open(origin.of(0), shard(0)).read(0, SIZE) == contents(0)

    def test_foreign_files_are_neither_counted_nor_deleted(self, origin: Origin, folder: Path) -> None:
        digest = shard(9).sha256
        names = [
            "thesis.odt",
            "x.part",
            f"{digest}.part",
            f"{digest}.x.part",
            f"{digest}.-1.part",
            f"{digest}x",
            "a.1.part",
        ]
        folder.mkdir(mode=0o700)
        for name in names:
            (folder / name).write_bytes(bytes(5 * SIZE))
            os.utime(folder / name, ns=(0, 0))
        (folder / "pictures").mkdir()
        (folder / "pictures" / "one.jpg").write_bytes(b"x")
        mine = cache(folder, shards=2)
        for number in range(5):
            assert mine.open(origin.of(number), shard(number)).read(0, SIZE) == contents(number)
        assert cached(folder) == {*names, "pictures", shard(3).sha256, shard(4).sha256}
        assert (folder / "pictures" / "one.jpg").exists()

    def test_a_shard_beyond_the_bound_is_refused_at_once(self, origin: Origin, folder: Path) -> None:
        with pytest.raises(EnvironmentFault, match="no room"):
            cache(folder, shards=0.5, patience_s=3600).open(origin.of(1), shard(1))
        assert origin.fetches == []
