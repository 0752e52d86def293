"""The data plane against its peers: `python -m tests.benchmarks.stream [--json FILE]`.

The same 8 192 JPEG images of 128 px (crops of SAGAN_TEST_DATA's imagenette, quality 92, 4:2:0) in each library's own
format: ours and webdataset read the same tars, mosaicml-streaming and litdata their own files. Every reader shuffles,
decodes with simplejpeg into batches of 64, uint8 channels-last, is a process of its own and reads three epochs: from
disk, and from an S3 server on the same cores with a cold cache. They take turns, round after round; a figure is the
median over rounds, a ratio the median of the ratios round by round. First each must have delivered every image with its
label. Peers run with no worker process and with two, and count with what is faster.

From disk the first epoch does not count (processes start, ours hashes); from S3 the first one alone counts, and begins
with a reader that has read its index and nothing else. Ratios of CPU hold on a busy machine, those of wall time on a
quiet one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import safetensors.numpy
import simplejpeg
import torch
from PIL import Image
from webdataset import TarWriter

from infra.local.servers import S3
from pipeline.config.schema import DataSection
from pipeline.data.index import FORMAT, INDEX, MANIFEST, Collection, Shard, read_shard
from pipeline.data.stream import Stream
from pipeline.data.threads import map_ahead
from pipeline.storage import files
from sagan.world import World
from tests.benchmarks import _readers
from tests.benchmarks._readers import BATCH, SIDE, Batches

IMAGES, PER_SHARD, EPOCHS, THREADS = 8192, 512, 3, 2
PATTERN = f"train-{{00000..{IMAGES // PER_SHARD - 1:05d}}}.tar"
PEERS = {"webdataset": "webdataset==1.0.2", "litdata": "litdata==0.2.76", "mosaicml": "mosaicml-streaming==0.13.0"}
BESIDE = ["torch==2.13.0", "torchvision==0.28.0", "simplejpeg==1.9.0"]
# What is shuffled together is then 4 096 images; webdataset's buffer, given to it, is 1 000.
ORDER = {"lanes": 4, "window": 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, help="their virtual environment, made where there is none")
    parser.add_argument("--json", type=Path, help="write the figures as one object")
    parser.add_argument("--read", nargs=3, metavar=("NAME", "SOURCE", "CACHE"), help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.read:
        name, source, cache = given.read
        print(json.dumps(_readers.measure(OURS[name](source, cache), IMAGES, given.epochs)))
        return
    with tempfile.TemporaryDirectory(prefix="sagan-stream-") as folder:
        bench = Bench(Path(folder), given.peers or Path(folder) / "peers")
        figures = bench.run(given.rounds)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


class Bench:
    def __init__(self, folder: Path, peers: Path) -> None:
        self.folder, self.python = folder, install(peers)
        write_collection(folder / "wds")
        for peer in ("litdata", "mosaicml"):
            self.call(self.python, _readers.__file__, "write", peer, folder / "wds" / PATTERN, folder / peer)

    def run(self, rounds: int) -> dict[str, float]:
        """All figures, printed on the way."""
        readers = ["decoder", "ours", *(f"{peer} {workers}" for peer in PEERS for workers in (0, 2))]
        with S3(self.folder / "s3") as server:
            os.environ.update(server.env)
            self.bucket = server.bucket("stream")
            for form in ("wds", "litdata", "mosaicml"):
                for name in files.list_files(str(self.folder / form)):
                    files.upload(self.folder / form / name, files.join(self.bucket, form, name))
            self.check_equal(readers)
            runs: dict[str, list[Run]] = defaultdict(list)
            for _ in range(rounds):
                for reader in readers:
                    runs[reader].append(Run(self.read(reader, str(self.folder), EPOCHS)))
                for reader in readers[1:]:
                    runs[f"{reader} s3"].append(Run(self.read(reader, self.bucket, EPOCHS)))
        show(runs)
        return ratios(runs) | {"resume_seconds": self.resume_seconds()}

    def check_equal(self, readers: list[str]) -> None:
        """An epoch of every reader is the same images with the same labels."""
        found = {reader: self.read(reader, str(self.folder), 0)["content"] for reader in readers}
        if len(set(found.values())) > 1:
            sys.exit(f"not every reader delivers the same images: {found}; nothing was timed")

    def read(self, reader: str, where: str, epochs: int) -> dict[str, Any]:
        """One process of one reader, its cache cold unless it reads from disk."""
        name, _, workers = reader.partition(" ")
        form = {"litdata": "litdata", "mosaicml": "mosaicml"}.get(name, "wds")
        source = files.join(where, form, *([PATTERN] if name == "webdataset" else []))
        cache = self.folder / ("warm" if where == str(self.folder) else "cold")
        if name in PEERS:
            options = ["--images", IMAGES, "--epochs", epochs, "--workers", workers]
            command = [self.python, _readers.__file__, "read", name, source, cache, *options]
        else:
            command = [sys.executable, "-m", __spec__.name, "--read", name, source, cache, "--epochs", epochs]
        found = json.loads(self.call(*command).splitlines()[-1])
        shutil.rmtree(self.folder / "cold", ignore_errors=True)
        return found

    def call(self, *command: object) -> str:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def resume_seconds(self) -> float:
        """From a stream's beginning to its first batch, at most over positions: nothing held, the cache on disk."""
        collection, worst = Collection.open(str(self.folder / "wds")), 0.0
        for share in (0.0, 0.5, 0.9):
            taken = []
            for _ in range(5):
                began = perf_counter()
                with closing(
                    Stream(collection, "train", seed=0, world=World(), data=section(str(self.folder / "warm")))
                ) as stream:
                    next(iter(stream.batches(int(share * IMAGES), BATCH)))
                    taken.append(perf_counter() - began)
            print(f"first batch at {share:.0%} of an epoch: {statistics.median(taken):.3f} s")
            worst = max(worst, statistics.median(taken))
        return worst


