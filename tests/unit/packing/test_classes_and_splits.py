"""Labels and names of splits mean the same in every kind of source; what is unclear is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import PackSection
from pipeline.errors import UsageError
from pipeline.packing.classes_and_splits import class_order, splits_of_folders
from pipeline.packing.pack import pack
from pipeline.packing.recognise import open_source
from tests.unit.packing.coloured_images import by_colour, picture, tar, write


def shards(folder: Path, labels: list[Any]) -> str:
    members: dict[str, bytes] = {}
    for n, label in enumerate(labels):
        members |= {f"{n}.png": picture(n), f"{n}.json": json.dumps({"label": label}).encode()}
    return str(write(folder / "shards", {"set-0.tar": tar(members)}))


def texts(folder: Path, labels: list[Any]) -> str:
    """`.cls` members of text."""
    members: dict[str, bytes] = {}
    for n, label in enumerate(labels):
        members |= {f"{n}.png": picture(n), f"{n}.cls": ("" if label is None else str(label)).encode()}
    return str(write(folder / "texts", {"set-0.tar": tar(members)}))


def parquet(folder: Path, labels: list[Any]) -> str:
    (folder / "parquet").mkdir()
    rows = {"image": [picture(n) for n in range(len(labels))], "label": labels}
    pq.write_table(pa.table(rows), folder / "parquet" / "set.parquet")
    return f"{folder}/parquet/set.parquet"


def table(folder: Path, labels: list[Any]) -> str:
    rows = "".join(f"{n}.png,{'' if label is None else label}\n" for n, label in enumerate(labels))
    images = {f"{n}.png": picture(n) for n in range(len(labels))}
    write(folder / "table", {**images, "labels.csv": f"path,label\n{rows}"})
    return f"{folder}/table/labels.csv"


def stylegan(folder: Path, labels: list[Any]) -> str:
    names = [f"00000/img{n:08d}.png" for n in range(len(labels))]
    content = json.dumps({"labels": [list(pair) for pair in zip(names, labels, strict=True)]})
    images = {name: picture(n) for n, name in enumerate(names)}
    return str(write(folder / "stylegan", {**images, "dataset.json": content}))


SOURCES = [shards, texts, parquet, table, stylegan]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 2, 10, 0], ["0", "2", "10"]),
        (["b", "a", "b", "c"], ["a", "b", "c"]),
        ([1.0, 0.0, 1.0, 2.0], ["0", "1", "2"]),
        ([-1, -1, -1, -1], []),
    ],
    ids=["numbers", "words", "whole floats", "none"],
)
def test_every_source_gives_the_same_classes(source: Any, labels: list[Any], names: list[str], tmp_path: Path) -> None:
    opened = open_source(source(tmp_path, labels))
    assert opened.class_names == names
    expected = [None if label == -1 else str(int(label)) if not isinstance(label, str) else label for label in labels]
    assert by_colour(opened) == {(n, 0, 0): ("train", name) for n, name in enumerate(expected)}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([0, 1, -7], "-7 is negative"),
        ([0, 1, 10**8], "100000000 is too large"),
        ([0.5, 1.0, 0.0], "0.5"),
    ],
    ids=["negative", "large", "fraction"],
)
def test_a_wrong_label_is_an_error_that_names_the_image(
    source: Any, labels: list[Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        open_source(source(tmp_path, labels))
    assert str(next(i for i, label in enumerate(labels) if label not in (0, 1))) in caught.value.message


@pytest.mark.parametrize("source", [shards, texts, table, stylegan])
@pytest.mark.parametrize("labels", [[2, 3, 10, "A", "K"], ["cat", 1, "dog"]], ids=["cards", "one number"])
def test_numbers_and_words_are_not_mixed(source: Any, labels: list[Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither all numbers nor all words") as caught:
        open_source(source(tmp_path, labels))
    assert "has 'A'" in caught.value.message or "has 'cat'" in caught.value.message


@pytest.mark.parametrize("source", [shards, parquet, stylegan])
def test_true_is_a_number_only_where_all_labels_are_true_or_false(source: Any, tmp_path: Path) -> None:
    assert open_source(source(tmp_path, [True, False, True])).class_names == ["0", "1"]


@pytest.mark.parametrize("source", [shards, stylegan])
def test_true_beside_numbers_is_refused(source: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has True"):
        open_source(source(tmp_path, [3, True, 1]))


@pytest.mark.parametrize("source", [shards, texts, table, stylegan])
def test_an_image_without_a_label_beside_others_is_named(source: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"some images have a class \(1, …\), but .*2\.png has none"):
        open_source(source(tmp_path, [1, 0, None, 1]))


@pytest.mark.parametrize("names", [{"v1.0.{n}": "cls"}, {"img.v1.{n}": "json"}, {"a.b/c.d.{n}": "cls"}])
def test_dots_in_names_of_shards(names: dict[str, str], tmp_path: Path) -> None:
    ((name, kind),) = names.items()
    members: dict[str, bytes] = {}
    for n in range(4):
        label = f"{n % 2}" if kind == "cls" else json.dumps({"label": n % 2})
        members |= {f"{name.format(n=n)}.png": picture(n), f"{name.format(n=n)}.{kind}": label.encode()}
    write(tmp_path / "set", {"shard-000000.tar": tar(members), "shard-000001.tar": tar(members)})
    assert by_colour(open_source(f"{tmp_path}/set")) == {(n, 0, 0): ("train", str(n % 2)) for n in range(4)}


def test_a_split_of_parquet_without_labels_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, label in {"train": [0, 1], "test": [-1, -1]}.items():
        rows = {"image": [picture(n, len(split)) for n in range(2)], "label": label}
        (tmp_path / "set").mkdir(exist_ok=True)
        pq.write_table(pa.table(rows), tmp_path / "set" / f"{split}-0.parquet")
    collection = pack(f"{tmp_path}/packed", PackSection(source=f"{tmp_path}/set", resolution=32))
    assert {split: len(ids) for split, ids in collection.splits.items()} == {"train": 2}
    out = capsys.readouterr().out
    assert "note: split test has no labels and is left out" in out
    assert "left out  2  -  no labels in split test" in out
    assert "2 classes: 0 = 0, 1 = 1" in out


def test_a_number_beyond_the_class_names_is_refused(tmp_path: Path) -> None:
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"]}}}})}
    rows = pa.table({"image": [picture(1), picture(2)], "label": [1, 2]}).replace_schema_metadata(metadata)
    pq.write_table(rows, tmp_path / "set.parquet")
    with pytest.raises(UsageError, match=r"00000001' is wrong: 2 is not a class: there are 2 classes"):
        open_source(f"{tmp_path}/set.parquet")


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        ({"Training": "train", "Testing": "test"}, 2),
        ({"TRAIN": "train", "Validation": "val", "Test": "test"}, 3),
        ({"training": "train", "valid": "val"}, 2),
        ({"train": "train", "held-out": "heldout"}, 2),
        ({"train": "train", "Hold_Out": "heldout"}, 2),
        ({"training_set": "train", "test_set": "test"}, 2),
        ({"seg_train": "train", "seg_test": "test"}, 2),
        ({"train2017": "train", "val2017": "val"}, 2),
    ],
)
def test_folders_are_splits_by_every_usual_name(folders: dict[str, str], splits: int, tmp_path: Path) -> None:
    contents, expected = {}, {}
    for a, (folder, split) in enumerate(folders.items()):
        for b, name in enumerate(("cat", "dog")):
            contents[f"set/{folder}/{name}/{name}.png"] = picture(a, b)
            expected[a, b, 0] = (split, name)
    source = open_source(str(write(tmp_path, contents)))
    assert by_colour(source) == expected
    assert len(source.splits) == splits


def test_splits_below_classes(tmp_path: Path) -> None:
    names = ["cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png"]
    source = open_source(str(write(tmp_path, {name: picture(n) for n, name in enumerate(names)})))
    assert by_colour(source) == {(n, 0, 0): (name.split("/")[1], name.split("/")[0]) for n, name in enumerate(names)}


@pytest.mark.parametrize("names", [{"train", "bus"}, {"train_station", "test_tube"}, {"cat", "dog"}, {"training"}])
def test_other_names_are_classes(names: set[str]) -> None:
    assert splits_of_folders(names) is None or names == {"training"}


@pytest.mark.parametrize("names", [{"train", "test", "extra"}, {"seg_train", "seg_test", "seg_pred"}])
def test_a_folder_beside_two_splits_is_named(names: set[str], tmp_path: Path) -> None:
    other = next(name for name in names if name in ("extra", "seg_pred"))
    contents = {f"{name}/cat/{name}.png": picture(n) for n, name in enumerate(names)}
    with pytest.raises(UsageError, match=f"are splits, but {other} is none") as caught:
        open_source(str(write(tmp_path, contents)))
    assert "sagan pack train=" in caught.value.remedy


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["0", "1", "10", "11", "2"], ["0", "1", "2", "10", "11"]),
        (["001", "010", "9"], ["001", "9", "010"]),
        (["1", "10", "2", "x"], ["1", "10", "2", "x"]),
    ],
)
def test_numbers_are_ordered_as_numbers(names: list[str], ordered: list[str], tmp_path: Path) -> None:
    assert class_order(names) == ordered
    source = open_source(str(write(tmp_path, {f"{name}/{name}.png": picture(n) for n, name in enumerate(names)})))
    assert source.class_names == ordered
    joined = open_source({"train": str(tmp_path), "heldout": str(tmp_path)})
    assert joined.class_names == ordered


@pytest.mark.parametrize("names", [[0, 1], "ab", {"a": 0}, [None], [["a"]]])
def test_class_names_of_parquet_that_are_no_texts_are_refused(names: Any, tmp_path: Path) -> None:
    url = parquet(tmp_path, [0, 1])
    features = {"info": {"features": {"label": {"names": names}}}}
    table = pq.read_table(url).replace_schema_metadata({b"huggingface": json.dumps(features).encode()})
    pq.write_table(table, url)
    with pytest.raises(UsageError, match="classes"):
        open_source(url)
