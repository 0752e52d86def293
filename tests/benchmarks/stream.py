"""The data plane against its peers: `python -m tests.benchmarks.stream [--json FILE]`.

The same 8 192 JPEG images of 128 px (crops of SAGAN_TEST_DATA's imagenette, quality 92, 4:2:0) in each library's own
format: ours and webdataset read the same tars, mosaicml-streaming and litdata their own files. Every reader shuffles,
decodes with simplejpeg into batches of 64, uint8 channels-last, and is a process of its own. Round after round they
take turns: an epoch from disk, then two from an S3 server on the same cores with a cold cache. A figure is the median
over rounds, a ratio the median of the ratios round by round. First each must have delivered every image with its label.
Peers run with no worker process and with two, and count with what is faster. What a storage that fails or answers late
costs is seen from the first batch to the last of a collection four times as large.

Ratios of CPU hold on a busy machine, those of wall time on a quiet one. The peers' environment is made where `--peers`
names none.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Self
from uuid import uuid4

import numpy as np
import safetensors.numpy
import simplejpeg
import torch
from PIL import Image
from webdataset import TarWriter

from infra.local.servers import S3
from pipeline.collection.manifest import FORMAT, INDEX, MANIFEST, Collection, Shard
from pipeline.collection.shard_file import read_shard
from pipeline.compute.threads import map_ahead
from pipeline.config.schema import DataSection
from pipeline.storage import files
from pipeline.streaming.stream import Stream
from sagan.ranks import World
from tests.benchmarks import _readers
from tests.benchmarks._readers import BATCH, SIDE, Batches
from tests.faults.storage_proxy import fault_proxy
from tests.real_data import real_file

IMAGES, PER_SHARD, THREADS = 8192, 512, 2
PHOTOS = "imagenette128-train-1500.tar"
LARGE = 4  # times as many, for what needs longer to be seen
PATTERN = f"train-{{00000..{IMAGES // PER_SHARD - 1:05d}}}.tar"
PEERS = {"webdataset": "webdataset==1.0.2", "litdata": "litdata==0.2.76", "mosaicml": "mosaicml-streaming==0.13.0"}
BESIDE = ["torch==2.13.0", "torchvision==0.28.0", "simplejpeg==1.9.0"]
# What is shuffled together is then 4 096 images; webdataset's buffer, given to it, is 1 000.
ORDER = {"lanes": 4, "window": 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="their virtual environment, made where there is none")
    parser.add_argument("--json", type=Path, help="write the figures as one object")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    real_file(PHOTOS)
    torch.set_num_threads(1)
    if given.serve:
        _readers.serve(OURS[given.serve])
        return
    with tempfile.TemporaryDirectory(prefix="sagan-stream-") as folder:
        figures = compare(Path(folder), given.peers or Path(folder) / "peers", given.rounds)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


def compare(folder: Path, peers: Path, rounds: int) -> dict[str, float]:
    """All figures, printed on the way."""
    python = install(peers)
    images = list(islice(crops(), IMAGES))
    write_collection(folder / "wds", images)
    write_collection(folder / "large", LARGE * images)
    for peer in ("litdata", "mosaicml"):
        write: list[str | Path] = [python, _readers.__file__, "write", peer, folder / "wds" / PATTERN, folder / peer]
        subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
    with (
        S3(folder / "s3") as server,
        fault_proxy(server.url) as late,
        fault_proxy(server.url) as failing,
        ExitStack() as stack,
    ):
        os.environ.update(server.env)
        bucket = server.bucket("stream")
        for file in files.list_files(str(folder)):
            if file.startswith(("wds/", "large/", "litdata/", "mosaicml/")):
                files.upload(folder / file, files.join(bucket, file))
        late.latency(0.2)
        failing.random(0.01, seed=0)

        def start(name: str, *command: str | Path, endpoint: str = server.url) -> Reader:
            return stack.enter_context(Reader(name, folder, bucket, command, endpoint))

        ours = [sys.executable, "-m", "tests.benchmarks.stream", "--serve"]
        readers = [start("decoder", *ours, "decoder"), start("ours", *ours, "ours")]
        readers += [
            start(f"{peer} {workers}", python, _readers.__file__, "read", peer, workers)
            for peer in PEERS
            for workers in ("0", "2")
        ]
        require_equal(readers)
        large = [
            start("large", *ours, "ours"),
            start("large, 1 % fail", *ours, "ours", endpoint=failing.url()),
            start("large, 200 ms late", *ours, "ours", endpoint=late.url()),
        ]
        for _ in range(rounds):
            for reader in readers:
                reader.read_local()
            for reader in readers[1:]:
                reader.read_cold()
            for reader in large:
                reader.read_cold()
    readers += large
    show(readers)
    figures = ratios({reader.name: reader for reader in readers})
    figures["resume_seconds"] = resume_seconds(folder)
    for name, value in figures.items():
        print(f"{name:28}{value:8.2f}")
    return figures


class Reader:
    """A reader's process, and what its turns took: rates in images/s, CPU in µs per image, times in seconds."""

    def __init__(self, name: str, folder: Path, bucket: str, command: Sequence[str | Path], endpoint: str) -> None:
        self.name, self._folder, self._bucket, self._command = name, folder, bucket, command
        self._environment = os.environ | {"AWS_ENDPOINT_URL": endpoint}
        self._log = folder / f"{name}.log"
        self._library = name.split(",")[0].split()[0]
        self._images = IMAGES * LARGE if self._library == "large" else IMAGES
        self.took = defaultdict[str, list[float]](list)

    def __enter__(self) -> Self:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def content(self) -> int:
        return self._ask("content", str(self._folder))

    def read_local(self) -> None:
        ((seconds, cpu_s, _),) = self._ask("local", str(self._folder))
        self.took["rate"].append(IMAGES / seconds)
        self.took["cpu"].append(1e6 * cpu_s / IMAGES)

    def read_cold(self) -> None:
        (seconds, cpu_s, first_s), (second_s, _, _) = self._ask("cold", self._bucket)
        self.took["cold_rate"].append(self._images / seconds)
        self.took["cold_cpu"].append(1e6 * cpu_s / self._images)
        self.took["first_batch"].append(first_s)
        self.took["warm_rate"].append((self._images - BATCH) / (seconds - first_s))
        self.took["second_rate"].append(self._images / second_s)

    def _ask(self, what: str, where: str, tries: int = 3) -> Any:
        source = files.join(where, "wds" if self._library in ("ours", "decoder", "webdataset") else self._library)
        source = files.join(source, PATTERN) if self._library == "webdataset" else source
        cache = self._folder / "cache" / self._library / (uuid4().hex if what == "cold" else "warm")
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([what, source, str(cache), self._images]) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            said = self._log.read_text().strip()
            if what == "content" or tries == 1:
                sys.exit(f"{self.name} ended:\n{said}")
            print(f"{self.name} failed and is asked again: {said.splitlines()[-1]}", flush=True)
            self.__exit__()
            return self.__enter__()._ask(what, where, tries - 1)
        found = json.loads(line)
        self.took["grown_mb"].append(found["grown_mb"])
        if what == "cold":
            shutil.rmtree(cache, ignore_errors=True)
        return found["answer"]


