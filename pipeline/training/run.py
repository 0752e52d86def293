"""The driver of a training run: what is there already, what to start, what to show, how to end."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.config import plan
from pipeline.config.schema import TrainJob
from pipeline.data.index import Collection
from pipeline.data.pack import pack
from pipeline.errors import InterruptedRun, SaganError, UsageError
from pipeline.storage import files, fileset
from pipeline.tracking import source
from pipeline.tracking.tracker import Tracker, last_step, tracking_uri
from pipeline.training import cluster
from pipeline.training.console import Console
from pipeline.training.decisions import superfluous
from pipeline.training.status import Snapshot, create

POLL_SECONDS = 0.5
SOURCE_COMMIT = "mlflow.source.git.commit"  # MLflow shows it as the run's source


class Evaluation(Protocol):
    """What the driver needs from `pipeline.evaluation.evaluate`, which it is handed."""

    def check(self, job: TrainJob) -> None:
        """Raise before anything starts if scores cannot be taken."""

    def score_checkpoint(self, job: TrainJob, checkpoint_url: str, run_id: str) -> dict[str, Any]:
        """Score, record, log and register one checkpoint; the first item is the score that ranks."""

    def higher_is_better(self, job: TrainJob) -> bool:
        """Whether a larger score ranks first."""

    def protected(self, job: TrainJob) -> set[str]:
        """Names of checkpoints to keep: the best, those without their score yet, those that registered models name."""

    def finalise(self, job: TrainJob, run_id: str) -> dict[str, Any]:
        """Score what is unscored, move the champion, take the final score; the scores' part of the summary."""


@dataclass
class Run:
    """A training run that is about to start or to go on."""

    job: TrainJob
    collection: Collection
    tracking_uri: str
    run_id: str
    method_digest: str
    record: dict[str, Any]
    """run.json: what must survive the driver."""
    reached: int
    """Position of the last metrics that an earlier driver logged."""
    summary: dict[str, Any] | None
    """Of a run that is finished already."""


