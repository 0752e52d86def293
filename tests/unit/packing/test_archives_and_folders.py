from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import EnvironmentFault, UsageError
from pipeline.packing.archives_and_folders import Tree, ignored
from pipeline.packing.classes_and_splits import split_in
from tests.unit.packing.coloured_images import DAMAGES, damaged_tar, picture, tar, write


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


CONTENTS = {f"a/{n}.png": picture(n) for n in range(3)}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("form", ["alone", "in a folder", "in a tar"])
def test_a_tar_that_is_damaged_after_its_first_member_is_refused(tmp_path: Path, form: str, damage: str) -> None:
    data = damaged_tar(CONTENTS, damage)
    write(tmp_path / "set", {"cats.tar": tar({"inner.tar": data}) if form == "in a tar" else data})
    with pytest.raises(UsageError, match=r"cats\.tar cannot be read as a plain tar: .* at byte 2,048"):
        Tree.open(f"{tmp_path}/set" if form == "in a folder" else f"{tmp_path}/set/cats.tar")


@pytest.mark.parametrize("zeros", [0, 1, 512, 1024, 10_000])
def test_a_tar_may_end_after_any_member(tmp_path: Path, zeros: int) -> None:
    members = tar(CONTENTS)[: 3 * 1024]
    assert tar(CONTENTS).rstrip(b"\0") == members.rstrip(b"\0")
    write(tmp_path, {"set.tar": members + bytes(zeros), "outer.tar": tar({"inner.tar": members + bytes(zeros)})})
    assert Tree.open(f"{tmp_path}/set.tar").images == list(CONTENTS)
    assert Tree.open(f"{tmp_path}/outer.tar").images == [f"inner/{name}" for name in CONTENTS]


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that every user may list. Those of pytest are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A `with` block in which this user may not list a folder. Root becomes another user, since root may always."""
    user, mode = os.geteuid(), folder.stat().st_mode
    folder.chmod(0)
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(mode)


@pytest.mark.parametrize("name", ["lost+found", ".hidden", "a/@eaDir/deep"])
def test_a_folder_that_is_left_out_need_not_be_readable(open_place: Path, name: str) -> None:
    root = write(open_place / ".set", {"a/1.png": picture(1), f"{name}/x.png": picture(2)})
    with locked(root / name):
        assert Tree.open(str(root)).places.keys() == {"a/1.png"}


@pytest.mark.parametrize("name", [".", "b"])
def test_another_folder_must_be_readable(open_place: Path, name: str) -> None:
    root = write(open_place / ".set", {"a/1.png": picture(1), "b/x.png": picture(2)})
    with locked(root / name), pytest.raises(EnvironmentFault, match=f"{root / name}: Permission denied"):
        Tree.open(str(root))
