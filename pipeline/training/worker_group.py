"""Runs the workers of a run with Ray Train, as many as fit."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Literal

from pipeline.compute.cluster import connect, ray_storage, this_node
from pipeline.compute.mailbox import Sender
from pipeline.compute.resources import (
    count_fitting,
    end_actor,
    fits,
    free_resources,
    node_resources,
    require_resources,
    uses_gpu,
    wait_for_nodes,
)
from pipeline.compute.root_cause import root_cause
from pipeline.compute.torch_settings import ALLOCATOR
from pipeline.compute.worker_environment import split_environment
from pipeline.config.schema import TrainJob
from pipeline.errors import EnvironmentFault, LastingFault, SaganError, counted
from pipeline.training.score_while_training import Scoring
from pipeline.training.shared_types import Assignment, TrainingRun
from pipeline.training.worker.training_loop import train_worker

_JOIN_S = 20.0  # limit for the end of a thread that waits for an answer of the cluster's head
_LOOK_S = 1.0  # seconds between two looks at the free resources of the cluster
_SETTLE_S = 10.0  # the resources of an ended group become free after some seconds
_UPLOAD_S = (
    120.0  # longest time that rank 0, if it is on another node, uploads a checkpoint after a node was taken away
)


def require_room(job: TrainJob) -> bool:
    """Connect to Ray and check that the cluster can hold the least number of workers.

    Waits for nodes that the autoscaler of the cluster can add, also for the tasks that score checkpoints beside the
    workers. Returns whether the cluster can hold these tasks. What other runs use counts as room, because Ray waits for
    it. Raises EnvironmentFault where the workers do not fit, and where no node has the GPUs of a score.
    """
    workers = job.train.least_workers
    connect(least_cpus(job))
    key = "train.workers" if job.train.min_workers is None else "train.min_workers"
    worker, scoring = needs(job)
    smaller = "resources.device=cpu" if worker["GPU"] else "resources.cpus_per_worker to fewer"

    def remedy(fit: int) -> str:
        return f"set {f'{key}={fit}' if fit else smaller}, or add nodes"

    def room() -> bool:
        return fits(node_resources(), workers, worker, scoring)

    wait_for_nodes([worker] * workers + scoring, room, f"{workers} workers and scores beside them")
    require_resources(workers, "workers", worker["CPU"], worker["GPU"], remedy)
    scores = job.evaluate
    if scores.gpus:  # Ray would wait for ever for the process of the final score
        less = "set evaluate.gpus=0, or add nodes with GPUs"
        require_resources(scores.workers, "processes that score", scores.cpus, scores.gpus, lambda fit: less)
    return room()


def with_device(job: TrainJob, trained_on: Literal["cpu", "cuda"] | None) -> TrainJob:
    """Return the job with the device that `resources.device: auto` means.

    It is the device on which the run has trained, or else what the cluster has now. A run whose cluster has lost its
    GPUs for a while must not train on CPUs meanwhile.
    """
    device = job.resources.device
    if device == "auto":
        connect(least_cpus(job))
        device = trained_on or ("cuda" if uses_gpu("auto") else "cpu")
    return job.model_copy(update={"resources": job.resources.model_copy(update={"device": device})})


def needs(job: TrainJob) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return what each worker needs, and what each process needs that scores a checkpoint beside training.

    An amount is a number of CPUs or GPUs, by name ("CPU", "GPU"). The list is empty where scores need nothing.
    """
    scores = job.evaluate
    scoring = [{"CPU": scores.cpus, "GPU": scores.gpus}] * scores.workers if scores.cpus or scores.gpus else []
    return {"CPU": job.resources.cpus_per_worker, "GPU": float(uses_gpu(job.resources.device))}, scoring


def least_cpus(job: TrainJob) -> float:
    """Return the CPUs of the least number of workers and of the processes that score beside them."""
    return job.train.least_workers * job.resources.cpus_per_worker + job.evaluate.workers * job.evaluate.cpus


