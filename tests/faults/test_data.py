"""The fault matrix with short faults and little patience; `python -m tests.faults.data` has the long one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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
