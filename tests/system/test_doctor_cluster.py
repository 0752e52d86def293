"""`sagan doctor --cluster` names the node that differs from the others, within a bounded time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from infra.local.servers import Ray
from tests.system.command_process import JOBS
from tests.system.ray_node import RayNode

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray")]

BROKEN = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "none",
    "GLOO_SOCKET_IFNAME": "absent0",
}


def doctor(head: Ray) -> tuple[int, list[dict[str, Any]]]:
    """The exit code and the results of the command."""
    environment = {**os.environ, **head.env, "PYTHONPATH": str(JOBS.parent)}
    command = [sys.executable, "-m", "pipeline", "doctor", "--cluster", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return done.returncode, results


def about(results: list[dict[str, Any]], name: str) -> list[str]:
    return [result["status"] for result in results if result["name"].endswith(name)]


def test_the_broken_node_of_three_is_named() -> None:
    with Ray(cpus=1) as head, RayNode(head, cpus=1):
        _, results = doctor(head)  # on a busy machine, a check may take longer than its limit and fail
        assert about(results, "nodes") == ["ok"], results
        assert about(results, "network") == ["ok"], results
        assert not about(results, ": S3")
        with RayNode(head, cpus=1, env=BROKEN):
            code, found = doctor(head)
    assert code == 3
    (storage,) = (result for result in found if result["name"].endswith(": S3"))
    node = storage["name"].removesuffix(": S3")
    pairs = {result["name"]: result["found"] for result in found if ") and " in result["name"]}
    assert len(pairs) == 2, "\n".join(f"{pair}: {error}" for pair, error in pairs.items())
    assert all(node in pair and BROKEN["GLOO_SOCKET_IFNAME"] in error for pair, error in pairs.items()), pairs
    assert about(found, "network") == ["ok"], "the two other nodes reach each other"
