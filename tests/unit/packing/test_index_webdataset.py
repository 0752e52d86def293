"""Indexing makes a collection of existing WebDataset shards and does not change them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.collection.manifest import Collection
from pipeline.collection.verify import verify_collection
from pipeline.config.schema import PackSection
from pipeline.errors import CorruptError, UsageError
from pipeline.packing.pack import pack
from tests.unit.packing.coloured_images import png


@pytest.fixture
def shards(images: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    paths = sorted(images.rglob("*.png"))
    for name, part in {
        "set-val-0.tar": paths[:20],
        "set-train-0.tar": paths[20:35],
        "set-train-1.tar": paths[35:],
    }.items():
        with webdataset.TarWriter(f"{folder}/{name}") as sink:
            for path in part:
                key = f"./{path.parent.name}.d/{path.stem}"
                sink.write({"__key__": key, "png": path.read_bytes(), "cls": path.parent.name})
    return folder


def test_shards_of_others_become_a_collection_as_they_are(
    shards: Path, class_of: Callable[..., str], images: Path
) -> None:
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    collection = pack(str(shards), PackSection(source=str(shards), index_only=True))
    assert {name: (shards / name).read_bytes() for name in before} == before
    assert {split: len(ids) for split, ids in collection.splits.items()} == {"train": 40, "val": 20}
    assert (collection.resolution, collection.encoding) == (32, "png")
    assert collection.class_names == ["ant", "bee", "cow"]
    seen = set()
    for i, label in enumerate(collection.labels):
        start = int(collection.offset[i])
        data = (shards / collection.shards[collection.shard[i]].name).read_bytes()
        pixels = np.asarray(Image.open(io.BytesIO(data[start : start + collection.length[i]])))
        assert class_of(pixels) == collection.class_names[label]
        seen.add(pixels.tobytes())
    assert len(seen) == 60
    verify_collection(collection.url)


def test_the_command_line_takes_a_relative_path(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards.parent)
    assert CliRunner().invoke(app, ["pack", "shards/", "--index-only"], catch_exceptions=False).exit_code == 0
    assert Collection.open(str(shards)).size("train") == 40


def test_images_of_another_size_are_broken(shards: Path) -> None:
    with webdataset.TarWriter(f"{shards}/set-train-2.tar") as sink:
        sink.write({"__key__": "odd", "png": png(40, 30), "cls": "ant"})
    with pytest.raises(UsageError, match=r"set-train-2/odd\.png: 40 x 30 pixels, not 32 x 32"):
        pack(str(shards), PackSection(source=str(shards), index_only=True))


def test_other_images_cannot_be_indexed_in_place(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no WebDataset shards") as caught:
        pack(str(images), PackSection(source=str(images), index_only=True))
    assert "pack the images instead" in caught.value.remedy
    (tmp_path / "shards").mkdir()
    with webdataset.TarWriter(f"{tmp_path}/shards/0.tar") as sink:
        sink.write({"__key__": "0", "png": png(500, 500), "cls": 0})
    with pytest.raises(UsageError, match="500 pixels wide"):
        pack(f"{tmp_path}/shards", PackSection(source=f"{tmp_path}/shards", index_only=True))


def test_exclude_takes_the_names_that_verify_prints(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards of others with an image that cannot be decoded: indexed, found by verify, and indexed without it."""
    shards = tmp_path / "shards"
    shards.mkdir()
    with webdataset.TarWriter(f"{shards}/train-000.tar") as sink:
        for n, path in enumerate(sorted(images.rglob("*.png"))):
            data = path.read_bytes()
            sink.write({"__key__": f"{n:03d}", "png": data[:-900] if n in (4, 44) else data, "cls": n % 2})
    section = PackSection(source=str(shards), index_only=True)
    collection = pack(str(shards), section)
    capsys.readouterr()
    with pytest.raises(CorruptError, match=r"train-000\.tar: 044\.png: cannot be decoded"):
        verify_collection(collection.url)
    printed = capsys.readouterr().out
    assert printed == "train-000/004.png\ntrain-000/044.png\n"
    (tmp_path / "bad.txt").write_text(printed)
    (shards / "manifest.json").unlink()
    assert pack(str(shards), section.model_copy(update={"exclude": f"{tmp_path}/bad.txt"})).size("train") == 58
    verify_collection(str(shards))
    repacked = pack(f"{tmp_path}/set", PackSection(source=str(shards), resolution=32, exclude=f"{tmp_path}/bad.txt"))
    assert repacked.size("train") == 58
