"""A checkpoint waits for room on its machine's disk; the run ends as if nothing had happened."""

from __future__ import annotations

import threading
import time

import pytest

from tests.faults.data import NOT_RUN, small_disk
from tests.faults.kills import Runs, runs


def fill_until_it_is_said(made: Runs, seen: threading.Event) -> None:
    """Fill the temporary folder, and empty it when the worker has told its driver that it waits."""
    filler = made.folder / "tmp" / "filler"
    filler.write_bytes(bytes(7_500_000))
    while not any(b"the next checkpoint" in mailbox.read_bytes() for mailbox in made.folder.glob("*/mailbox")):
        time.sleep(0.05)
    seen.set()
    filler.unlink()


def test_a_checkpoint_waits_for_room() -> None:
    with runs(1) as made, small_disk(made.folder / "tmp", 8_000_000) as disk:
        if disk is None:
            pytest.skip(NOT_RUN)
        undisturbed = made.run("undisturbed", [])
        seen = threading.Event()
        other = threading.Thread(target=fill_until_it_is_said, args=(made, seen))
        other.start()
        waited = made.run("waited", [])
        other.join()
        assert seen.is_set()
    assert (waited.checkpoint, waited.points) == (undisturbed.checkpoint, undisturbed.points)
    said = [line for line in waited.status.lines if line.startswith("the next checkpoint waits for its machine's disk")]
    assert "no space left for a checkpoint" in said[0]
    assert "set TMPDIR to a folder with more space" in said[0]
    assert waited.status.images_lost == 0
