"""Scores checkpoints of a run that trains: in tasks beside training, or in line on rank 0. No fault ends training."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from pipeline.compute.mailbox import Sender
from pipeline.compute.resources import shown_amounts
from pipeline.compute.tasks import BackgroundTask
from pipeline.config.schema import TrainJob
from pipeline.errors import shown_url
from pipeline.runs.checkpoints import StoredCheckpoint
from pipeline.runs.score_protocol import Score
from pipeline.runs.stored_run import StoredRun
from pipeline.training.shared_types import Evaluation, TrainingRun
from pipeline.training.status import messages

TRIES = 3  # attempts to score a checkpoint beside training
PAUSE_S = 10.0  # seconds between two attempts
SAID_S = 30.0  # seconds of waiting for room after which it is said


@dataclass(frozen=True)
class Scoring:
    """Scores complete checkpoints of a run and reports the scores to the driver. It works in any process."""

    job: TrainJob
    mlflow_run_id: str
    driver: Sender
    evaluation: Evaluation

    @classmethod
    def of(cls, run: TrainingRun, driver: Sender, evaluation: Evaluation) -> Scoring:
        return cls(run.job, run.mlflow_run_id, driver, evaluation)

    def in_line(self, gpu: bool) -> Scoring:
        """Return the scoring of one process on its training device."""
        section = self.job.evaluate.model_copy(update={"workers": 1, "gpus": float(gpu)})
        job = self.job.model_copy(update={"evaluate": section})
        return Scoring(job, self.mlflow_run_id, self.driver, self.evaluation)

    def __call__(self, checkpoint: StoredCheckpoint) -> Score:
        """Return the score of the checkpoint.

        Raises the exceptions of `Evaluation.score_checkpoint`, after a line on the driver's console.
        """
        try:
            score = self.evaluation.score_checkpoint(self.job, checkpoint, self.mlflow_run_id)
        except Exception as error:
            self.driver.send(messages.Noted(f"scoring {checkpoint.name} failed: {shown_url(str(error))}"))
            raise
        self.driver.deliver(messages.Scored(checkpoint.images, score.metric, score.value))
        return score


class ScoringBeside:
    """Scores the checkpoints that are due, one at a time, in tasks of the cluster while training continues.

    A checkpoint whose score fails three times, or takes longer than `evaluate.timeout_s`, is scored after training. The
    time in which a task waits for room does not count.
    """

    def __init__(self, scoring: Scoring) -> None:
        self._scoring = scoring
        self._stored = StoredRun.of(scoring.job)
        self._due: deque[str] = deque()
        self._known = 0  # names of `Status.to_score` that were taken
        self._task: BackgroundTask | None = None
        self._began = 0.0  # time at which the task was given to Ray, and later at which its process began
        self._has_room = False  # whether the task's process has begun
        self._said = False  # that it waits for room
        self._tries = 0

    @property
    def scores_now(self) -> bool:
        """Whether the process of a task runs, and holds what it needs."""
        return self._task is not None and self._has_room

    def follow(self, to_score: list[str]) -> bool:
        """Take new names of checkpoints, and start and end tasks. The call does not wait.

        Returns whether a checkpoint is being scored or waits for its score.
        """
        self._due.extend(to_score[self._known :])
        self._known = len(to_score)
        if self._task is not None:
            self._look_at(self._task)
        elif self._due and time.monotonic() > self._began + (PAUSE_S if self._tries else 0):
            self._start(self._due[0])
        return bool(self._due)

    def cancel(self) -> None:
        """End the task."""
        if self._task is not None:
            self._task.cancel()

    def _start(self, name: str) -> None:
        self._began, self._has_room, self._said, self._tries = time.monotonic(), False, False, self._tries + 1
        cpus, gpus = self._task_needs
        self._task = BackgroundTask(self._scoring, self._stored.checkpoint(name), cpus=cpus, gpus=gpus)

    @property
    def _task_needs(self) -> tuple[float, float]:
        """CPUs and GPUs of the task. With several workers, it only waits for them and needs nothing."""
        section = self._scoring.job.evaluate
        return (section.cpus, section.gpus) if section.workers == 1 else (0.0, 0.0)

    def _look_at(self, task: BackgroundTask) -> None:
        name, limit = self._due[0], self._scoring.job.evaluate.timeout_s
        if not self._has_room:
            self._look_for_beginning(task)
        if task.is_done():
            self._task = None
            try:
                task.result()
            except Exception as error:
                self._failed(name, f"{type(error).__name__}")
            else:
                self._next()
        elif self._has_room and time.monotonic() > self._began + limit:
            task.cancel()
            self._task, self._tries = None, TRIES
            self._failed(name, f"it took longer than evaluate.timeout_s, {limit:g} s")

    def _look_for_beginning(self, task: BackgroundTask) -> None:
        """Note when the task begins, and say once that it waits for room."""
        if task.has_begun():
            if self._said:
                self._scoring.driver.send(messages.WentOn("a score"))
            self._began, self._has_room = time.monotonic(), True
        elif not self._said and time.monotonic() > self._began + SAID_S:
            needed = f"{shown_amounts(*self._task_needs)} for checkpoint {self._due[0]}"
            self._scoring.driver.send(messages.Waits("a score", needed, "Ray starts it when the cluster has room"))
            self._said = True

    def _failed(self, name: str, reason: str) -> None:
        again = self._tries < TRIES
        when = f"it is tried again in {PAUSE_S:.0f} s" if again else "it will be scored after training"
        self._scoring.driver.send(messages.Noted(f"checkpoint {name} has no score yet, and {when}: {reason}"))
        if not again:
            self._next()

    def _next(self) -> None:
        self._due.popleft()
        self._tries = 0
