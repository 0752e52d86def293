from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.packing.archives_and_folders import Tree, ignored
from pipeline.packing.classes_and_splits import split_in
from tests.unit.packing.coloured_images import picture, tar, write


def test_a_tar_is_a_folder_wherever_it_stands(tmp_path: Path) -> None:
    inner = tar({"2.png": picture(2)})
    root = write(tmp_path / "set", {"1.png": picture(1), "cats.tar": tar({"./a/1.png": picture(3), "more.tar": inner})})
    tree = Tree.open(str(root))
    assert tree.images == ["1.png", "cats/a/1.png", "cats/more/2.png"]
    assert tree.tars == ["cats"]
    assert [tree.read(path) for path in tree.images] == [picture(1), picture(3), picture(2)]


def test_hidden_files_are_not_images(tmp_path: Path) -> None:
    root = write(tmp_path, {name: picture(1) for name in ("a/1.png", "a/._1.png", "__MACOSX/1.png", ".b/1.png")})
    assert Tree.open(str(root)).images == ["a/1.png"]
    assert [ignored(path) for path in ("a/.b/c", "__MACOSX/a", "a.b/c")] == ["hidden", "hidden", None]


def test_a_text_is_found_in_the_tree_and_beside_it(tmp_path: Path) -> None:
    root = write(tmp_path / "set", {"1.png": picture(1), "deep/inside.txt": "inside"})
    write(tmp_path, {"beside.txt": "beside"})
    tree = Tree.open(str(root))
    assert [tree.text(f"{name}.txt") for name in ("inside", "beside", "nowhere")] == ["inside", "beside", None]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00005.parquet", "train"),
        ("set-validation-000", "val"),
        ("VAL/cat/1.png", "val"),
        ("trained/1.png", None),
        ("testimony.tar", None),
    ],
)
def test_a_split_is_a_word_of_the_path(path: str, split: str | None) -> None:
    assert split_in(path) == split


@pytest.mark.parametrize("name", ["none", "none.tar"])
def test_a_missing_source_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"{tmp_path}/{name} does not exist"):
        Tree.open(f"{tmp_path}/{name}")


def test_a_file_that_is_neither_folder_nor_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(UsageError, match="neither a folder nor a tar"):
        Tree.open(f"{tmp_path}/images.zip")


@pytest.mark.parametrize("data", [b"no tar at all" * 100, b"\x1f\x8b" + b"x" * 1000])
def test_a_tar_that_cannot_be_read_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "set.tar").write_bytes(data)
    with pytest.raises(UsageError, match="cannot be read as a plain tar"):
        Tree.open(f"{tmp_path}/set.tar")