class Run:
    """What one process took. Rates in images/s, CPU in µs per image."""

    def __init__(self, found: dict[str, Any]) -> None:
        (self.first_epoch_s, cpu_s), *later = found["laps"]
        self.first_epoch_cpu = 1e6 * cpu_s / IMAGES
        self.rate = IMAGES * len(later) / sum(seconds for seconds, _ in later)
        self.cpu = 1e6 * sum(cpu_s for _, cpu_s in later) / (IMAGES * len(later))
        self.first_batch_s, self.grown_mb = found["first_s"], found["grown_mb"]

    @property
    def cold_rate(self) -> float:
        return IMAGES / self.first_epoch_s


def show(runs: dict[str, list[Run]]) -> None:
    print(f"{'':18}{'images/s':>9}{'CPU µs':>8}{'from S3, cold':>15}{'CPU µs':>8}{'first batch s':>15}")
    for reader in (name for name in runs if not name.endswith(" s3")):
        local, remote = runs[reader], runs.get(f"{reader} s3", [])
        line = f"{reader:18}{median(local, 'rate'):9,.0f}{median(local, 'cpu'):8.0f}"
        if remote:
            line += f"{median(remote, 'cold_rate'):15,.0f}{median(remote, 'first_epoch_cpu'):8.0f}"
            line += f"{median(remote, 'first_batch_s'):15.2f}"
        print(line)


def ratios(runs: dict[str, list[Run]]) -> dict[str, float]:
    ours, remote, decoder = runs["ours"], runs["ours s3"], runs["decoder"]
    figures = {
        "local_decoder_share": ratio(ours, "rate", decoder, "rate"),
        "decoder_cpu_ratio": ratio(ours, "cpu", decoder, "cpu"),
        "s3_cpu_ratio": ratio(remote, "first_epoch_cpu", ours, "cpu"),
        "second_epoch_share": ratio(remote, "rate", ours, "rate"),
        "worker_memory_mb": median(ours, "grown_mb"),
    }
    for peer in PEERS:
        best = max((f"{peer} 0", f"{peer} 2"), key=lambda name: median(runs[name], "rate"))
        figures[f"{peer}_ratio"] = ratio(ours, "rate", runs[best], "rate")
        best = max((f"{peer} 0 s3", f"{peer} 2 s3"), key=lambda name: median(runs[name], "cold_rate"))
        figures[f"s3_{peer}_ratio"] = ratio(remote, "cold_rate", runs[best], "cold_rate")
    for name, value in figures.items():
        print(f"{name:24}{value:8.2f}")
    return figures


def ratio(ours: list[Run], what: str, others: list[Run], of: str) -> float:
    return statistics.median(getattr(a, what) / getattr(b, of) for a, b in zip(ours, others, strict=True))


def median(runs: list[Run], what: str) -> float:
    return statistics.median(getattr(run, what) for run in runs)


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


def write_collection(folder: Path) -> None:
    folder.mkdir()
    shards, columns, images = [], defaultdict(list), crops()
    for number in range(IMAGES // PER_SHARD):
        path = folder / f"train-{number:05d}.tar"
        with path.open("wb") as file, TarWriter(file, encoder=False) as tar:
            for key in range(number * PER_SHARD, (number + 1) * PER_SHARD):
                label, image = next(images)
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
    mean = sum(columns["length"]) / IMAGES
    print(f"{IMAGES} JPEG images of {SIDE} px, {mean / 1e3:.1f} KB each, in {len(shards)} shards; {THREADS} threads")


def crops() -> Iterator[tuple[int, bytes]]:
    """(label, JPEG) of random crops of real photographs, no two alike."""
    photos = []
    with tarfile.open(Path(os.environ["SAGAN_TEST_DATA"], "imagenette128-train-1500.tar")) as tar:
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
