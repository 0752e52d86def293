"""Every fault against the data plane, over a real collection on a real S3 server: what it promises, and what happens.

    python -m tests.faults.data [--markdown]

Two workers of one node stream an epoch through the fault proxy. Each fault is met twice. First it passes: then the
images and labels delivered are those of an undisturbed stream, bit for bit. Then it lasts: then the error names the
object (or the folder) and the cause. The fault hits the shard that the first batch needs, so that nothing is delivered
before it is over.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import track
from rich.table import Table

from infra.local.servers import S3
from pipeline.collection.manifest import Collection
from pipeline.config.schema import DataSection, PackSection
from pipeline.errors import SaganError
from pipeline.packing.pack import pack
from pipeline.streaming.order import Order
from pipeline.streaming.stream import Stream
from sagan.ranks import World
from tests.faults.storage_proxy import FaultProxy, fault_proxy

WORKERS, BATCH, SEED = 2, 96, 5
NOT_RUN = "not run: a small disk takes the right to mount one"


@dataclass(frozen=True)
class Fault:
    """What is promised while it passes, and what the error says where it lasts (a pattern; None: it cannot last)."""

    promise: str
    cause: str | None


FAULTS = {
    "refused": Fault("waits, and continues when the port is open again", "cannot be reached|broke off"),
    "reset_mid_body": Fault("fetches again", "broke off"),
    "burst_500": Fault("tries again", "answers InternalError"),
    "burst_503": Fault("tries again with growing pauses", "answers SlowDown"),
    "slow_first_byte": Fault("waits; gives up a request after 20 s of silence", "cannot be reached"),
    "slow_body": Fault("waits; gives up a transfer below 50 kB/s after 20 s", "the download is too slow"),
    "truncated_body": Fault("fetches again, decodes nothing of the damaged shard", "broke off"),
    "flipped_byte": Fault("fetches again, decodes nothing of the damaged shard", "differs from its manifest"),
    "object_replaced": Fault("fetches again, decodes nothing of the damaged shard", "differs from its manifest"),
    "object_missing": Fault("asks three times", "is missing"),
    "credentials_revoked": Fault("asks three times", "does not know this key id"),
    "cache_disk_full": Fault("evicts its own older shards", "has no room"),
    "cache_corrupted": Fault("fetches again, decodes nothing of the damaged shard", None),
    "killed_while_writing_cache": Fault("deletes the partial file and fetches again", None),
}
SLOW = ("slow_first_byte", "slow_body")


@dataclass(frozen=True)
class Outcome:
    """kept: if the promise was. seconds: from the fault's end to the next batch, or from its start to the error."""

    kept: bool
    what: str
    seconds: float


@dataclass
class Place:
    """A packed collection behind the proxy, and the digest of what an undisturbed stream delivers of it."""

    proxy: FaultProxy
    collection: Collection
    scratch: Path
    clean: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def victim(self) -> str:
        """Name of the shard that the first batch needs first."""
        data, collection = self.section(Path()), self.collection
        first = Order(collection.shard_sizes("train"), SEED, data.lanes, data.window).samples(range(1))[0]
        return collection.shards[collection.shard[collection.ids("train").start + first]].name

    def section(self, cache: Path, patience_s: float = 300.0) -> DataSection:
        return DataSection(train=self.collection.url, cache=str(cache), lanes=4, window=64, patience_s=patience_s)

    def cache(self) -> Path:
        """A new, empty folder."""
        return Path(tempfile.mkdtemp(dir=self.scratch))