def require_equal(readers: list[Reader]) -> None:
    """An epoch of every reader is the same images with the same labels."""
    found = {reader.name: reader.content() for reader in readers}
    if len(set(found.values())) > 1:
        sys.exit(f"not every reader delivers the same images: {found}; nothing was timed")


def show(readers: list[Reader]) -> None:
    print(f"{'':20}{'images/s':>9}{'CPU µs':>8}{'from S3, cold':>15}{'CPU µs':>8}{'first batch s':>15}")
    for reader in readers:
        print(f"{reader.name:20}", end="")
        if reader.took["rate"]:
            print(f"{median(reader.took['rate']):9,.0f}{median(reader.took['cpu']):8.0f}", end="")
        else:
            print(" " * 17, end="")
        if reader.took["cold_rate"]:
            print(
                f"{median(reader.took['cold_rate']):15,.0f}{median(reader.took['cold_cpu']):8.0f}{median(reader.took['first_batch']):15.2f}",
                end="",
            )
        print()


def ratios(readers: dict[str, Reader]) -> dict[str, float]:
    ours, decoder = readers["ours"], readers["decoder"]
    figures = {
        "local_decoder_share": ratio(ours.took["rate"], decoder.took["rate"]),
        "decoder_cpu_ratio": ratio(ours.took["cpu"], decoder.took["cpu"]),
        "s3_cpu_ratio": ratio(ours.took["cold_cpu"], ours.took["cpu"]),
        "second_epoch_share": ratio(ours.took["second_rate"], ours.took["rate"]),
        "failing_share": ratio(readers["large, 1 % fail"].took["warm_rate"], readers["large"].took["warm_rate"]),
        "late_share": ratio(readers["large, 200 ms late"].took["warm_rate"], readers["large"].took["warm_rate"]),
        "worker_memory_mb": max(ours.took["grown_mb"]),
    }
    for peer in PEERS:
        both = readers[f"{peer} 0"], readers[f"{peer} 2"]
        figures[f"{peer}_ratio"] = min(ratio(ours.took["rate"], other.took["rate"]) for other in both)
        figures[f"s3_{peer}_ratio"] = min(ratio(ours.took["cold_rate"], other.took["cold_rate"]) for other in both)
    return figures


def ratio(ours: list[float], others: list[float]) -> float:
    return median([a / b for a, b in zip(ours, others, strict=True)])


