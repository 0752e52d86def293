"""A node that gets notice before it leaves costs a run no image, and the run ends as an undisturbed one."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.local.servers import Ray
from pipeline.runs.checkpoints import METRICS
from pipeline.storage import files
from tests.conftest import TestS3
from tests.faults.storage_proxy import fault_proxy
from tests.system.command_process import Driver
from tests.system.ray_node import RayNode, give_notice

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray")]

STEP = 32  # images
# A drain is no failure. The first failure would end the run.
OVERRIDES: dict[str, Any] = {"train.workers": 2, "train.max_failures": 0, "track.register": "false"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preemption")


@pytest.fixture(scope="module")
def head() -> Iterator[Ray]:
    """A head on which no worker fits."""
    with Ray(cpus=0) as head:
        yield head


def train(folder: Path, head: Ray, name: str, **overrides: Any) -> Driver:
    env = {**head.env, "SAGAN_BUCKET": str(folder / "bucket"), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    return Driver(folder, env, name=name, **OVERRIDES, **overrides)


def checkpoints(folder: Path, name: str) -> list[str]:
    return files.list_names(f"{folder}/bucket/runs/{name}/checkpoints")


@pytest.fixture(scope="module")
def undisturbed(folder: Path, head: Ray) -> str:
    """Name of the last checkpoint of a run that nothing happened to. It holds the digest of the state."""
    with RayNode(head, cpus=2):
        run = train(folder, head, "undisturbed")
        assert run.end() == 0, run.output
    return checkpoints(folder, "undisturbed")[-1]


def require_nothing_lost(folder: Path, run: Driver, name: str, undisturbed: str) -> None:
    assert run.end() == 0, run.output
    assert checkpoints(folder, name)[-1] == undisturbed
    summary = run.summary(name)
    assert (summary["restarts"], summary["images_lost"]) == (1, 0)
    points = Path(summary["checkpoint"], METRICS).read_text().splitlines()
    steps = [json.loads(line)["step"] for line in points]
    assert steps == list(range(STEP, summary["images"] + 1, STEP)), "every step is logged once"


def test_a_node_leaves_and_another_one_joins(folder: Path, head: Ray, undisturbed: str) -> None:
    with RayNode(head, cpus=1), RayNode(head, cpus=1) as leaving:
        run = train(folder, head, "replaced")
        run.until("checkpoint 0")
        leaving.give_notice()
        run.until("will be taken away in ")
        run.until("checkpoint 0")
        leaving.wait_for_end()  # it is idle, long before its deadline
        with RayNode(head, cpus=1):
            require_nothing_lost(folder, run, "replaced", undisturbed)


def test_a_run_that_waits_for_a_node_can_be_stopped_and_goes_on_later(
    folder: Path, head: Ray, undisturbed: str
) -> None:
    with RayNode(head, cpus=1):
        with RayNode(head, cpus=1) as leaving:
            run = train(folder, head, "waiting")
            run.until("checkpoint 0")
            leaving.give_notice()
            leaving.wait_for_end()
        run.signal(signal.SIGTERM)
        assert run.end() == 130, run.output
        with RayNode(head, cpus=1):
            require_nothing_lost(folder, train(folder, head, "waiting"), "waiting", undisturbed)


def test_the_node_of_the_driver_leaves(folder: Path, head: Ray, undisturbed: str) -> None:
    with Ray(cpus=2, env={"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "120"}) as leaving:
        run = train(folder, leaving, "driver")
        run.until("checkpoint 0")
        give_notice(leaving)
        assert run.end() == 3, run.output
        assert "the node of the driver will be taken away" in run.output
    with RayNode(head, cpus=2):
        require_nothing_lost(folder, train(folder, head, "driver"), "driver", undisturbed)


def test_an_upload_that_outlasts_the_notice(folder: Path, head: Ray, undisturbed: str, s3: TestS3) -> None:
    """The manifest takes a minute, and the node of one rank is taken away after twenty seconds.

    If it is the node of rank 0, the checkpoint before counts, and this is said. If it is the other one, rank 0 ends the
    upload.
    """
    bucket = s3.bucket()
    with fault_proxy(s3.url) as proxy, RayNode(head, cpus=1), RayNode(head, cpus=1, drain_s=20) as leaving:
        env = json.dumps({**s3.env, "AWS_ENDPOINT_URL": proxy.url()})
        run = train(folder, head, "outlasts", **{"checkpoint.root": f"{bucket}/runs", "resources.env": env})
        run.until("checkpoint 0")
        proxy.inject("slow_first_byte", "*/checkpoints/*/manifest.json", seconds=60)
        leaving.give_notice()
        assert proxy.wait_for("slow_first_byte")
        leaving.wait_for_end()
        with RayNode(head, cpus=1):
            assert run.end() == 0, run.output
    assert files.list_names(f"{bucket}/runs/outlasts/checkpoints")[-1] == undisturbed
    lost = run.summary("outlasts")["images_lost"]
    print(f"{lost} images lost")
    assert (lost > 0) == ("was complete: the one before it counts" in run.output), run.output
    points = files.read_bytes(f"{run.summary('outlasts')['checkpoint']}/{METRICS}").decode().splitlines()
    assert [json.loads(line)["step"] for line in points] == list(range(STEP, 1600 + 1, STEP))
