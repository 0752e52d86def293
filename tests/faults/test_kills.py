"""A short run of the seeded kills; `python -m tests.faults.kills` has the long one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.conftest import TestS3
from tests.faults.kills import INTERVAL, STEP, Ended, Kill, Notice, Runs, TakenAway, check, runs
from tests.faults.storage_proxy import fault_proxy


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[tuple[Runs, Ended]]:
    """The fewest ranks whose sums depend on the order of the summands."""
    with runs(3) as made:
        yield made, made.run("undisturbed", [])


def test_a_run_whose_workers_are_killed_ends_as_the_undisturbed_run(three_ranks: tuple[Runs, Ended]) -> None:
    made, undisturbed = three_ranks
    ended = check(12, made, undisturbed)
    assert ended.reached


def test_each_kill_of_a_list_is_met(three_ranks: tuple[Runs, Ended]) -> None:
    """While a checkpoint is uploaded, while it is restored, and between its files and its manifest."""
    made, undisturbed = three_ranks
    kills = [
        Kill(0, "upload a file", 7, after=True),
        Kill(1, "load the state", 1, after=False),
        Kill(0, "upload the manifest", 1, after=False),
    ]
    ended = made.run("listed", kills)
    assert ended.reached == kills
    assert (ended.checkpoint, ended.points) == (undisturbed.checkpoint, undisturbed.points)
    assert ended.status.images_lost > 0


def test_a_run_that_starts_from_another_is_killed_and_ends_as_the_undisturbed_one(
    three_ranks: tuple[Runs, Ended],
) -> None:
    """Its first driver dies before training, its source is deleted, and then workers die twice."""
    made, undisturbed = three_ranks
    source = made.folder / "theirs"
    shutil.copytree(made.folder / "runs" / "undisturbed", source)
    start = {"init": {"source": str(source), "optimizers": True}, "optim": {"lr_d": 1e-4}}
    alone = made.run("started", [], **start)
    assert alone.points != undisturbed.points

    made.start("started-killed", **start)
    shutil.rmtree(source)
    kills = [Kill(1, "step", 2, after=True), Kill(0, "log", 4, after=False)]
    killed = made.run("started-killed", kills, **start)
    assert killed.reached == kills
    assert killed.status.resumed_from is not None
    assert (killed.checkpoint, killed.points) == (alone.checkpoint, alone.points)


def test_workers_that_get_notice_lose_nothing(three_ranks: tuple[Runs, Ended]) -> None:
    """Between two checkpoints, and as soon as they have started."""
    made, undisturbed = three_ranks
    ended = made.run("noticed", [Notice(4 * STEP), Notice(0)])
    assert ended.left == 2
    assert (ended.checkpoint, ended.points) == (undisturbed.checkpoint, undisturbed.points)
    assert ended.status.images_lost == 0


def test_a_machine_that_is_taken_away_before_the_upload_has_ended_tears_nothing(
    three_ranks: tuple[Runs, Ended], s3: TestS3
) -> None:
    """The files of the last checkpoint are in storage, and its manifest is on the way. The one before it counts."""
    made, undisturbed = three_ranks
    with fault_proxy(s3.url) as proxy:

        def deadline() -> None:
            assert proxy.wait_for("slow_first_byte")
            proxy.clear()

        behind = Runs(made.folder, made.world, f"{s3.bucket()}/runs", {**s3.env, "AWS_ENDPOINT_URL": proxy.url()})
        for stop in (INTERVAL + STEP, INTERVAL + 2 * STEP):  # the ranks may take another step before they agree to stop
            proxy.inject("slow_first_byte", f"*/checkpoints/{stop:012}-*/manifest.json", seconds=600)
        ended = behind.run("taken-away", [TakenAway(INTERVAL + STEP, deadline)])
    assert (ended.checkpoint, ended.points) == (undisturbed.checkpoint, undisturbed.points)
    assert ended.left == 0
    assert ended.status.resumed_from is not None
    assert ended.status.resumed_from.startswith(f"{INTERVAL:012}-")
    assert STEP <= ended.status.images_lost <= 2 * STEP
    assert any("was complete: the one before it counts" in line for line in ended.status.lines)
