"""Decisions are functions of what was observed."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import TrainJob
from pipeline.training.decisions import at_border, due, superfluous


def job(**train):
    return TrainJob.model_validate(
        {
            "name": "a",
            "data": {"train": "x"},
            "train": {"kimg": 1, "batch": 32, **train},
            "checkpoint": {"kimg": 0.2},
            "evaluate": {"kimg": 0.5},
        }
    )


@given(interval=st.integers(1, 500), batch=st.integers(1, 300), steps=st.integers(1, 60))
def test_due_once_for_every_interval_that_steps_cross(interval, batch, steps):
    """Whatever the batch: a step longer than the interval is due once, not several times."""
    borders = [due(i * batch, (i + 1) * batch, interval / 1000) for i in range(steps)]
    assert sum(borders) <= steps * batch // interval
    if batch <= interval:
        assert sum(borders) == steps * batch // interval


def test_what_happens_at_borders():
    quiet = at_border(job(log_kimg=10), 0, 32, stop_requested=False)
    assert not any((quiet.log, quiet.checkpoint, quiet.evaluate, quiet.stop))
    checkpoint = at_border(job(), 192, 224, stop_requested=False)
    assert (checkpoint.log, checkpoint.checkpoint, checkpoint.evaluate, checkpoint.stop) == (True, True, False, False)
    scored = at_border(job(), 480, 512, stop_requested=False)
    assert (scored.checkpoint, scored.evaluate, scored.stop) == (True, True, False)
    asked = at_border(job(), 0, 32, stop_requested=True)
    assert (asked.log, asked.checkpoint, asked.evaluate, asked.stop, asked.early) == (True, True, False, True, True)
    last = at_border(job(), 992, 1024, stop_requested=False)
    assert (last.log, last.checkpoint, last.evaluate, last.stop, last.early) == (True, True, True, True, False)
    assert not at_border(job(), 992, 1024, stop_requested=True).early


def test_retention_keeps_the_newest_and_the_protected():
    names = [f"{i:03}" for i in range(6)]
    assert superfluous(names, 2, {"001"}) == ["000", "002", "003"]
    assert superfluous(names[:2], 2, set()) == []
