"""Readers of other libraries, and how a reader is measured: run by `tests.benchmarks.stream`.

`python _readers.py write NAME SHARDS DESTINATION` puts the images of WebDataset shards into a library's own format,
`python _readers.py read NAME WORKERS` reads what it is asked to and says what that took (`serve`). It runs in an
environment of the peers' and imports nothing of this project. All give batches of 64, shuffled, uint8 [64, 3, 128, 128]
channels-last with int64 labels, decoded by simplejpeg straight into the batch.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
import simplejpeg
import torch

BATCH, SIDE = 64, 128
SKIPPED = 8  # batches that were read ahead while others had their turn
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


# --- measuring -------------------------------------------------------------------------------------------------------


def serve(make: Callable[[str, str], Batches]) -> None:
    """Answer every [what, source, cache, images] that comes as a line of JSON, until there are no more.

    `content`: of an epoch, see below. `local`: an epoch somewhere in the middle of one long reading. `cold`: the first
    and the second epoch of a new reader that has read its index and nothing else.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    Path("/proc/self/clear_refs").write_text("5")  # the largest size is that of what follows
    idle_mb, reading = memory_mb("VmRSS"), None
    for line in sys.stdin:
        what, source, cache, images = json.loads(line)
        if what == "content":
            answer: Any = content(make(source, cache), images)
        elif what == "cold":
            batches = make(source, cache)
            answer = [epoch(batches, images), epoch(batches, images)]
            del batches  # and its processes
        else:
            if reading is None:
                reading = make(source, cache)
                epoch(reading, images)  # processes start, ours hashes
            for _ in range(SKIPPED):
                next(reading)
            answer = [epoch(reading, images)]
        print(json.dumps({"answer": answer, "grown_mb": memory_mb("VmHWM") - idle_mb}), file=answers, flush=True)


def epoch(batches: Batches, images: int) -> tuple[float, float, float]:
    """Until `images` have come: seconds, CPU seconds of this process and those below it, seconds to the first batch."""
    began, used, seen, first_s = time.perf_counter(), cpu(), 0, 0.0
    while seen < images:
        pixels, labels = next(batches)
        first_s = first_s or time.perf_counter() - began
        seen += len(labels)
    assert pixels.shape[1:] == (3, SIDE, SIDE)
    assert pixels.stride(1) == 1
    return time.perf_counter() - began, cpu() - used, first_s


def content(batches: Batches, images: int) -> int:
    """The same for the same images with the same labels, in whatever order they come."""
    total = seen = 0
    for pixels, labels in batches:
        for image, label in zip(pixels.permute(0, 2, 3, 1).numpy(), labels.tolist(), strict=True):
            if seen < images:
                total += zlib.crc32(image.tobytes(), label)
                seen += 1
        if seen == images:
            break
    return total


def cpu() -> float:
    """User and system seconds of this process and everything below it, running or ended."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    tick = os.sysconf("SC_CLK_TCK")
    running = 0.0
    for pid in _below(os.getpid()):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        running += sum(map(int, fields[11:15])) / tick
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime + running


def _below(pid: int) -> Iterator[int]:
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            yield child
            yield from _below(child)


def memory_mb(what: str) -> float:
    """A line of this process's status, in megabytes."""
    return int(Path("/proc/self/status").read_text().partition(f"{what}:")[2].split()[0]) / 1024


# --- decoding --------------------------------------------------------------------------------------------------------


def decode(samples: list[tuple[bytes, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = np.empty((len(samples), SIDE, SIDE, 3), dtype=np.uint8)
    for row, (data, _) in zip(pixels, samples, strict=True):
        simplejpeg.decode_jpeg(data, "RGB", buffer=row)
    labels = torch.tensor([label for _, label in samples])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), labels


# --- readers ---------------------------------------------------------------------------------------------------------


def read_webdataset(source: str, workers: int, cache: str) -> Batches:
    """With curl where the shards are in a bucket: webdataset has no s3:// of its own."""
    import webdataset

    urls = _shard_urls(source)

    def collate(samples: list[tuple[bytes, bytes]]) -> tuple[torch.Tensor, torch.Tensor]:
        return decode([(data, int(label)) for data, label in samples])

    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), workersplitter=webdataset.split_by_worker)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .batched(BATCH, collation_fn=collate)
        .repeat()
    )
    return _epochs(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers))


def _shard_urls(pattern: str) -> list[str]:
    """Of `…/train-{00000..00015}.tar`, on disk or in a bucket."""
    if not pattern.startswith("s3://"):
        return list(braceexpand.braceexpand(pattern))
    key, secret, endpoint = (os.environ[f"AWS_{k}"] for k in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "ENDPOINT_URL"))
    curl = f"pipe:curl -sf --aws-sigv4 aws:amz:us-east-1:s3 -u {key}:{secret} {endpoint}/"
    return [curl + path for path in braceexpand.braceexpand(pattern.removeprefix("s3://"))]


def read_mosaicml(source: str, workers: int, cache: str) -> Batches:
    _without_torchvision_operators()
    from streaming import StreamingDataset

    remote = source if source.startswith("s3://") else None
    if remote:
        os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    dataset = StreamingDataset(
        remote=remote, local=cache if remote else source, shuffle=True, batch_size=BATCH, num_canonical_nodes=1
    )
    return _epochs(torch.utils.data.DataLoader(dataset, **_loading(workers)))


def read_litdata(source: str, workers: int, cache: str) -> Batches:
    _without_torchvision_operators()
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # its client refuses http endpoints
    dataset = StreamingDataset(source, cache_dir=cache if source.startswith("s3://") else None, shuffle=True)
    return _epochs(StreamingDataLoader(dataset, **_loading(workers)))


def _loading(workers: int) -> dict[str, Any]:
    def collate(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        return decode([(sample["jpg"], int(sample["cls"])) for sample in samples])

    return {
        "batch_size": BATCH, "num_workers": workers, "collate_fn": collate, "persistent_workers": workers > 0
    }  # fmt: skip


def _epochs(loader: Any) -> Batches:
    while True:
        yield from loader


@lru_cache
def _without_torchvision_operators() -> None:
    """These libraries import torchvision, whose wheel is built for CUDA: without it its operators are missing."""
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# --- writers ---------------------------------------------------------------------------------------------------------


def write(form: str, shards: str, destination: str) -> None:
    import webdataset

    _without_torchvision_operators()
    urls = _shard_urls(shards)
    samples = ({"jpg": s["jpg"], "cls": int(s["cls"])} for s in webdataset.WebDataset(urls, shardshuffle=False))
    shard_bytes = sum(Path(url).stat().st_size for url in urls) // len(urls)
    if form == "mosaicml":
        from streaming import MDSWriter

        with MDSWriter(out=destination, columns={"jpg": "bytes", "cls": "int"}, size_limit=shard_bytes) as writer:
            for sample in samples:
                writer.write(sample)
    else:
        from litdata.streaming import Cache

        cache = Cache(destination, chunk_bytes=shard_bytes)
        for number, sample in enumerate(samples):
            cache[number] = sample
        cache.done()
        cache.merge()


READERS = {"webdataset": read_webdataset, "mosaicml": read_mosaicml, "litdata": read_litdata}


def main() -> None:
    what, name, *given = sys.argv[1:]
    torch.set_num_threads(1)
    if what == "write":
        write(name, *given)
    else:
        serve(lambda source, cache: READERS[name](source, int(given[0]), cache))


if __name__ == "__main__":
    main()
