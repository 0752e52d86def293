from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.collection.manifest import Collection
from pipeline.collection.shard_file import read_shard
from pipeline.collection.verify import verify_collection
from pipeline.errors import CorruptError, SaganError
from tests.hostile_collection import change_manifest, contents_below


def test_a_whole_collection_passes(packed: Collection) -> None:
    seen: list[tuple[int, int | None]] = []
    assert verify_collection(packed.url, lambda done, total: seen.append((done, total))).digest == packed.digest
    assert seen[-1] == (60, 60)


def test_a_flipped_byte_is_found_with_shard_and_key(packed: Collection, copied: Path) -> None:
    """In the middle of an image: its checksum fails, and so does the shard's."""
    name = packed.shards[3].name
    sample = list(read_shard(copied / name))[2]
    data = bytearray((copied / name).read_bytes())
    data[sample.offset + sample.length // 2] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(CorruptError) as caught:
        verify_collection(str(copied))
    assert f"{name}: its SHA-256 differs from the manifest" in caught.value.message
    assert f"{name}: {sample.name}: " in caught.value.message
    assert packed.shards[2].name not in caught.value.message


def test_missing_and_truncated_shards_are_all_named(packed: Collection, copied: Path) -> None:
    (copied / packed.shards[0].name).unlink()
    truncated = copied / packed.shards[1].name
    truncated.write_bytes(truncated.read_bytes()[:5000])
    with pytest.raises(CorruptError) as caught:
        verify_collection(str(copied))
    assert f"{packed.shards[0].name}: missing" in caught.value.message
    assert packed.shards[1].name in caught.value.message


@pytest.mark.parametrize("field", ["name", "sha256"])
@pytest.mark.parametrize("value", ["{home}/.bashrc", "../home/.bashrc", "../../home/.bashrc"])
def test_a_foreign_collection_changes_no_file_outside(copied: Path, tmp_path: Path, field: str, value: str) -> None:
    """A shard whose name or digest leads to a file of the user's, with contents of the author's choice beside it."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_text("mine")
    change_manifest(copied, lambda m: m["shards"][0].update({field: value.format(home=home)}))
    before = contents_below(tmp_path)
    result = CliRunner().invoke(app, ["verify", str(copied)])
    assert isinstance(result.exception, SaganError)
    assert f"shards.0.{field}" in result.exception.message
    assert contents_below(tmp_path) == before


def test_a_shard_larger_than_the_manifest_says_is_not_read_to_its_end(packed: Collection, copied: Path) -> None:
    with (copied / packed.shards[1].name).open("r+b") as file:
        file.truncate(2**40)  # takes no room on the disk; a whole copy would
    with pytest.raises(
        CorruptError, match=rf"{packed.shards[1].name}: .*has more than {packed.shards[1].size:,} bytes"
    ):
        verify_collection(str(copied))


@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
def test_a_shard_without_an_end_is_refused(packed: Collection, copied: Path, target: str) -> None:
    shard = copied / packed.shards[0].name
    shard.unlink()
    if target == "pipe":
        os.mkfifo(shard)
    else:
        shard.symlink_to(target)
    with pytest.raises(SaganError, match="not a regular file"):
        verify_collection(str(copied))


@pytest.mark.parametrize(
    "change", [lambda text: text.replace("ant", "bee"), lambda text: text + "x\n", lambda text: "", None]
)
def test_names_that_differ_from_the_manifest_are_found(copied: Path, change: Any) -> None:
    keys = copied / "keys.txt"
    if change is None:
        keys.unlink()
    else:
        keys.write_text(change(keys.read_text()))
    with pytest.raises(CorruptError, match=r"keys\.txt"):
        verify_collection(str(copied))


def damage_an_image(packed: Collection, copied: Path) -> None:
    path = copied / packed.shards[0].name
    data = bytearray(path.read_bytes())
    data[packed.offset[0] + 60] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["changed", "not covered"])
def test_names_that_are_not_verified_are_not_printed(
    packed: Collection, copied: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """`--exclude` follows what is printed."""
    damage_an_image(packed, copied)
    if kind == "changed":
        (copied / "keys.txt").write_text("victim.png\n" * 60)
    else:
        change_manifest(copied, lambda manifest: manifest.pop("keys"))
    with pytest.raises(CorruptError, match=r"keys\.txt"):
        verify_collection(str(copied))
    assert capsys.readouterr().out == ""


def test_a_collection_of_the_first_version_is_good_without_verified_names(copied: Path) -> None:
    change_manifest(copied, lambda manifest: manifest.pop("keys"))
    assert verify_collection(str(copied)).keys is None
    assert "keys" not in json.loads((copied / "manifest.json").read_text())
