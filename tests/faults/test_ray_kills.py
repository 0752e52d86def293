"""A short run of the kills on a Ray cluster; `python -m tests.faults.ray_kills` has the long one."""

from __future__ import annotations

import pytest

from pipeline.runs.checkpoints import LoggedPoint
from tests.faults.ray_kills import check, cluster, recovery, train_undisturbed


def points(*seconds: float) -> list[LoggedPoint]:
    return [LoggedPoint(step=step, time_ms=int(1000 * at), metrics={}) for step, at in enumerate(seconds)]


@pytest.mark.parametrize(
    ("seconds", "happened", "expected"),
    [
        ((10.0, 11.0, 19.0, 20.0), 12.0, 7.0),  # from the event, and not from the step before it
        ((10.0, 11.0, 12.0, 19.0), 10.5, 7.0),  # a step was on its way
        ((10.0, 11.0), 4.0, 6.0),
        ((10.0, 11.0), 11.5, None),
    ],
)
def test_recovery_is_the_longest_time_without_a_step_after_the_event(
    seconds: tuple[float, ...], happened: float, expected: float | None
) -> None:
    assert recovery(points(*seconds), happened) == expected


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_run_whose_controller_is_killed_goes_on_by_itself() -> None:
    """Seed 7 kills it during the steps. A controller that dies before its workers have started restarts nothing."""
    with cluster() as made:
        undisturbed = train_undisturbed(made)
        for event in ("controller", "controller-unheard"):
            result = check(event, 7, made, undisturbed)
            assert result.moment.phase == "step"
            assert result.ended.restarts == 1
