"""A submitter of infra/kubernetes submits its job again where the head or the driver was lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.local.server_process import free_port
from infra.local.servers import Ray

SCRIPTS = Path(__file__).parents[2] / "infra/kubernetes/base/scripts"

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray")]


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.2)


def test_a_lost_head_and_a_killed_driver_cost_nobody_a_command(tmp_path):
    starts, end = tmp_path / "starts", tmp_path / "end"
    starts.touch()
    entrypoint = f"echo $$ >> {starts}; until test -e {end}; do sleep 0.2; done"

    def drivers() -> list[int]:
        return [int(line) for line in starts.read_text().split()]

    port = free_port()
    first, second = Ray(port=port), Ray(port=port)
    second.token = first.token
    env = {**os.environ, **first.env, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
    pod = {"RAY_DASHBOARD_ADDRESS": f"127.0.0.1:{port}", "RAY_JOB_SUBMISSION_ID": "again"}
    with (tmp_path / "log").open("w") as log:
        submitter = subprocess.Popen(
            [sys.executable, SCRIPTS / "submit.py", entrypoint], env={**env, **pod}, stdout=log, stderr=log
        )
    try:
        with first:
            until(lambda: len(drivers()) == 1)
            subprocess.run([sys.executable, SCRIPTS / "stop_jobs.py"], env=env, check=True)
            assert first.jobs() == {"again": "STOPPED"}
        with second:
            until(lambda: len(drivers()) == 2)
            os.kill(drivers()[-1], signal.SIGKILL)
            until(lambda: len(drivers()) == 3)
            end.touch()
            assert submitter.wait() == 0
            assert second.jobs() == {"again": "SUCCEEDED"}
    finally:
        submitter.kill()
        submitter.wait()
    assert "does not answer" in (tmp_path / "log").read_text()


def test_a_job_that_fails_for_good_ends_its_submitter(ray_cluster):
    pod = {"RAY_DASHBOARD_ADDRESS": f"127.0.0.1:{ray_cluster.port}", "RAY_JOB_SUBMISSION_ID": "for-good"}
    done = subprocess.run(
        [sys.executable, SCRIPTS / "submit.py", "echo the cause; exit 2"],
        env={**os.environ, **ray_cluster.env, **pod},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "the cause" in done.stdout
    assert "for-good has failed for good" in done.stdout
