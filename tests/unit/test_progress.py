"""Progress goes to a callback or to stderr, never to stdout."""

from __future__ import annotations

import re

import pytest

from pipeline import progress as module
from pipeline.progress import progress


def test_a_callback_receives_the_progress_and_replaces_all_output(capfd: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int | None]] = []
    with progress("packing", 10, report=lambda done, total: told.append((done, total))) as advance:
        for amount in (3, 4, 3):
            advance(amount)
    assert told == [(3, 10), (7, 10), (10, 10)]
    assert capfd.readouterr() == ("", "")


def test_without_a_terminal_a_final_line_is_printed_to_stderr(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHORT_S", 0.0)  # no work is too short
    with progress("packing", 1500) as advance:
        advance(1000)
        advance(500)
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"packing: 1,500 images in \d+\.\d s\n", err)


def test_without_a_terminal_short_work_prints_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHORT_S", 3600.0)
    with progress("packing", 10) as advance:
        advance(10)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("total", "of", "left"), [(1500, " of 1,500", r", [\d,]+ s left"), (None, "", "")])
def test_without_a_terminal_long_work_prints_its_rate_and_the_time_left(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, total: int | None, of: str, left: str
) -> None:
    monkeypatch.setattr(module, "_LINE_S", 0.0)  # a line each time
    with progress("reading", total, unit="bytes") as advance:
        advance(1000)
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(rf"reading: 1,000{of} bytes, [\d,]+/s{left}\nreading: 1,000 bytes in \d+\.\d s\n", err)
