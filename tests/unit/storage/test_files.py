"""Files on this machine's disk; the same promises over S3 are in tests/system/test_storage.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import EnvironmentFault
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


def test_a_relative_path_is_below_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files.write_json("runs/x.json", {"b": 1, "a": 2})
    assert (tmp_path / "runs" / "x.json").read_text() == '{\n "a": 2,\n "b": 1\n}\n'


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    files.write_bytes("~/x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"


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
