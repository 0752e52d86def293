"""The training worker. It restores the state, then steps, logs, writes checkpoints and scores them until the end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.collection.manifest import Collection
from pipeline.compute.devices import configure_device
from pipeline.config.schema import TrainJob
from pipeline.errors import CorruptError, EnvironmentFault, SaganError, shown_url
from pipeline.runs.checkpoints import (
    METRICS,
    StoredCheckpoint,
    fetch_newest_checkpoint,
    load_state,
    upload_checkpoint,
    write_checkpoint,
)
from pipeline.runs.records import CheckpointFacts
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import file_sets
from pipeline.storage.scratch_folder import ScratchFolder
from pipeline.streaming.device_transfer import to_device
from pipeline.streaming.stream import Stream
from pipeline.tracking.git_commit import git_commit
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.training import rank_consistency
from pipeline.training.actions_after_step import Actions, actions_after_step
from pipeline.training.run_status import TimeShares
from pipeline.training.training_run import Assignment
from sagan import spectral_norm
from sagan.attention import SelfAttention
from sagan.ranks import World
from sagan.step import METRICS as STEP_METRICS
from sagan.step import Step
from sagan.train_state import TrainState


def train_worker(assignment: Assignment) -> None:
    """Run one Ray Train worker."""
    os.environ.update(assignment.secrets)
    try:
        with contextlib.closing(Worker(assignment)) as worker:
            worker.run()
    except (EnvironmentFault, CorruptError) as error:
        assignment.status.note.remote(f"a worker failed: {error.message}")
        raise  # Ray Train restarts the workers. The cause may be gone by then.
    except SaganError as error:
        # Every rank raises this error, and would raise it again after a restart. Return, so that Ray does not restart.
        ray.get(assignment.status.failed.remote(error))
    except Exception as error:
        assignment.status.note.remote(shown_url(f"a worker failed: {type(error).__name__}: {error}"))
        raise


class Worker:
    """One rank of a training run."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.job = job = TrainJob.model_validate(assignment.job)
        self.stored = StoredRun.of(job)
        self.status = assignment.status
        self.world = World.current()
        self.is_rank0 = self.world.rank == 0
        self.device = ray.train.torch.get_device() if ray.get_gpu_ids() else torch.device("cpu")
        configure_device(self.device)
        # Decisions are broadcast between hosts with gloo, so that a broadcast never waits for a GPU.
        self.control = dist.new_group(backend="gloo") if self.world.size > 1 else None
        self.scratch = ScratchFolder(f"run-{job.name}")
        self.uploads = ScratchFolder(f"upload-{job.name}")  # Ray deletes each checkpoint in it after its upload
        self.metrics_file = self.scratch.path / METRICS
        self.train_seconds = 0.0
        self.git_commit = git_commit()  # read at the start, because the checkout may change during training
        self.collection = Collection.open(job.data.train)
        self.state = self._restore()
        self.step = Step(self.state, job.train.batch, self.world, job.train.precision, job.train.micro_batch)
        self.stream = Stream(
            self.collection, job.data.split, seed=job.seed, world=self.world, data=job.data, note=self._note
        )
        self.tracker = MlflowRun(assignment.tracking_uri, assignment.mlflow_run_id) if self.is_rank0 else None
        self._replay_metrics()

    def run(self) -> None:
        """Train to `train.kimg`, or until the driver asks to stop."""
        job, state = self.job, self.state
        batches = self._batches()
        self.shares, since_log = TimeShares(), state.images
        totals = torch.zeros(len(STEP_METRICS), device=self.device)
        steps = 0
        while state.images < 1000 * job.train.kimg:
            before = state.images
            totals += self.step(next(batches) for _ in range(job.optim.n_dis))
            steps += 1
            actions = actions_after_step(job, before, state.images, self._stop_requested())
            if actions.log:
                self._log(totals / steps, state.images - since_log)
                totals.zero_()
                self.shares, since_log, steps = TimeShares(), state.images, 0
            if actions.checkpoint:
                self._checkpoint(actions)
            if actions.stop:
                break

    def close(self) -> None:
        """End the threads of the stream and the tracker, and delete local files."""
        self.stream.close()
        if self.tracker is not None:
            self.tracker.close(timeout_s=30)
        self.scratch.delete()
        self.uploads.delete_if_empty()  # an upload may still go on

    # --- start -------------------------------------------------------------------------------------------------------

    def _restore(self) -> TrainState:
        """Return the state of the newest good checkpoint, or a new state where there is no checkpoint. Collective.

        Rank 0 chooses the checkpoint.
        """
        local = self.scratch.path / "restored"
        local.mkdir()
        newest = None
        if self.is_rank0:
            method = self.assignment.method_digest
            newest = fetch_newest_checkpoint(self.stored.checkpoints_url, local, method, self._note)
        checkpoint: StoredCheckpoint | None = self._from_rank0(newest)
        if checkpoint is None:
            state = TrainState(self.job.model, self.job.optim, self.job.seed, self.device)
        else:
            if not self.is_rank0:
                file_sets.fetch_set(checkpoint.url, local)
            restored = StoredCheckpoint(str(local))
            state = load_state(local, checkpoint.url, self.device)
            self.metrics_file.write_bytes(restored.metrics())
            self.train_seconds = restored.facts().train_seconds
        shutil.rmtree(local)
        rank_consistency.check_ranks(state, self.world)
        if self.is_rank0:
            name = None if checkpoint is None else checkpoint.name
            ray.get(self.status.group_started.remote(state.images, name, self.train_seconds))
        return state

    def _replay_metrics(self) -> None:
        """Pass every point of the checkpoint to the tracker. The tracker skips points that the MLflow run has."""
        if self.tracker is not None and self.metrics_file.exists():
            self.tracker.replay(self.metrics_file.read_text())

    # --- around a step -----------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        flip_seed = self.job.seed if self.job.data.flip else None
        for batch in self.stream.batches(self.state.images, self.job.train.batch):
            self.shares.data += batch.wait_s
            yield to_device(batch, self.device, flip_seed)

    def _stop_requested(self) -> bool:
        """Return whether the driver asks to stop. Rank 0 asks the driver; all ranks return its answer. Collective."""
        requested = bool(self.is_rank0 and ray.get(self.status.progress.remote(self.state.images)))
        if self.control is None:
            return requested
        flag = torch.tensor([requested])
        dist.broadcast(flag, src=0, group=self.control)
        return bool(flag)

    def _log(self, metrics: Tensor, images: int) -> None:
        """Log `metrics`, this rank's part of the means over the last `images` images. Collective.

        Raises SaganError where a metric is not finite.
        """
        values = dict(zip(STEP_METRICS, self.world.sum_(metrics).tolist(), strict=True))
        if not all(map(math.isfinite, values.values())):
            raise SaganError(
                f"training diverged at {self.state.images / 1000:.1f} kimg: {values}",
                rank_consistency.LOWER_RATES,
            )
        for network, part in (("g", self.state.generator), ("d", self.state.discriminator)):
            gammas = [m.gamma.item() for m in part.modules() if isinstance(m, SelfAttention)]
            values.update({f"gamma_{network}{i or ''}": gamma for i, gamma in enumerate(gammas)})
            if sigmas := [layer.sigma for _, layer in spectral_norm.layers(part)]:
                values[f"sigma_{network}"] = torch.stack(sigmas).max().item()
        shares = self.shares.metrics(images)
        self.train_seconds += images / shares["images_per_s"]
        if self.tracker is not None:
            step, now = self.state.images, int(time.time() * 1000)
            metrics_now = {**values, **shares}
            with self.metrics_file.open("a") as file:
                file.write(json.dumps({"step": step, "time_ms": now, "metrics": metrics_now}) + "\n")
            self.tracker.log(metrics_now, step, now)
            self.status.progress.remote(step, metrics_now, self.train_seconds)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _checkpoint(self, actions: Actions) -> None:
        """Write a checkpoint on rank 0 and upload it in a thread. Collective.

        The call waits for the upload of the previous checkpoint. If the run stops now, or if rank 0 scores this
        checkpoint, the call also waits for the upload of this checkpoint.
        """
        began = time.perf_counter()
        score = self.assignment.score_in_line
        score_now = actions.score and score is not None and not actions.interrupted
        rank_consistency.check_ranks(self.state, self.world)
        rank_consistency.require_finite(self.state)
        wait = actions.stop or score_now
        upload = ray.train.CheckpointUploadMode.SYNC if wait else ray.train.CheckpointUploadMode.ASYNC
        name, written = None, None
        if self.is_rank0:
            local = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=self.uploads.path))
            facts = CheckpointFacts(
                images=self.state.images,
                train_seconds=self.train_seconds,
                to_score=actions.score,
                collection_digest=self.collection.digest,
                class_names=self.collection.class_names,
                method_digest=self.assignment.method_digest,
                git_commit=self.git_commit,
            )
            name = write_checkpoint(local, self.state, self.metrics_file, facts)
            written = ray.train.Checkpoint.from_directory(str(local))
        checkpoint = self.stored.checkpoint(self._from_rank0(name))
        scored_beside = written is not None and actions.score and score is None
        ray.train.report(
            {"images": self.state.images},
            checkpoint=written,
            checkpoint_dir_name=checkpoint.name,
            checkpoint_upload_mode=upload,
            checkpoint_upload_fn=self._upload,
            delete_local_checkpoint_after_upload=True,
            validation=ray.train.ValidationTaskConfig(fn_kwargs={"url": checkpoint.url}) if scored_beside else False,
        )
        if actions.interrupted and self.is_rank0:
            ray.get(self.status.stopped.remote())
        self.shares.checkpoint += time.perf_counter() - began
        if score_now:
            self._score_in_line(checkpoint)

    def _score_in_line(self, checkpoint: StoredCheckpoint) -> None:
        """Score a checkpoint on rank 0 while the other ranks wait. Collective.

        The training state and torch's random-number generators do not change. An error in scoring does not stop
        training; the checkpoint is then scored after training.
        """
        score = self.assignment.score_in_line
        assert score is not None
        began = time.perf_counter()
        if self.is_rank0:
            devices = [self.device] if self.device.type == "cuda" else []
            # `score` shows an error on the driver's console, and the checkpoint is scored after training.
            with torch.random.fork_rng(devices), contextlib.suppress(Exception):
                score(checkpoint)
            configure_device(self.device)  # an extractor changes settings of torch
        ray.train.collective.barrier()  # a long score would exceed the time-out of torch's barriers
        seconds = time.perf_counter() - began
        self.shares.evaluation += seconds
        if self.is_rank0:
            self._note(f"training waited {seconds:.1f} s for the score")

    def _upload(self, written: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Upload a written checkpoint. Ray Train calls this method in a separate thread."""
        upload_checkpoint(Path(written.path), self.stored.checkpoint(name))
        ray.get(self.status.uploaded.remote(name))
        storage = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(f"{storage.experiment_fs_path}/checkpoints/{name}", storage.storage_filesystem)

    # --- between ranks -----------------------------------------------------------------------------------------------

    def _from_rank0(self, value: Any) -> Any:
        """Return the value of rank 0 on every rank. Collective."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def _note(self, message: str) -> None:
        """Show the message on the driver's console."""
        self.status.note.remote(message)
