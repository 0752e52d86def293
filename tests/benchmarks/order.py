"""What an order is worth and what it costs: `python -m tests.benchmarks.order [--json FILE]`.

First how well it mixes 1.28 M images against a permutation of all of them, for choices of lanes and shard size with
windows of 2 048. It matters most where a collection lies sorted by class (`sagan pack` writes samples permuted). Then
its cost at scale, simulated for an epoch: nothing is stored or fetched. Images of 10.5 KB (JPEG, 128 px, in a tar),
eight ranks a node, 1 000 images/s and rank.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import safetensors.numpy

from pipeline.collection.manifest import Shard
from pipeline.streaming.order import Order
from sagan.random import Purpose, permutation

WINDOW, BATCH, CLASSES = 2048, 256, 1000
IMAGE_BYTES, RANKS_PER_NODE, IMAGES_PER_S = 10_500, 8, 1000
IMAGENET = 1_280_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures as one object")
    given = parser.parse_args()
    quality()
    figures = scale()
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


# --- mixing ----------------------------------------------------------------------------------------------------------


def quality() -> None:
    print(f"mixing of {IMAGENET:,} images: windows of {WINDOW}, batches of {BATCH}, packed by class ({CLASSES})")
    print("                 neighbours  classes in  longest run  pairs of    first      shards on  fetches × set,")
    print("lanes  images    in images   a batch     of a class   a shard     batch, MB  disk at    8 / 64 workers")
    print("       a shard   apart                                × random               once")
    cost, value = "{:>9,.0f}{:>10}{:>14.2f} /{:5.2f}", "{:>13,.0f}{:>10.0f}{:>12}{:>13.1f}"
    for lanes in (4, 16, 64):
        for per_shard in (250, 1000, 4000):
            order = Order([per_shard] * (IMAGENET // per_shard), 0, lanes, WINDOW)
            first_mb = len(np.unique(order.shards(range(BATCH)))) * per_shard * IMAGE_BYTES / 1e6
            fetches = (order.fetches(workers) * per_shard / IMAGENET for workers in (8, 64))
            mixed = value.format(*mixing(order.samples(range(IMAGENET)), per_shard))
            print(f"{lanes:5}{per_shard:9}{mixed}", cost.format(first_mb, lanes * (WINDOW // per_shard + 1), *fetches))
    print("any permutation".ljust(14) + value.format(*mixing(permutation(IMAGENET, 0, Purpose.PACKING), 1000))[1:])


def mixing(ids: np.ndarray, per_shard: int) -> tuple[float, float, int, float]:
    """Of a sequence of sample ids: how far apart the neighbours of the packed order come (median); distinct classes of
    a batch and the longest run of one class, where the packed order is by class; pairs of a batch that lie in one
    shard, as a multiple of what a random permutation expects."""
    n = len(ids)
    places = np.empty(n, dtype=np.int64)
    places[ids] = np.arange(n)
    classes = ids * CLASSES // n
    changes = np.flatnonzero(np.diff(classes, prepend=-1, append=-1))
    same_shard = pairs((ids // per_shard).reshape(-1, BATCH)) / (per_shard / n)
    apart = np.median(np.abs(np.diff(places)))
    return float(apart), distinct(classes.reshape(-1, BATCH)).mean(), int(np.diff(changes).max()), same_shard


def distinct(rows: np.ndarray) -> np.ndarray:
    return (np.diff(np.sort(rows, axis=1), axis=1) > 0).sum(axis=1) + 1


def pairs(rows: np.ndarray) -> float:
    """The share of all pairs inside rows that are equal."""
    _, counts = np.unique(rows + (np.arange(len(rows)) * (rows.max() + 1))[:, None], return_counts=True)
    return float((counts * (counts - 1)).sum() / (len(rows) * rows.shape[1] * (rows.shape[1] - 1)))


# --- scale -----------------------------------------------------------------------------------------------------------


def scale() -> dict[str, float]:
    print(
        f"\nscale: {RANKS_PER_NODE} ranks a node, {IMAGES_PER_S:,} images/s and rank, {IMAGE_BYTES / 1e3} KB an image"
    )
    print("                                   order, CPU                    stored, MB        an epoch")
    print("    images  shards  ranks  lanes    s an  ms a cold  µs a  MB at  manifest  index  fetches  requests  GB of")
    print("                                   epoch   position  batch  most                   × set  a second  a node")
    figures: dict[str, float] = {}
    for images, shards, ranks, lanes in (
        (1_280_000, 1_300, 8, 16),
        (1_280_000, 1_300, 16, 16),
        (1_280_000, 1_300, 32, 32),
        (1_280_000, 1_300, 64, 64),
        (13_000_000, 13_000, 512, 512),
    ):
        sizes = np.diff(np.arange(shards + 1) * images // shards).tolist()
        order, slab = Order(sizes, 0, lanes, WINDOW), WINDOW * lanes
        cold_s = cpu_seconds(walk, order, range(images - 1, images), 1)
        epoch_s = cpu_seconds(walk, order, range(images, 2 * images), slab)
        batch_s = cpu_seconds(walk, order, range(images, images + slab), BATCH) / (slab / BATCH)
        tracemalloc.start()
        walk(Order(sizes, 0, lanes, WINDOW), range(images), slab)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        manifest, index = stored(sizes)
        per_node = needed(order, sizes, ranks, slab)
        shard_bytes = images / shards * IMAGE_BYTES
        side_by_side = -(-lanes * RANKS_PER_NODE // ranks) * (WINDOW * shards / images + 1) * shard_bytes
        requests_per_s = per_node.sum() / (images / (ranks * IMAGES_PER_S))
        fetches = per_node.sum() / shards
        print(
            f"{images:>10,}{shards:>8,}{ranks:>7}{lanes:>7}{epoch_s:>8.2f}{cold_s * 1e3:>11.1f}{batch_s * 1e6:>6.0f}"
            f"{most / 1e6:>7.1f}{manifest / 1e6:>10.1f}{index / 1e6:>7.0f}{fetches:>9.2f}{requests_per_s:>10.0f}"
            f"{per_node.max() * shard_bytes / 1e9:>8.2f} ({side_by_side / 1e9:.2f})",
            flush=True,
        )
        figures |= {f"order_seconds_{images}_{ranks}": epoch_s, f"fetches_{images}_{ranks}": fetches}
    return figures


def cpu_seconds(work: Callable[..., object], *given: object) -> float:
    """Which a busy machine does not stretch."""
    began = time.process_time()
    work(*given)
    return time.process_time() - began


def walk(order: Order, positions: range, stride: int) -> None:
    """As a worker does: never all at once."""
    for start in range(positions.start, positions.stop, stride):
        order.samples(range(start, min(start + stride, positions.stop)))


def needed(order: Order, sizes: list[int], ranks: int, stride: int) -> np.ndarray:
    """Shards that each node fetches in an epoch."""
    found = np.zeros((-(-ranks // RANKS_PER_NODE), len(sizes)), dtype=bool)
    for start in range(0, order.samples_per_epoch, stride):
        positions = np.arange(start, min(start + stride, order.samples_per_epoch))
        found[positions % ranks // RANKS_PER_NODE, order.shards(positions)] = True
    return found.sum(axis=1)


def stored(sizes: list[int]) -> tuple[int, int]:
    """Bytes of a manifest's shards, and of an index."""
    shards = [asdict(Shard(f"train-{i:05d}.tar", n * IMAGE_BYTES, "0" * 64, n, "train")) for i, n in enumerate(sizes)]
    n = sum(sizes)
    columns: dict[str, np.ndarray] = {
        "shard": np.zeros(n, np.int32),
        "offset": np.zeros(n, np.int64),
        "length": np.zeros(n, np.int32),
        "label": np.zeros(n, np.int32),
    }
    return len(json.dumps(shards, indent=1)), len(safetensors.numpy.save(columns))


if __name__ == "__main__":
    main()
