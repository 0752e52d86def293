"""A call on a node has a process of its own, so that what an earlier call left in a process cannot make it fail."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("ray")]

SCRIPT = """
import os
import ray
from pipeline.compute.cluster import live_nodes, run_on_nodes

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
for _ in range(3):
    print(*run_on_nodes(dict.fromkeys(live_nodes(), os.getpid), 60).values())
"""


def test_each_call_has_a_process_of_its_own() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    pids = [int(pid) for pid in ran.stdout.split()]
    assert len(set(pids)) == 3
