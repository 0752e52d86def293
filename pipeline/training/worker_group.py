"""Runs the workers of a run with Ray Train."""

from __future__ import annotations

from pipeline.compute.cluster import connect, ray_storage, this_node
from pipeline.compute.devices import ALLOCATOR, uses_gpu
from pipeline.compute.mailbox import Sender
from pipeline.compute.resources import has_resources, require_resources
from pipeline.compute.worker_environment import split_environment
from pipeline.config.schema import TrainJob
from pipeline.training.score_while_training import Scoring
from pipeline.training.shared_types import Assignment, TrainingRun
from pipeline.training.worker.training_loop import train_worker


def require_room(job: TrainJob) -> bool:
    """Connect to Ray and check that the workers fit the cluster.

    Returns whether the tasks that score checkpoints fit beside the workers. Raises EnvironmentFault where the workers
    do not fit.
    """
    workers, cpus, scores = job.train.workers, job.resources.cpus_per_worker, job.evaluate
    connect(workers * cpus + scores.workers * scores.cpus)
    gpus = float(uses_gpu(job.resources.device))
    require_resources(workers, "workers", cpus, gpus, lambda fit: f"set train.workers={fit} or add nodes")
    more_cpus, more_gpus = scores.workers * scores.cpus, scores.workers * scores.gpus
    return has_resources(
        workers * cpus + more_cpus if more_cpus else 0,
        workers * gpus + more_gpus if more_gpus else 0,
    )


def shown(job: TrainJob) -> str:
    """Return the workers of a run with their resources, for messages."""
    gpus = " and a GPU" if uses_gpu(job.resources.device) else ""
    return f"{job.train.workers} workers with {job.resources.cpus_per_worker:g} CPUs{gpus} each"


def run_workers(run: TrainingRun, driver: Sender, score_in_line: Scoring | None) -> None:
    """Train with Ray Train until the workers return. The call blocks and raises the exceptions of Ray.

    Ray Train starts failed workers again without limit. The driver decides about each start (`restart_budget`). Ray
    Train knows nothing of the checkpoints: it would end the run where storage fails while it writes its own records.

    Args:
        driver: Takes the messages of the workers.
        score_in_line: Scores a checkpoint on rank 0 while the other ranks wait; None where tasks beside training score.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipeline.compute.process_group import ProcessGroup

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
    threads = {"OMP_NUM_THREADS": str(max(1, int(job.resources.cpus_per_worker)))}
    env = {**threads, **ALLOCATOR["cuda" if gpu else "cpu"], **public}
    TorchTrainer(
        lambda: train_worker(assignment, this_node()),  # Ray Train would show a `train_loop_config` in its state
        torch_config=ProcessGroup(backend="nccl" if gpu else "gloo", timeout_s=timeout_s),
        scaling_config=ScalingConfig(
            num_workers=job.train.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": job.resources.cpus_per_worker, **({"GPU": 1.0} if gpu else {})},
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=-1),
            worker_runtime_env={"env_vars": env},
        ),
    ).fit()
