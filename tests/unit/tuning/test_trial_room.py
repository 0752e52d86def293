"""A trial starts when what is free holds it, and what is free counts trials that have not got their room yet."""

from __future__ import annotations

import threading

import pytest

from pipeline.compute.resources import PlacementGroups
from pipeline.tuning import trial_room
from pipeline.tuning.trial_room import Room, TrialNeeds, TrialRoom


def amounts(cpus: float, gpus: float = 0.0) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus}


TWO_AND_A_SCORE = TrialNeeds(2, amounts(1), [amounts(1)], driver_cpus=0.01)


@pytest.mark.parametrize(
    ("free", "placed", "running", "holds"),
    [
        ([amounts(8)], 0, 0, True),
        ([amounts(3)], 1, 1, False),  # the process of the trial itself takes a hundredth of a CPU
        ([amounts(3.5)], 1, 1, True),
        ([amounts(3.5)], 0, 1, False),  # the running trial will take two
        ([amounts(6.5)], 0, 1, True),
        ([amounts(1.5), amounts(2)], 1, 1, True),  # the score on one node, the workers on the other
        ([amounts(0.9)] * 8, 1, 1, False),  # other runs have the rest of each node
        ([amounts(3.5)], 2, 1, True),  # a trial has ended, and its placement group is still there
    ],
)
def test_a_trial_starts_where_its_room_is_free(
    free: list[dict[str, float]], placed: int, running: int, holds: bool
) -> None:
    assert Room(free, placed).holds_another(TWO_AND_A_SCORE, running) == holds


def test_a_run_that_a_thread_drives_needs_no_process_for_it() -> None:
    in_a_thread = TrialNeeds(2, amounts(1), [amounts(1)])
    assert Room([amounts(3)], 1).holds_another(in_a_thread, 1)
    assert not Room([amounts(2.9)], 1).holds_another(in_a_thread, 1)


def test_runs_that_differ_start_where_the_greatest_of_them_fits() -> None:
    wide, deep = TrialNeeds(4, amounts(1), [amounts(1)]), TrialNeeds(1, amounts(2, 1), [amounts(2), amounts(2)])
    greatest = TrialNeeds.greatest([wide, deep])
    assert greatest == TrialNeeds(4, amounts(2, 1), [amounts(2), amounts(2)])
    assert TrialNeeds.greatest([wide]) == wide


def test_a_trial_that_scores_in_line_needs_no_room_beside_its_workers() -> None:
    in_line = TrialNeeds(2, amounts(1, 1), [])
    assert Room([amounts(64, 2)], 1).holds_another(in_line, 1)
    assert not Room([amounts(64, 1)], 1).holds_another(in_line, 1)


def test_no_trial_starts_at_a_look_during_which_a_group_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of the running trial end after its group was counted, and before the free CPUs are read."""
    groups, looks, next_look = [1], threading.Semaphore(0), threading.Semaphore(0)

    def free_resources() -> list[dict[str, float]]:
        if groups[0]:
            groups[0] = 0
            return [amounts(4)]
        looks.release()  # the look before is over
        next_look.acquire()
        return [amounts(4)]

    monkeypatch.setattr(trial_room, "placement_groups", lambda: PlacementGroups(groups[0], 0, []))
    monkeypatch.setattr(trial_room, "release_placement_groups", lambda _: None)
    monkeypatch.setattr(trial_room, "free_resources", free_resources)
    monkeypatch.setattr(trial_room, "_LOOK_S", 0.001)
    room = TrialRoom("the study", TrialNeeds(2, amounts(1), [amounts(1)]), "2 workers", "run")
    try:
        looks.acquire()
        assert not room.may_start(1)
    finally:
        next_look.release(1000)
        room.close()
