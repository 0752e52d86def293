from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.collection.manifest import Collection
from pipeline.errors import CorruptError, UsageError
from tests.hostile_collection import change_index, change_manifest, write_index


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


def test_the_digest_does_not_depend_on_the_names_at_the_source(packed: Collection, copied: Path) -> None:
    change_manifest(copied, lambda manifest: manifest.update(keys={"size": 1, "sha256": "0" * 64}))
    assert Collection.open(str(copied)).digest == packed.digest
    change_manifest(copied, lambda manifest: manifest.update(class_names=["ant", "bee", "dog"]))
    assert Collection.open(str(copied)).digest != packed.digest


FOREIGN: list[tuple[str, dict[str, Any]]] = [
    *(
        ("shards.1.name", {"name": name})
        for name in (
            "/home/x/.bashrc",
            "../x.tar",
            "a/x.tar",
            "a\\x.tar",
            ".x.tar",
            "",
            "x",
            "x\n.tar",
            "\x1b[2J.tar",
            "x" * 300 + ".tar",
            "\ud800.tar",
            7,
            None,
        )
    ),
    ("shards", {"name": "train-00000.tar"}),
    *(
        ("shards.1.sha256", {"sha256": digest})
        for digest in ("../home/id", "0" * 64 + ".lock", "0" * 64 + "\n", "A" * 64, "0" * 63, "room", 0)
    ),
    *(("shards.1.size", {"size": size}) for size in (-1, 1.0, True, "7", 2**70, None)),
    *(("shards.1.count", {"count": count}) for count in (-1, 0, 7.0, True, 2**63)),
    ("shards", {"count": 10**12}),
    *(("shards.1.split", {"split": split}) for split in ("", "a/b", "..", "\x1b", 3)),
    ("shards", {"split": "between"}),
    ("shards.1.more", {"more": 1}),
]


@pytest.mark.parametrize(("field", "values"), FOREIGN)
def test_a_foreign_entry_of_a_shard_is_named(copied: Path, field: str, values: dict[str, Any]) -> None:
    change_manifest(copied, lambda manifest: manifest["shards"][1].update(values))
    with pytest.raises(CorruptError, match=rf"manifest\.json is not the manifest of a collection: {field}: ") as caught:
        Collection.open(str(copied))
    assert caught.value.message.isprintable()


FOREIGN_FIELDS: dict[str, list[Any]] = {
    "resolution": [{"resolution": value} for value in (10**6, 0, -32, 32.0, True, "32", None)],
    "encoding": [{"encoding": value} for value in ("eps", "../x", "", 1, None)],
    "class_names": [{"class_names": value} for value in (["a", "a", "a"], ["x"] * 200_000, "abc", {"a": 1})],
    "class_names.0": [{"class_names": [value]} for value in ("", "\x1b[2J", "a\nb", "x" * 2000, 3, None)],
    "shards": [{"shards": []}, {"shards": {}}, {"shards": None}, {"shards": "x"}, {"shards": [[]]}],
    "index": [{"index": None}, {"index": []}, {"index": "x"}],
    "index.sha256": [{"index": {"size": 9, "sha256": value}} for value in ("x", None)],
    "index.size": [{"index": {"size": value, "sha256": "0" * 64}} for value in (-1, 1.5, 2**80)],
    "keys.size": [{"keys": {"size": value, "sha256": "0" * 64}} for value in (-1, True)],
}


@pytest.mark.parametrize(
    ("field", "values"), [(field, values) for field, several in FOREIGN_FIELDS.items() for values in several]
)
def test_a_foreign_field_is_named(copied: Path, field: str, values: dict[str, Any]) -> None:
    change_manifest(copied, lambda manifest: manifest.update(values))
    with pytest.raises(CorruptError, match=rf"manifest\.json is not the manifest of a collection: {field}"):
        Collection.open(str(copied))


@pytest.mark.parametrize("format_", [True, 1.0, "1", None, [1], 2**200])
def test_a_foreign_format_is_refused(copied: Path, format_: Any) -> None:
    change_manifest(copied, lambda manifest: manifest.update(format=format_))
    with pytest.raises((CorruptError, UsageError), match="format"):
        Collection.open(str(copied))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 900 + "1" + "}" * 900, '{"format": 1' + "0" * 9000 + "}"])
def test_json_that_exhausts_the_parser_is_refused(copied: Path, text: str) -> None:
    (copied / "manifest.json").write_text(text)
    with pytest.raises((CorruptError, UsageError)):
        Collection.open(str(copied))


def test_a_manifest_of_any_size_is_not_read_to_its_end(copied: Path) -> None:
    with (copied / "manifest.json").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(CorruptError, match="has more than"):
        Collection.open(str(copied))


def at(column: str, i: int, value: int) -> Callable[[dict[str, np.ndarray]], None]:
    def change(columns: dict[str, np.ndarray]) -> None:
        columns[column][i] = value

    return change


def as_type(column: str, kind: Any) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda columns: columns.update({column: columns[column].astype(kind)})


@pytest.mark.parametrize(
    ("column", "change"),
    [
        *(("shard", at("shard", 0, value)) for value in (-1, 1, 9, 2**31 - 1)),
        ("shard", lambda columns: columns.update(shard=columns["shard"][::-1].copy())),
        *(("offset", at("offset", 5, value)) for value in (-1, 10**9, 2**63 - 1)),
        *(("length", at("length", 5, value)) for value in (0, -1, 2**31 - 1)),
        ("offset", at("length", 5, 2**24)),
        *(("label", at("label", 5, value)) for value in (-1, 3, 99)),
        *((name, as_type(name, kind)) for name in ("shard", "length", "label") for kind in (np.int64, np.float32)),
        *(("offset", as_type("offset", kind)) for kind in (np.int32, np.uint64, np.float64)),
        *((name, lambda c, n=name: c.update({n: c[n][:-1].copy()})) for name in ("shard", "offset", "length", "label")),
        ("label", lambda columns: columns.update(label=columns["label"].reshape(-1, 1))),
        ("columns", lambda columns: columns.pop("label")),
        ("columns", lambda columns: columns.update(more=columns["label"])),
    ],
)
def test_a_foreign_column_of_the_index_is_named(
    copied: Path, column: str, change: Callable[[dict[str, np.ndarray]], object]
) -> None:
    change_index(copied, change)
    with pytest.raises(CorruptError, match=rf"index\.safetensors.*\b{column}\b"):
        Collection.open(str(copied))


def test_labels_of_a_collection_without_classes_are_zero(copied: Path) -> None:
    change_manifest(copied, lambda manifest: manifest.update(class_names=[]))
    with pytest.raises(CorruptError, match="label of sample"):
        Collection.open(str(copied))


@pytest.mark.parametrize("data", [b"", b"x", b"\xff" * 8, (2**62).to_bytes(8, "little") + b"{}", b"\2\0\0\0\0\0\0\0{}"])
def test_an_index_that_is_no_safetensors_file_is_refused(copied: Path, data: bytes) -> None:
    write_index(copied, data)
    with pytest.raises(CorruptError, match=r"index\.safetensors"):
        Collection.open(str(copied))


def test_an_index_larger_than_its_samples_is_not_read(copied: Path) -> None:
    change_manifest(copied, lambda manifest: manifest["index"].update(size=2**40))
    with pytest.raises(CorruptError, match=r"index\.safetensors: the manifest says .* bytes, but at most"):
        Collection.open(str(copied))


def test_an_index_larger_than_the_manifest_says_is_not_read_to_its_end(copied: Path) -> None:
    with (copied / "index.safetensors").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(CorruptError, match="has more than"):
        Collection.open(str(copied))
