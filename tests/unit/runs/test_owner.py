"""A run has one owner: of several drivers one trains it, and the next one starts when that one has ended or died."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.runs import owner
from pipeline.runs.owner import LostRun, Owner, claim, newest_owner, require_owner
from pipeline.storage import files
from tests.conftest import TestS3

CLAIM = "import os, sys; from pipeline.runs.owner import claim; claim(sys.argv[1], print); os._exit(0)"


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder of owners, with short times."""
    monkeypatch.setattr(owner, "RENEWAL_S", 0.3)
    monkeypatch.setattr(owner, "_POLL_S", 0.05)
    if request.param == "local":
        yield str(tmp_path / "run" / "owners")
    else:
        s3: TestS3 = request.getfixturevalue("s3")
        yield f"{s3.bucket()}/run/owners"


def test_a_second_driver_is_refused_and_the_first_one_goes_on(folder: str) -> None:
    first = claim(folder, print)
    with pytest.raises(UsageError, match=r"process \d+ on .* is training this run"):
        claim(folder, print)
    first.require()
    require_owner(folder, first.number)
    first.release()


def test_what_was_released_is_taken_at_once(folder: str) -> None:
    said: list[str] = []
    for number in range(1, 6):
        taken = claim(folder, said.append)
        assert taken.number == number
        taken.release()
    assert said == []
    assert len(files.list_names(folder)) <= 4, "old owners are deleted"


def test_a_driver_of_this_machine_that_was_killed_is_replaced_at_once(folder: str) -> None:
    subprocess.run([sys.executable, "-c", CLAIM, folder], check=True)
    said: list[str] = []
    taken = claim(folder, said.append)
    assert (taken.number, said) == (2, [])
    taken.release()


def test_a_driver_of_another_machine_is_replaced_after_a_while(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "TAKEOVER_S", 3.0)
    elsewhere = Owner(host="another", boot="1", pid=1, process_start="1", token="x")
    assert files.create(f"{folder}/00000007.json", elsewhere.model_dump_json().encode())
    files.write_json(f"{folder}/00000007.alive", {"released": False})
    said: list[str] = []
    taken = claim(folder, said.append)
    assert taken.number == 8
    assert said
    assert said[0].startswith("waiting at most ")
    taken.release()


def test_an_owner_that_was_replaced_stops(folder: str) -> None:
    first = claim(folder, print)
    files.write_bytes(f"{folder}/00000002.json", b"{}")
    with pytest.raises(LostRun):
        require_owner(folder, first.number)
    while True:
        try:
            first.require()
        except LostRun:
            break
    first.release()
    assert newest_owner(folder) == 2
    assert b"true" not in files.read_bytes(f"{folder}/00000001.alive"), "it touches nothing more"


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"host": 3}'])
def test_an_owner_that_cannot_be_read_is_one_that_may_be_alive(
    folder: str, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(owner, "TAKEOVER_S", 0.3)
    files.write_bytes(f"{folder}/00000001.json", content)
    taken = claim(folder, print)
    assert taken.number == 2
    taken.release()


def test_of_many_one_creates(folder: str) -> None:
    for attempt in range(3):
        with ThreadPoolExecutor(8) as pool:
            created = list(pool.map(lambda i: files.create(f"{folder}/{attempt}", f"{i}".encode()), range(8)))  # noqa: B023
        assert sum(created) == 1
        assert files.read_bytes(f"{folder}/{attempt}").decode() == str(created.index(True))


def test_an_owner_that_releases_while_another_looks_is_followed(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The release changes the time of the sign of life, as a renewal does."""
    monkeypatch.setattr(owner, "RENEWAL_S", 60.0)
    first, looked = claim(folder, print), owner._is_released
    seen = []

    def released(folder: str, number: int) -> bool:
        answer = looked(folder, number)
        seen.append(answer)
        if len(seen) == 2:
            time.sleep(1.1)  # S3 counts in seconds
            first.release()
        return answer

    monkeypatch.setattr(owner, "_is_released", released)
    taken = claim(folder, print)
    assert taken.number == 2
    taken.release()
