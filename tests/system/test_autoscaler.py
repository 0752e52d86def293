"""A job waits for nodes that the cluster's autoscaler can add, and is refused where it cannot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

from infra.local.servers import Ray
from tests.system.command_process import Driver

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray")]


class AutoscaledRay(Ray):
    """A head without CPUs whose autoscaler starts nodes of this machine, by Ray's own provider for tests.

    Args:
        nodes: Largest number of nodes with two CPUs. None: the autoscaler has no node types, as in a cluster that is
            made by hand.
    """

    leaving_s = 5.0  # nobody ends the nodes that the autoscaler has started

    def __init__(self, nodes: int | None) -> None:
        env = {"RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        if nodes is not None:
            env |= {"RAY_FAKE_CLUSTER": "1", "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID}
            env |= {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
        super().__init__(cpus=0, env=env)
        self.nodes = nodes

    def command(self) -> list[str]:
        command = super().command()
        if self.nodes is None:
            return command
        provider = {
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "gcs_address": f"127.0.0.1:{self.gcs_port}",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        }
        types = {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": self.nodes},
        }
        commands = ["setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray", "initialization"]
        config = {
            "cluster_name": "fake",
            "max_workers": self.nodes,
            "idle_timeout_minutes": 5,
            "provider": provider,
            "available_node_types": types,
            "head_node_type": FAKE_HEAD_NODE_TYPE,
            "file_mounts": {},
            "cluster_synced_files": [],
            **{f"{command}_commands": [] for command in commands},
        }
        (self.scratch / "autoscaling.yaml").write_text(json.dumps(config))
        return [*command, f"--autoscaling-config={self.scratch / 'autoscaling.yaml'}"]


@pytest.fixture(scope="module")
def head() -> Iterator[Ray]:
    with AutoscaledRay(nodes=2) as head:
        yield head


def train(folder: Path, head: Ray, workers: int) -> Driver:
    env = {**head.env, "SAGAN_BUCKET": str(folder / "bucket"), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    overrides: dict[str, Any] = {"train.workers": workers, "track.register": "false"}
    return Driver(folder, env, **overrides)


def test_a_job_waits_for_nodes_that_the_autoscaler_can_add(tmp_path: Path, head: Ray) -> None:
    run = train(tmp_path, head, workers=2)
    assert "nodes for 2 workers and scores beside them, since" in run.until("the start waits for ")
    run.until("the start waited ")
    assert run.end() == 0, run.output
    assert "the cluster has no room to score beside training" not in run.output


def test_a_job_that_the_autoscaler_has_no_nodes_for_is_refused(tmp_path: Path, head: Ray) -> None:
    run = train(tmp_path, head, workers=8)
    assert run.end() == 3, run.output
    assert "8 workers need 8 CPUs; the cluster has " in run.output
    assert "the start waits" not in run.output


def test_a_cluster_that_is_made_by_hand_is_not_waited_for(tmp_path: Path) -> None:
    with AutoscaledRay(nodes=None) as head:
        run = train(tmp_path, head, workers=2)
        assert run.end() == 3, run.output
    assert "2 workers need 2 CPUs; the cluster has 0" in run.output
    assert "the start waits" not in run.output
