"""`sagan status` says what a run is doing, from the run's folder alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline import cli
from pipeline.collection.manifest import Collection
from pipeline.config.schema import TrainJob
from pipeline.errors import BudgetSpent, InterruptedRun, SaganError, UsageError
from pipeline.job_runner import _evaluation
from pipeline.runs.stored_run import StoredRun
from pipeline.tracking.mlflow_run import client
from pipeline.training.driver import find_or_start, owned, train
from pipeline.training.shared_types import TrainingRun
from pipeline.training.status import status_file
from pipeline.training.status.messages import GroupStarted, Logged, StartAsked, Stepped, Waits, WentOn, WorkerFailed
from pipeline.training.status.run_status import Status
from pipeline.training.status.status_file import WAITING, StatusFile
from tests.unit.evaluation.conftest import commit_checkpoint
from tests.unit.training.test_lost_mlflow_run import job_in, start_run

START = """
import os, sys, time
from pathlib import Path
from pipeline.collection.manifest import Collection
from tests.unit.training.test_lost_mlflow_run import job_in
from tests.unit.training.test_status_file import driving, training
folder = Path(sys.argv[2])
with driving(job_in(Collection.open(sys.argv[1]), folder, folder / "runs")) as (run, told):
    now = training()
    now.earlier_device_s = 7200
    told.follow(now)
    while (state := run.stored.state()) is None or state.state != "training":
        time.sleep(0.02)
    os._exit(1)
