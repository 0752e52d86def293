"""Files on this machine's disk; the same promises over S3 are in tests/system/test_storage.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import EnvironmentFault, UsageError
from pipeline.storage import files


@pytest.mark.parametrize(
    ("url", "parts", "expected"),
    [
        ("s3://bucket/runs/", ["a", "b.json"], "s3://bucket/runs/a/b.json"),
        ("s3://bucket", ["a"], "s3://bucket/a"),
        ("/data", ["a/", "/b"], "/data/a/b"),
        ("/", ["a"], "/a"),
        ("runs", [], "runs"),
    ],
)
def test_join(url: str, parts: list[str], expected: str) -> None:
    assert files.join(url, *parts) == expected


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_plain_path_and_a_file_url_are_the_same(tmp_path: Path, scheme: str) -> None:
    files.write_bytes(f"{scheme}{tmp_path}/a/b", b"x")
    assert (tmp_path / "a" / "b").read_bytes() == b"x"
    assert files.read_bytes(f"{scheme}{tmp_path}/a/b") == b"x"
    assert files.list_names(f"{scheme}{tmp_path}") == ["a"]
    assert files.list_files(f"{scheme}{tmp_path}") == ["a/b"]


@pytest.mark.parametrize("root", ["folder", "bucket"])
def test_no_bytes_are_no_request(request: pytest.FixtureRequest, tmp_path: Path, root: str) -> None:
    """S3 takes a range that ends before it begins for the whole object, or refuses it."""
    base = str(tmp_path) if root == "folder" else request.getfixturevalue("s3").bucket()
    url = files.join(base, "x")
    files.write_bytes(url, b"content")
    assert [files.read_bytes(url, start, start) for start in (0, 3, 7)] == [b"", b"", b""]
    assert [files.read_bytes(url, None, 0), files.read_bytes(url, 3, 2)] == [b"", b""]


def test_a_relative_path_is_below_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files.write_json("runs/x.json", {"b": 1, "a": 2})
    assert (tmp_path / "runs" / "x.json").read_text() == '{\n "a": 2,\n "b": 1\n}\n'


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    files.write_bytes("~/x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_the_home_folder_of_nobody_is_refused(scheme: str) -> None:
    with pytest.raises(UsageError, match="there is no user nosuchuser") as caught:
        files.exists(f"{scheme}~nosuchuser/x")
    assert "./~nosuchuser" in caught.value.remedy


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    files.write_bytes(f"{tmp_path}/x", b"old")
    with pytest.raises(FileNotFoundError):
        files.upload(tmp_path / "not there", f"{tmp_path}/x")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x", b"old")]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=f"{tmp_path}/file"):
        files.check_writable(f"{tmp_path}/file/below")


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    files.check_writable(f"{tmp_path}/new")
    assert list((tmp_path / "new").iterdir()) == []


def test_an_unknown_kind_of_url_is_an_environment_fault() -> None:
    with pytest.raises(EnvironmentFault, match="nosuch"):
        files.read_bytes("nosuch://bucket/x")


ODD = [
    "exp[1]",
    "exp*",
    "exp?",
    "{exp}",
    "100%",
    "%41",
    "a#b",
    "a+b",
    "a&b",
    "two  words",
    "été",
    "a'b",
    "$HOME",
    "~x",
    "!e",
]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("root", ["folder", "bucket"])
def test_a_name_is_taken_literally(request: pytest.FixtureRequest, tmp_path: Path, root: str, name: str) -> None:
    """No call takes a name as a pattern. A pattern would find the neighbours, or nothing at all."""
    base = str(tmp_path / "root") if root == "folder" else request.getfixturevalue("s3").bucket()
    neighbours = ["exp1/x", "expand/x", "exp/x", "A/x", "a/x", "100/x", f"{name}beside"]
    for neighbour in neighbours:
        files.write_bytes(files.join(base, neighbour), b"foreign")
    url = files.join(base, name)
    assert not files.exists(url)
    assert files.list_files(url) == files.list_names(url) == files.list_folders(url) == []
    files.delete(url)

    files.write_bytes(files.join(url, "one", name), b"own")
    (tmp_path / "local").write_bytes(b"other")
    files.upload(tmp_path / "local", files.join(url, "two"))
    assert files.exists(files.join(url, "two"))
    assert files.size(files.join(url, "two")) == 5
    assert files.list_files(url) == [f"one/{name}", "two"]
    assert files.list_names(url) == ["one", "two"]
    assert files.list_folders(url) == ["one"]
    assert files.list_folders(base) == sorted({"exp1", "expand", "exp", "A", "a", "100", name})
    assert files.read_bytes(files.join(url, "one", name), 1, 3) == b"wn"
    files.download(files.join(url, "one", name), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"own"
    with files.reading(files.join(url, "two")) as file:
        assert file.read() == b"other"

    files.delete(files.join(url, "one", name))
    assert files.list_files(url) == ["two"]
    files.check_writable(url)
    assert files.list_files(url) == ["two"]
    files.delete(url)
    assert not files.exists(url)
    assert files.list_files(base) == sorted(neighbours)
