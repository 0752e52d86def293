"""What every training worker runs: restore, then step, log, checkpoint until told to stop."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.schema import TrainJob
from pipeline.data.device import to_device
from pipeline.data.index import Collection
from pipeline.data.stream import Stream
from pipeline.errors import CorruptError, EnvironmentFault, SaganError
from pipeline.storage import fileset
from pipeline.tracking import source
from pipeline.tracking.tracker import Tracker
from pipeline.training import checkpoints, consistency
from pipeline.training.checkpoints import FACTS, METRICS
from pipeline.training.decisions import StepBorder, at_border
from pipeline.training.status import Rate
from sagan import machine, spectral_norm
from sagan.attention import SelfAttention
from sagan.state import TrainState
from sagan.step import METRICS as STEP_METRICS
from sagan.step import Step
from sagan.world import World


@dataclass
class Assignment:
    """What the driver hands to every worker."""

    job: dict[str, Any]
    tracking_uri: str
    run_id: str
    status: Any  # handle of the RunStatus actor
    method_digest: str
    score_in_line: Callable[[str], object] | None
    """Scores the committed checkpoint of a name; None where the cluster has room to do that beside training."""


def train(config: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker."""
    assignment: Assignment = config["assignment"]
    try:
        with contextlib.closing(Worker(assignment)) as worker:
            worker.run()
    except (EnvironmentFault, CorruptError) as error:
        assignment.status.note.remote(f"a worker failed: {error.message}")
        raise  # new workers may find it mended
    except SaganError as error:
        # the same on every rank, and no restart would change it: end without one
        ray.get(assignment.status.failed.remote(error))
    except Exception as error:
        assignment.status.note.remote(f"a worker failed: {type(error).__name__}: {error}")
        raise