def shown(job: TrainJob) -> str:
    """Return the workers of a run with their resources, for messages."""
    gpus = " and a GPU" if uses_gpu(job.resources.device) else ""
    workers, cpus = counted(job.train.least_workers, "worker"), counted(job.resources.cpus_per_worker, "CPU")
    return f"{workers} with {cpus}{gpus}{'' if job.train.least_workers == 1 else ' each'}"


class RoomWatch:
    """A thread that asks Ray whether more workers fit than train, since the driver must not wait for an answer.

    An autoscaler is asked for nodes for `train.workers`. Nothing happens where the number of workers is fixed.

    Args:
        beside: Whether room is left for the tasks that score checkpoints.
    """

    def __init__(self, job: TrainJob, beside: bool) -> None:
        self._job, self._beside = job, beside
        self._group = 0
        self._since: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="room", daemon=True)
        if job.train.changes_size:
            _ask_autoscaler(job, job.train.workers)
            self._thread.start()

    def close(self) -> None:
        if self._job.train.changes_size:
            self._ended.set()
            self._thread.join(_JOIN_S)  # it must not ask for nodes once more after the request was withdrawn
            _ask_autoscaler(self._job, 0)

    def grown(self, group: int, workers: int) -> bool:
        """Return whether more workers than those of the present group have fitted for `train.grow_after_s` seconds.

        `group` is the number of the group, and `workers` its size. The time begins with the group, which itself takes
        room.
        """
        if group != self._group:
            self._group, self._since = group, None
        since, train = self._since, self._job.train
        return workers < train.workers and since is not None and time.monotonic() - since >= train.grow_after_s

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            _ask_autoscaler(self._job, self._job.train.workers)  # an actor of Ray Train replaces the request
            with suppress(Exception):  # the head does not answer, and Ray raises errors of many kinds then
                fits = _fitting(self._job, self._beside) > 0
                self._since = (self._since or time.monotonic()) if fits else None


def _fitting(job: TrainJob, beside: bool) -> int:
    """Return how many workers fit on what is free in the cluster."""
    worker, scoring = needs(job)
    return count_fitting(free_resources(), worker, scoring if beside else ())


def _ask_autoscaler(job: TrainJob, workers: int) -> None:
    """Ask the autoscaler of the cluster, if there is one, for nodes for that many workers."""
    from ray.autoscaler.sdk import request_resources

    gpu = {"GPU": 1.0} if uses_gpu(job.resources.device) else {}
    with suppress(Exception):  # the head does not answer
        request_resources(bundles=[{"CPU": job.resources.cpus_per_worker, **gpu}] * workers)


def _number(job: TrainJob, beside: bool) -> int:
    """Return the number of workers to start: `train.workers`, or as many as fit, but not below `train.min_workers`."""
    train, until = job.train, time.monotonic() + _SETTLE_S
    if not train.changes_size:
        return train.workers
    while (fit := _fitting(job, beside)) < train.workers and time.monotonic() < until:
        time.sleep(_LOOK_S)
    return max(train.least_workers, min(fit, train.workers))


def can_start_again(error: BaseException | None, changes_size: bool) -> bool:
    """Return whether the driver starts another group after an exception of `run_workers`.

    It does where the process of Ray Train's controller died or cannot be reached, which nobody else starts again, where
    it could not start because the storage is away, and where a group failed before it could train. Where the number of
    workers may change, it also does where a group failed later, or found no room in time.
    """
    from ray.exceptions import RayActorError, RayTaskError
    from ray.train import ControllerError, PreemptionError, WorkerGroupError
    from ray.train.v2._internal.execution.failure_handling.default import RETRYABLE_CONTROLLER_ERRORS

    if isinstance(error, RayActorError | EnvironmentFault):
        return not isinstance(error, LastingFault)
    if isinstance(error, ControllerError) and isinstance(error.controller_failure, RayActorError | RayTaskError):
        return True  # a worker raised or died while its process group was set up, which Ray Train does not try again
    if not changes_size:
        return False
    if isinstance(error, ControllerError):
        return isinstance(error.controller_failure, RETRYABLE_CONTROLLER_ERRORS)  # as Ray Train would try again
    return isinstance(error, WorkerGroupError | PreemptionError)