"""


@pytest.fixture
def job(packed: Collection, tmp_path: Path) -> TrainJob:
    return job_in(packed, tmp_path, tmp_path / "runs")


def status(url: str) -> dict[str, Any]:
    """What `sagan status` says as JSON."""
    seen: dict[str, Any] = json.loads(CliRunner().invoke(cli.app, ["status", url, "--json"]).stdout)
    return seen


def words(url: str) -> str:
    """What `sagan status` says to people."""
    result = CliRunner().invoke(cli.app, ["status", url])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def until(job: TrainJob, key: str, value: object) -> dict[str, Any]:
    """What `sagan status` says as soon as `key` has a value. The time-out of tests ends it."""
    while (seen := status(StoredRun.of(job).url))[key] != value:
        time.sleep(0.02)
    return seen


@contextmanager
def driving(job: TrainJob) -> Iterator[tuple[TrainingRun, StatusFile]]:
    """A driver of the run, without workers."""
    with ExitStack() as held:
        run = find_or_start(job, _evaluation(), None, lambda stored: held.enter_context(owned(stored)))
        yield run, held.enter_context(StatusFile(run, higher_is_better=False))


def training() -> Status:
    """The status of a run whose workers have trained a little."""
    now = Status()
    for message in (
        StartAsked(frozenset({"a"}), 1),
        GroupStarted(0, None, 0.0),
        Logged(16, {"images_per_s": 8.0}, 2.0),
        Stepped(32),
    ):
        now.apply(message)
    return now


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_file, "NEWS_S", 0.01)


def test_a_run_is_shown_from_its_start_to_its_end(job: TrainJob) -> None:
    with driving(job) as (run, told):
        seen = until(job, "state", "starting")
        assert (seen["kimg"], seen["total_kimg"], seen["checkpoint"], seen["score"]) == (0, 1, None, None)
        assert seen["driver"]["alive"]
        now = training()
        now.earlier_device_s = 1800
        told.follow(now)
        seen = until(job, "state", "training")
        spending = seen["spending"]
        assert spending["device_hours"] == pytest.approx(0.5, abs=0.1)
        left = spending["expected_device_hours"] - spending["device_hours"]
        assert left == pytest.approx((1000 - 32) * 2 / 16 / 3600)
        assert spending["cost"] is None
        assert (seen["kimg"], seen["images_per_s"], seen["restarts"], seen["waits"]) == (0.032, 8, 0, [])

        now.apply(Waits("checkpoint x", "storage: it is away", "it is sent again in 5 s"))
        told.follow(now)
        (wait,) = until(job, "waits", [dict(now.waits["checkpoint x"])])["waits"]
        assert wait["what"] == "storage: it is away"
        assert now.lines[-1].startswith("checkpoint x waits for storage: it is away, since ")
        now.apply(WentOn("checkpoint x"))
        told.follow(now)
        until(job, "waits", [])

        checkpoint = commit_checkpoint(job, 32)
        now.apply(WorkerFailed(SaganError("the disk is gone"), 32, "OSError"))
        for message in (StartAsked(frozenset({"a"}), 1), GroupStarted(32, checkpoint.name, 1.0)):
            now.apply(message)
        told.follow(now)
        seen = until(job, "restarts", 1)
        assert seen["last_error"] == "the disk is gone"
        assert seen["checkpoint"]["name"] == checkpoint.name
        now.apply(Stepped(1000))
        told.score(now)
        until(job, "state", "scoring")
    seen = status(StoredRun.of(job).url)
    assert (seen["state"], seen["kimg"], seen["driver"]["alive"]) == ("finished", 1, False)
    said = words(StoredRun.of(job).url)
    assert "state finished position 1.0 of 1 kimg, 8 images/s" in said
    assert f"checkpoint {checkpoint.name}, " in said
    assert "last error the disk is gone (" in said
    tags = client(run.tracking_uri).get_run(run.mlflow_run_id).data.tags
    assert tags[WAITING] == "no"


def test_what_a_run_waits_for_is_a_tag_of_mlflow(job: TrainJob) -> None:
    with driving(job) as (run, told):
        now = training()
        now.apply(Waits("the start", "the end of a pause", "it ends after 5 s"))
        told.follow(now)
        mlflow = client(run.tracking_uri)
        while "the start waits" not in mlflow.get_run(run.mlflow_run_id).data.tags.get(WAITING, ""):
            time.sleep(0.02)
    assert mlflow.get_run(run.mlflow_run_id).data.tags[WAITING] == "no"


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (SaganError("training diverged", "lower the rates"), "failed", "training diverged"),
        (InterruptedRun("stopped at 0.0 kimg"), "stopped", None),
    ],
)
def test_how_a_run_ended_is_kept(job: TrainJob, error: SaganError, state: str, message: str | None) -> None:
    with pytest.raises(type(error)), driving(job):
        raise error
    seen = status(StoredRun.of(job).url)
    assert (seen["state"], seen["last_error"]) == (state, message)
    with driving(job):
        assert until(job, "state", "starting")["last_error"] == message, "an earlier driver's"


def test_what_a_run_spends_has_a_price_and_a_budget(job: TrainJob) -> None:
    keys = {"resources": {"price_per_device_hour": 4.0}, "budget": {"cost": 10.0}}
    job = TrainJob.model_validate({**job.model_dump(by_alias=True), **keys})
    now = training()
    now.earlier_device_s = 3 * 3600
    with driving(job) as (run, told):
        told.follow(now)
    seen = status(StoredRun.of(job).url)
    assert seen["budget_hours"] == 2.5
    assert seen["spending"]["cost"] == pytest.approx(12, abs=0.5)
    said = words(StoredRun.of(job).url)
    assert "budget 2.50 device hours" in said
    assert "cost 12.0" in said
    tags = client(run.tracking_uri).get_run(run.mlflow_run_id).data.tags
    assert float(tags["device_hours"]) == pytest.approx(3, abs=0.1)
    assert float(tags["expected_cost"]) > float(tags["cost"]) == pytest.approx(12, abs=0.5)


def test_a_run_without_budget_left_starts_no_worker_and_says_how_it_goes_on(job: TrainJob) -> None:
    keys = {"resources": {"price_per_device_hour": 4.0}, "budget": {"cost": 10.0}}
    job = TrainJob.model_validate({**job.model_dump(by_alias=True), **keys})
    now = training()
    now.earlier_device_s = 3 * 3600
    with driving(job) as (run, told):
        told.follow(now)
    checkpoint = commit_checkpoint(job, 32)
    with pytest.raises(BudgetSpent) as caught:
        train(job, _evaluation())
    error = caught.value
    for text in ("budget.cost is 10", "3.0", "cost 12.0", "0.0 of 1 kimg", checkpoint.name):
        assert text in error.message
    assert error.remedy == "to go on, run the same command with a larger budget, such as budget.cost=20"
    assert error.exit_code == 4
    assert status(StoredRun.of(job).url)["state"] == "stopped"
    assert client(run.tracking_uri).get_run(run.mlflow_run_id).info.status == "KILLED"


def test_a_driver_that_was_killed_is_said_to_be_dead(job: TrainJob, packed: Collection, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", START, packed.url, str(tmp_path)])
    seen = status(StoredRun.of(job).url)
    assert (seen["state"], seen["kimg"]) == ("driver died", 0.032)
    assert not seen["driver"]["alive"]
    assert seen["spending"]["device_hours"] >= 2
    assert start_run(job).record.device_hours == seen["spending"]["device_hours"], "the next driver goes on from there"


def test_a_run_of_older_code_and_a_run_that_is_not_there(job: TrainJob) -> None:
    start_run(job)
    commit_checkpoint(job, 32)
    url = StoredRun.of(job).url
    seen = status(url)
    assert (seen["state"], seen["kimg"], seen["total_kimg"]) == ("unknown", 0.032, None)
    result = CliRunner().invoke(cli.app, ["status", f"{url}2"])
    assert isinstance(result.exception, UsageError)
    assert "its folder has: moved" in result.exception.remedy
