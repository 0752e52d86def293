"""The fault matrix with short faults and little patience; `python -m tests.faults.data` has the long one."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from queue import Queue

import pytest

from pipeline.collection.manifest import Collection
from pipeline.config.schema import DataSection
from pipeline.streaming.stream import Stream
from sagan.ranks import World
from tests.faults import data
from tests.faults.data import FAULTS, NOT_RUN, SLOW, Outcome, Place

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def place(test_data: Path | None) -> Iterator[Place]:
    with data.place(test_data) as place:
        yield place


def check(outcome: Outcome) -> None:
    assert outcome.kept, outcome.what
    if outcome.what == NOT_RUN:
        pytest.skip(NOT_RUN)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_changes_nothing_that_is_delivered(place: Place, fault: str) -> None:
    check(data.passing(place, fault, seconds=1.0))


@pytest.mark.parametrize("fault", [name for name, fault in FAULTS.items() if fault.cause and name not in SLOW])
def test_a_fault_that_lasts_ends_with_an_error_that_names_the_object_and_the_cause(place: Place, fault: str) -> None:
    check(data.lasting(place, fault, patience_s=0.5))


@pytest.mark.slow
@pytest.mark.parametrize("fault", SLOW)
def test_silent_and_slow_transfers_are_given_up(place: Place, fault: str) -> None:
    check(data.lasting(place, fault, patience_s=0.5))


def test_a_stream_reads_from_the_cache_during_an_outage_and_then_waits_with_a_note(place: Place) -> None:
    """One lane, no window: a shard after the other, in batches of a tenth of one."""
    place.proxy.clear()
    section = place.section(place.cache()).model_copy(update={"lanes": 1, "window": 1, "ahead": 1, "threads": 1})
    notes: Queue[str] = Queue()
    with (
        closing(Stream(place.collection, "train", seed=0, world=World(), data=section, note=notes.put)) as stream,
        ThreadPoolExecutor(1) as pool,
    ):
        batches = stream.batches(0, 10)
        next(batches)
        place.proxy.inject("burst_503", times=math.inf)
        for _ in range(8):  # what is left of the shard
            next(batches)
        epoch = pool.submit(lambda: [next(batches) for _ in range(place.collection.size("train") // 10)])
        assert "still waiting for" in notes.get(timeout=60)
        place.proxy.clear()
        epoch.result(timeout=60)


def _labels(section: DataSection) -> list[int]:
    """Of the first batch."""
    with closing(Stream(Collection.open(section.train), "train", seed=1, world=World(), data=section)) as stream:
        return next(stream.batches(0, 64)).labels.tolist()


def test_a_process_forked_from_one_that_has_streamed_streams_too(place: Place) -> None:
    """s3fs is not fork-safe: a client taken over from the parent would hang."""
    place.proxy.clear()
    here = _labels(place.section(place.cache()))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_labels, (place.section(place.cache()),)).get(timeout=60) == here
