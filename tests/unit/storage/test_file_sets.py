from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.errors import CorruptError, SaganError
from pipeline.storage import file_sets, files
from tests.hostile_collection import change_manifest, contents_below


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    (made / "code").mkdir(parents=True)
    (made / "state.bin").write_bytes(bytes(range(256)) * 10)
    (made / "code" / "a.py").write_text("x = 1\n")
    return made


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"{tmp_path}/store/set"


def test_an_uploaded_set_is_fetched_with_its_facts(folder: Path, url: str, tmp_path: Path) -> None:
    committed = file_sets.upload_set(folder, url, images=640, class_names=["a"])
    fetched = file_sets.fetch_set(url, tmp_path / "copy")
    assert fetched == committed == file_sets.read_manifest(url) == file_sets.verify_set(url)
    assert fetched.facts == {"images": 640, "class_names": ["a"]}
    assert fetched.digest == file_sets.FileEntry.of(Path(url) / "manifest.json").sha256
    assert (tmp_path / "copy/state.bin").read_bytes() == (folder / "state.bin").read_bytes()
    assert (tmp_path / "copy/code/a.py").read_text() == "x = 1\n"


def test_a_set_without_manifest_does_not_exist(folder: Path, url: str, tmp_path: Path) -> None:
    shutil.copytree(folder, url)
    assert file_sets.read_manifest(url) is None
    with pytest.raises(FileNotFoundError):
        file_sets.fetch_set(url, tmp_path / "copy")


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_found_and_the_file_named(folder: Path, url: str, tmp_path: Path, damage: str) -> None:
    file_sets.upload_set(folder, url)
    victim = Path(url) / "state.bin"
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[1000] ^= 1
        victim.write_bytes(data)
    elif damage == "truncate":
        victim.write_bytes(data[:-1])
    else:
        victim.unlink()
    for read in (lambda: file_sets.fetch_set(url, tmp_path / "copy"), lambda: file_sets.verify_set(url)):
        with pytest.raises(CorruptError, match=r"state\.bin"):
            read()
    assert not (tmp_path / "copy/state.bin").exists()


def test_a_set_never_changes(folder: Path, url: str) -> None:
    first = file_sets.upload_set(folder, url)
    assert file_sets.upload_set(folder, url) == first
    (folder / "state.bin").write_bytes(b"other")
    with pytest.raises(SaganError, match="already holds"):
        file_sets.upload_set(folder, url)
    assert file_sets.verify_set(url) == first


def test_a_set_can_be_removed_twice(folder: Path, url: str) -> None:
    file_sets.upload_set(folder, url)
    file_sets.remove_set(url)
    assert not files.exists(url)
    file_sets.remove_set(url)


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside"])
def test_a_manifest_cannot_name_files_outside_its_folder(url: str, tmp_path: Path, name: str) -> None:
    entry = {"size": 1, "sha256": "0" * 64}
    files.write_json(f"{url}/manifest.json", {"format": 1, "files": {name: entry}})
    with pytest.raises(CorruptError, match="outside"):
        file_sets.fetch_set(url, tmp_path / "copy")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', json.dumps({"format": 1, "files": {"a": {}}})])
def test_a_file_that_is_not_a_manifest_is_named(url: str, text: str) -> None:
    files.write_bytes(f"{url}/manifest.json", text.encode())
    with pytest.raises(CorruptError, match=r"manifest\.json is not a manifest"):
        file_sets.read_manifest(url)


def test_a_manifest_of_a_later_format_is_refused(url: str) -> None:
    files.write_json(f"{url}/manifest.json", {"format": 2, "files": {}})
    with pytest.raises(CorruptError, match="format 2"):
        file_sets.read_manifest(url)


@pytest.mark.parametrize(
    "name", ["", ".", "a//b", "./a", "a/.", ".bashrc", ".ssh/keys", "a\\b", "a\n", "\x1b[2J", "x" * 300]
)
def test_a_name_that_is_not_plain_is_refused(url: str, tmp_path: Path, name: str) -> None:
    files.write_json(f"{url}/manifest.json", {"format": 1, "files": {name: {"size": 1, "sha256": "0" * 64}}})
    before = contents_below(tmp_path)
    for read in (lambda: file_sets.fetch_set(url, tmp_path / "copy"), lambda: file_sets.verify_set(url)):
        with pytest.raises(CorruptError, match=r"manifest\.json is not a manifest: files"):
            read()
    assert contents_below(tmp_path) == before


def test_a_file_that_is_also_a_folder_is_refused(url: str) -> None:
    entry = {"size": 0, "sha256": "0" * 64}
    files.write_json(f"{url}/manifest.json", {"format": 1, "files": {"a": entry, "a/b/c": entry}})
    with pytest.raises(CorruptError, match="a is both a file and a folder"):
        file_sets.verify_set(url)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("size", value) for value in (-1, 1.0, True, "1", None, 2**70)),
        *(("sha256", value) for value in ("", "0" * 63, "A" * 64, "../x", 0)),
    ],
)
def test_a_foreign_entry_is_named(folder: Path, url: str, field: str, value: object) -> None:
    file_sets.upload_set(folder, url)
    change_manifest(Path(url), lambda manifest: manifest["files"]["state.bin"].update({field: value}))
    with pytest.raises(CorruptError, match=rf"files\.state\.bin\.{field}: "):
        file_sets.verify_set(url)


def test_facts_are_bounded(folder: Path, url: str) -> None:
    deep: object = 1
    for _ in range(100):
        deep = [deep]
    file_sets.upload_set(folder, url, deep=deep)
    with pytest.raises(CorruptError, match="nested deeper"):
        file_sets.read_manifest(url)
    with Path(url, "manifest.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CorruptError, match="has more than"):
        file_sets.read_manifest(url)


def test_a_file_larger_than_its_entry_is_not_read_to_its_end(folder: Path, url: str, tmp_path: Path) -> None:
    file_sets.upload_set(folder, url)
    with Path(url, "state.bin").open("r+b") as file:
        file.truncate(2**40)  # takes no room on the disk; a whole copy would
    with pytest.raises(CorruptError, match=r"state\.bin .*has more than 2,560 bytes"):
        file_sets.fetch_set(url, tmp_path / "copy")
    assert not (tmp_path / "copy/state.bin").exists()
