"""What holds for every system test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.command_process import end_drivers


@pytest.fixture(autouse=True)
def _no_driver_is_left() -> Iterator[None]:
    yield
    end_drivers()
