from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from pipeline.collection.image_codec import decode_into
from pipeline.collection.manifest import Collection
from pipeline.config.schema import DataSection, PackSection
from pipeline.errors import CorruptError, UsageError
from pipeline.packing.pack import pack
from pipeline.streaming.order import Order
from pipeline.streaming.stream import Batch, Stream
from sagan.ranks import World

SEED, LANES, WINDOW = 11, 4, 5


@pytest.fixture
def section(packed: Collection, tmp_path: Path) -> DataSection:
    return DataSection(train=packed.url, cache=f"{tmp_path}/cache", lanes=LANES, window=WINDOW, threads=2, ahead=3)


@contextmanager
def streaming(
    collection: Collection, section: DataSection, *, rank: int = 0, size: int = 1, split: str = "train"
) -> Iterator[Stream]:
    stream = Stream(collection, split, seed=SEED, world=World(rank, size), data=section)
    yield stream
    stream.close()


def take(stream: Stream, start: int, batch: int, count: int) -> list[Batch]:
    return list(islice(stream.batches(start, batch), count))


def expected(collection: Collection, positions: range, split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """What stands at `positions`, read from the shards one by one."""
    order = Order(collection.shard_sizes(split), SEED, LANES, WINDOW)
    ids = collection.splits[split].start + order.samples(positions)
    images = np.empty((len(ids), collection.resolution, collection.resolution, 3), dtype=np.uint8)
    for pixels, i in zip(images, ids, strict=True):
        data = Path(collection.url, collection.shards[collection.shard[i]].name).read_bytes()
        decode_into(data[collection.offset[i] : collection.offset[i] + collection.length[i]], pixels)
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(collection.labels[ids])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batch", [8, 25])
def test_the_workers_of_any_world_read_what_the_order_says(
    packed: Collection, section: DataSection, size: int, batch: int
) -> None:
    """Over more than two epochs of 60 images, with batches that divide neither the epoch nor among the workers."""
    count = 130 // batch
    images, labels = expected(packed, range(count * batch))
    for rank in range(size):
        with streaming(packed, section, rank=rank, size=size) as stream:
            taken = take(stream, 0, batch, count)
        seen = [position for shares in taken for position in shares.positions]
        assert seen == list(range(rank, count * batch, size))
        assert torch.equal(torch.cat([shares.images for shares in taken]), images[seen])
        assert torch.equal(torch.cat([shares.labels for shares in taken]), labels[seen])


@pytest.mark.parametrize("start", [0, 1, 7, 59, 60, 61, 119, 1000 * 60 + 17])
def test_resuming_anywhere_equals_the_uninterrupted_sequence(
    packed: Collection, section: DataSection, start: int
) -> None:
    images, labels = expected(packed, range(start, start + 24))
    with streaming(packed, section) as stream:
        taken = take(stream, start, 8, 3)
    assert torch.equal(torch.cat([batch.images for batch in taken]), images)
    assert torch.equal(torch.cat([batch.labels for batch in taken]), labels)


@pytest.mark.parametrize(("size", "threads"), [(1, 4), (2, 1), (3, 2), (8, 1)])
def test_a_run_continues_in_the_middle_of_an_epoch_on_other_workers_and_threads(
    packed: Collection, section: DataSection, size: int, threads: int
) -> None:
    with streaming(packed, section, rank=1, size=2) as stream:
        take(stream, 0, 9, 5)
        state = json.loads(json.dumps(stream.state_dict()))
    assert state["position"] == 45
    images, _ = expected(packed, range(45, 90))
    changed = section.model_copy(update={"threads": threads})
    for rank in range(size):
        with streaming(packed, changed, rank=rank, size=size) as stream:
            taken = list(islice(stream.resume(state, 9), 5))
        seen = [position for batch in taken for position in batch.positions]
        assert seen == [p for p in range(45, 90) if p % size == rank]
        assert torch.equal(torch.cat([batch.images for batch in taken]), images[[p - 45 for p in seen]])


def test_a_position_of_another_collection_or_order_is_refused_with_both(
    packed: Collection, section: DataSection
) -> None:
    with streaming(packed, section) as stream:
        state = stream.state_dict()
        assert next(stream.resume(state, 8)).positions == range(8)
    with (
        streaming(replace(packed, digest="e" * 64), section) as stream,
        pytest.raises(UsageError, match=f"{packed.digest}.* has collection e{{64}}"),
    ):
        stream.resume(state, 8)
    with (
        streaming(packed, section.model_copy(update={"lanes": 2})) as stream,
        pytest.raises(UsageError, match=f"'lanes': {LANES}.*'lanes': 2"),
    ):
        stream.resume(state, 8)


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_webdataset_composes_with_the_order(
    packed: Collection, section: DataSection, rank: int, size: int, processes: int
) -> None:
    """Its map and its batched, in this process or in DataLoader's, give what `batches` gives."""

    def decode(sample: dict[str, Any]) -> tuple[np.ndarray, int, str]:
        pixels = np.empty((32, 32, 3), dtype=np.uint8)
        decode_into(sample["png"], pixels)
        return pixels, int(sample["cls"]), f"{sample['__url__']} {sample['__key__']}"

    order = Order(packed.shard_sizes("train"), SEED, LANES, WINDOW)

    with streaming(packed, section, rank=rank, size=size) as stream:
        wanted = take(stream, 7, 8, 12)
    with streaming(packed, section, rank=rank, size=size) as stream:
        stages = partial(stream.samples, 7, 8), webdataset.map(decode), webdataset.batched(8 // size)
        loader = torch.utils.data.DataLoader(
            webdataset.DataPipeline(*stages),
            batch_size=None,
            num_workers=processes,
            multiprocessing_context="fork" if processes else None,
        )
        for batch, (pixels, labels, names) in zip(wanted, loader, strict=False):
            assert torch.equal(torch.as_tensor(pixels).permute(0, 3, 1, 2), batch.images)
            assert torch.equal(torch.as_tensor(labels), batch.labels)
            ids = order.samples(batch.positions)
            assert list(names) == [f"{packed.shard_url(packed.shards[packed.shard[i]])} {i:08d}" for i in ids]


def test_memory_is_reused_only_when_no_view_of_its_batch_is_left(packed: Collection, section: DataSection) -> None:
    images, _ = expected(packed, range(8))
    with streaming(packed, section) as stream:
        batches = stream.batches(0, 8)
        held = next(batches).images[:, :1]
        places = {next(batches).images.data_ptr() for _ in range(100)}
        assert torch.equal(held, images[:, :1])
        assert held.data_ptr() not in places
        assert len(places) < 20


@pytest.mark.parametrize("change", [{"threads": 1}, {"threads": 4}, {"ahead": 1}, {"ahead": 9}])
def test_the_number_of_threads_does_not_change_the_batches(
    packed: Collection, section: DataSection, change: dict[str, Any]
) -> None:
    images, _ = expected(packed, range(120))
    with streaming(packed, section.model_copy(update=change)) as stream:
        taken = take(stream, 0, 8, 15)
    assert torch.equal(torch.cat([batch.images for batch in taken]), images)


def test_a_cache_smaller_than_the_collection_only_costs_fetches(packed: Collection, section: DataSection) -> None:
    room = 4 * max(shard.size for shard in packed.shards)
    order = Order(packed.shard_sizes("train"), SEED, 1, 7)
    tight = section.model_copy(update={"cache_gb": room / 1e9, "lanes": 1, "window": 7})
    with streaming(packed, tight) as stream:
        taken = take(stream, 0, 8, 15)
    kept = [path.stat().st_size for path in Path(section.cache).iterdir() if path.suffix == ""]
    assert sum(kept) <= room < sum(shard.size for shard in packed.shards)
    labels = torch.from_numpy(packed.labels[order.samples(range(120))])
    assert torch.equal(torch.cat([batch.labels for batch in taken]), labels)


def test_a_cache_that_cannot_hold_the_windows_is_refused_before_anything_starts(
    packed: Collection, section: DataSection
) -> None:
    with pytest.raises(UsageError, match=r"data\.cache_gb is 0\.0001, but 4 lanes") as caught:
        Stream(packed, "train", seed=0, world=World(), data=section.model_copy(update={"cache_gb": 1e-4}))
    assert "raise data.cache_gb" in caught.value.remedy


def test_labels_are_those_of_the_pixels(
    packed: Collection, section: DataSection, class_of: Callable[[np.ndarray], str]
) -> None:
    with streaming(packed, section) as stream:
        (batch,) = take(stream, 0, 60, 1)
    for image, label in zip(batch.images, batch.labels, strict=True):
        assert packed.class_names[label] == class_of(image.permute(1, 2, 0).numpy())


def test_a_batch_is_uint8_channels_last_and_says_how_long_it_took(packed: Collection, section: DataSection) -> None:
    with streaming(packed, section) as stream:
        (batch,) = take(stream, 0, 8, 1)
    assert (batch.images.shape, batch.images.dtype) == ((8, 3, 32, 32), torch.uint8)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert (batch.labels.shape, batch.labels.dtype) == ((8,), torch.int64)
    assert batch.wait_s > 0


def test_jpeg_batches_equal_pillow(images: Path, section: DataSection, tmp_path: Path) -> None:
    from io import BytesIO

    from PIL import Image

    collection = pack(f"{tmp_path}/jpeg", PackSection(source=str(images), resolution=64, encoding="jpeg"))
    order = Order(collection.shard_sizes("train"), SEED, LANES, WINDOW)
    with streaming(collection, section) as stream:
        (batch,) = take(stream, 0, 60, 1)
    data = Path(collection.url, collection.shards[0].name).read_bytes()
    for image, i in zip(batch.images, order.samples(range(60)), strict=True):
        with Image.open(BytesIO(data[collection.offset[i] : collection.offset[i] + collection.length[i]])) as pillow:
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(pillow))


def test_a_split_is_read_alone(images: Path, section: DataSection, tmp_path: Path) -> None:
    source = {"train": str(images), "heldout": str(images / "bee")}
    with pytest.raises(UsageError, match="'heldout' has no class folders"):
        pack(f"{tmp_path}/no", PackSection(source=source, resolution=32))
    (tmp_path / "bees").mkdir()
    (tmp_path / "bees" / "bee").symlink_to(images / "bee")
    source["heldout"] = f"{tmp_path}/bees"
    collection = pack(f"{tmp_path}/two", PackSection(source=source, resolution=32, shard_images=9))
    with streaming(collection, section, split="heldout") as stream:
        (batch,) = take(stream, 3, 20, 1)
    wanted, labels = expected(collection, range(3, 23), "heldout")
    assert torch.equal(batch.images, wanted)
    assert torch.equal(batch.labels, labels)
    assert set(batch.labels.tolist()) == {collection.class_names.index("bee")}


def test_an_unknown_split_is_refused(packed: Collection, section: DataSection) -> None:
    with pytest.raises(UsageError, match="no split 'valid'"):
        Stream(packed, "valid", seed=0, world=World(), data=section)


def test_a_new_iteration_ends_the_one_before_and_close_ends_all_threads(
    packed: Collection, section: DataSection
) -> None:
    before = set(threading.enumerate())
    with streaming(packed, section) as stream:
        first = stream.batches(0, 8)
        next(first)
        second = next(stream.batches(40, 8))
        assert list(first) == []
        assert torch.equal(second.images, expected(packed, range(40, 48))[0])
    assert set(threading.enumerate()) == before


def test_a_stream_can_be_closed_before_its_first_batch(packed: Collection, section: DataSection) -> None:
    with streaming(packed, section) as stream:
        stream.batches(0, 8)


def test_a_damaged_shard_is_an_error_at_its_batch_and_not_before(
    copied: Path, packed: Collection, section: DataSection
) -> None:
    damaged = int(packed.shard[Order(packed.shard_sizes("train"), SEED, LANES, WINDOW).samples(range(60))[-1]])
    path = copied / packed.shards[damaged].name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    collection = Collection.open(str(copied))
    ids = Order(collection.shard_sizes("train"), SEED, LANES, WINDOW).samples(range(60))
    whole = int(np.flatnonzero(collection.shard[ids] == damaged)[0])
    before = set(threading.enumerate())
    with streaming(collection, section) as stream:
        batches = stream.batches(0, 1)
        for _ in range(whole):
            next(batches)
        with pytest.raises(CorruptError, match=path.name):
            next(batches)
    assert set(threading.enumerate()) == before


def test_an_image_that_cannot_be_decoded_names_its_shard(packed: Collection, section: DataSection) -> None:
    """An index that points elsewhere, with a shard whose hash is right."""
    shifted = replace(packed, offset=packed.offset + 8)
    with streaming(shifted, section) as stream, pytest.raises(CorruptError, match=r"train-0000\d\.tar: image at byte"):
        next(stream.batches(0, 8))
