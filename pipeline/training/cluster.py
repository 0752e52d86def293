"""Ray: connect, see that there is room, run workers under Ray Train, and find the cause of what it raises."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import TrainJob
from pipeline.errors import EnvironmentFault
from pipeline.storage import files
from pipeline.storage.run_folder import images_of
from sagan.machine import ALLOCATOR

if TYPE_CHECKING:
    from pipeline.training.run import Evaluation, Run


def connect(least_cpus: float = 1) -> None:
    """Join the cluster of RAY_ADDRESS (every submitted job has it); else start Ray on this machine."""
    import ray

    if ray.is_initialized():
        return
    # Ray Train asks its workers for results this often; its default of 2 s would be the cost of each report
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    runtime_env = None if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else {"env_vars": _python_path()}
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING, "runtime_env": runtime_env}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**options)
        else:
            ray.init(num_cpus=max(os.cpu_count() or 1, int(-(-least_cpus // 1))), include_dashboard=False, **options)
    except Exception as error:  # Ray raises bare Exceptions, for instance when a node is slow to start
        raise EnvironmentFault(
            f"the Ray cluster at {os.environ.get('RAY_ADDRESS', 'this machine')} cannot be reached: {error}",
            "start one with `ray start --head`, or unset RAY_ADDRESS to run on this machine alone",
        ) from None


def join() -> None:
    """Join the cluster of RAY_ADDRESS where there is one, so that its tasks pack and verify what lies in buckets."""
    if os.environ.get("RAY_ADDRESS"):
        connect()


def _python_path() -> dict[str, str]:
    """Workers import the code that the driver imported, installed or not."""
    checkout = str(Path(__file__).resolve().parents[2])
    return {"PYTHONPATH": os.pathsep.join([checkout, *filter(None, [os.environ.get("PYTHONPATH")])])}


def uses_gpu(job: TrainJob) -> bool:
    import ray

    if job.resources.device == "auto":
        return ray.cluster_resources().get("GPU", 0) >= 1
    return job.resources.device == "cuda"


def prepare(job: TrainJob) -> bool:
    """Connect and see that the workers fit; returns whether evaluation fits beside them.

    Raises EnvironmentFault where they do not, since Ray would wait in silence.
    """
    import ray

    workers, scores = job.train.workers, job.evaluate
    connect(workers * job.resources.cpus_per_worker + scores.workers * scores.cpus)
    have = ray.cluster_resources()
    need = {"CPU": workers * job.resources.cpus_per_worker, "GPU": float(workers) if uses_gpu(job) else 0.0}
    for resource, wanted in need.items():
        if wanted > have.get(resource, 0):
            raise EnvironmentFault(
                f"{workers} workers need {wanted:g} {resource}s; the cluster has {have.get(resource, 0):g}",
                f"set train.workers={int(have.get(resource, 0) // (wanted / workers))} or add nodes",
            )
    more = {"CPU": scores.workers * scores.cpus, "GPU": scores.workers * scores.gpus}
    fits = all(need[resource] + wanted <= have.get(resource, 0) for resource, wanted in more.items() if wanted)
    if not fits:
        print(
            f"no room to evaluate beside training ({more['CPU']:g} CPUs, {more['GPU']:g} GPUs more): "
            "it waits for each score",
            flush=True,
        )
    return fits


def fit(run: Run, status: Any, evaluation: Evaluation, beside: bool) -> None:
    """Train with Ray Train until the workers return, scoring beside them or in line. Blocks; raises what Ray raises."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, ValidationConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipeline.training.worker import Assignment, train

    job = run.job
    gpu = uses_gpu(job)
    filesystem, path = ray_storage(job.checkpoint.root)
    _forget_ray_state(job)
    scoring = Scoring(job if beside else _alone(job, gpu), run.run_id, status, evaluation)
    assignment = Assignment(
        job.model_dump(mode="json", by_alias=True),
        run.tracking_uri,
        run.run_id,
        status,
        run.method_digest,
        None if beside else scoring,
    )
    threads = {"OMP_NUM_THREADS": str(max(1, int(job.resources.cpus_per_worker)))}
    env = {**threads, **ALLOCATOR["cuda" if gpu else "cpu"], **job.resources.env}
    timeout_s = 300 + int(job.data.patience_s)  # workers must not give up one that waits for data before it does
    TorchTrainer(
        train,
        train_loop_config={"assignment": assignment},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=timeout_s),
        scaling_config=ScalingConfig(
            num_workers=job.train.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": job.resources.cpus_per_worker, **({"GPU": 1.0} if gpu else {})},
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=job.train.max_failures),
            worker_runtime_env={"env_vars": env},
        ),
        validation_config=ValidationConfig(
            fn=lambda _, name: scoring(name),
            ray_remote_kwargs={
                # with several workers it only waits for them
                "num_cpus": job.evaluate.cpus if job.evaluate.workers == 1 else 0,
                "num_gpus": job.evaluate.gpus if job.evaluate.workers == 1 else 0,
                "scheduling_strategy": "DEFAULT",  # a sweep's trial would have it inside its own placement group
            },
        )
        if beside
        else None,
    ).fit()


def _alone(job: TrainJob, gpu: bool) -> TrainJob:
    """The job whose scores are taken by one process, on the device that it trains on."""
    section = job.evaluate.model_copy(update={"workers": 1, "gpus": float(gpu)})
    return job.model_copy(update={"evaluate": section})


@dataclass(frozen=True)
class Scoring:
    """Scores committed checkpoints of a run, in whatever process, and tells the driver."""

    job: TrainJob
    run_id: str
    status: Any
    evaluation: Evaluation

    def __call__(self, checkpoint: str) -> dict[str, Any]:
        """Values by short name of the checkpoint of this name. Raises what evaluation raises."""
        try:
            scores = self.evaluation.score_checkpoint(self.job, self.job.folder.checkpoint(checkpoint), self.run_id)
        except Exception as error:
            self.status.note.remote(f"{checkpoint} could not be scored now and will be after training: {error}")
            raise
        key, value = next(iter(scores.items()))
        self.status.scored.remote(images_of(checkpoint), key, value)
        return scores


def ray_storage(root: str) -> tuple[Any, str]:
    """Ray's view of the same storage. Its native S3 client makes directories that break other clients."""
    import pyarrow.fs

    filesystem, path = files.filesystem(root)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path


def _forget_ray_state(job: TrainJob) -> None:
    """Ray's snapshot of an earlier driver would name checkpoints that retention deleted; ours are the authority."""
    snapshot = files.join(job.folder.url, "checkpoint_manager_snapshot.json")
    if files.exists(snapshot):
        files.delete(snapshot)


def root_cause(error: BaseException) -> BaseException:
    """The worker's own exception inside what Ray raised."""
    import ray.exceptions
    import ray.train

    if isinstance(error, ray.train.WorkerGroupError) and error.worker_failures:
        return root_cause(error.worker_failures[min(error.worker_failures)])
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        return root_cause(error.cause)
    original = getattr(error, "_base_exc", None)
    return root_cause(original) if isinstance(original, BaseException) else error


def release_placement_groups() -> None:
    """Give back what stopped trials left behind, when none of this driver's runs goes on.

    Ray Train has a cleaner for a controller that is killed, but it can lose the race (ray-project/ray issue 62753):
    seen once in two sweeps, and the workers' CPUs stay reserved.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    for identifier, facts in placement_group_table().items():
        if identifier.endswith(job) and facts["state"] != "REMOVED":  # the id of a group ends with its job's
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(identifier))))
