"""Decisions are functions of what was observed."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import TrainJob
from pipeline.training.worker.actions_after_step import actions_after_step, is_due


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
def test_an_action_is_due_once_for_every_interval_that_steps_cross(interval, batch, steps):
    """Whatever the batch: a step longer than the interval is due once, not several times."""
    due = [is_due(i * batch, (i + 1) * batch, interval / 1000) for i in range(steps)]
    assert sum(due) <= steps * batch // interval
    if batch <= interval:
        assert sum(due) == steps * batch // interval


def test_a_step_that_crosses_nothing_has_no_actions():
    quiet = actions_after_step(job(log_kimg=10), 0, 32, stop_requested=False)
    assert not any((quiet.log, quiet.checkpoint, quiet.score, quiet.stop, quiet.interrupted))


def test_a_checkpoint_is_logged_first_and_a_score_has_a_checkpoint():
    checkpoint = actions_after_step(job(), 192, 224, stop_requested=False)
    assert (checkpoint.log, checkpoint.checkpoint, checkpoint.score, checkpoint.stop) == (True, True, False, False)
    scored = actions_after_step(job(), 480, 512, stop_requested=False)
    assert (scored.checkpoint, scored.score, scored.stop) == (True, True, False)


def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_and_is_interrupted():
    asked = actions_after_step(job(), 0, 32, stop_requested=True)
    assert (asked.log, asked.checkpoint, asked.score, asked.stop, asked.interrupted) == (True, True, False, True, True)


def test_the_last_step_is_scored_and_is_not_an_interruption():
    last = actions_after_step(job(), 992, 1024, stop_requested=False)
    assert (last.log, last.checkpoint, last.score, last.stop, last.interrupted) == (True, True, True, True, False)
    assert not actions_after_step(job(), 992, 1024, stop_requested=True).interrupted
