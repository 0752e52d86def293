"""What the driver makes of messages: whether a group that loses a node has failed, and what the run has spent."""

from __future__ import annotations

import time

import pytest

from pipeline.compute.cluster import LeavingNode
from pipeline.errors import EnvironmentFault, SaganError
from pipeline.training.restart_budget import next_start
from pipeline.training.status.messages import (
    Alive,
    GroupLost,
    GroupStarted,
    Logged,
    NodesLeave,
    RoomForMore,
    StartAsked,
    Stepped,
    Stopped,
    Uploaded,
    WorkerFailed,
)
from pipeline.training.status.run_status import Status

LOST = WorkerFailed(SaganError("connection reset"), 64, "RuntimeError")


def group_on(*nodes: str) -> StartAsked:
    return StartAsked(frozenset(nodes), len(nodes))


def leaves(node: str, seconds: float | None = 25.0) -> NodesLeave:
    return NodesLeave([LeavingNode(node, f"host-of-{node}", seconds)])


def status_of_a_group_on(*nodes: str) -> Status:
    status = Status()
    status.apply(group_on(*nodes))
    status.apply(GroupStarted(0, None, 0.0))
    status.apply(Stepped(64))
    return status


def test_a_group_moves_when_one_of_its_nodes_leaves() -> None:
    status = status_of_a_group_on("a", "b")
    status.apply(leaves("c"))
    assert not status.must_move
    assert not status.lines
    for _ in range(3):  # a drain is seen again at each look
        status.apply(leaves("b"))
    assert status.must_move
    (line,) = status.lines
    assert "node host-of-b will be taken away in 25 s" in line
    status.apply(Stopped())
    assert not status.must_move, "no group is there"
    status.apply(group_on("a", "c"))
    assert status.must_move, "c leaves, too"
    status.apply(group_on("a", "d"))
    assert not status.must_move


def test_a_group_that_stopped_for_a_leaving_node_has_not_failed() -> None:
    status = status_of_a_group_on("a", "b")
    status.apply(leaves("b", None))
    status.apply(Stopped())
    status.apply(group_on("a", "c"))
    assert next_start(status.attempts, 0).refusal is None


def test_a_group_whose_node_left_before_the_checkpoint_was_complete_has_not_failed() -> None:
    status = status_of_a_group_on("a", "b")
    status.apply(leaves("b"))
    status.apply(LOST)
    status.apply(group_on("a", "c"))
    status.apply(GroupStarted(0, None, 0.0))
    assert next_start(status.attempts, 0).refusal is None
    assert status.images_lost == 64
    status.apply(LOST)
    status.apply(group_on("a", "c"))
    assert next_start(status.attempts, 0).refusal is not None, "without notice it has"


def test_a_group_grows_once_and_has_not_failed() -> None:
    status = status_of_a_group_on("a")
    for _ in range(3):  # the room is seen at each look
        status.apply(RoomForMore())
    assert status.must_restart
    assert status.lines == ["more workers fit: a checkpoint is written, and more workers start"]
    status.apply(Stopped())
    status.apply(RoomForMore())
    status.apply(group_on("a", "b"))
    assert not status.must_restart
    assert status.lines[-1] == "training goes on with 2 instead of 1 workers"
    assert next_start(status.attempts, 0).refusal is None


def test_a_group_that_was_lost_counts_as_a_failure() -> None:
    status = status_of_a_group_on("a", "b")
    status.apply(GroupLost(found_no_room=False))
    status.apply(group_on("a"))
    assert next_start(status.attempts, 0).refusal is not None
    assert next_start(status.attempts, 1).refusal is None


def test_groups_that_are_lost_before_they_ask_count_as_failures() -> None:
    status = Status()
    for _ in range(2):
        status.apply(GroupLost(found_no_room=False))
    assert next_start([*status.attempts, []], 1).refusal is not None
    assert next_start([*status.attempts, []], 2).refusal is None
    status.apply(LOST)  # of a group that has not asked either
    status.apply(GroupLost(found_no_room=False))
    assert next_start([*status.attempts, []], 2).refusal is not None


def test_groups_that_could_not_start_without_storage_end_the_run_with_the_fault_of_storage() -> None:
    status = Status()
    for _ in range(2):
        status.apply(GroupLost(found_no_room=False, fault=EnvironmentFault("s3://b does not answer", "start it")))
    refusal = next_start([*status.attempts, []], 1).refusal
    assert isinstance(refusal, EnvironmentFault)
    assert "the last error: s3://b does not answer" in refusal.message
    assert status.lines[-1] == "the workers could not start: s3://b does not answer"


def test_a_group_that_is_lost_while_it_leaves_has_not_failed() -> None:
    status = status_of_a_group_on("a", "b")
    status.apply(leaves("b"))
    status.apply(Stopped())
    status.apply(GroupLost(found_no_room=False))
    assert next_start([*status.attempts, []], 0).refusal is None
    status.apply(GroupLost(found_no_room=False))  # of the next group, before it asked
    assert next_start([*status.attempts, []], 0).refusal is not None


