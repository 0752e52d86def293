"""The rows of a table of path and label decide which images are packed, and their classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UsageError
from pipeline.packing.recognise import open_source
from tests.unit.packing.coloured_images import by_colour, picture, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path, {f"pictures/{n}.png": picture(n) for n in range(3)})


@pytest.mark.parametrize(
    "text",
    [
        "path,label\npictures/0.png,b\npictures/1.png,a\n",
        "0.png,b\n1.png,a\n",
        "file,x,class\n0.png,9,b\n1.png,9,a",
        ",x,label\n0.png,9,b\n1.png,9,a",
    ],
    ids=["header", "no header", "more columns", "a column without a name"],
)
def test_only_the_images_of_its_rows_are_taken(root: Path, text: str) -> None:
    write(root, {"labels.csv": text})
    expected = {(0, 0, 0): ("train", "b"), (1, 0, 0): ("train", "a")}
    assert by_colour(open_source(f"{root}/labels.csv")) == expected


@pytest.mark.parametrize("header", ["label,id", "Class,id", "digit,id"])
def test_labels_that_are_names_of_images_are_no_paths(root: Path, header: str) -> None:
    write(root, {"labels.csv": f"{header}\n2,0.png\n0,1.png\n"})
    source = open_source(f"{root}/labels.csv" + ("#digit" if "digit" in header else ""))
    assert by_colour(source) == {(0, 0, 0): ("train", "2"), (1, 0, 0): ("train", "0")}


@pytest.mark.parametrize("text", ["b,0.png\na,1.png\n", "0.png,b\n1.png,a\n"], ids=["label first", "path first"])
def test_a_table_without_a_header_has_its_paths_in_any_column(root: Path, text: str) -> None:
    write(root, {"labels.csv": text})
    expected = {(0, 0, 0): ("train", "b"), (1, 0, 0): ("train", "a")}
    assert by_colour(open_source(f"{root}/labels.csv")) == expected


@pytest.mark.parametrize("header", ["image,label", "Image,x,Class", "file,smiling"])
def test_a_header_is_no_row_where_an_image_has_the_name_of_a_column(root: Path, header: str) -> None:
    write(root, {f"{name}.png": picture(9) for name in ("image", "Image", "file")})
    middle = ",9" if "x" in header else ""
    write(root, {"labels.csv": f"{header}\n0.png{middle},1\n1.png{middle},0\n"})
    wanted = "#smiling" if "smiling" in header else ""
    names = ("smiling", "not smiling") if wanted else ("1", "0")
    expected = {(n, 0, 0): ("train", name) for n, name in enumerate(names)}
    assert by_colour(open_source(f"{root}/labels.csv{wanted}")) == expected


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


EXPECTED = {(n, 0, 0): ("train", name) for n, name in enumerate(["cat", "dog", "cat"])}
ROWS = [("pictures/0.png", "cat"), ("pictures/1.png", "dog"), ("pictures/2.png", "cat")]


@pytest.mark.parametrize(
    "change",
    [
        lambda path: f"./{path}",
        lambda path: f"/{path}",
        lambda path: path.replace("/", "\\"),
        lambda path: f"C:\\Users\\me\\{path}",
        lambda path: f"/home/me/set/{path}",
        lambda path: path.removesuffix(".png"),
        lambda path: path.removeprefix("pictures/").removesuffix(".png"),
        lambda path: path.replace("/", "//"),
    ],
    ids=["./", "/", "backslash", "drive", "elsewhere", "no suffix", "stem", "//"],
)
@pytest.mark.parametrize("header", ["path,label\n", "id,breed\n", ""])
def test_paths_as_other_programs_write_them(root: Path, change: Callable[[str], str], header: str) -> None:
    write(root, {"labels.csv": header + "".join(f"{change(path)},{label}\n" for path, label in ROWS)})
    assert by_colour(open_source(f"{root}/labels.csv")) == EXPECTED


@pytest.mark.parametrize("path", ["other/0.png", "C:\\other\\0.png", "9", "pictures"])
def test_a_path_in_another_folder_is_not_found(root: Path, path: str) -> None:
    write(root, {"labels.csv": f"path,label\npictures/1.png,a\n{path},b\n"})
    with pytest.raises(UsageError, match="there are 0 images of this name"):
        open_source(f"{root}/labels.csv")


def test_a_path_that_two_images_have_is_refused(root: Path) -> None:
    write(root, {"more/0.png": picture(9), "labels.csv": "path,label\npictures/1.png,a\n0.png,b\n"})
    with pytest.raises(UsageError, match=r"there are 2 images of this name .* more/0\.png, pictures/0\.png"):
        open_source(f"{root}/labels.csv")
    write(root, {"labels.csv": "path,label\npictures/1.png,a\nset/pictures/0.png,b\n"})
    assert by_colour(open_source(f"{root}/labels.csv")) == {(1, 0, 0): ("train", "a"), (0, 0, 0): ("train", "b")}


@pytest.mark.parametrize("name", ["labels.csv", "labels.txt", "labels.tsv"])
@pytest.mark.parametrize("separator", [",", ", ", ";", "; ", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_separators_and_encodings_are_found_out(root: Path, name: str, separator: str, encoding: str) -> None:
    rows = [("path", "label"), *((path, "Katze, zahm" if label == "cat" else "thé") for path, label in ROWS)]
    text = "\r\n".join(separator.join(f'"{cell}"' if "," in cell else cell for cell in row) for row in rows)
    write(root, {name: text.encode(encoding)})
    names = {"cat": "Katze, zahm", "dog": "thé"}
    expected = {key: ("train", names[label]) for key, (_, label) in EXPECTED.items()}
    assert by_colour(open_source(f"{root}/{name}")) == expected


def test_a_line_of_excel_names_the_separator(root: Path) -> None:
    write(root, {"labels.csv": "sep=;\npath;label\n" + "".join(f"{path};{label}\n" for path, label in ROWS)})
    assert by_colour(open_source(f"{root}/labels.csv")) == EXPECTED


@pytest.mark.parametrize("encoding", ["cp1252", "latin1", "mac_roman"])
def test_another_encoding_is_an_error_that_names_it(root: Path, encoding: str) -> None:
    write(root, {"labels.csv": "path,label\npictures/0.png,a\npictures/1.png,café\n".encode(encoding)})
    with pytest.raises(UsageError, match="not UTF-8 or UTF-16 text: line 3") as caught:
        open_source(f"{root}/labels.csv")
    assert "UTF-8" in caught.value.remedy


@pytest.mark.parametrize(
    "text",
    ["path,label\n0.png,a\n1.png,a,b\n", "path label\n0.png a\n1.png\n", "path:label\n0.png:a\n1.png:b\n", "", "\n\n"],
    ids=["another column", "a missing value", "colons", "empty", "blank"],
)
def test_a_table_without_columns_is_refused(root: Path, text: str) -> None:
    write(root, {"labels.csv": text})
    with pytest.raises(UsageError, match="no separator of|has no rows"):
        open_source(f"{root}/labels.csv")


def test_images_that_the_table_does_not_name_are_listed(root: Path) -> None:
    write(root, {"labels.csv": "path,label\n0.png,a\n1.png,b\n"})
    source = open_source(f"{root}/labels.csv")
    assert source.left_out == {("not named by the table", ".png"): (1, "pictures/2.png")}


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"


@pytest.mark.parametrize("name", ["a.parquet", "a.tar", "a.csv", "a.tar.gz", "folder/a.parquet", "tars/0.tar"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, {name: POINTER})
    place = name.partition("/")[0]
    with pytest.raises(UsageError, match=f"{name} is a pointer of Git LFS") as caught:
        open_source(f"{tmp_path}/{place}")
    assert "git lfs pull" in caught.value.remedy


@pytest.mark.parametrize("cut", [0, 10, 100, -30, -4, "middle"])
@pytest.mark.parametrize("form", ["file", "folder", "table"])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, cut: int | str, form: str) -> None:
    rows = {"image": [picture(n) for n in range(9)], "label": list(range(9))}
    if form == "table":
        rows = {"path": [f"{n}.png" for n in range(9)], "label": list(range(9))}
    path = tmp_path / "set" / "x.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table(rows), path, compression="gzip")
    data = bytearray(path.read_bytes())
    if isinstance(cut, str):
        data[20:100] = bytes(80)
    path.write_bytes(data if isinstance(cut, str) else data[:cut])
    with pytest.raises(UsageError, match=r"x\.parquet is no Parquet file, or it is truncated or damaged"):
        open_source(str(path.parent if form == "folder" else path))
