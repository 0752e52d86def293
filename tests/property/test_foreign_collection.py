"""Any change of a manifest or an index gives a SaganError or a right collection, and changes no other file."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.collection.manifest import Collection
from pipeline.collection.verify import verify_collection
from pipeline.config.schema import DataSection, PackSection
from pipeline.errors import SaganError
from pipeline.packing.pack import pack
from pipeline.storage import file_sets
from pipeline.streaming.stream import Stream
from sagan.ranks import World
from tests.faults.hostile.random_changes import changed_tensors, changed_value, damaged
from tests.hostile_collection import contents_below, write_index

thorough = settings(max_examples=100)
RANDOM = st.randoms(use_true_random=False)  # Hypothesis draws its numbers, and finds a simple change that fails
CANARY = "mine"


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder with a collection of 12 images, a home beside it, and an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        root, noise = Path(folder), np.random.default_rng(0)
        for name in ("ant", "bee"):
            (root / "images" / name).mkdir(parents=True)
            for i in range(6):
                image = Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                image.save(root / "images" / name / f"{i}.png")
        section = PackSection(source=f"{root}/images", resolution=32, shard_images=5)
        pack(f"{root}/original", section, lambda done, total: None)
        (root / "home").mkdir()
        (root / "home" / "id.tar").write_text(CANARY)
        yield root


def names_below(root: Path) -> list[str]:
    """Names that lead out of a folder, to a file of somebody else."""
    return [f"{root}/home/id.tar", *("../" * up + "home/id.tar" for up in (1, 2, 3)), "../../home/id", "x.lock", ".."]


def check(collection: Path, root: Path) -> None:
    """Open, verify and stream: each raises a SaganError or succeeds, and only the cache changes."""
    before = contents_below(root / "home") | contents_below(collection)
    for use in (use_index, use_verify, use_stream):
        with suppress(SaganError):
            use(collection, root)
    assert contents_below(root / "home") | contents_below(collection) == before
    assert {path.name for path in root.iterdir()} - {"cache"} == {"images", "original", "home", collection.name}


def use_index(folder: Path, root: Path) -> None:
    collection = Collection.open(str(folder))
    sizes = np.array([shard.size for shard in collection.shards])[collection.shard]
    assert (collection.offset >= 0).all()
    assert (collection.length > 0).all()
    assert (collection.offset + collection.length <= sizes).all()
    assert ((collection.labels >= 0) & (collection.labels < max(1, len(collection.class_names)))).all()
    assert sum(map(len, collection.splits.values())) == len(collection.labels)


def use_verify(folder: Path, root: Path) -> None:
    verify_collection(str(folder), lambda done, total: None)


def use_stream(folder: Path, root: Path) -> None:
    collection = Collection.open(str(folder))
    data = DataSection(train=str(folder), cache=f"{root}/cache", window=4, patience_s=0, threads=1)
    split = next(iter(collection.splits))
    with closing(Stream(collection, split, seed=0, world=World(), data=data)) as stream:
        next(stream.batches(0, min(4, collection.size(split))))


def copy(root: Path) -> Path:
    folder = root / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(root / "cache", ignore_errors=True)
    return Path(shutil.copytree(root / "original", folder))


@thorough
@given(random=RANDOM)
def test_any_manifest(place: Path, random: Random) -> None:
    folder = copy(place)
    path = folder / "manifest.json"
    path.write_text(json.dumps(changed_value(json.loads(path.read_text()), random, names_below(place))))
    check(folder, place)


@thorough
@given(random=RANDOM)
def test_any_bytes_of_a_manifest(place: Path, random: Random) -> None:
    folder = copy(place)
    (folder / "manifest.json").write_bytes(damaged((folder / "manifest.json").read_bytes(), random))
    check(folder, place)


@thorough
@given(random=RANDOM)
def test_any_index(place: Path, random: Random) -> None:
    folder = copy(place)
    write_index(folder, changed_tensors((folder / "index.safetensors").read_bytes(), random, names_below(place)))
    check(folder, place)


@thorough
@given(random=RANDOM)
def test_any_manifest_of_a_set_of_files(random: Random) -> None:
    with tempfile.TemporaryDirectory() as temp:
        made = Path(temp) / "made"
        (made / "code").mkdir(parents=True)
        (made / "code" / "a.py").write_text("x = 1")
        (made / "state").write_text("state")
        file_sets.upload_set(made, f"{temp}/set", images=640, names=["a"])
        path = Path(temp, "set", "manifest.json")
        path.write_text(json.dumps(changed_value(json.loads(path.read_text()), random, names_below(Path(temp)))))
        (Path(temp) / "home").mkdir()
        (Path(temp) / "home" / "id.tar").write_text(CANARY)
        before = contents_below(Path(temp))
        with suppress(SaganError):
            assert file_sets.verify_set(f"{temp}/set").digest
        with suppress(SaganError):
            assert file_sets.fetch_set(f"{temp}/set", Path(temp) / "a" / "b").digest
        shutil.rmtree(Path(temp) / "a", ignore_errors=True)
        assert contents_below(Path(temp)) == before
