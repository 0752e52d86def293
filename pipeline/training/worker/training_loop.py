"""The training worker. It restores the state, then steps, logs, writes checkpoints and scores them until the end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.collection.manifest import Collection
from pipeline.compute.process_group import worker_device
from pipeline.compute.torch_settings import configure_device
from pipeline.config.schema import TrainJob
from pipeline.errors import CorruptError, EnvironmentFault, SaganError
from pipeline.runs.checkpoints import (
    METRICS,
    StoredCheckpoint,
    fetch_newest_checkpoint,
    load_state,
    require_room,
    write_checkpoint,
)
from pipeline.runs.git_commit import git_commit
from pipeline.runs.json_records import CheckpointFacts
from pipeline.runs.owner import require_owner
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import file_sets
from pipeline.storage.scratch_folder import ScratchFolder
from pipeline.streaming.device_transfer import to_device
from pipeline.streaming.stream import Batch, Stream
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.training.restart_budget import LONGEST_PAUSE_S, Start
from pipeline.training.shared_types import Assignment
from pipeline.training.status import messages
from pipeline.training.worker import rank_consistency
from pipeline.training.worker.actions_after_step import Actions, actions_after_step
from pipeline.training.worker.checkpoint_upload import CheckpointUpload
from pipeline.training.worker.finite_check import FiniteCheck, NotFinite, diverged, first_not_finite
from pipeline.training.worker.own_time import OwnTime
from pipeline.training.worker.time_shares import TimeShares, process_age_s
from pipeline.training.worker.watchdog import Watchdog
from sagan import spectral_norm
from sagan.attention import SelfAttention
from sagan.blocks import ResidualControl
from sagan.ranks import World
from sagan.step import METRICS as STEP_METRICS
from sagan.step import Step
from sagan.train_state import TrainState

_GRADIENTS = slice(STEP_METRICS.index("gradient_d"), None)  # equal on all ranks, unlike the parts of the losses
ROOM_PAUSE_S = 10.0  # seconds between two looks at a full disk
_MEET_S = 30.0  # longest time that ranks wait for rank 0 without a sign of it


def train_worker(assignment: Assignment, node: str) -> None:
    """Run one Ray Train worker, on the node with the id `node`."""
    os.environ.update(assignment.secrets)
    worker = None
    try:
        with contextlib.closing(worker := Worker(assignment, node)):
            worker.run()
    except Exception as error:
        shown = error if isinstance(error, SaganError) else SaganError(f"{type(error).__name__}: {error}")
        if isinstance(error, SaganError) and not isinstance(error, EnvironmentFault | CorruptError):
            # Every rank raises this error, and would raise it again. Return, so that Ray Train does not restart.
            assignment.driver.deliver(messages.Failed(shown))
            return
        images = 0 if worker is None else worker.images
        assignment.driver.send(messages.WorkerFailed(shown, images, type(error).__name__))
        raise  # Ray Train restarts the workers. The cause may be gone by then.


class Worker:
    """One rank of a training run."""

    def __init__(self, assignment: Assignment, node: str) -> None:
        self.assignment = assignment
        self.node = node
        self.job = TrainJob.model_validate(assignment.job)
        self.stored = StoredRun.of(self.job)
        self.driver = assignment.driver
        self.own_time = OwnTime()
        self.world = replace(World.current(), waits=lambda: self.own_time)
        self.is_rank0 = self.world.rank == 0
        self.device = worker_device()
        self.images = 0  # last completed position
        # Decisions are broadcast between hosts with gloo, so that a broadcast never waits for a GPU.
        limit = timedelta(seconds=assignment.step_timeout_s)
        self.control = dist.new_group(backend="gloo", timeout=limit) if self.world.size > 1 else None
        self.watchdog = Watchdog(self.world.rank, assignment.step_timeout_s / 4, self.driver.send)
        self.open = contextlib.ExitStack()  # what `close` ends
        self.open.callback(self.watchdog.close)

    def run(self) -> None:
        """Train to `train.kimg`, or until the driver asks to stop."""
        if not self._permitted_to_start():
            return
        self._set_up()
        while self.images < 1000 * self.job.train.kimg:
            before, must_stop = self.images, self._ask_to_stop()
            self._step()
            actions = actions_after_step(self.job, before, self.images, must_stop())
            if actions.log:
                self._log()
            if actions.checkpoint:
                self._checkpoint(actions)
            if actions.score:
                self._score_in_line(actions)
            if actions.stop:
                break
        self._end()

    def close(self) -> None:
        """End all threads, and delete local files."""
        self.open.close()

    # --- start and end -----------------------------------------------------------------------------------------------

    def _permitted_to_start(self) -> bool:
        """Ask the driver for permission to start, and wait as long as it says. Collective.

        Returns False where the run is asked to stop meanwhile, and where it must end. The driver then gets the reason.
        """
        start: Start | None = None
        nodes = self._from_all(self.node)
        if self.is_rank0:
            start = self.driver.ask(messages.StartAsked(frozenset(nodes), len(nodes), process_age_s()))
            if start.pause_s and start.refusal is None:
                pause = f"it ends {start.pause_s:.0f} s after its beginning"
                self.driver.send(messages.Waits("the start", "the end of a pause after failures in a row", pause))
            until = time.monotonic() + min(start.pause_s, LONGEST_PAUSE_S)
            while time.monotonic() < until and not self.driver.exchange(None):
                time.sleep(0.2)
            self.driver.send(messages.WentOn("the start"))
            if start.refusal is not None:
                self.driver.deliver(messages.Failed(start.refusal))  # raised, Ray Train would start the workers again
                start = None
            elif self.driver.exchange(None):
                self.driver.deliver(messages.Stopped())
                start = None
        return self._from_rank0(start) is not None

    def _set_up(self) -> None:
        """Restore the state, and open the stream and the tracker. Collective."""
        job = self.job
        configure_device(self.device)
        self.scratch = ScratchFolder(f"run-{job.name}")
        self.open.callback(self.scratch.delete)
        self.metrics_file = self.scratch.path / METRICS
        self.train_seconds = 0.0
        self.git_commit = git_commit()  # read at the start, because the checkout may change during training
        self.collection = Collection.open(job.data.train)
        self.state = self._restore()
        self.images = self.state.images
        self.upload = self.open.enter_context(
            contextlib.closing(CheckpointUpload(self.driver.send, self._require_owner))
        )
        self.step = Step(
            self.state, job.train.batch, self.world, job.train.precision, job.train.micro_batch, job.data.augment
        )
        stream = Stream(
            self.collection, job.data.split, seed=job.seed, world=self.world, data=job.data, note=self._waits_for_images
        )
        self.open.enter_context(contextlib.closing(stream))
        self.batches = stream.batches(self.images, job.train.batch)
        self.tracker = MlflowRun(self.assignment.tracking_uri, self.assignment.mlflow_run_id) if self.is_rank0 else None
        if self.tracker is not None:
            self.open.callback(self.tracker.close, timeout_s=30)
            if self.metrics_file.exists():  # the tracker skips points that the MLflow run has
                self.tracker.replay(self.metrics_file.read_text())
        self.waits_for_images = False
        self.finite = FiniteCheck()
        self.shares, self.logged_at, self.steps = TimeShares(), self.images, 0
        self.totals = torch.zeros(len(STEP_METRICS), device=self.device)

    def _restore(self) -> TrainState:
        """Return the state of the newest good checkpoint, or a new state where there is no checkpoint. Collective.

        Rank 0 chooses the checkpoint. Raises SaganError where the run must not start from new weights.
        """
        local = self.scratch.path / "restored"
        local.mkdir()
        newest = None
        if self.is_rank0:
            method = self.assignment.method_digest
            newest = fetch_newest_checkpoint(
                self.stored.checkpoints_url, local, method, self._note, self._require_owner
            )
        checkpoint: StoredCheckpoint | None = self._from_rank0(newest)
        if checkpoint is None and self.job.init is not None:
            raise SaganError(
                f"{self.stored.checkpoints_url} has no good checkpoint, not even the first, which holds init.source",
                "start over with --fresh, which reads init.source again",
            )
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
            name = checkpoint.name if checkpoint is not None and state.images else None
            self.driver.send(messages.GroupStarted(state.images, name, self.train_seconds))
        return state

    def _end(self) -> None:
        """Wait for the last upload, and tell the driver where the run was stopped. Collective."""
        if self.is_rank0:
            self.upload.wait()
            finished = self.images >= 1000 * self.job.train.kimg
            self.driver.deliver(messages.Stepped(self.images) if finished else messages.Stopped())

    # --- a step ------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Run one training step on the next batches."""
        self.own_time.begin_step()
        self.totals += (metrics := self.step(self._next_batches()))
        self.own_time.end_step()
        self.steps += 1
        self.images = self.state.images
        self.watchdog.step(self.images, self.own_time.seconds)
        if (found := self.finite.step(self.images, metrics[_GRADIENTS])) is not None:
            self._not_finite(found, "a gradient")

    def _waits_for_images(self, reason: str) -> None:
        """Tell the driver that this rank has waited for a shard. The next batch ends the wait."""
        self.waits_for_images = True
        until = f"the workers start again after data.patience_s, {self.job.data.patience_s:g} s"
        self.driver.send(messages.Waits(f"rank {self.world.rank}", f"images: {reason}", until))

    def _next_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        flip_seed = self.job.seed if self.job.data.flip else None
        for number in range(self.job.optim.n_dis):
            batch: Batch = next(self.batches)
            if self.waits_for_images:
                self.waits_for_images = False
                self.driver.send(messages.WentOn(f"rank {self.world.rank}"))
            self.shares.data += batch.wait_s
            start = self.state.images + number * self.job.train.batch
            if batch.positions != self.world.share(start, start + self.job.train.batch):
                raise AssertionError(f"the batch has positions {batch.positions}, and the run is at {start}")
            yield to_device(batch, self.device, flip_seed)

    def _ask_to_stop(self) -> Callable[[], bool]:
        """Begin to agree whether the run must stop after the next step, as rank 0 knows now. Collective.

        Returns a function that returns the answer, the same on all ranks. The answer travels during the step, because
        waking the other ranks for it after the step takes half a millisecond.
        """
        requested = self.is_rank0 and self.driver.exchange(messages.Stepped(self.images))
        if self.control is None:
            return lambda: requested
        flag = torch.tensor([requested])
        work = dist.broadcast(flag, src=0, group=self.control, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(flag)

        return answer

    def _not_finite(self, images: int, what: str) -> None:
        """Raise NotFinite for the first time at a position, and SaganError for the second time. Collective.

        The second time shows that the cause is the method and not a device.
        """
        again = self._from_rank0(self.is_rank0 and self.driver.ask(messages.NotFiniteAt(images)))
        if again:
            raise diverged(images, f"{what} is not finite")
        raise NotFinite(
            f"{what} is not finite at {images / 1000:.1f} kimg (rank {self.world.rank} on {socket.gethostname()}); the "
            "run goes back to its newest checkpoint and repeats the steps"
        )

    # --- actions after a step ----------------------------------------------------------------------------------------

    def _log(self) -> None:
        """Log the means of the metrics since the last log. Collective."""
        if (found := self.finite.last()) is not None:
            self._not_finite(found, "a gradient")
        values = self._logged_values()
        if not all(map(math.isfinite, (values[name] for name in STEP_METRICS))):
            self._not_finite(self.images, "a loss")
        shares = self.shares.metrics(images := self.images - self.logged_at)
        self.train_seconds += images / shares["images_per_s"]
        if self.tracker is not None:
            step, now = self.images, int(time.time() * 1000)
            metrics = {**values, **shares}
            with self.metrics_file.open("a") as file:
                file.write(json.dumps({"step": step, "time_ms": now, "metrics": metrics}) + "\n")
            self.tracker.log(metrics, step, now)
            self.driver.send(messages.Logged(step, metrics, self.train_seconds))
        self.totals.zero_()
        self.shares, self.logged_at, self.steps = TimeShares(), self.images, 0

    def _logged_values(self) -> dict[str, float]:
        """Return the means of the metrics since the last log, every γ, and the largest σ of each network. Collective.

        The host waits once for the device.
        """
        means = self.world.sum_(self.totals / self.steps)
        values = dict(zip(STEP_METRICS, means, strict=True))
        for network, part in (("g", self.state.generator), ("d", self.state.discriminator)):
            gammas = [m.gamma.detach() for m in part.modules() if isinstance(m, SelfAttention | ResidualControl)]
            values.update({f"gamma_{network}{i or ''}": gamma for i, gamma in enumerate(gammas)})
            if sigmas := [layer.sigma for _, layer in spectral_norm.layers(part)]:
                values[f"sigma_{network}"] = torch.stack(sigmas).max()
        return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))

    def _checkpoint(self, actions: Actions) -> None:
        """Copy the state on rank 0, and begin to write and to upload it. Collective.

        The call waits for the upload of the previous checkpoint.
        """
        began = time.perf_counter()
        self._wait_for_upload()
        rank_consistency.check_ranks(self.state, self.world)
        if tensor := first_not_finite(self.state):
            self._not_finite(self.images, tensor)
        self._wait_for_room()
        if self.is_rank0:
            local = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=self.scratch.path))
            facts = CheckpointFacts(
                images=self.images,
                train_seconds=self.train_seconds,
                to_score=actions.score,
                collection_digest=self.collection.digest,
                class_names=self.collection.class_names,
                method_digest=self.assignment.method_digest,
                git_commit=self.git_commit,
            )
            copies, metrics = [self.state.copied()], self.metrics_file.read_bytes()
            beside = actions.score and self.assignment.score_in_line is None
            self.upload.start(
                local,
                # Once the copy is written, its memory is free: an upload may take long.
                lambda: self.stored.checkpoint(write_checkpoint(local, copies.pop(), metrics, facts)),
                lambda checkpoint: self.driver.deliver(messages.Uploaded(checkpoint.name, beside)),
            )
        self.shares.checkpoint += time.perf_counter() - began

    def _score_in_line(self, actions: Actions) -> None:
        """Score the last checkpoint on rank 0 while the other ranks wait. Collective.

        Does nothing where tasks beside training score.

        The training state and torch's random-number generators do not change. An error in scoring does not stop
        training; the checkpoint is then scored after training.
        """
        score = self.assignment.score_in_line
        if score is None or actions.interrupted:
            return
        began = time.perf_counter()
        self._wait_for_upload()
        if self.is_rank0:
            self.upload.wait()
            devices = [self.device] if self.device.type == "cuda" else []
            # `score` shows an error on the driver's console, and the checkpoint is scored after training.
            assert self.upload.last is not None, "the score is that of a checkpoint"
            with torch.random.fork_rng(devices), contextlib.suppress(Exception):
                score(self.upload.last)
            configure_device(self.device)  # an extractor changes settings of torch
        if self.control is not None:
            limit = timedelta(seconds=self.job.evaluate.timeout_s + self.assignment.step_timeout_s)
            dist.monitored_barrier(self.control, limit)
        seconds = time.perf_counter() - began
        self.shares.evaluation += seconds
        if self.is_rank0:
            self._note(f"training waited {seconds:.1f} s for the score")

    def _wait_for_upload(self) -> None:
        """Wait until rank 0 has uploaded the last checkpoint. Collective.

        The ranks meet in between, because an outage of storage may last longer than they wait for each other.
        """
        while self._from_rank0(self.is_rank0 and not self.upload.ended(_MEET_S)):
            self.watchdog.step(self.images, self.own_time.seconds)

    def _wait_for_room(self) -> None:
        """Wait until rank 0 has room on its disk for the files of a checkpoint. Collective."""
        while self._from_rank0(self.is_rank0 and self._lacks_room()):
            self.watchdog.step(self.images, self.own_time.seconds)

    def _lacks_room(self) -> bool:
        """Return whether there is no room for a checkpoint, after a pause, and tell the driver."""
        who = "the next checkpoint"
        try:
            require_room(self.scratch.path, self.stored.checkpoints_url, self.state, self.metrics_file)
        except EnvironmentFault as fault:
            until = f"it is written when there is room; {fault.remedy}"
            self.driver.send(messages.Waits(who, f"its machine's disk: {fault.message}", until))
            time.sleep(ROOM_PAUSE_S)
            return True
        self.driver.send(messages.WentOn(who))
        return False

    # --- between processes -------------------------------------------------------------------------------------------

    def _from_rank0(self, value: Any) -> Any:
        """Return the value of rank 0 on every rank. Collective."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def _from_all(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank. Collective."""
        if self.control is None:
            return [value]
        values = [None] * self.world.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def _require_owner(self) -> None:
        """Raise LostRun where the driver of this worker does not own the run any more."""
        require_owner(self.stored.owners_url, self.assignment.owner)

    def _note(self, line: str) -> None:
        """Show a line on the driver's console."""
        self.driver.send(messages.Noted(line))