@contextmanager
def place(test_data: Path | None) -> Iterator[Place]:
    """Imagenette at 128 px where there is test data, else digits; shards of 100."""
    images = test_data and test_data / "imagenette128-train-1500.tar"
    source, resolution = (str(images), 128) if images else ("digits", 32)
    with (
        tempfile.TemporaryDirectory(prefix="sagan-faults-") as folder,
        S3(Path(folder) / "s3") as s3,
        fault_proxy(s3.url) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in {**s3.env, "AWS_ENDPOINT_URL": proxy.url()}.items():
            patch.setenv(name, value)
        section = PackSection(source=source, resolution=resolution, shard_images=100)
        made = Place(proxy, pack(f"{s3.bucket('faults')}/images", section), Path(folder))
        made.clean = deliver(made, made.cache()).digest
        yield made


@dataclass
class Delivery:
    """digest: of all images and labels in their order. first: when the first batch came, as time.monotonic() says."""

    digest: str
    first: float


def deliver(place: Place, cache: Path, patience_s: float = 300.0, workers: int = WORKERS) -> Delivery:
    """One epoch and a bit, by the workers of a node side by side. Raises what a worker raises."""
    batches = math.ceil(place.collection.size("train") / BATCH) + 1
    firsts = []

    def work(rank: int) -> str:
        data, world = place.section(cache, patience_s), World(rank, workers)
        digest = hashlib.sha256()
        with closing(
            Stream(place.collection, "train", seed=SEED, world=world, data=data, note=place.notes.append)
        ) as stream:
            for batch, _ in zip(stream.batches(0, BATCH), range(batches), strict=False):
                if batch.positions.start == 0:
                    firsts.append(time.monotonic())
                digest.update(batch.images.numpy().tobytes())
                digest.update(batch.labels.numpy().tobytes())
        return digest.hexdigest()

    with ThreadPoolExecutor(workers) as pool:
        return Delivery("".join(pool.map(work, range(workers))), firsts[0])


# --- a fault that passes ---------------------------------------------------------------------------------------------


def passing(place: Place, fault: str, seconds: float) -> Outcome:
    """Meet it, for `seconds` where it is one that takes time; then deliver everything."""
    place.proxy.clear()
    cache = place.cache()
    if fault == "cache_disk_full":
        return _disk_of_half_the_size(place)
    if fault == "cache_corrupted":
        deliver(place, cache)
        for path in (path for path in cache.iterdir() if not path.suffix):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        over = time.monotonic()
    elif fault == "killed_while_writing_cache":
        _kill_in_mid_write(place, cache)
        over = time.monotonic()
    else:
        times = 1 if fault in (*SLOW, "refused") else 2
        place.proxy.inject(fault, f"*/{place.victim}", times, seconds)
        over = None
    delivery = deliver(place, cache)
    return _compared(place, delivery, place.proxy.last() if over is None else over)


def _compared(place: Place, delivery: Delivery, over: float) -> Outcome:
    same = delivery.digest == place.clean
    return Outcome(same, "same images and labels" if same else "OTHER IMAGES OR LABELS", delivery.first - over)


def _kill_in_mid_write(place: Place, cache: Path) -> None:
    """A process that streams is killed while a part of a shard is in its cache."""
    before = place.proxy.counts().get("slow_body", 0)
    place.proxy.inject("slow_body", f"*/{place.victim}", seconds=15)
    process = get_context("spawn").Process(target=_stream_for_ever, args=(place.section(cache),), daemon=True)
    process.start()
    assert place.proxy.wait_for("slow_body", before + 1)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(cache.glob("*.part")), "there must be something to clean up"


def _stream_for_ever(data: DataSection) -> None:
    for _ in Stream(Collection.open(data.train), "train", seed=SEED, world=World(), data=data).batches(0, BATCH):
        pass


def _disk_of_half_the_size(place: Place) -> Outcome:
    size = sum(shard.size for shard in place.collection.shards) // 2
    with small_disk(place.cache(), size) as disk:
        if disk is None:
            return Outcome(True, NOT_RUN, math.nan)
        began = time.monotonic()
        return _compared(place, deliver(place, disk / "cache"), began)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path | None]:
    """A file system of `size` bytes, mounted at `folder`; None where we may not."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


# --- a fault that lasts ----------------------------------------------------------------------------------------------


def lasting(place: Place, fault: str, patience_s: float) -> Outcome:
    """Meet it until a stream gives up."""
    place.proxy.clear()
    if fault != "cache_disk_full":
        place.proxy.inject(fault, f"*/{place.victim}", math.inf, 600.0 if fault in SLOW else 0.0)
        return _refusal(place, place.cache(), patience_s, place.victim, FAULTS[fault].cause)
    with small_disk(place.cache(), 1 << 20) as disk:
        if disk is None:
            return Outcome(True, NOT_RUN, math.nan)
        (disk / "of somebody else").write_bytes(bytes(1 << 20))
        return _refusal(place, disk / "cache", patience_s, str(disk), FAULTS[fault].cause)


def _refusal(place: Place, cache: Path, patience_s: float, named: str, cause: str | None) -> Outcome:
    began = time.monotonic()
    try:
        deliver(place, cache, patience_s, workers=1)
    except SaganError as error:
        clear = named in error.message and cause is not None and bool(re.search(cause, error.message))
        return Outcome(clear, f"{type(error).__name__}: {error.message}", time.monotonic() - began)
    return Outcome(False, "NO ERROR", time.monotonic() - began)


# --- the table -------------------------------------------------------------------------------------------------------


Row = tuple[str, Fault, Outcome, Outcome | None]
HEADINGS = ("fault", "promise, if temporary", "delivered", "next batch after", "error, if permanent", "error after")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    test_data = os.environ.get("SAGAN_TEST_DATA")
    markdown = parser.parse_args().markdown
    with place(Path(test_data) if test_data else None) as there:
        rows: list[Row] = []
        for name, fault in track(FAULTS.items(), "faults", console=Console(stderr=True)):
            passed = passing(there, name, seconds=30.0)
            lasted = lasting(there, name, patience_s=5.0) if fault.cause else None
            rows.append((name, fault, passed, lasted))
            print(name, passed, lasted, file=sys.stderr, flush=True)
    cells = [_cells(*row) for row in rows]
    if markdown:
        for line in (HEADINGS, ["---"] * len(HEADINGS), *cells):
            print(f"| {' | '.join(line)} |")
    else:
        table = Table(*HEADINGS, show_lines=True)
        for line in cells:
            table.add_row(*line)
        Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0 if all(passed.kept and (lasted is None or lasted.kept) for _, _, passed, lasted in rows) else 1


def _cells(name: str, fault: Fault, passed: Outcome, lasted: Outcome | None) -> list[str]:
    said = ["–", "–"] if lasted is None else [_public(lasted.what), _seconds(lasted)]
    return [name, fault.promise, passed.what, _seconds(passed), *said]


def _seconds(outcome: Outcome) -> str:
    if math.isnan(outcome.seconds):
        return "–"
    return f"{outcome.seconds:.1f} s" if outcome.seconds >= 0 else f"{-outcome.seconds:.1f} s before its end"


def _public(message: str) -> str:
    """Without this machine's ports and folders."""
    return re.sub(r"/\S*/sagan-faults-[^/\s]+/\w+", "…", re.sub(r" at http://\S+(?=:)", "", message))


if __name__ == "__main__":
    sys.exit(main())
