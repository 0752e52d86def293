"""What the checks of foreign files cost: `python -m tests.benchmarks.checks [--rounds N] [--json FILE]`.

One process runs the code as it is and without checks in turn, and changes the order with every round. `without_checks`
replaces these functions by ones that check nothing: validation of the manifest and of the rows of the
index, comparison of an image's header with the resolution before it is decoded, the permissions of the cache's folder,
the formats and the number of pixels of source images, and the escaping of names. Both compare SHA-256.

    packing     1 000 JPEG files of up to 128 px (crops of SAGAN_TEST_DATA's imagenette), one shard
    streaming   four epochs of 2 048 such images from a warm cache on disk, batches of 64
    opening     a collection of 1.28 M samples in 1 280 shards

A figure is the CPU time with the checks divided by that without, minus one: the median over rounds, with quartiles. CPU
time of a process hardly depends on other programs, unlike wall time.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import safetensors.numpy
import simplejpeg
import torch
from PIL import Image

from pipeline.collection import image_codec, manifest
from pipeline.collection.manifest import FORMAT, INDEX, MANIFEST, Collection, Shard
from pipeline.config.schema import DataSection, PackSection
from pipeline.packing import finish_collection, pack
from pipeline.storage import validate_json
from pipeline.storage.file_sets import FileEntry
from pipeline.streaming import read_images
from pipeline.streaming.shard_cache import ShardCache
from pipeline.streaming.stream import Stream
from sagan.ranks import World
from tests.benchmarks._interleaved import Figures
from tests.benchmarks.stream import crops, write_collection
from tests.real_data import real_file

SIDE, BATCH, EPOCHS = 128, 64, 4
STREAMED, PACKED, SHARDS, PER_SHARD = 2048, 1000, 1280, 1000
WORKS = ("packing", "streaming", "opening")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the figures as one object")
    given = parser.parse_args()
    torch.set_num_threads(1)
    real_file("imagenette128-train-1500.tar")
    with tempfile.TemporaryDirectory(prefix="sagan-checks-") as folder:
        build(Path(folder))
        figures = compare(Path(folder), given.rounds)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


def compare(folder: Path, rounds: int) -> Figures:
    contexts: dict[str, Callable[[], AbstractContextManager[None]]] = {"with": nullcontext, "without": without_checks}
    rows: dict[str, list[Figures]] = {checks: [] for checks in contexts}
    for number in range(rounds + 1):
        for checks in sorted(contexts, reverse=bool(number % 2)):
            with contexts[checks]():
                figures_of_round = measure(folder, folder / "own")
            if number:  # the first round imports and fills caches
                rows[checks].append(figures_of_round)
    figures: Figures = {}
    print("             CPU s with   CPU s without   more, % (quartiles)")
    for work in WORKS:
        both = [(a[work], b[work]) for a, b in zip(rows["with"], rows["without"], strict=True)]
        more = [100 * (a / b - 1) for a, b in both]
        low, middle, high = statistics.quantiles(more, n=4)
        with_s, without_s = (statistics.median(column) for column in zip(*both, strict=True))
        print(f"{work:<13}{with_s:10.3f}{without_s:16.3f}   {middle:+.1f} ({low:+.1f} to {high:+.1f})")
        figures |= {f"checks_{work}_cpu_seconds": with_s, f"checks_{work}_more_percent": middle}
    return figures


# --- what is measured ------------------------------------------------------------------------------------------------


def measure(folder: Path, own: Path) -> Figures:
    """CPU seconds of each kind of work. `own` is a folder for what it writes."""
    works: dict[str, Callable[[], object]] = {
        "packing": lambda: pack_photos(folder / "photos", own / "packed"),
        "streaming": lambda: stream(folder / "streamed", own / "cache"),
        "opening": lambda: Collection.open(str(folder / "large")),
    }
    figures = {}
    for name, work in works.items():
        shutil.rmtree(own / "packed", ignore_errors=True)
        began = time.process_time()
        work()
        figures[name] = time.process_time() - began
    return figures


def pack_photos(source: Path, destination: Path) -> None:
    section = PackSection(source=str(source), resolution=SIDE, encoding="jpeg", shard_images=PACKED)
    with redirect_stdout(io.StringIO()):
        pack.pack(str(destination), section, lambda done, total: None)


def stream(folder: Path, cache: Path) -> None:
    collection = Collection.open(str(folder))
    data = DataSection(train="", cache=str(cache), threads=2, lanes=4, window=512)
    with closing(Stream(collection, "train", seed=0, world=World(), data=data)) as opened:
        for _ in islice(opened.batches(0, BATCH), EPOCHS * STREAMED // BATCH):
            pass


@contextmanager
def without_checks() -> Iterator[None]:
    """Replace the functions that check foreign values by ones that only read them."""

    def decode_into(data: bytes, pixels: np.ndarray) -> None:
        simplejpeg.decode_jpeg(data, "RGB", buffer=pixels)

    def decode_image(data: bytes, max_pixels: int) -> Image.Image:
        return image_codec._to_rgb(Image.open(io.BytesIO(data)))

    def make_folder(cache: ShardCache) -> None:
        cache._folder.mkdir(parents=True, exist_ok=True)

    def parse(data: bytes, url: str, what: str) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(data)
        return values

    def validate(model: Any, values: dict[str, Any], url: str, what: str) -> Any:
        shards = [Shard(**shard) for shard in values["shards"]]
        keys = FileEntry(**values["keys"]) if "keys" in values else None
        return model.model_construct(
            **{**values, "shards": shards, "index": FileEntry(**values["index"]), "keys": keys}
        )

    def read_index(url: str, values: Any) -> dict[str, np.ndarray]:
        columns: dict[str, np.ndarray] = safetensors.numpy.load(manifest._read_entry(url, values.index, 2**40))
        return columns

    bare_json = SimpleNamespace(read=validate_json.read, parse=parse, validate=validate)
    replaced = (
        (read_images, "decode_into", decode_into),
        (image_codec, "decode_image", decode_image),
        (ShardCache, "_require_private_folder", make_folder),
        (manifest, "validate_json", bare_json),
        (manifest, "_read_index", read_index),
        (pack, "printable", str),
        (finish_collection, "printable", str),
    )
    with ExitStack() as stack:
        for owner, name, bare in replaced:  # a check that was renamed raises AttributeError
            stack.enter_context(mock.patch.object(owner, name, bare))
        yield


# --- what is read ----------------------------------------------------------------------------------------------------


def build(folder: Path) -> None:
    photos = list(islice(crops(), STREAMED))
    write_collection(folder / "streamed", photos)
    for number, (label, data) in enumerate(photos[:PACKED]):
        path = folder / "photos" / f"class{label}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_large_collection(folder / "large")


def write_large_collection(folder: Path) -> None:
    """Write a manifest and an index; nothing reads the shards."""
    folder.mkdir()
    samples, length = SHARDS * PER_SHARD, 10_000
    shards = [Shard(f"train-{i:05d}.tar", PER_SHARD * length, "0" * 64, PER_SHARD, "train") for i in range(SHARDS)]
    places = np.arange(samples)
    index = safetensors.numpy.save(
        {
            "shard": (places // PER_SHARD).astype(np.int32),
            "offset": (places % PER_SHARD * length).astype(np.int64),
            "length": np.full(samples, length, dtype=np.int32),
            "label": (places % 1000).astype(np.int32),
        }
    )
    (folder / INDEX).write_bytes(index)
    values = {
        "format": FORMAT,
        "resolution": SIDE,
        "encoding": "jpeg",
        "class_names": [f"class {label}" for label in range(1000)],
        "shards": [asdict(shard) for shard in shards],
        "index": {"size": len(index), "sha256": hashlib.sha256(index).hexdigest()},
    }
    (folder / MANIFEST).write_text(json.dumps(values))


if __name__ == "__main__":
    main()
