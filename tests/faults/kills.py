"""Kills of training workers at named points: the run ends as if nothing had happened.

    python -m tests.faults.kills --seeds 100 [--first N] [--world 1 2 4]

Every seed is a run of its own. Workers, gloo, storage and MLflow are real, but the processes are started here and not
by Ray, and a file stands in for the driver's mailbox. A seed chooses in how many worker groups a rank dies, at which
point, and at which pass through it. The process ends there by `os._exit`. The next group starts from what storage
holds. Some groups are not killed but get notice, as before a node is taken away.

What is promised: the last checkpoint has the bits of the undisturbed run's. Its `metrics.jsonl` holds every point of
the undisturbed run once. A kill loses at most the images since the newest checkpoint and those of one step, and a
notice loses none. The temporary folder is empty, and the run's folder holds complete checkpoints alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pipeline.compute.cluster import LeavingNode
from pipeline.config.job_file import parse_job
from pipeline.config.schema import PackSection, TrainJob
from pipeline.packing.pack import pack
from pipeline.runs.checkpoints import LoggedPoint
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import files
from pipeline.training.restart_budget import Start
from pipeline.training.retention import delete_superfluous_checkpoints
from pipeline.training.shared_types import Assignment, TrainingRun
from pipeline.training.status import messages
from pipeline.training.status.run_status import Status
from tests.progress_timeout import progress_seen
from tests.unit.training.test_lost_mlflow_run import start_run

KILLED = 137
STEP, INTERVAL, LENGTH = 32, 96, 384  # images of a step, between checkpoints, and of the run
KEYS = ("loss_d", "loss_g", "gradient_d", "gradient_g")
"""Metrics whose values do not depend on time."""
GROUP_S = 300.0  # longest silence of a worker group

# name: (module or class, function, number of calls in a group). A rank dies before or after one of the calls.
POINTS = {
    "step": ("sagan.step.Step", "__call__", 12),
    "log": ("pipeline.training.worker.training_loop.Worker", "_log", 12),
    "write a checkpoint": ("pipeline.training.worker.training_loop", "write_checkpoint", 4),
    "upload a file": ("pipeline.storage.files", "upload", 16),
    "upload the manifest": ("pipeline.storage.files", "write_bytes", 4),
    "tell the driver": ("tests.faults.kills.FileSender", "deliver", 5),
    "fetch the checkpoint": ("pipeline.storage.file_sets", "fetch_set", 1),
    "load the state": ("pipeline.training.worker.training_loop", "load_state", 1),
    "open the stream": ("pipeline.training.worker.training_loop", "Stream", 1),
    "close": ("pipeline.training.worker.training_loop.Worker", "close", 1),
}
RESTORING = ("fetch the checkpoint", "load the state")


@dataclass(frozen=True)
class Kill:
    """Rank `rank` dies before or after its `call`-th call at a point."""

    rank: int
    point: str
    call: int
    after: bool

    @classmethod
    def drawn(cls, dice: random.Random, world: int, group: int) -> Kill:
        """Draw a kill of a group. The first group, 0, has no checkpoint to restore."""
        point = dice.choice([name for name in POINTS if group or name not in RESTORING])
        return cls(dice.randrange(world), point, dice.randint(1, POINTS[point][2]), dice.random() < 0.5)


@dataclass(frozen=True)
class Notice:
    """The workers are asked to leave at position `images`."""

    images: int

    @classmethod
    def drawn(cls, dice: random.Random) -> Notice:
        return cls(dice.randrange(0, LENGTH, STEP))


@dataclass(frozen=True)
class TakenAway(Notice):
    """The workers are asked to leave at position `images`, and their machine is taken away when `deadline` returns."""

    deadline: Callable[[], None]


@dataclass
class FileSender:
    """Stands in for `pipeline.compute.mailbox.Sender`: messages are in a file, which survives the sender."""

    path: Path
    leave_at: int | None = None
    """Position from which on the workers are asked to stop."""

    def send(self, message: Any) -> None:
        with self.path.open("ab") as file:
            file.write(pickle.dumps(message))

    def deliver(self, message: Any, timeout_s: float = 0.0) -> None:
        self.send(message)

    def exchange(self, message: Any) -> bool:
        if message is not None:
            self.send(message)
        return self.leave_at is not None and isinstance(message, messages.Stepped) and message.images >= self.leave_at

    def ask(self, message: Any, timeout_s: float = 0.0) -> Any:
        return Start(0.0) if isinstance(message, messages.StartAsked) else False

    def received(self) -> Iterator[Any]:
        with self.path.open("rb") as file:
            while file.peek(1):
                yield pickle.load(file)


@dataclass
class Ended:
    """What became of a run."""

    checkpoint: str
    points: dict[tuple[int, str], float]
    status: Status
    seconds: list[float] = field(default_factory=list)
    reached: list[Kill] = field(default_factory=list)
    left: int = 0
    """Groups that left after a notice."""


def _found(place: str) -> Any:
    import importlib

    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(module), name) if name[0].isupper() else importlib.import_module(place)


def _work(rank: int, world: int, folder: Path, assignment: Assignment, kill: Kill | None) -> None:
    """Run one rank in this process. It ends by itself, or as `kill` says."""
    import torch.distributed as dist

    from pipeline.training.worker import training_loop

    sys.stderr = (folder / f"rank{rank}.log").open("a")
    tempfile.tempdir = None  # known since the preload of the fork server, and TMPDIR has another value here
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    if kill is not None and kill.rank == rank:
        _plant(kill)
    with mock.patch.object(training_loop, "worker_device", return_value=torch.device("cpu")):
        training_loop.train_worker(assignment, "")


def _plant(kill: Kill) -> None:
    place, name, _ = POINTS[kill.point]
    owner = _found(place)
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == kill.call and not kill.after:
            os._exit(KILLED)
        result = original(*arguments, **options)
        if calls == kill.call:
            os._exit(KILLED)
        return result

    setattr(owner, name, dying)


class Runs:
    """Runs of one job below `folder`, on `world` ranks.

    Args:
        folder: Folder of the collection, of the temporary files and of all runs, where `root` names no other place.
        world: Number of ranks.
        root: URL of the folder of the runs.
        env: Environment variables of the workers.
    """

    def __init__(self, folder: Path, world: int, root: str | None = None, env: dict[str, str] | None = None) -> None:
        self.folder, self.world, self.env = folder, world, env or {}
        collection = folder / "digits"
        if not collection.exists():
            pack(str(collection), PackSection(source="digits", resolution=32, shard_images=500))
        self.values: dict[str, Any] = {
            "kind": "train",
            "seed": 7,
            "data": {"train": str(collection), "cache": str(folder / "cache")},
            "model": {"channels_g": 4, "channels_d": 4, "multipliers_g": [4, 4, 4, 4], "multipliers_d": [2, 2, 2, 2]},
            "train": {"kimg": LENGTH / 1000, "batch": STEP, "workers": world, "log_kimg": STEP / 1000},
            "checkpoint": {"root": root or str(folder / "runs"), "kimg": INTERVAL / 1000, "keep": 2},
            "evaluate": {"extractor": "classifier", "kimg": 1000, "samples": 100},
            "track": {"uri": f"sqlite:///{folder}/mlflow.db", "register": False},
        }

    def start(self, name: str, **values: Any) -> TrainingRun:
        """Find or start a run without training it."""
        job = parse_job({**self.values, **values, "name": name}, name)
        assert isinstance(job, TrainJob)
        return start_run(job)

    def run(self, name: str, events: Sequence[Kill | Notice], **values: Any) -> Ended:
        """Train a run to its end. The n-th worker group meets the n-th event. `values` are more values of the job."""
        run = self.start(name, **values)
        job = run.job
        status, seconds, reached, left = Status(), [], [], 0
        for event in [*events, None]:
            began = time.monotonic()
            ended, codes = self._group(run, event, status)
            seconds.append(time.monotonic() - began)
            delete_superfluous_checkpoints(job)
            if isinstance(event, Kill) and KILLED in codes:
                reached.append(event)
            left += status.stopped
            if ended and not status.stopped:
                break
        newest, points = last_checkpoint(run.stored)
        return Ended(newest, points_by_key(points), status, seconds, reached, left)

    def _group(self, run: TrainingRun, event: Kill | Notice | None, status: Status) -> tuple[bool, list[int]]:
        """Run one worker group. Returns whether all ranks came to the end, and their exit codes."""
        context = multiprocessing.get_context("forkserver")
        # torch imports `_dynamo` for the first optimiser of a process
        context.set_forkserver_preload(["pipeline.training.worker.training_loop", "mlflow", "torch._dynamo"])
        with tempfile.TemporaryDirectory(dir=self.folder) as group:
            assert run.owner is not None
            kill = event if isinstance(event, Kill) else None
            sender = FileSender(Path(group) / "mailbox", event.images if isinstance(event, Notice) else None)
            sender.path.touch()
            assignment = Assignment(
                job=run.job.model_dump(mode="json", by_alias=True),
                tracking_uri=run.tracking_uri,
                mlflow_run_id=run.mlflow_run_id,
                owner=run.owner.number,
                driver=sender,  # type: ignore[arg-type]
                method_digest=run.method_digest,
                secrets={"TMPDIR": str(self.folder / "tmp"), **self.env},
                score_in_line=None,
                step_timeout_s=GROUP_S,
            )
            ranks = [
                context.Process(target=_work, args=(rank, self.world, Path(group), assignment, kill))
                for rank in range(self.world)
            ]
            for process in ranks:
                process.start()
            if isinstance(event, TakenAway):
                event.deadline()
                for process in ranks:
                    process.kill()
            while living := [process.sentinel for process in ranks if process.is_alive()]:
                wait(living)
                if any(process.exitcode for process in ranks):  # Ray Train ends the group of a worker that fails
                    for process in ranks:
                        process.kill()
            status.apply(messages.StartAsked(frozenset({group}), 0))
            if isinstance(event, TakenAway):
                status.apply(messages.NodesLeave([LeavingNode(group, "the machine", 0.0)]))
            for message in sender.received():
                status.apply(message)
            codes = [process.exitcode or 0 for process in ranks]
            if not isinstance(event, Kill | TakenAway) and any(codes):
                logs = "\n".join(path.read_text() for path in sorted(Path(group).glob("*.log")))
                raise AssertionError(f"workers failed that nothing had killed: {codes}\n{logs}")
            return not any(codes), codes


def last_checkpoint(run: StoredRun) -> tuple[str, list[LoggedPoint]]:
    """Return the name of the newest checkpoint and its points. Raises AssertionError where one is not complete."""
    complete = run.checkpoints()
    names = files.list_names(run.checkpoints_url)
    if names != [checkpoint.name for checkpoint in complete]:
        raise AssertionError(f"{run.name}: unfinished checkpoints are left: {names}")
    return complete[-1].name, [LoggedPoint.model_validate_json(line) for line in complete[-1].metrics().splitlines()]


def points_by_key(points: Iterable[LoggedPoint]) -> dict[tuple[int, str], float]:
    """Return the values that do not depend on time, by position and key. Raises AssertionError where one is twice."""
    values: dict[tuple[int, str], float] = {}
    for point in points:
        for key in KEYS:
            if (point.step, key) in values:
                raise AssertionError(f"{key} at {point.step} is there twice")
            values[point.step, key] = point.metrics[key]
    return values


@contextmanager
def runs(world: int) -> Iterator[Runs]:
    with tempfile.TemporaryDirectory(prefix="sagan-kills-") as folder:
        (Path(folder) / "tmp").mkdir()
        yield Runs(Path(folder), world)


def check(seed: int, made: Runs, undisturbed: Ended) -> Ended:
    """Train a run with the kills of a seed. Raises AssertionError where a promise is broken."""
    dice = random.Random(seed)
    events = [
        Notice.drawn(dice) if dice.random() < 0.2 else Kill.drawn(dice, made.world, group)
        for group in range(dice.randint(1, 3))
    ]
    ended = made.run(f"seed{seed}", events)
    what = f"seed {seed}, {made.world} ranks, {events}"
    if ended.checkpoint != undisturbed.checkpoint:
        raise AssertionError(f"{what}: the run ended in {ended.checkpoint} and not in {undisturbed.checkpoint}")
    if ended.points != undisturbed.points:
        raise AssertionError(f"{what}: the logged points differ")
    most = len(ended.reached) * (INTERVAL + STEP)
    if ended.status.images_lost > most:
        raise AssertionError(f"{what}: {ended.status.images_lost} images were lost; at most {most} may be")
    if left := list((made.folder / "tmp").glob("*sagan-*")):
        raise AssertionError(f"{what}: left in the temporary folder: {left}")
    return ended


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100, help="number of seeds")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks, which take turns")
    options = parser.parse_args()
    points: Counter[str] = Counter()
    seconds, lost, failures, notices = [], [], 0, 0
    for world in options.world:
        with runs(world) as made:
            undisturbed = made.run("undisturbed", [])
            for seed in range(options.first, options.first + options.seeds):
                if options.world[seed % len(options.world)] != world:
                    continue
                try:
                    ended = check(seed, made, undisturbed)
                except AssertionError as failure:
                    failures += 1
                    print(f"FAILED {failure}", flush=True)
                    continue
                progress_seen()
                points.update(f"{kill.point}, {'after' if kill.after else 'before'}" for kill in ended.reached)
                seconds += ended.seconds
                lost.append(ended.status.images_lost)
                met = f"{len(ended.reached)} kills, {ended.left} notices"
                print(f"seed {seed}, {world} ranks: {met}, {lost[-1]} images lost", flush=True)
                notices += ended.left
    print(f"{options.seeds} seeds, {sum(points.values())} kills and {notices} notices met, {failures} failures")
    if seconds:
        print(f"worker groups: median {statistics.median(seconds):.1f} s; images lost: at most {max(lost)} in a run")
    for point, count in sorted(points.items()):
        print(f"| {point} | {count} |")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
