"""Workers start again while that can help, and not for ever."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import EnvironmentFault, LastingFault, SaganError
from pipeline.training.restart_budget import LONGEST_PAUSE_S, SAME_FAILURES, next_start
from pipeline.training.status.messages import StartAsked, Uploaded, WorkerFailed
from pipeline.training.status.run_status import Status

NODES = frozenset({"a", "b"})


def failed(images: int = 32, error: SaganError | None = None) -> list[WorkerFailed]:
    return [WorkerFailed(error or SaganError("it broke"), images, type(error).__name__ if error else "RuntimeError")]


def test_the_first_group_and_the_one_after_a_kill_start_at_once() -> None:
    assert next_start([[]], 3).pause_s == 0
    assert next_start([[], []], 3).pause_s == 0


def test_pauses_grow_to_five_minutes_without_limit() -> None:
    starts = [next_start([[]] * n, -1) for n in range(1, 40)]
    assert all(start.refusal is None for start in starts)
    assert all(a.pause_s <= b.pause_s for a, b in pairwise(starts))
    assert starts[2].pause_s > 0
    assert starts[-1].pause_s == LONGEST_PAUSE_S


@pytest.mark.parametrize("most", [0, 1, 3])
def test_so_many_failures_without_a_newer_checkpoint_end_the_run(most: int) -> None:
    assert next_start([[]] * (most + 1), most).refusal is None
    refusal = next_start([*[failed(n) for n in range(most + 1)], []], most).refusal
    assert refusal is not None
    assert "without a newer checkpoint; the last error: it broke" in refusal.message
    assert ("once" if most == 0 else f"{most + 1} times") in refusal.message


def test_the_error_that_ends_a_run_keeps_its_exit_code_and_its_remedy() -> None:
    """Not the one of a worker that lost the connection to the worker that failed."""
    group = [*failed(error=LastingFault("the key is revoked", "correct the key")), *failed()]
    refusal = next_start([group, []], 0).refusal
    assert isinstance(refusal, LastingFault)
    assert refusal.remedy.startswith("correct the key; then run the same command again")


def test_a_checkpoint_resets_the_count() -> None:
    status = Status()
    for _ in range(4):
        status.apply(StartAsked(NODES, 2))
    assert next_start(status.attempts, 2).refusal is not None
    status.apply(Uploaded("000000000032-00000000", to_score=False))
    status.apply(StartAsked(NODES, 2))
    assert next_start(status.attempts, 0).refusal is not None, "the group that wrote the checkpoint failed once"
    assert next_start(status.attempts, 1) == next_start([[], []], 1)


def test_the_same_error_at_the_same_position_ends_a_run_without_limit() -> None:
    same = [failed()] * SAME_FAILURES
    refusal = next_start([*same, []], -1).refusal
    assert refusal is not None
    assert f"{SAME_FAILURES} times at 0.0 kimg with RuntimeError" in refusal.message
    assert next_start([*same[1:], []], -1).refusal is None
    assert next_start([*[failed(n) for n in range(SAME_FAILURES)], []], -1).refusal is None, "positions differ"


@given(st.integers(SAME_FAILURES, 30))
def test_an_outage_never_ends_a_run_without_limit(groups: int) -> None:
    """The rank that waits for storage fails for it, and the others because that rank is gone."""
    outage = [*failed(error=EnvironmentFault("no bucket")), *failed()]
    assert next_start([*[outage] * groups, []], -1).refusal is None
