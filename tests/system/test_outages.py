"""Ordinary events of a cluster end no run. A part that dies or an outage delays it, and its last state is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import files
from tests.faults.storage_proxy import fault_proxy
from tests.system.command_process import JOBS, Driver, ray_workers, training_workers

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray")]

Place = tuple[Path, str, dict[str, str]]
SCORED: dict[str, Any] = {"evaluate.kimg": 0.64, "track.register": "false"}


@pytest.fixture(scope="module")
def place(s3: Any, ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """(folder of the commands, bucket, environment)."""
    folder, bucket = tmp_path_factory.mktemp("outages"), s3.bucket()
    env = {**s3.env, **ray_cluster.env, "SAGAN_BUCKET": bucket}
    env["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    return folder, bucket, env


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> str:
    """Name of the last checkpoint of a run that nothing happened to. It holds the digest of the state."""
    folder, _, env = place
    run = Driver(folder, env, name="undisturbed", **SCORED)
    assert run.end() == 0, run.output
    return files.name(run.summary("undisturbed")["checkpoint"])


def ends_the_same(place: Place, run: Driver, name: str, undisturbed: str) -> dict[str, Any]:
    _, bucket, _ = place
    assert run.end() == 0, run.output
    assert files.list_names(f"{bucket}/runs/{name}/checkpoints")[-1] == undisturbed
    return run.summary(name)


def killed(actor: str, cluster: str) -> None:
    (process,) = ray_workers(actor, cluster)
    os.kill(process, signal.SIGKILL)


@pytest.fixture
def kill(place: Place) -> Callable[[str], None]:
    return lambda actor: killed(actor, place[2]["RAY_ADDRESS"])


def test_the_drivers_mailbox_dies(place: Place, undisturbed: str, kill: Callable[[str], None]) -> None:
    folder, _, env = place
    run = Driver(folder, env, name="mailbox", **SCORED)
    run.until("checkpoint 0")
    kill("_Actor")
    summary = ends_the_same(place, run, "mailbox", undisturbed)
    assert (summary["restarts"], summary["images_lost"]) == (0, 0)


def test_the_process_that_scores_dies_each_time(place: Place, undisturbed: str, kill: Callable[[str], None]) -> None:
    """It is tried three times, and then again after training, in the driver."""
    folder, bucket, env = place
    slow = {**SCORED, "evaluate.samples": 20_000, "evaluate.repeats": 1}
    run = Driver(folder, env, name="scoring", **slow)
    for _ in range(3):
        kill_when_it_runs(kill, "_call")
        run.until("has no score yet")
    assert "it will be scored after training" in run.output
    summary = ends_the_same(place, run, "scoring", undisturbed)
    assert summary["restarts"] == 0
    assert len(files.list_names(f"{bucket}/runs/scoring/scores")) == 3


def kill_when_it_runs(kill: Callable[[str], None], actor: str) -> None:
    while True:
        try:
            kill(actor)
        except ValueError:  # it has not started yet
            continue
        return


def test_a_rank_is_stopped_for_a_while(place: Place, undisturbed: str) -> None:
    folder, bucket, env = place
    run = Driver(folder, env, name="stopped-rank", **SCORED)
    run.until("checkpoint 0")
    process = training_workers(env["RAY_ADDRESS"])[0]
    os.kill(process, signal.SIGSTOP)
    run.until(f"(process {process} on ")
    line = run.output.splitlines()[-1]
    assert line.startswith("training waits for rank ")
    command = [sys.executable, "-m", "pipeline", "status", f"{bucket}/runs/stopped-rank", "--json"]
    without_cluster = {
        **os.environ,
        **env,
        "PYTHONPATH": str(JOBS.parent),
        "RAY_ADDRESS": "",
        "MLFLOW_TRACKING_URI": "",
    }
    while not (seen := json.loads(subprocess.run(command, env=without_cluster, capture_output=True).stdout))["waits"]:
        time.sleep(0.02)
    assert f"process {process} on " in seen["waits"][0]["what"]
    os.kill(process, signal.SIGCONT)
    run.until("training waited ")
    summary = ends_the_same(place, run, "stopped-rank", undisturbed)
    assert (summary["restarts"], summary["images_lost"]) == (0, 0)


def test_storage_fails_during_a_checkpoint_and_a_score(place: Place, s3: Any, undisturbed: str) -> None:
    folder, _, env = place
    with fault_proxy(s3.url) as proxy:
        behind = {"AWS_ENDPOINT_URL": proxy.url()}
        overrides: dict[str, Any] = {**SCORED, "resources.env": json.dumps(behind)}
        run = Driver(folder, {**env, **behind}, name="outage", **overrides)
        run.until("checkpoint 000000000320")
        proxy.inject("burst_503", times=float("inf"), object="*/runs/outage/*")
        run.until("waits for storage: ")
        proxy.clear()
        summary = ends_the_same(place, run, "outage", undisturbed)
    assert summary["restarts"] == 0


def test_a_second_driver_of_a_run_is_refused(place: Place) -> None:
    """The run ends only when it is told to: on a slow machine it could otherwise end before it is refused to others."""
    folder, _, env = place
    longer = {**SCORED, "train.kimg": 1000}
    run = Driver(folder, env, name="twice", **longer)
    run.until("checkpoint 0")
    for command in ("run",), ("run", "--fresh"):
        second = Driver(folder, env, command=(sys.executable, "-m", "pipeline", *command), name="twice", **longer)
        assert second.end() == 2, second.output
        assert f"process {run.process.pid} on " in second.output
    run.signal(signal.SIGTERM)
    assert run.end() == 130, run.output
    assert "resumed from" not in run.output


def test_a_driver_that_lost_its_run_ends_and_leaves_it_alone(place: Place) -> None:
    folder, bucket, env = place
    run = Driver(folder, env, name="lost", **SCORED)
    run.until("checkpoint 0")
    before = files.list_names(f"{bucket}/runs/lost/checkpoints")
    files.write_bytes(f"{bucket}/runs/lost/owners/00000002.json", b"{}")
    assert run.end() == 1, run.output
    assert "another driver has taken over the run" in run.output
    after = files.list_names(f"{bucket}/runs/lost/checkpoints")
    assert len(after) <= len(before) + 1, "one may have been on its way"
