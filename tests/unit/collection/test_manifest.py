from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.collection.manifest import Collection
from pipeline.errors import CorruptError, UsageError


def test_the_manifest_describes_the_collection(packed: Collection) -> None:
    assert (packed.resolution, packed.encoding, packed.num_classes) == (32, "png", 3)
    assert packed.class_names == ["ant", "bee", "cow"]
    assert packed.splits == {"train": range(60)}
    assert packed.shard_sizes("train") == [7] * 8 + [4]


def test_an_unknown_split_is_refused_and_the_others_are_named(packed: Collection) -> None:
    with pytest.raises(UsageError, match="no split 'test'") as caught:
        packed.size("test")
    assert "train" in caught.value.remedy


def test_the_index_says_where_the_bytes_of_every_image_are(packed: Collection, class_of: Callable[..., str]) -> None:
    for i, (number, offset, length) in enumerate(zip(packed.shard, packed.offset, packed.length, strict=True)):
        data = Path(packed.url, packed.shards[number].name).read_bytes()[offset : offset + length]
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        assert packed.class_names[packed.labels[i]] == class_of(pixels)


def test_evenly_spaced_ids_span_a_split(packed: Collection) -> None:
    assert packed.evenly_spaced_ids("train", 4).tolist() == [0, 15, 30, 45]
    assert packed.evenly_spaced_ids("train", 100).tolist() == list(range(60))


def test_a_changed_index_is_refused(copied: Path) -> None:
    data = bytearray((copied / "index.safetensors").read_bytes())
    data[-1] ^= 1
    (copied / "index.safetensors").write_bytes(data)
    with pytest.raises(CorruptError, match=r"index\.safetensors differs"):
        Collection.open(str(copied))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}'])
def test_a_file_that_is_not_a_manifest_is_refused(copied: Path, text: str) -> None:
    (copied / "manifest.json").write_text(text)
    with pytest.raises(CorruptError, match=r"manifest\.json is not"):
        Collection.open(str(copied))


def test_a_manifest_of_another_format_is_refused(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(UsageError, match="format 2"):
        Collection.open(str(copied))
