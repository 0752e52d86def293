"""A run with a range of workers trains with as many as fit, and ends as the run with a fixed number does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from infra.local.servers import Ray
from pipeline.runs.checkpoints import METRICS
from sagan import TrainState
from tests.system.command_process import Driver, training_workers
from tests.system.ray_node import RayNode, cpus_in_use

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray")]

STEP = 32  # images
OVERRIDES: dict[str, Any] = {"train.kimg": 3.2, "evaluate.cpus": 0, "track.register": "false"}
ELASTIC = {"train.workers": 2, "train.min_workers": 1, "train.grow_after_s": 1}


def train(
    folder: Path, head: Ray, name: str, environment: Mapping[str, str] = MappingProxyType({}), /, **overrides: Any
) -> Driver:
    env = {
        **head.env,
        **environment,
        "SAGAN_BUCKET": str(folder / "bucket"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }
    return Driver(folder, env, name=name, **OVERRIDES, **overrides)


def state(folder: Path, run: Driver, name: str) -> dict[str, torch.Tensor]:
    return dict(TrainState.load(Path(run.summary(name)["checkpoint"])).tensors())


def test_a_run_shrinks_and_grows_with_its_cluster(tmp_path: Path) -> None:
    """One node at first; another joins, and is killed without notice."""
    with Ray(cpus=0) as head, RayNode(head, cpus=1):
        run = train(tmp_path, head, "elastic", **ELASTIC)
        run.until("checkpoint 0")
        with RayNode(head, cpus=1) as second:
            run.until("training goes on with 2 instead of 1 workers")
            run.until("checkpoint 0")
            second.kill()
            run.until("training goes on with 1 instead of 2 workers")
        assert run.end() == 0, run.output
        fixed = train(tmp_path, head, "fixed", **{"train.workers": 1})
        assert fixed.end() == 0, fixed.output
    points = Path(run.summary("elastic")["checkpoint"], METRICS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in points] == list(range(STEP, 3200 + 1, STEP)), "each step once"
    # At most one interval between checkpoints and one step are lost: only one node left without notice.
    assert run.summary("elastic")["images_lost"] <= 320 + STEP
    # Sums over one and over two ranks round in another order, and a hundred updates of Adam enlarge the difference.
    # Biases before a batch norm are left out: their gradients are rounding errors, which Adam scales up.
    ours, theirs = state(tmp_path, run, "elastic"), state(tmp_path, fixed, "fixed")
    weights = [name for name in theirs if name.startswith(("generator.", "discriminator.")) and "weight" in name]
    assert weights
    for name in weights:
        assert (ours[name] - theirs[name]).norm() <= 0.02 * theirs[name].norm(), name


def test_a_group_that_finds_no_room_in_time_starts_again_with_what_fits(tmp_path: Path) -> None:
    """Another job holds the only CPU when the run starts. Then a node joins that has two. No group has failed."""
    with Ray(cpus=0) as head, RayNode(head, cpus=1), cpus_in_use(head, 1):
        soon = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3"}  # Ray's default is 60
        run = train(tmp_path, head, "late", soon, **ELASTIC, **{"train.max_failures": 0})
        run.until("the workers have found no room in time")
        with RayNode(head, cpus=2):
            run.until("checkpoint 0")
            if len(training_workers(head.env["RAY_ADDRESS"])) < 2:  # the node joined after they were counted
                run.until("training goes on with 2 instead of 1 workers")
            assert run.end() == 0, run.output
    assert run.summary("late")["images_lost"] == 0
