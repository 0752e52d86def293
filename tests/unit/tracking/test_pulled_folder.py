"""A pull into a folder that somebody else may have prepared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import CorruptError, UsageError
from pipeline.tracking.pulled_folder import LIST, replacing


def pull(folder: Path, names: list[str]) -> None:
    with replacing(folder) as download:
        for name in names:
            (download / name).parent.mkdir(parents=True, exist_ok=True)
            (download / name).write_text("new")


@pytest.mark.parametrize("listed", [["../mine"], ["/tmp/x"], {"a": 1}, "a", [1], [["a"]], None])
def test_the_list_of_an_earlier_pull_deletes_nothing_outside_its_folder(listed: object, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    folder = tmp_path / "pulled"
    pull(folder, ["a", "b/c"])
    (folder / LIST).write_text(json.dumps(listed))
    with pytest.raises(CorruptError, match="not the list of an earlier pull"):
        pull(folder, ["a"])
    assert (tmp_path / "mine").read_text() == "mine"
    assert (folder / "b" / "c").read_text() == "new"


def test_a_link_in_the_folder_leads_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "c").write_text("mine")
    folder = tmp_path / "pulled"
    pull(folder, ["a"])
    (folder / "b").symlink_to(tmp_path / "mine")
    (folder / LIST).write_text(json.dumps(["a", "b/c"]))
    with pytest.raises(UsageError, match="behind a link"):
        pull(folder, ["a", "b/c"])
    assert (tmp_path / "mine" / "c").read_text() == "mine"


def test_a_second_pull_replaces_the_files_of_the_first(tmp_path: Path) -> None:
    pull(tmp_path / "pulled", ["a", "b/c"])
    pull(tmp_path / "pulled", ["a"])
    assert not (tmp_path / "pulled" / "b" / "c").exists()
