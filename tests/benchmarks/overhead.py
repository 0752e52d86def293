"""What the training loop costs beside the step: `python -m tests.benchmarks.overhead [--json FILE]`.

Two ranks in processes of Ray, with gloo between them. One loop is the worker's with everything on: stream, messages to
the driver through Ray, stop requests, logs to MLflow, watchdog, check of the gradients, checkpoints. The other, bare
loop calls the same step and nothing else. The step sleeps 50 ms and then waits for the other rank, so that only the
host's part is seen. The loops take turns, and each round gives a pair. The machine must be quiet: where processes wait
for a core, each message between them costs milliseconds.

The model has 8.5 M / 9.5 M parameters, and its checkpoint 0.25 GB. The cost of checkpoints is given for one in every
`checkpoint.kimg` = 100 thousand images at a batch of 64, which is one in 1 563 steps or 78 s. The loop logs every 100
steps, as in the files in `jobs/`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.compute.cluster import connect
from pipeline.compute.mailbox import Mailbox
from pipeline.config.job_file import parse_job
from pipeline.config.schema import PackSection, TrainJob
from pipeline.packing.pack import pack
from pipeline.training.driver import POLL_SECONDS, _receive
from pipeline.training.shared_types import Assignment
from pipeline.training.status.run_status import Status
from pipeline.training.worker import training_loop
from pipeline.training.worker.actions_after_step import Actions
from pipeline.training.worker.training_loop import Worker
from sagan import Step, TrainState, World
from sagan.step import METRICS
from tests.unit.training.test_lost_mlflow_run import start_run

RANKS, BATCH, STEP_S = 2, 64, 0.05
LOG = 100  # steps between two logs
INTERVAL = round(100_000 / BATCH)  # steps between two checkpoints


class SleepingStep:
    """Stands in for `sagan.Step`. Its state has moments, as after a real step, so checkpoints have their size."""

    def __init__(self, state: TrainState, batch: int, world: World, *_: object) -> None:
        self._state, self._batch, images = state, batch, state.images
        if world.size > 1 and not state.optimizer_d.state:
            size = state.model.resolution or 32
            Step(state, 2)([(torch.zeros(2, 3, size, size), torch.arange(2))])
            state.images = images

    def __call__(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        for _ in batches:
            sleep()
        self._state.images += self._batch
        return torch.zeros(len(METRICS))


def sleep() -> None:
    time.sleep(STEP_S)
    dist.all_reduce(torch.ones(1))


class TimedWorker(Worker):
    """A worker that notes when its steps begin, and when the checkpoint at the end of the run begins."""

    def __init__(self, assignment: Assignment) -> None:
        super().__init__(assignment, "")
        self.begins: list[float] = []

    def _step(self) -> None:
        self.begins.append(time.perf_counter())
        super()._step()

    def _checkpoint(self, actions: Actions) -> None:
        self.ends = time.perf_counter()
        super()._checkpoint(actions)

    def times(self) -> dict[str, float]:
        """Return the seconds of a step while no checkpoint is written, and what the checkpoint in the middle adds.

        It holds up its own step, and its upload the steps after it.
        """
        middle, warm_up = len(self.begins) // 2 - 1, LOG // 2  # the log is in the middle of the counted steps
        step = (self.begins[warm_up + LOG] - self.begins[warm_up]) / LOG
        return {"step": step, "checkpoint": self.ends - self.begins[middle] - (len(self.begins) - middle) * step}


class Rank:
    """A rank, in a process of its own."""

    def __init__(self, rank: int, store: str) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)

    def bare(self, steps: int) -> float:
        """Return the seconds that each of `steps` steps takes in a loop of nothing else."""
        dist.barrier()
        began = time.perf_counter()
        for _ in range(steps):
            sleep()
        return (time.perf_counter() - began) / steps

    def train(self, assignment: Assignment) -> dict[str, float]:
        """Train a run and return the times of its worker."""
        with (
            mock.patch.object(training_loop, "Step", SleepingStep),
            mock.patch.object(training_loop, "worker_device", return_value=torch.device("cpu")),
        ):
            worker = TimedWorker(assignment)
            try:
                worker.run()
            finally:
                worker.close()
        return worker.times()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=320, help="steps of a loop in a round, 300 or more")
    parser.add_argument("--json", type=Path, help="write the figures as one object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments.rounds, arguments.steps)
    for name, value in figures.items():
        print(f"{name} {value:.4g}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def measure(folder: Path, rounds: int, steps: int) -> dict[str, float]:
    import ray

    connect(RANKS)
    ranks = [ray.remote(num_cpus=1)(Rank).remote(rank, str(folder / "store")) for rank in range(RANKS)]
    pack(str(folder / "digits"), PackSection(source="digits", resolution=32, shard_images=500, encoding="jpeg"))
    pairs = []
    for number in range(rounds + 1):
        bare = max(ray.get([rank.bare.remote(steps) for rank in ranks]))
        timed = train(folder, ranks, f"round{number}", steps)
        print(
            f"bare {bare * 1e3:.2f} ms/step, loop {timed['step'] * 1e3:.2f}, checkpoint {timed['checkpoint']:.2f} s",
            flush=True,
        )
        if number:  # the first: caches, imports
            pairs.append((bare, timed))
    ray.shutdown()
    step = statistics.median(timed["step"] / bare - 1 for bare, timed in pairs)
    checkpoint = statistics.median(timed["checkpoint"] / bare / INTERVAL for bare, timed in pairs)
    return {
        "bare_step_ms": 1e3 * statistics.median(bare for bare, _ in pairs),
        "loop_step_ms": 1e3 * statistics.median(timed["step"] for _, timed in pairs),
        "checkpoint_s": statistics.median(timed["checkpoint"] for _, timed in pairs),
        "overhead_without_checkpoints_percent": 100 * step,
        "overhead_of_checkpoints_percent": 100 * checkpoint,
        "overhead_percent": 100 * (step + checkpoint),
    }


def train(folder: Path, ranks: list[Any], name: str, steps: int) -> dict[str, float]:
    """Train a run on the ranks, with a checkpoint after half of the steps and at the end; return rank 0's times."""
    import ray

    job = parse_job(
        {
            "kind": "train",
            "name": name,
            "data": {"train": str(folder / "digits"), "cache": str(folder / "cache")},
            "model": {"resolution": 32, "multipliers_g": [8, 8, 4, 2], "multipliers_d": [2, 4, 8, 8]},
            "optim": {"n_dis": 1},
            "train": {"kimg": steps * BATCH / 1000, "batch": BATCH, "workers": RANKS, "log_kimg": LOG * BATCH / 1000},
            "checkpoint": {"root": str(folder / "runs"), "kimg": steps * BATCH / 2000},
            "evaluate": {"extractor": "classifier", "kimg": 1_000_000},
            "track": {"uri": f"sqlite:///{folder}/mlflow.db", "register": False},
        },
        name,
    )
    assert isinstance(job, TrainJob)
    run, mailbox, status, ended = start_run(job), Mailbox(), Status(), threading.Event()
    assert run.owner is not None
    assignment = Assignment(
        job=run.job.model_dump(mode="json", by_alias=True),
        tracking_uri=run.tracking_uri,
        mlflow_run_id=run.mlflow_run_id,
        driver=mailbox.sender,
        owner=run.owner.number,
        method_digest=run.method_digest,
        secrets={},
        score_in_line=None,
        step_timeout_s=300,
    )

    def drive() -> None:
        while not ended.wait(POLL_SECONDS):
            _receive(mailbox, status, run.job, ends=False)

    driver = threading.Thread(target=drive)
    driver.start()
    try:
        times: list[dict[str, float]] = ray.get([rank.train.remote(assignment) for rank in ranks])
    finally:
        ended.set()
        driver.join()
    shutil.rmtree(folder / "runs")  # a disk that writes old rounds would hold up the next one
    return times[0]


if __name__ == "__main__":
    main()
