"""After which exceptions of Ray Train another group of workers starts."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

from pipeline.training.worker_group import can_start_again, found_no_room


@pytest.mark.parametrize(
    ("error", "again", "no_room"),
    [
        (None, False, False),
        (RuntimeError("no such function"), False, False),
        (ActorDiedError(), True, False),
        (ControllerError(ValueError("no such resource")), False, False),
        (ControllerError(WorkerGroupStartupTimeoutError(2)), True, True),
        (ControllerError(WorkerGroupStartupFailedError("an actor died while it started")), True, False),
        (WorkerGroupError("rank 1 died", {1: RuntimeError("connection reset")}), True, False),
    ],
)
def test_a_group_starts_again_after_a_failure_and_where_it_found_no_room(
    error: BaseException | None, again: bool, no_room: bool
) -> None:
    assert (can_start_again(error, changes_size=True), found_no_room(error)) == (again, no_room)
    controller_died = isinstance(error, ActorDiedError)
    assert can_start_again(error, changes_size=False) == controller_died, "Ray Train starts a fixed number again itself"