class Worker:
    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.job = job = TrainJob.model_validate(assignment.job)
        self.status = assignment.status
        self.world = World.current()
        self.leads = self.world.rank == 0
        self.device = _prepare_device()
        # decisions travel over the host, so that agreeing on them never waits for a GPU
        self.control = dist.new_group(backend="gloo") if self.world.size > 1 else None
        self.scratch = tempfile.TemporaryDirectory(prefix=f"sagan-{job.name}-")
        self.metrics_file = Path(self.scratch.name) / METRICS
        self.train_seconds = 0.0
        self.commit = source.commit()  # now: a checkout may move on while this runs
        self.collection = Collection.open(job.data.train)
        self.state = self._restore()
        self.step = Step(self.state, job.train.batch, self.world, job.train.precision, job.train.micro_batch)
        self.stream = Stream(
            self.collection, job.data.split, seed=job.seed, world=self.world, data=job.data, note=self._note
        )
        self.tracker = Tracker(assignment.tracking_uri, assignment.run_id) if self.leads else None
        self._replay_metrics()

    def run(self) -> None:
        job, state = self.job, self.state
        batches = self._batches()
        self.rate, since_log = Rate(), state.images
        totals = torch.zeros(len(STEP_METRICS), device=self.device)
        steps = 0
        while state.images < 1000 * job.train.kimg:
            before = state.images
            totals += self.step(next(batches) for _ in range(job.optim.n_dis))
            steps += 1
            border = at_border(job, before, state.images, self._stop_requested())
            if border.log:
                self._log(totals / steps, state.images - since_log)
                totals.zero_()
                self.rate, since_log, steps = Rate(), state.images, 0
            if border.checkpoint:
                self._checkpoint(border)
            if border.stop:
                break

    def close(self) -> None:
        self.stream.close()
        if self.tracker is not None:
            self.tracker.close(timeout_s=30)
        self.scratch.cleanup()

    # --- beginning ---------------------------------------------------------------------------------------------------

    def _restore(self) -> TrainState:
        """The newest good checkpoint (rank 0 decides which), else a fresh state."""
        local = Path(self.scratch.name) / "restored"
        local.mkdir()
        name = checkpoints.fetch_newest(self.job.folder, local, self._note) if self.leads else None
        name = self._from_leader(name)
        if name is None:
            state = TrainState(self.job.model, self.job.optim, self.job.seed, self.device)
        else:
            if not self.leads:
                fileset.fetch(self.job.folder.checkpoint(name), local)
            state = TrainState.load(local, self.device)
            self.metrics_file.write_bytes((local / METRICS).read_bytes())
            self.train_seconds = json.loads((local / FACTS).read_text())["train_seconds"]
        consistency.check(state, self.world)
        if self.leads:
            ray.get(self.status.group_started.remote(state.images, name, self.train_seconds))
        return state

    def _replay_metrics(self) -> None:
        """Hand the tracker every point of the checkpoint; what the run already holds it skips."""
        if self.tracker is not None and self.metrics_file.exists():
            for line in self.metrics_file.read_text().splitlines():
                point = json.loads(line)
                self.tracker.log(point["metrics"], point["step"], point["time_ms"])

    # --- a step's surroundings ---------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        flip_seed = self.job.seed if self.job.data.flip else None
        for batch in self.stream.batches(self.state.images, self.job.train.batch):
            self.rate.data += batch.wait_s
            yield to_device(batch, self.device, flip_seed)

    def _stop_requested(self) -> bool:
        """The driver's wish, as rank 0 sees it, agreed on by all ranks at the same border."""
        asked = bool(self.leads and ray.get(self.status.progress.remote(self.state.images)))
        if self.control is None:
            return asked
        flag = torch.tensor([asked])
        dist.broadcast(flag, src=0, group=self.control)
        return bool(flag)

    def _log(self, metrics: Tensor, images: int) -> None:
        values = dict(zip(STEP_METRICS, self.world.sum_(metrics).tolist(), strict=True))
        if not all(map(math.isfinite, values.values())):
            raise SaganError(
                f"training diverged at {self.state.images / 1000:.1f} kimg: {values}",
                consistency.LOWER_RATES,
            )
        for network, part in (("g", self.state.generator), ("d", self.state.discriminator)):
            gammas = [m.gamma.item() for m in part.modules() if isinstance(m, SelfAttention)]
            values.update({f"gamma_{network}{i or ''}": gamma for i, gamma in enumerate(gammas)})
            if sigmas := [layer.sigma for _, layer in spectral_norm.layers(part)]:
                values[f"sigma_{network}"] = torch.stack(sigmas).max().item()
        rate = self.rate.metrics(images)
        self.train_seconds += images / rate["images_per_s"]
        if self.tracker is not None:
            step, now = self.state.images, int(time.time() * 1000)
            metrics_now = {**values, **rate}
            with self.metrics_file.open("a") as file:
                file.write(json.dumps({"step": step, "time_ms": now, "metrics": metrics_now}) + "\n")
            self.tracker.log(metrics_now, step, now)
            self.status.progress.remote(step, metrics_now, self.train_seconds)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _checkpoint(self, border: StepBorder) -> None:
        """Rank 0 writes, a background thread uploads; a run's last checkpoint is waited for, and one scored in line."""
        began = time.perf_counter()
        score = self.assignment.score_in_line
        in_line = border.evaluate and score is not None and not border.early  # who asked to stop waits for no score
        consistency.check(self.state, self.world)
        consistency.require_finite(self.state)
        wait = border.stop or in_line
        upload = ray.train.CheckpointUploadMode.SYNC if wait else ray.train.CheckpointUploadMode.ASYNC
        name, checkpoint = None, None
        if self.leads:
            local = Path(tempfile.mkdtemp(prefix="checkpoint-"))
            facts = {
                "train_seconds": self.train_seconds,
                "evaluate": border.evaluate,
                "collection": self.collection.digest,
                "class_names": self.collection.class_names,
                "method_digest": self.assignment.method_digest,
                "commit": self.commit,
            }
            name = checkpoints.write(local, self.state, self.metrics_file, facts)
            checkpoint = ray.train.Checkpoint.from_directory(str(local))
        name = self._from_leader(name)
        ray.train.report(
            {"images": self.state.images},
            checkpoint=checkpoint,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=upload,
            checkpoint_upload_fn=self._commit,
            delete_local_checkpoint_after_upload=True,
            validation=_validation(name) if checkpoint and border.evaluate and score is None else False,
        )
        if border.early and self.leads:
            ray.get(self.status.stopped.remote())
        self.rate.checkpoint += time.perf_counter() - began
        if score and in_line:
            self._score_in_line(score, name)

    def _score_in_line(self, score: Callable[[str], object], checkpoint: str) -> None:
        """Rank 0 scores while the others wait; afterwards all go on as if nothing had been. Collective."""
        began = time.perf_counter()
        if self.leads:
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices), contextlib.suppress(Exception):  # the driver is told, and tries again
                score(checkpoint)
            machine.prepare(self.device)  # an extractor has its own wishes
        ray.train.collective.barrier()  # which, unlike those of torch, does not give up a rank that takes its time
        seconds = time.perf_counter() - began
        self.rate.evaluation += seconds
        if self.leads:
            self._note(f"training waited {seconds:.1f} s for it")

    def _commit(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        checkpoints.commit(Path(checkpoint.path), self.job.folder, name)
        ray.get(self.status.committed.remote(name))
        storage = ray.train.get_context().get_storage()
        path = f"{storage.experiment_fs_path}/checkpoints/{name}"
        return ray.train.Checkpoint(path, storage.storage_filesystem)

    # --- between ranks -----------------------------------------------------------------------------------------------

    def _from_leader(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Collective."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def _note(self, message: str) -> None:
        self.status.note.remote(message)


def _validation(name: str | None) -> ray.train.ValidationTaskConfig:
    return ray.train.ValidationTaskConfig(fn_kwargs={"name": name})


def _prepare_device() -> torch.device:
    device = ray.train.torch.get_device() if ray.get_gpu_ids() else torch.device("cpu")
    machine.prepare(device)
    return device
