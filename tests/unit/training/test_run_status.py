"""A worker group that loses a node has not failed where there was notice."""

from __future__ import annotations

import pytest

from pipeline.compute.cluster import LeavingNode
from pipeline.errors import SaganError
from pipeline.training.restart_budget import next_start
from pipeline.training.status.messages import (
    GroupLost,
    GroupStarted,
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


def test_a_group_that_is_lost_while_it_leaves_has_not_failed() -> None:
    status = status_of_a_group_on("a", "b")
    status.apply(leaves("b"))
    status.apply(Stopped())
    status.apply(GroupLost(found_no_room=False))
    assert next_start([*status.attempts, []], 0).refusal is None


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
