"""The rows of a table of path and label decide which images are packed, and their classes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UsageError
from pipeline.packing.recognise import open_source
from tests.unit.packing.coloured import by_colour, picture, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path, {f"pictures/{n}.png": picture(n) for n in range(3)})


@pytest.mark.parametrize(
    "text",
    [
        "path,label\npictures/0.png,b\npictures/1.png,a\n",
        "0.png,b\n1.png,a\n",
        "file,x,class\n0.png,9,b\n1.png,9,a",
    ],
    ids=["header", "no header", "more columns"],
)
def test_only_the_images_of_its_rows_are_taken(root: Path, text: str) -> None:
    write(root, {"labels.csv": text})
    expected = {(0, 0, 0): ("train", "b"), (1, 0, 0): ("train", "a")}
    assert by_colour(open_source(f"{root}/labels.csv")) == expected


def test_parquet_without_images_is_a_table(root: Path) -> None:
    pq.write_table(pa.table({"path": ["0.png", "1.png", "2.png"], "label": [10, 9, 10]}), root / "labels.parquet")
    source = open_source(f"{root}/labels.parquet")
    assert source.class_names == ["9", "10"], "numbers are sorted as numbers"
    assert source.labels.tolist() == [1, 0, 1]


def test_a_missing_image_is_named(root: Path) -> None:
    write(root, {"labels.csv": "path,label\n9.png,a\n"})
    with pytest.raises(UsageError, match=r"names '9\.png', but there are 0 images"):
        open_source(f"{root}/labels.csv")


@pytest.mark.parametrize("name", ["none.csv", "none.parquet", "none.tar.gz"])
def test_a_missing_table_is_named(root: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} does not exist"):
        open_source(f"{root}/{name}")