def why_not_started(error: BaseException | None) -> SaganError | None:
    """Return why a group could not start, from an exception of `run_workers`; None where that is not known."""
    from ray.exceptions import RayTaskError
    from ray.train import ControllerError

    if isinstance(error, EnvironmentFault):
        return error
    if isinstance(error, ControllerError) and isinstance(error.controller_failure, RayTaskError):
        cause = root_cause(error)
        return SaganError(f"{type(cause).__name__}: {cause}")
    return None


def found_no_room(error: BaseException | None) -> bool:
    """Return whether an exception of `run_workers` says that the cluster had no room for the group in time."""
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(error, ControllerError) and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)


def run_workers(run: TrainingRun, driver: Sender, score_in_line: Scoring | None) -> None:
    """Train with Ray Train until the workers return. The call blocks and raises the exceptions of Ray.

    Ray Train starts failed workers again without limit, in the same number. Where the number may change, and where its
    controller died, it raises an exception instead, and the caller calls again. The driver decides about each start
    (`restart_budget`). Ray Train knows nothing of the checkpoints: it would end the run where storage fails while it
    writes its own records. Raises EnvironmentFault where the controller could not start because the storage is away.

    Args:
        driver: Takes the messages of the workers.
        score_in_line: Scores a checkpoint on rank 0 while the other ranks wait; None where tasks beside training score.
    """
    from ray.exceptions import RayActorError
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from pipeline.compute.process_group import ProcessGroup
    from pipeline.training.ray_trainer import Trainer

    job, owner = run.job, run.owner
    assert owner is not None, "a run that has ended is not trained"
    gpu = uses_gpu(job.resources.device)
    filesystem, path = ray_storage(job.checkpoint.root)
    public, secrets = split_environment(job.resources.env)
    timeout_s = 300 + int(job.data.patience_s)  # longer than a worker waits for data, and than a pause before a start
    assignment = Assignment(
        job=job.model_dump(mode="json", by_alias=True),
        tracking_uri=run.tracking_uri,
        mlflow_run_id=run.mlflow_run_id,
        driver=driver,
        owner=owner.number,
        method_digest=run.method_digest,
        secrets=secrets,
        score_in_line=score_in_line,
        step_timeout_s=timeout_s,
    )
    retries = 0 if job.train.changes_size else -1
    threads = {"OMP_NUM_THREADS": str(max(1, int(job.resources.cpus_per_worker)))}
    env = {**threads, **ALLOCATOR["cuda" if gpu else "cpu"], **public}
    trainer = Trainer(
        lambda: train_worker(assignment, this_node()),  # Ray Train would show a `train_loop_config` in its state
        torch_config=ProcessGroup(backend="nccl" if gpu else "gloo", timeout_s=timeout_s),
        scaling_config=ScalingConfig(
            num_workers=_number(job, beside=score_in_line is None),
            use_gpu=gpu,
            resources_per_worker={"CPU": job.resources.cpus_per_worker, **({"GPU": 1.0} if gpu else {})},
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(
                max_failures=retries,
                max_preemption_failures=retries,
                controller_failure_limit=retries,
                preemption_grace_s=_UPLOAD_S,
            ),
            worker_runtime_env={"env_vars": env},
        ),
    )
    try:
        trainer.fit()
    except RayActorError as error:  # of the controller
        end_actor(error.actor_id)  # Ray would keep what it reserved for its workers until the driver ends
        if error.actor_init_failed:  # it reads its own records first
            run.stored.checkpoints()
        raise
