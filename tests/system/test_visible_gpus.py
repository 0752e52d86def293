"""Tasks and actors see the GPUs that they reserve, and no others.

Ray counts the GPUs that it is told of. The machine need not have them.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("ray")]

SCRIPT = """
import os
import ray
from pipeline.compute.actor_pool import ActorPool
from pipeline.compute.tasks import map_parallel, run_as_task


class Seen:
    def gpus(self, shared, item):
        return os.environ.get("CUDA_VISIBLE_DEVICES")


def seen(*_):
    return os.environ.get("CUDA_VISIBLE_DEVICES")


ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
print(repr(run_as_task(seen, cpus=1, gpus=0)), repr(next(map_parallel(seen, [0], (), True))))
print(len(run_as_task(seen, cpus=1, gpus=1)))
for gpus in (0, 1):
    pool = ActorPool(Seen, 1, 1, gpus)
    print(repr(next(pool.map("gpus", None, [0]))) if gpus == 0 else len(next(pool.map("gpus", None, [0]))))
    pool.stop()
"""


def test_tasks_and_actors_see_the_gpus_that_they_reserve() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["''", "''", "1", "''", "1"]
