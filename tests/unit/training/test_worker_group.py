"""After which exceptions of Ray Train another group of workers starts, when, and on which device."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Literal

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

from pipeline.compute import resources
from pipeline.config.job_file import parse_job
from pipeline.config.schema import TrainJob
from pipeline.errors import EnvironmentFault, LastingFault
from pipeline.training import worker_group
from pipeline.training.driver import _Background
from pipeline.training.worker_group import can_start_again, found_no_room, needs, why_not_started, with_device


@pytest.mark.parametrize(
    ("error", "again", "no_room"),
    [
        (None, False, False),
        (RuntimeError("no such function"), False, False),
        (ActorDiedError(), True, False),
        (ActorUnavailableError("connection reset", None), True, False),
        (EnvironmentFault("the storage does not answer"), True, False),
        (LastingFault("the keys have expired"), False, False),
        (ControllerError(ValueError("no such resource")), False, False),
        (ControllerError(WorkerGroupStartupTimeoutError(2)), True, True),
        (ControllerError(WorkerGroupStartupFailedError("an actor died while it started")), True, False),
        (ControllerError(RayTaskError("on_start", "traceback", ValueError("the port is in use"))), True, False),
        (ControllerError(ActorDiedError()), True, False),
        (WorkerGroupError("rank 1 died", {1: RuntimeError("connection reset")}), True, False),
    ],
)
def test_a_group_starts_again_after_a_failure_and_where_it_found_no_room(
    error: BaseException | None, again: bool, no_room: bool
) -> None:
    assert (can_start_again(error, changes_size=True), found_no_room(error)) == (again, no_room)
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    not_by_ray = again and isinstance(cause, RayActorError | RayTaskError | EnvironmentFault)
    assert can_start_again(error, changes_size=False) == not_by_ray, "Ray Train starts a fixed number again itself"


def test_the_cause_of_a_group_that_did_not_start_is_known() -> None:
    raised = ControllerError(RayTaskError("on_start", "traceback", ValueError("the port is in use")))
    fault = EnvironmentFault("the storage does not answer")
    assert str(why_not_started(raised)) == "ValueError: the port is in use"
    assert why_not_started(fault) is fault
    assert why_not_started(ControllerError(ActorDiedError())) is why_not_started(None) is None


def test_a_group_starts_after_its_pause_and_not_after_the_end() -> None:
    begun = threading.Event()
    with closing(_Background(begun.set)) as workers:
        workers.start(0.01)
        assert begun.wait(60)
        workers.done.wait(60)
        begun.clear()
        workers.start(3600)
    assert workers.done.wait(60)
    assert not begun.is_set()


def test_a_run_that_began_on_gpus_waits_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"kind": "train", "name": "r", "data": {"train": "set"}, "train": {"kimg": 1, "batch": 16}}
    job = parse_job(values, "test")
    assert isinstance(job, TrainJob)
    monkeypatch.setattr(worker_group, "connect", lambda least_cpus: None)
    cases: list[tuple[float, Literal["cuda"] | None]] = [(8.0, None), (0.0, "cuda")]
    for gpus, trained_on in cases:
        monkeypatch.setattr(resources, "cluster_resources", lambda gpus=gpus: {"CPU": 64.0, "GPU": gpus})
        started = with_device(job, trained_on)
        assert started.resources.device == "cuda"
        assert needs(started)[0]["GPU"] == 1
    explicit = job.model_copy(update={"resources": job.resources.model_copy(update={"device": "cpu"})})
    assert needs(with_device(explicit, "cuda"))[0]["GPU"] == 0


def test_a_score_that_needs_a_gpu_which_no_node_has_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray would wait for ever for the process of the final score."""
    values = {"kind": "train", "name": "r", "data": {"train": "set"}, "train": {"kimg": 1, "batch": 16}}
    job = parse_job({**values, "evaluate": {"gpus": 1}, "resources": {"device": "cpu"}}, "test")
    assert isinstance(job, TrainJob)
    monkeypatch.setattr(worker_group, "connect", lambda least_cpus: None)
    monkeypatch.setattr(resources, "_has_autoscaler", lambda: False)
    monkeypatch.setattr(resources, "cluster_resources", lambda: {"CPU": 64.0, "GPU": 0.0})
    for module in (resources, worker_group):
        monkeypatch.setattr(module, "node_resources", lambda: [{"CPU": 64.0, "GPU": 0.0}])
    with pytest.raises(EnvironmentFault, match="processes that score need 1 GPUs; the cluster has 0") as caught:
        worker_group.require_room(job)
    assert "evaluate.gpus=0" in caught.value.remedy