def train(
    job: TrainJob,
    evaluation: Evaluation,
    *,
    parent: str | None = None,
    on_score: Callable[[int, float | None], None] | None = None,
    final: bool = True,
    on_end: Callable[[TrainJob, str], None] | None = None,
) -> dict[str, Any]:
    """Train to `train.kimg`, resuming where the run stands; returns the summary.

    `on_score(images, score)` is told each score as it comes. `parent` is the MLflow run of a sweep, whose trials are
    not `final`: their champion is chosen among them all. `on_end(job, run_id)` is called once the summary stands and
    before the MLflow run ends.

    Raises UsageError, EnvironmentFault or SaganError with what is wrong; InterruptedRun after SIGINT or SIGTERM, with
    one checkpoint committed at the next step border.
    """
    run = prepare(job, evaluation, parent)
    if run.summary is not None:
        return run.summary
    status = "FAILED"
    try:
        snapshot = _fit(run, evaluation, on_score)
        scores = evaluation.finalise(run.job, run.run_id) if final else {}
        summary = _summary(run, snapshot, scores)
        _write_summary(run.job, summary)
        if on_end is not None:
            on_end(run.job, run.run_id)
        status = "FINISHED"
    except (InterruptedRun, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        Tracker(run.tracking_uri, run.run_id).finish(status)
    return summary


def pack_if_missing(job: TrainJob) -> None:
    """Pack `data.pack` to `data.train` where no collection stands there yet."""
    if job.data.pack is not None and not files.exists(files.join(job.data.train, "manifest.json")):
        files.check_writable(job.data.train)
        cluster.join()
        pack(job.data.train, job.data.pack)


def resolve(job: TrainJob) -> TrainJob:
    """The job with what its collection and its environment decide filled in."""
    collection = Collection.open(job.data.train)
    if job.data.split not in collection.splits:
        raise UsageError(
            f"{job.data.train} has no split {job.data.split!r}",
            f"set data.split to one of: {', '.join(collection.splits)}",
        )
    job = plan.complete(job, collection.resolution, collection.classes)
    return job.model_copy(update={"track": job.track.model_copy(update={"uri": tracking_uri(job)})})


def prepare(job: TrainJob, evaluation: Evaluation, parent: str | None = None) -> Run:
    """Check everything that can be checked before a worker starts, and find or begin the run."""
    files.check_writable(job.checkpoint.root)
    pack_if_missing(job)
    job = resolve(job)
    collection = Collection.open(job.data.train)
    evaluation.check(job)
    method = plan.method(job, collection.digest)
    record = _own_record(job, method)
    uri = tracking_uri(job)
    if record and (summary := _finished_summary(job)):
        return Run(job, collection, uri, record["mlflow_run_id"], plan.digest(method), record, 0, summary)
    tracker = Tracker.start(
        uri,
        job.track.experiment,
        job.name,
        record["mlflow_run_id"] if record else None,
        params=method,
        tags={
            "kind": "train",
            "method_digest": plan.digest(method),
            "collection": job.data.train,
            SOURCE_COMMIT: source.commit(),
        },
        artifacts=job.track.artifacts or artifacts(job),
        parent=parent,
    )
    tracker.close(timeout_s=30)
    if record is None:
        record = {"format": 1, "name": job.name, "method": method, "mlflow_run_id": tracker.run_id}
        record |= {"starts": 0, "images_lost": 0}
    # where images and extractor are, for whoever looks at the run later
    record |= {section: getattr(job, section).model_dump(mode="json") for section in ("data", "evaluate")}
    files.write_json(job.folder.record, record)
    reached = last_step(uri, tracker.run_id, "loss_d")
    return Run(job, collection, uri, tracker.run_id, plan.digest(method), record, reached, None)


def artifacts(job: TrainJob) -> str | None:
    """A database has no artifact store of its own: models and pictures go beside the runs."""
    return files.join(job.checkpoint.root, "mlflow") if (job.track.uri or "").startswith("sqlite:") else None


def _own_record(job: TrainJob, method: dict[str, Any]) -> dict[str, Any] | None:
    """run.json of the same name, if the run exists. Raises UsageError if it was another method."""
    if not files.exists(job.folder.record):
        return None
    record: dict[str, Any] = files.read_json(job.folder.record)
    theirs = record["method"]
    if theirs != method:
        differing = [k for k in sorted(theirs.keys() | method.keys()) if theirs.get(k) != method.get(k)]
        shown = "\n".join(f"    {key}: {theirs.get(key)} there, {method.get(key)} here" for key in differing)
        raise UsageError(
            f"a run named {job.name} exists under {job.checkpoint.root} with another method:\n{shown}",
            "give this one another name (name=…), set the keys back to continue that one, "
            "or start over with --fresh, which deletes it",
        )
    return record


def _finished_summary(job: TrainJob) -> dict[str, Any] | None:
    if not files.exists(job.folder.summary):
        return None
    summary: dict[str, Any] = files.read_json(job.folder.summary)
    return summary if summary["images"] >= 1000 * job.train.kimg else None


def forget(job: TrainJob) -> None:
    """Delete a run's folder, checkpoints and all (`--fresh`). Registered models have files of their own."""
    files.delete(job.folder.url)


# --- while it runs ---------------------------------------------------------------------------------------------------


def _fit(run: Run, evaluation: Evaluation, on_score: Callable[[int, float | None], None] | None) -> Snapshot:
    """Run Ray Train in a thread; show progress, apply retention and pass signals on from this one."""
    import ray

    job = run.job
    beside = cluster.prepare(job)
    status = create(run.reached, run.record["starts"], run.record["images_lost"])
    fit = _Fit(lambda: cluster.fit(run, status, evaluation, beside))
    seen = Snapshot(starts=run.record["starts"])
    with _signals(lambda: status.request_stop.remote()) as asked, Console(job) as console:
        fit.start()
        while not fit.done.wait(POLL_SECONDS):
            before, seen = seen, ray.get(status.snapshot.remote())
            console.show(seen)
            for images, _, value in seen.scores[len(before.scores) :]:
                if on_score is not None:
                    on_score(images, value)
            if seen.starts > before.starts:
                run.record |= {"starts": seen.starts, "images_lost": seen.images_lost}
                files.write_json(job.folder.record, run.record)
            if len(seen.committed) > len(before.committed) or len(seen.scores) > len(before.scores):
                _apply_retention(job, evaluation)
            if seen.stopped:
                break
        seen = ray.get(status.snapshot.remote())
        console.show(seen)
    if asked and seen.images < 1000 * job.train.kimg:
        newest = job.folder.checkpoints()[-1:]
        stands = f"checkpoint {job.folder.checkpoint(newest[0])} stands" if newest else "there was no step to save yet"
        raise InterruptedRun(f"stopped at {seen.images / 1000:.1f} kimg; {stands}", "the same command resumes there")
    if seen.failure is not None:
        raise seen.failure
    fit.reraise(job)
    return seen


def _apply_retention(job: TrainJob, evaluation: Evaluation) -> None:
    for name in superfluous(job.folder.checkpoints(), job.checkpoint.keep, evaluation.protected(job)):
        fileset.remove(job.folder.checkpoint(name))


@dataclass
class _Fit:
    """Ray Train's blocking call in a thread, since signals must reach the main one."""

    call: Callable[[], None]
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True, name="ray-train").start()

    def _run(self) -> None:
        try:
            self.call()
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()

    def reraise(self, job: TrainJob) -> None:
        """Turn Ray's nested errors into what went wrong, and say what stands."""
        if self.error is None:
            return
        cause = cluster.root_cause(self.error)
        if isinstance(cause, SaganError):
            raise cause
        newest = job.folder.checkpoints()[-1:]
        stands = f"checkpoint {newest[0]} stands; the same command resumes from it" if newest else "nothing was saved"
        raise SaganError(f"training {job.name} failed: {type(cause).__name__}: {cause}", stands) from self.error


@contextlib.contextmanager
def _signals(on_signal: Callable[[], Any]) -> Iterator[list[int]]:
    """The signals that asked for a stop; SIGINT and SIGTERM are noted and passed on. A second one gives up at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # a trial of a sweep: its sweep is the one to ask
        yield asked
        return

    def handle(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print(f"{signal.Signals(number).name}: saving a checkpoint at the next step border …", flush=True)
        on_signal()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --- afterwards ------------------------------------------------------------------------------------------------------


def _summary(run: Run, seen: Snapshot, scores: dict[str, Any]) -> dict[str, Any]:
    job = run.job
    return {
        "name": job.name,
        "kind": "train",
        "images": seen.images,
        "seconds": round(seen.train_seconds, 2),
        "images_per_s": round(seen.images / seen.train_seconds, 2) if seen.train_seconds else None,
        **scores,
        "mlflow_run_id": run.run_id,
        "resumed_from": seen.resumed_from,
        "restarts": max(0, seen.starts - 1),
        "images_lost": seen.images_lost,
    }


def _write_summary(job: TrainJob, summary: dict[str, Any]) -> None:
    """Beside the run in storage, and where the command was given."""
    files.write_json(job.folder.summary, summary)
    local = Path("runs") / job.name
    local.mkdir(parents=True, exist_ok=True)
    (local / "summary.json").write_text(json.dumps(summary, indent=1))
