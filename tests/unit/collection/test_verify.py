from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.collection.manifest import Collection
from pipeline.collection.shard_file import read_shard
from pipeline.collection.verify import verify_collection
from pipeline.errors import CorruptError


def test_a_whole_collection_passes(packed: Collection) -> None:
    seen: list[tuple[int, int | None]] = []
    assert verify_collection(packed.url, lambda done, total: seen.append((done, total))).digest == packed.digest
    assert seen[-1] == (60, 60)


def test_a_flipped_byte_is_found_with_shard_and_key(packed: Collection, copied: Path) -> None:
    """In the middle of an image: its checksum fails, and so does the shard's."""
    name = packed.shards[3].name
    sample = list(read_shard(copied / name))[2]
    data = bytearray((copied / name).read_bytes())
    data[sample.offset + sample.length // 2] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(CorruptError) as caught:
        verify_collection(str(copied))
    assert f"{name}: its SHA-256 differs from the manifest" in caught.value.message
    assert f"{name}: {sample.name}: " in caught.value.message
    assert packed.shards[2].name not in caught.value.message


def test_missing_and_truncated_shards_are_all_named(packed: Collection, copied: Path) -> None:
    (copied / packed.shards[0].name).unlink()
    truncated = copied / packed.shards[1].name
    truncated.write_bytes(truncated.read_bytes()[:5000])
    with pytest.raises(CorruptError) as caught:
        verify_collection(str(copied))
    assert f"{packed.shards[0].name}: missing" in caught.value.message
    assert packed.shards[1].name in caught.value.message
