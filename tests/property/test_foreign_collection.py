"""Any change of a manifest or an index gives a SaganError or a right collection, and changes no other file."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
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
from tests.hostile_collection import contents_below, write_index

thorough = settings(max_examples=100, deadline=None)
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


def hostile_values(root: Path) -> st.SearchStrategy[Any]:
    """Values that lead elsewhere, are too large, or have another type."""
    names = ["", ".", "..", "../home/id.tar", f"{root}/home/id.tar", "../../home/id", "a/b.tar", "x.lock"]
    digits = st.text("0123456789abcdef", min_size=63, max_size=65)
    numbers = st.integers(-(2**70), 2**70) | st.sampled_from([-1, 0, 1, 2**31 - 1, 2**31, 2**63 - 1])
    scalars = st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=20) | st.sampled_from(names) | digits
    return st.recursive(scalars, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(), part, max_size=3))


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Every container and key inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [place for key in keys for place in [(value, key), *places_in(value[key])]]


def mutate(value: Any, data: st.DataObject, root: Path) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        if not (places := places_in(value)):
            return
        container, key = data.draw(st.sampled_from(places))
        match data.draw(st.sampled_from(["replace", "copy", "repeat", "rename", "delete"])):
            case "replace":
                container[key] = data.draw(hostile_values(root))
            case "copy":
                other, other_key = data.draw(st.sampled_from(places))
                container[key] = deepcopy(other[other_key])
            case "repeat" if isinstance(container, list):
                container.append(deepcopy(container[key]))
            case "rename" if isinstance(container, dict):
                container[str(data.draw(hostile_values(root)))] = container.pop(key)
            case _:
                del container[key]


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
@given(data=st.data())
def test_any_manifest(place: Path, data: st.DataObject) -> None:
    folder = copy(place)
    manifest = json.loads((folder / "manifest.json").read_text())
    mutate(manifest, data, place)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    check(folder, place)


@thorough
@given(data=st.data())
def test_any_bytes_of_a_manifest(place: Path, data: st.DataObject) -> None:
    folder = copy(place)
    damage(folder / "manifest.json", data)
    check(folder, place)


@thorough
@given(data=st.data())
def test_any_value_of_an_index(place: Path, data: st.DataObject) -> None:
    folder = copy(place)
    stored = safetensors.numpy.load((folder / "index.safetensors").read_bytes())
    columns = {name: column.copy() for name, column in stored.items()}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(columns)))
        column = columns[name]
        kind = data.draw(st.sampled_from(["value", "type", "cut", "shape", "delete"]))
        if kind == "value" and column.dtype.kind == "i" and column.size:
            limits = np.iinfo(column.dtype)
            extreme = st.sampled_from([limits.min, limits.max, -1, 0, 1, 2, 512])
            value = data.draw(extreme | st.integers(int(limits.min), int(limits.max)))
            column.flat[data.draw(st.integers(0, column.size - 1))] = value
        elif kind == "type":
            columns[name] = column.astype(data.draw(st.sampled_from(["i1", "i4", "i8", "u8", "f2", "f8", "?"])))
        elif kind == "cut":
            columns[name] = np.ascontiguousarray(column[: data.draw(st.integers(0, len(column)))])
        elif kind == "shape":
            columns[name] = column.reshape(1, -1)
        elif len(columns) > 1:
            del columns[name]
    write_index(folder, safetensors.numpy.save(columns))
    check(folder, place)


@thorough
@given(data=st.data())
def test_any_bytes_of_an_index(place: Path, data: st.DataObject) -> None:
    folder = copy(place)
    damage(folder / "index.safetensors", data)
    write_index(folder, (folder / "index.safetensors").read_bytes())
    check(folder, place)


@thorough
@given(data=st.data())
def test_any_manifest_of_a_set_of_files(place: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as temp:
        made = Path(temp) / "made"
        (made / "code").mkdir(parents=True)
        (made / "code" / "a.py").write_text("x = 1")
        (made / "state").write_text("state")
        file_sets.upload_set(made, f"{temp}/set", images=640, names=["a"])
        path = Path(temp, "set", "manifest.json")
        manifest = json.loads(path.read_text())
        mutate(manifest, data, place)
        path.write_text(json.dumps(manifest))
        (Path(temp) / "id.tar").write_text(CANARY)
        before = contents_below(Path(temp))
        with suppress(SaganError):
            assert file_sets.verify_set(f"{temp}/set").digest
        with suppress(SaganError):
            assert file_sets.fetch_set(f"{temp}/set", Path(temp) / "a" / "b").digest
        shutil.rmtree(Path(temp) / "a", ignore_errors=True)
        assert contents_below(Path(temp)) == before


def damage(path: Path, data: st.DataObject) -> None:
    """Flip, insert, delete or cut bytes."""
    contents = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(contents) - 1)))
        match data.draw(st.sampled_from(["flip", "insert", "delete", "cut"])):
            case "flip" if contents:
                contents[at] ^= data.draw(st.integers(1, 255))
            case "insert":
                contents[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del contents[at : at + data.draw(st.integers(1, 8))]
            case _:
                del contents[at:]
    path.write_bytes(contents)