def test_a_group_that_found_no_room_has_not_failed() -> None:
    status = Status()
    for _ in range(2):
        status.apply(GroupLost(found_no_room=True))
    assert status.lines == ["the workers have found no room in time, and as many as fit start"], "it is said once"
    status.apply(group_on("a"))
    assert next_start(status.attempts, 0).refusal is None


@pytest.mark.parametrize("elastic", [False, True])
def test_a_node_that_leaves_before_the_upload_has_ended_is_said(elastic: bool) -> None:
    status = status_of_a_group_on("a", "b")
    status.apply(Uploaded("000000000064-0", False))
    status.apply(leaves("b"))
    status.apply(Stepped(96))
    if elastic:
        status.apply(GroupLost(found_no_room=False))
    status.apply(group_on("a"))
    status.apply(GroupStarted(64, "000000000064-0", 0.0))
    assert status.images_lost == 32
    assert next_start(status.attempts, 0).refusal is None
    (line,) = (line for line in status.lines if "before the checkpoint at 0.1 kimg was complete" in line)
    assert "Raise RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" in line

    status.apply(LOST)  # for another reason
    status.apply(group_on("a"))
    status.apply(GroupStarted(64, "000000000064-0", 0.0))
    assert sum("was complete" in line for line in status.lines) == 1


def test_a_complete_checkpoint_on_a_leaving_node_loses_nothing_and_nothing_is_said() -> None:
    status = status_of_a_group_on("a", "b")
    status.apply(leaves("b"))
    status.apply(Uploaded("000000000064-0", False))
    status.apply(group_on("a"))  # the message that the group stopped was lost
    status.apply(GroupStarted(64, "000000000064-0", 0.0))
    assert status.images_lost == 0
    assert not any("was complete" in line for line in status.lines)


class Clock:
    """A Unix time that a test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def group_of(workers: int, age_s: float) -> StartAsked:
    return StartAsked(frozenset({"a"}), workers, age_s)


def seconds(status: Status) -> float:
    """Device seconds of the run, to the millisecond."""
    return round(3600 * status.device_hours, 3)


def test_workers_hold_their_devices_from_the_start_of_their_processes_until_they_are_gone() -> None:
    clock = Clock()
    status = Status(clock=clock, earlier_device_s=50.0)
    clock.now_s += 600  # the cluster has no room
    assert seconds(status) == 50, "an earlier driver's"
    status.apply(group_of(4, age_s=10.0))
    assert seconds(status) == 50 + 4 * 10
    clock.now_s += 100
    assert seconds(status) == 50 + 4 * 110
    status.apply(Stopped())
    clock.now_s += 600
    assert seconds(status) == 50 + 4 * 110
    status.apply(group_of(2, age_s=20.0))  # as many as fit
    clock.now_s += 5
    assert seconds(status) == 50 + 4 * 110 + 2 * 25
    status.notice_end()
    clock.now_s += 600
    assert seconds(status) == 50 + 4 * 110 + 2 * 25


def test_a_group_that_died_without_a_message_held_its_devices_until_the_next_one() -> None:
    clock = Clock()
    status = Status(clock=clock)
    clock.now_s += 60
    status.apply(group_of(2, age_s=500.0))  # the process is older than the driver
    assert seconds(status) == 2 * 60
    clock.now_s += 30
    status.apply(group_of(2, age_s=8.0))
    assert seconds(status) == 2 * 90, "nothing counts twice"
    status.apply(LOST)
    clock.now_s += 15
    status.apply(group_of(2, age_s=8.0))
    assert seconds(status) == 2 * 98, "between the failure and the next start no device is held"


def test_the_workers_of_a_silent_group_are_counted_up_to_their_last_sign() -> None:
    clock = Clock()
    status = Status(clock=clock)
    status.apply(group_of(2, age_s=0.0))
    clock.now_s += 10
    status.apply(Alive(0, "process 1 on a", 0, 0.0))
    clock.now_s += 100
    status.notice_silence("2 workers")
    assert seconds(status) == 2 * 10


def test_gpus_that_score_count_while_they_score() -> None:
    clock = Clock()
    status = Status(clock=clock)
    for gpus in (0.0, 2.0, 2.0, 0.0):
        clock.now_s += 10
        status.notice_scoring(gpus)
    assert seconds(status) == 2 * 20


def test_the_time_of_an_image_is_that_between_logs_on_all_workers() -> None:
    status = Status()
    assert status.device_s_per_image is None
    status.apply(group_of(4, age_s=0.0))
    status.apply(GroupStarted(1000, "000000001000-0", 300.0))
    assert status.device_s_per_image is None
    status.apply(Logged(1400, {}, 310.0))
    assert status.device_s_per_image == 4 * 10 / 400
    status.apply(group_of(2, age_s=0.0))
    status.apply(GroupStarted(1200, "000000001200-0", 305.0))
    status.apply(Logged(1300, {}, 310.0))
    assert status.device_s_per_image == (4 * 10 + 2 * 5) / 500


def test_a_jump_of_the_machines_clock_is_no_device_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    status, now = status_of_a_group_on("a", "b"), time.time
    assert status.clock is not now, "a clock that is bound already would not see the jump"
    monkeypatch.setattr(time, "time", lambda: now() + 4 * 3600)
    status.notice_scoring(1.0)
    assert status.device_hours < 1
