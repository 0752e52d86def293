"""Ray Train: the workers of a run and the tasks that score its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.compute.cluster import connect, ray_storage
from pipeline.compute.devices import ALLOCATOR, uses_gpu, visible_gpus
from pipeline.compute.environment import split_environment
from pipeline.compute.resources import has_resources, require_resources
from pipeline.config.schema import TrainJob
from pipeline.errors import shown_url
from pipeline.runs.checkpoints import StoredCheckpoint
from pipeline.runs.score_protocol import Score
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import files
from pipeline.training.training_loop import train_worker
from pipeline.training.training_run import Assignment, Evaluation, TrainingRun


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


def run_workers(run: TrainingRun, status: Any, evaluation: Evaluation, beside: bool) -> None:
    """Train with Ray Train until the workers return. The call blocks and raises the exceptions of Ray.

    Args:
        beside: If true, tasks of the cluster score checkpoints while training continues. Otherwise rank 0 scores them
            and the other ranks wait.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, ValidationConfig
    from ray.train.torch import TorchTrainer

    from pipeline.compute.process_group import ProcessGroup

    job = run.job
    gpu = uses_gpu(job.resources.device)
    filesystem, path = ray_storage(job.checkpoint.root)
    _delete_ray_snapshot(run.stored)
    scoring = Scoring(job if beside else _scored_by_one_process(job, gpu), run.mlflow_run_id, status, evaluation)
    public, secrets = split_environment(job.resources.env)
    assignment = Assignment(
        job.model_dump(mode="json", by_alias=True),
        run.tracking_uri,
        run.mlflow_run_id,
        status,
        run.method_digest,
        secrets,
        None if beside else scoring,
    )
    threads = {"OMP_NUM_THREADS": str(max(1, int(job.resources.cpus_per_worker)))}
    env = {**threads, **ALLOCATOR["cuda" if gpu else "cpu"], **public}
    timeout_s = 300 + int(job.data.patience_s)  # longer than a worker waits for data
    TorchTrainer(
        lambda: train_worker(assignment),  # Ray Train would show a `train_loop_config` in its state
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
            failure_config=FailureConfig(max_failures=job.train.max_failures),
            worker_runtime_env={"env_vars": env},
        ),
        validation_config=ValidationConfig(
            fn=lambda _, url: scoring(StoredCheckpoint(url)).values,
            ray_remote_kwargs={
                # With several evaluation workers, this task only waits for them and needs no resources.
                "num_cpus": job.evaluate.cpus if job.evaluate.workers == 1 else 0,
                **visible_gpus(job.evaluate.gpus if job.evaluate.workers == 1 else 0),
                # Without this, Ray would place the task in the placement group of a sweep's trial.
                "scheduling_strategy": "DEFAULT",
            },
        )
        if beside
        else None,
    ).fit()


def _scored_by_one_process(job: TrainJob, gpu: bool) -> TrainJob:
    """Return the job with evaluation settings for one process that scores on its training device."""
    section = job.evaluate.model_copy(update={"workers": 1, "gpus": float(gpu)})
    return job.model_copy(update={"evaluate": section})


@dataclass(frozen=True)
class Scoring:
    """Scores complete checkpoints of a run and reports the scores to the driver. It works in any process."""

    job: TrainJob
    mlflow_run_id: str
    status: Any
    evaluation: Evaluation

    def __call__(self, checkpoint: StoredCheckpoint) -> Score:
        """Return the score of the checkpoint.

        Raises the exceptions of `Evaluation.score_checkpoint`, after a note on the driver's console.
        """
        try:
            score = self.evaluation.score_checkpoint(self.job, checkpoint, self.mlflow_run_id)
        except Exception as error:
            reason = shown_url(str(error))
            self.status.note.remote(f"scoring {checkpoint.name} failed; it will be scored after training: {reason}")
            raise
        self.status.scored.remote(checkpoint.images, score.metric, score.value)
        return score


def _delete_ray_snapshot(run: StoredRun) -> None:
    """Delete Ray's list of checkpoints. An earlier driver wrote it, and it may name checkpoints that were deleted."""
    snapshot = files.join(run.url, "checkpoint_manager_snapshot.json")
    if files.exists(snapshot):
        files.delete(snapshot)
