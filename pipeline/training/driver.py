"""The driver of a training run. It starts the workers, shows progress and ends the run."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.compute.cluster import NodeWatch, this_node
from pipeline.compute.mailbox import Mailbox, Question
from pipeline.compute.resources import uses_gpu
from pipeline.compute.root_cause import root_cause
from pipeline.config.schema import TrainJob
from pipeline.errors import BudgetSpent, CorruptError, EnvironmentFault, InterruptedRun, SaganError
from pipeline.runs.json_records import RunScores, TrainSummary
from pipeline.runs.owner import LostRun
from pipeline.runs.spending import HOUR_S, Spending, shown_amount
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.training import worker_group
from pipeline.training.find_or_start import find_or_start, owned
from pipeline.training.restart_budget import next_start
from pipeline.training.retention import delete_superfluous_checkpoints
from pipeline.training.score_while_training import Scoring, ScoringBeside
from pipeline.training.shared_types import Evaluation, TrainingRun
from pipeline.training.status.messages import GroupLost, NodesLeave, NotFiniteAt, RoomForMore, StartAsked
from pipeline.training.status.run_status import Status
from pipeline.training.status.status_file import StatusFile
from pipeline.training.status.training_progress import Console, Screen
from pipeline.training.stop_signals import stop_signals

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
HOUSEKEEPING_PAUSE_S = 30.0  # after a fault of storage


def train(
    job: TrainJob,
    evaluation: Evaluation,
    *,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
    kept: Collection[str] = (),
    on_score: Callable[[int, float | None], None] | None = None,
    final: bool = True,
    on_end: Callable[[TrainJob, str], None] | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    screen: Screen | None = None,
) -> TrainSummary:
    """Train from the run's newest checkpoint to `train.kimg` and return the summary.

    A run that has ended is not trained again. Its stored summary is returned.

    Args:
        evaluation: Computes the scores.
        parent: Id of the MLflow run of the sweep or the study to which this run belongs.
        tags: More tags of the MLflow run, by key.
        kept: Names of checkpoints that must be kept, because other runs start from them.
        on_score: Called with (position in images, value) after each score. The value is None where the model generates
            images that are not finite.
        final: Whether to compute a final score at the end and to register the best model. False for a trial, because a
            sweep chooses its champion among all trials; the checkpoints that are due are scored then, too.
        on_end: Called with (job, MLflow run id) after the summary is stored and before the MLflow run ends.
        asked_to_stop: Returns whether the run must stop as after a signal. It is called several times a second while
            the run trains. Where it raises KeyboardInterrupt, the run ends at once.
        screen: Shows the progress, beside that of other runs. Default: a screen for this run alone.

    Raises UsageError, also where another driver trains this run, EnvironmentFault or SaganError. Raises InterruptedRun
    after SIGINT, SIGTERM or `asked_to_stop`, and BudgetSpent where the budget of the run is spent; the checkpoint after
    the current step is written first.
    """
    with contextlib.ExitStack() as held:
        run = find_or_start(job, evaluation, parent, lambda stored: held.enter_context(owned(stored)), tags)
        if run.summary is not None:
            return run.summary
        told = held.enter_context(StatusFile(run, evaluation.higher_is_better(run.job)))
        status = "FAILED"
        try:
            if _reaches_budget(run.job, run.record.device_hours):
                raise _budget_spent(run, run.record.device_hours, run.reached)
            snapshot = _train(run, evaluation, kept, on_score, asked_to_stop, told, screen)
            told.score(snapshot)
            scores = RunScores()
            if final:
                scores = evaluation.finalise(run.job, run.mlflow_run_id)
            else:
                evaluation.score_due(run.job, run.mlflow_run_id)
            snapshot.notice_scoring(run.job.evaluate.all_gpus)
            told.score(snapshot)
            summary = _summary(run, snapshot, scores)
            _write_summary(run, summary)
            if on_end is not None:
                on_end(run.job, run.mlflow_run_id)
            status = "FINISHED"
        except (InterruptedRun, BudgetSpent, KeyboardInterrupt):
            status = "KILLED"
            raise
        except LostRun:
            status = ""  # the MLflow run is the other driver's too
            raise
        finally:
            if status:
                finish_tracking(run, status)
        return summary


def finish_tracking(run: TrainingRun, status: str) -> None:
    """Send MLflow the points of the newest checkpoint that it lacks, and set the status of the MLflow run.

    Waits at most 30 seconds for MLflow, and then logs a warning. A fault of storage is a warning too.
    """
    tracker = MlflowRun(run.tracking_uri, run.mlflow_run_id)
    try:
        for checkpoint in run.stored.checkpoints()[-1:]:
            tracker.replay(checkpoint.metrics().decode())
    except (EnvironmentFault, CorruptError, ValueError) as error:  # ValueError: the points are no JSON
        log.warning("MLflow may lack points of %s: %s", run.job.name, error)
    tracker.finish(status)


# --- while the run trains ---------------------------------------------------------------------------------------------


def _train(
    run: TrainingRun,
    evaluation: Evaluation,
    kept: Collection[str],
    on_score: Callable[[int, float | None], None] | None,
    asked_to_stop: Callable[[], bool],
    told: StatusFile,
    screen: Screen | None,
) -> Status:
    """Run Ray Train in a background thread. The calling thread shows progress, scores, retains and handles signals.

    A worker group whose node will be taken away writes a checkpoint and ends. Another group then starts as soon as it
    has nodes. Where the number of workers may change, the same happens when more fit, and after a failure. It also
    happens where Ray Train's controller dies. Returns the last status of the run.
    """
    owner = run.owner
    assert owner is not None, "a run that has ended is not trained"
    job = run.job = worker_group.with_device(run.job, run.record.device)
    run.record = run.record.model_copy(update={"device": job.resources.device})
    beside = worker_group.require_room(job)
    if not beside:
        print(
            f"{job.name}: the cluster has no room to score beside training: training waits for each score", flush=True
        )
    status = Status(
        images=run.reached,
        starts=run.record.starts,
        images_lost=run.record.images_lost,
        earlier_device_s=HOUR_S * run.record.device_hours,
    )
    mailbox, housekeeping = Mailbox(), Housekeeping(run, kept)
    scoring = Scoring.of(run, mailbox.sender, evaluation)
    scores = ScoringBeside(scoring) if beside else None
    in_line = None if beside else scoring.in_line(uses_gpu(job.resources.device))
    here, ends, spent = this_node(), False, False
    with (
        stop_signals("training stops after this step and writes a checkpoint") as signals,
        contextlib.nullcontext(screen) if screen else Screen() as shown_on,
        Console(job, shown_on) as console,
        contextlib.closing(NodeWatch()) as nodes,
        contextlib.closing(worker_group.RoomWatch(job, beside)) as room,
        contextlib.closing(_Background(lambda: worker_group.run_workers(run, mailbox.sender, in_line))) as workers,
    ):
        workers.start()
        groups = status.groups
        training = scoring_goes_on = unheard = True
        while training or scoring_goes_on or unheard:
            if training:
                training = not workers.done.wait(POLL_SECONDS)
            else:
                time.sleep(POLL_SECONDS)
            owner.require()
            if asked_to_stop() and not signals:
                signals.append(signal.SIGTERM)
            known = len(status.scores)
            status.apply(NodesLeave(nodes.leaving))
            if training and room.grown(status.groups, status.workers):
                status.apply(RoomForMore())
            if training and not spent and _reaches_budget(job, status.device_hours):
                spent = True
                status.lines.append("the budget is spent: training stops after this step and writes a checkpoint")
            ends = bool(signals) or here in status.leaving or spent
            _receive(mailbox, status, job, ends)
            if training:
                status.notice_silence(worker_group.shown(job))
                status.notice_stragglers()
            else:
                status.notice_end()
            status.notice_scoring(job.evaluate.all_gpus if scores is not None and scores.scores_now else 0.0)
            console.show(status)
            told.follow(status)
            for images, _, value in status.scores[known:]:
                if on_score is not None:
                    on_score(images, value)
            housekeeping.follow(status)
            unheard = scoring_goes_on  # the last task may have sent its score after the messages were received
            scoring_goes_on = scores is not None and scores.follow(status.to_score)
            lost = not training and _are_lost(workers.error, status, job)
            if lost:
                fault = worker_group.why_not_started(workers.error)
                status.apply(GroupLost(worker_group.found_no_room(workers.error), fault))
                another = next_start([*status.attempts, []], job.train.max_failures)
                status.failure = status.failure or another.refusal  # the next group might be lost before it asks
            failed = status.failure is not None or (workers.error is not None and not lost)
            left = not training or not status.nodes  # no group trains
            if isinstance(status.failure, LostRun) or (left and ends) or (failed and not training):
                break
            if not training and (status.stopped or lost):
                never_asked = lost and status.groups == groups  # a group that asks gets its pause as the answer
                workers.start(another.pause_s if never_asked else 0.0)
                groups, training = status.groups, True
        if scores is not None:
            scores.cancel()
    if signals:
        raise InterruptedRun(
            f"stopped at {status.images / 1000:.1f} kimg; {_newest_checkpoint(run)}",
            "run the same command again to resume",
        )
    if status.failure is not None:
        raise status.failure
    if spent and status.images < 1000 * job.train.kimg:
        raise _budget_spent(run, status.device_hours, status.images)
    if ends and status.images < 1000 * job.train.kimg:
        raise EnvironmentFault(
            f"the node of the driver will be taken away; training stopped at {status.images / 1000:.1f} kimg, and "
            f"{_newest_checkpoint(run)}",
            "run the same command again to resume",
        )
    if workers.error is not None:
        cause = root_cause(workers.error)
        if isinstance(cause, SaganError):
            raise cause
        raise SaganError(
            f"training {job.name} failed: {type(cause).__name__}: {cause}",
            f"{_newest_checkpoint(run)}; correct the cause, then run the same command again to resume",
        ) from workers.error
    return status


def _are_lost(error: BaseException | None, status: Status, job: TrainJob) -> bool:
    """Return whether another group must start after one that has ended, and that the driver has not asked to stop.

    Args:
        error: Exception of `run_workers`. Without one, the workers have come to their end and said so. If the driver
            does not know it, their last message was lost with the mailbox.
    """
    if error is not None:
        return worker_group.can_start_again(error, job.train.changes_size)
    return status.failure is None and not status.stopped and status.images < 1000 * job.train.kimg


def _receive(mailbox: Mailbox, status: Status, job: TrainJob, ends: bool) -> None:
    """Apply all messages of the mailbox to the status, and answer the questions among them.

    The workers are asked to stop where the run ends, where a node of theirs will be taken away, or where more fit.
    """
    for message in mailbox.collect():
        asked = message.message if isinstance(message, Question) else message
        repeated = isinstance(asked, NotFiniteAt) and asked.images in status.not_finite
        status.apply(asked)
        if isinstance(message, Question):
            mailbox.ask_to_stop(ends or status.must_restart)
            start = next_start(status.attempts, job.train.max_failures)
            mailbox.answer(message, start if isinstance(asked, StartAsked) else repeated)
    mailbox.ask_to_stop(ends or status.must_restart)


def _reaches_budget(job: TrainJob, device_hours: float) -> bool:
    return job.budget_hours is not None and device_hours >= job.budget_hours


def _budget_spent(run: TrainingRun, device_hours: float, images: int) -> BudgetSpent:
    """Return the error that ends a run at a position, when it has held at least the device hours of its budget."""
    job, budget = run.job, run.job.budget
    key, value = ("hours", budget.hours) if budget.hours == job.budget_hours else ("cost", budget.cost)
    assert value is not None, "the run has a budget"
    cost = Spending.of(device_hours, 0, None, job.resources.price_per_device_hour).cost
    costs = "" if cost is None else f", which cost {shown_amount(cost)}"
    return BudgetSpent(
        f"the budget of {job.name} is spent: budget.{key} is {value:.10g}, and the run has held "
        f"{shown_amount(device_hours)} device hours{costs}; it has reached {images / 1000:.1f} of {job.train.kimg:g} "
        f"kimg, and {_newest_checkpoint(run)}",
        f"to go on, run the same command with a larger budget, such as budget.{key}={2 * value:.10g}",
    )


def _newest_checkpoint(run: TrainingRun) -> str:
    """Return a clause for messages that names the newest complete checkpoint."""
    try:
        newest = run.stored.checkpoints()[-1:]
    except EnvironmentFault:  # it must not take the place of the error whose message this is
        return "which checkpoint is the newest is not known, since storage does not answer"
    return f"checkpoint {newest[0].url} is complete" if newest else "the run has no checkpoint yet"


class Housekeeping:
    """Keeps the run's record up to date and applies retention while the run trains.

    A fault of storage does not end training. It is shown, and the work is done later.

    Args:
        run: The run.
        kept: Names of checkpoints that are kept whatever their age.
    """

    def __init__(self, run: TrainingRun, kept: Collection[str] = ()) -> None:
        self._run, self._kept = run, kept
        self._counted = 0  # checkpoints up to which the record counts device hours
        self._applied = 0  # checkpoints and scores for which retention was applied
        self._again_at = -math.inf

    def follow(self, seen: Status) -> None:
        """Write the record after a start of the workers or a new checkpoint. Delete checkpoints after a new checkpoint
        or a new score.
        """
        run, uploaded = self._run, len(seen.uploaded)
        known = uploaded + len(seen.scores)
        if time.monotonic() < self._again_at:
            return
        try:
            if seen.starts > run.record.starts or uploaded > self._counted:
                counts = {"starts": seen.starts, "images_lost": seen.images_lost, "device_hours": seen.device_hours}
                record = run.record.model_copy(update=counts)
                run.stored.write_record(record)
                run.record, self._counted = record, uploaded
            if known > self._applied:
                delete_superfluous_checkpoints(run.job, self._kept)
                self._applied = known
        except (EnvironmentFault, CorruptError) as error:
            self._again_at = time.monotonic() + HOUSEKEEPING_PAUSE_S
            print(
                f"{run.job.name}: the run's record or retention is late, and training continues; tried again in "
                f"{HOUSEKEEPING_PAUSE_S:.0f} s: {error.message}",
                flush=True,
            )


@dataclass
class _Background:
    """A blocking call in a thread. Python delivers signals to the main thread, which therefore must not block."""

    call: Callable[[], None]
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    _closed: threading.Event = field(default_factory=threading.Event)

    def start(self, pause_s: float = 0.0) -> None:
        """Begin the call after a pause in seconds, unless `close` comes first."""
        self.error = None
        self.done.clear()
        threading.Thread(target=self._run, args=(pause_s,), daemon=True, name="ray-train").start()

    def close(self) -> None:
        """Prevent a call that has not begun. A call that has begun is not ended."""
        self._closed.set()

    def _run(self, pause_s: float) -> None:
        try:
            if not self._closed.wait(pause_s):
                self.call()
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()


# --- at the end ------------------------------------------------------------------------------------------------------


def _summary(run: TrainingRun, seen: Status, scores: RunScores) -> TrainSummary:
    spending = Spending.of(seen.device_hours, 0, None, run.job.resources.price_per_device_hour)
    return TrainSummary(
        name=run.job.name,
        images=seen.images,
        seconds=round(seen.train_seconds, 2),
        images_per_s=round(seen.images / seen.train_seconds, 2) if seen.train_seconds else None,
        mlflow_run_id=run.mlflow_run_id,
        resumed_from=seen.resumed_from,
        restarts=max(0, seen.starts - 1),
        images_lost=seen.images_lost,
        device_hours=spending.device_hours,
        cost=spending.cost,
        **dict(scores),
    )


def _write_summary(run: TrainingRun, summary: TrainSummary) -> None:
    """Write the summary into the run's folder, and a copy into `runs/<name>/` of the current directory.

    Logs a warning where the copy cannot be written.
    """
    run.stored.write_summary(summary)
    local = Path("runs") / run.job.name
    try:
        local.mkdir(parents=True, exist_ok=True)
        (local / "summary.json").write_text(summary.model_dump_json(indent=1))
    except OSError as error:
        log.warning("%s has no copy of the summary of %s: %s", local.absolute(), run.job.name, error.strerror)