def resume_seconds(folder: Path) -> float:
    """From a stream's beginning to its first batch, at most over positions: nothing held, the shards on disk."""
    collection, worst = Collection.open(str(folder / "wds")), 0.0
    for share in (0.0, 0.5, 0.9):
        taken = []
        for _ in range(5):
            began = perf_counter()
            stream = Stream(
                collection, "train", seed=0, world=World(), data=section(str(folder / "cache" / "ours" / "warm"))
            )
            next(iter(stream.batches(int(share * IMAGES), BATCH)))
            taken.append(perf_counter() - began)
            stream.close()
        print(f"first batch at {share:.0%} of an epoch: {median(taken):.3f} s")
        worst = max(worst, median(taken))
    return worst


# --- readers in this environment -------------------------------------------------------------------------------------


def read_ours(source: str, cache: str) -> Batches:
    stream = Stream(Collection.open(source), "train", seed=0, world=World(), data=section(cache))
    return ((batch.images, batch.labels) for batch in stream.batches(0, BATCH))


def section(cache: str) -> DataSection:
    return DataSection(train="", cache=cache, threads=THREADS, **ORDER)


def read_decoder(source: str, _cache: str) -> Batches:
    """The ceiling: images in memory, threads that decode into batches which are there already."""
    collection = Collection.open(source)
    shards = [Path(source, shard.name).read_bytes() for shard in collection.shards]
    places = zip(collection.shard.tolist(), collection.offset.tolist(), collection.length.tolist(), strict=True)
    images = [shards[shard][offset : offset + length] for shard, offset, length in places]
    labels = torch.from_numpy(collection.labels)
    ring = np.empty((8, BATCH, SIDE, SIDE, 3), dtype=np.uint8)

    def decode(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch, first = ring[number % len(ring)], number * BATCH % IMAGES
        for row, data in zip(batch, images[first : first + BATCH], strict=True):
            simplejpeg.decode_jpeg(data, "RGB", buffer=row)
        return torch.from_numpy(batch).permute(0, 3, 1, 2), labels[first : first + BATCH]

    return map_ahead(decode, iter(range(sys.maxsize)), THREADS, 4)


OURS = {"ours": read_ours, "decoder": read_decoder}


# --- what is read ----------------------------------------------------------------------------------------------------


def write_collection(folder: Path, images: Sequence[tuple[int, bytes]]) -> None:
    folder.mkdir()
    shards, columns = [], defaultdict(list)
    for number in range(len(images) // PER_SHARD):
        path = folder / f"train-{number:05d}.tar"
        with path.open("wb") as file, TarWriter(file, encoder=False) as tar:
            for key in range(number * PER_SHARD, (number + 1) * PER_SHARD):
                label, image = images[key]
                tar.write({"__key__": f"{key:08d}", "jpg": image, "cls": str(label).encode()})
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        shards.append(Shard(path.name, path.stat().st_size, sha256, PER_SHARD, "train"))
        for sample in read_shard(path):
            for name, value in (("shard", number), *sample._asdict().items()):
                columns[name].append(value)
    types = {"shard": np.int32, "offset": np.int64, "length": np.int32, "label": np.int32}
    index = safetensors.numpy.save({name: np.array(columns[name], dtype) for name, dtype in types.items()})
    (folder / INDEX).write_bytes(index)
    manifest = {
        "format": FORMAT,
        "resolution": SIDE,
        "encoding": "jpeg",
        "class_names": [str(label) for label in range(10)],
        "shards": [asdict(shard) for shard in shards],
        "index": {"size": len(index), "sha256": hashlib.sha256(index).hexdigest()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    mean = sum(columns["length"]) / len(images)
    print(
        f"{len(images)} JPEG images of {SIDE} px, {mean / 1e3:.1f} KB each, in {len(shards)} shards; {THREADS} threads"
    )


def crops() -> Iterator[tuple[int, bytes]]:
    """(label, JPEG) of random crops of real photographs, no two alike."""
    photos = []
    with tarfile.open(real_file(PHOTOS)) as tar:
        names = [member.name for member in tar if member.isfile()]
        classes = sorted({name.split("/")[1] for name in names})
        for name in names:
            file = tar.extractfile(name)
            assert file
            photos.append((classes.index(name.split("/")[1]), Image.open(io.BytesIO(file.read())).convert("RGB")))
    rng = np.random.default_rng(0)
    while True:
        label, photo = photos[rng.integers(len(photos))]
        side = int(rng.integers(96, SIDE + 1))
        left, top = rng.integers(0, SIDE - side + 1, 2).tolist()
        image = photo.resize((SIDE, SIDE), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=92, subsampling="4:2:0")
        yield label, out.getvalue()


def install(folder: Path) -> Path:
    """The peers' interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *BESIDE, *PEERS.values()], check=True)
    return python


if __name__ == "__main__":
    main()
