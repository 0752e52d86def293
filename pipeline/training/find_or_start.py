"""Finds the run of a name or starts it: packs the images, completes the job, checks it and owns the run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from pipeline.collection.manifest import MANIFEST, Collection
from pipeline.compute.cluster import join_named_cluster
from pipeline.config.run_method import complete_model, digest_of, method_differences, method_of
from pipeline.config.schema import TrainJob
from pipeline.errors import CorruptError, EnvironmentFault, LastingFault, UsageError, shown_url
from pipeline.packing.pack import pack
from pipeline.runs.checkpoints import METRICS, require_room, upload_checkpoint, write_checkpoint
from pipeline.runs.git_commit import git_commit
from pipeline.runs.json_records import CheckpointFacts, RecordedData, RecordedEvaluation, RecordedInit, RunRecord
from pipeline.runs.owner import Ownership, claim
from pipeline.runs.stored_run import StoredRun, StoredSweep
from pipeline.storage import files
from pipeline.tracking.init_source import describe, find_init, first_state
from pipeline.tracking.mlflow_run import MlflowRun, artifact_location, last_step, tracking_uri
from pipeline.training.shared_types import Evaluation, TrainingRun
from pipeline.training.worker.finite_check import first_not_finite
from sagan.train_state import TrainState

# New weights are drawn from torch's random numbers, which all threads of a driver share.
_ONE_AT_A_TIME = threading.Lock()

SOURCE_COMMIT = "mlflow.source.git.commit"  # MLflow shows this tag as the source version of the run


@contextlib.contextmanager
def owned(stored: StoredRun | StoredSweep) -> Iterator[Ownership]:
    """Own a run or a sweep inside a `with` block. Raises what `claim` raises."""
    what: Literal["run", "sweep"] = "sweep" if isinstance(stored, StoredSweep) else "run"
    owner = claim(stored.owners_url, lambda line: print(f"{stored.name}: {line}", flush=True), what)
    try:
        yield owner
    finally:
        owner.release()


def pack_if_missing(job: TrainJob) -> None:
    """Pack `data.pack` to `data.train`, unless `data.train` already holds a collection."""
    if job.data.pack is not None and not files.exists(files.join(job.data.train, MANIFEST)):
        files.check_writable(job.data.train)
        pack(job.data.train, job.data.pack, on_cluster=join_named_cluster())


def complete_job(job: TrainJob) -> TrainJob:
    """Return the job with the values filled in that its collection and its environment decide.

    The collection decides the resolution and the number of classes. The environment decides the tracking URI.
    Raises UsageError where the collection has no split `data.split` or does not fit the model.
    """
    collection = Collection.open(job.data.train)
    collection.ids(job.data.split)
    job = complete_model(job, collection.resolution, collection.num_classes)
    return job.model_copy(update={"track": job.track.model_copy(update={"uri": tracking_uri(job)})})


def find_or_start(
    job: TrainJob,
    evaluation: Evaluation,
    parent: str | None,
    own: Callable[[StoredRun], Ownership],
    tags: Mapping[str, str] | None = None,
) -> TrainingRun:
    """Check the job before any worker starts, then find the run of this name or start it in MLflow.

    `own` becomes the owner of a run that has not ended, before anything of it is changed. A job with `init` gets its
    first checkpoint here. `parent` and `tags` are those of `start_tracking`.

    A run that exists resumes where MLflow does not answer. Raises UsageError, EnvironmentFault or CorruptError.
    """
    files.check_writable(job.checkpoint.root)
    pack_if_missing(job)
    job = complete_job(job)
    evaluation.check(job)
    stored = StoredRun.of(job)
    collection = Collection.open(job.data.train)
    with _ONE_AT_A_TIME:
        init, method = start_and_method(job, collection, stored)
    uri = tracking_uri(job)
    if ended := ended_run(job, stored, method):
        return ended
    owner = own(stored)
    if ended := ended_run(job, stored, method):  # by the driver that this one has waited for
        return ended
    record = _own_record(job, stored, method)
    if record is not None:
        record = _with_newest_hours(record, stored)
    with _ONE_AT_A_TIME:
        first = _first_state(job, collection, stored, init) if init and not stored.checkpoints() else None
    try:
        record = start_tracking(job, stored, record, method, parent, init, tags)
        reached = last_step(uri, record.mlflow_run_id, "loss_d")
    except EnvironmentFault as fault:
        if record is None or isinstance(fault, LastingFault):
            raise
        print(f"{job.name}: the run resumes without MLflow, which gets its points later: {fault.message}", flush=True)
        reached = max((checkpoint.images for checkpoint in stored.checkpoints()), default=0)
    if first is not None:
        owner.require()
        _write_first_checkpoint(*first, stored, collection, digest_of(method))
    return TrainingRun(job, stored, uri, record, owner, reached, None)


def start_and_method(
    job: TrainJob, collection: Collection, stored: StoredRun
) -> tuple[RecordedInit | None, dict[str, Any]]:
    """Return what a complete job starts from, None for new weights, and its method.

    Raises UsageError where what it starts from does not fit, CorruptError, EnvironmentFault.
    """
    known = stored.record()
    init = find_init(job, collection.class_names, known.init if known else None)
    return init, method_of(job, collection.digest, init.sha256 if init else None)


def start_tracking(
    job: TrainJob,
    stored: StoredRun,
    record: RunRecord | None,
    method: dict[str, Any],
    parent: str | None,
    init: RecordedInit | None,
    tags: Mapping[str, str] | None = None,
) -> RunRecord:
    """Start the MLflow run of a training run or resume it, write the run's record and return it.

    A tracker that does not have the MLflow run of `record` gets a new one with the metrics of the newest checkpoint.

    Args:
        job: The complete job.
        stored: Folder of the run.
        record: The run's record; None for a new run.
        method: Method of the job.
        parent: Id of the MLflow run of the sweep, if the run is a trial.
        init: What the run starts from; None for new weights.
        tags: More tags of the MLflow run, by key.

    Raises EnvironmentFault.
    """
    tracker = MlflowRun.start(
        tracking_uri(job),
        job.track.experiment,
        job.name,
        record.mlflow_run_id if record else None,
        params=method,
        tags={
            "kind": "train",
            "method_digest": digest_of(method),
            "collection": shown_url(job.data.train),
            SOURCE_COMMIT: git_commit(),
            **(describe(init) if init else {}),
            **(tags or {}),
        },
        artifacts=artifact_location(job),
        parent=parent,
    )
    earlier = record.earlier_mlflow_run_ids if record else []
    if record and record.mlflow_run_id != tracker.run_id:
        earlier = [*earlier, record.mlflow_run_id]
        for checkpoint in stored.checkpoints()[-1:]:
            tracker.replay(checkpoint.metrics().decode())
    tracker.close(timeout_s=30)
    record = RunRecord(
        name=job.name,
        method=method,
        mlflow_run_id=tracker.run_id,
        earlier_mlflow_run_ids=earlier,
        starts=record.starts if record else 0,
        images_lost=record.images_lost if record else 0,
        device_hours=record.device_hours if record else 0.0,
        data=RecordedData.of(job.data),
        evaluate=RecordedEvaluation.of(job.evaluate),
        init=init,
    )
    stored.write_record(record)
    return record


def _first_state(
    job: TrainJob, collection: Collection, stored: StoredRun, init: RecordedInit
) -> tuple[TrainState, float]:
    """Return the state that a run starts from, and its seconds of training. Print what the run takes from where.

    Raises UsageError, EnvironmentFault. Raises CorruptError also where a value of the source is not finite.
    """
    (state, train_seconds), where = first_state(job, collection.class_names, init), describe(init)["init"]
    if tensor := first_not_finite(state):
        raise CorruptError(f"{job.name} cannot start from {where}: {tensor} is not finite", "give another init.source")
    print(f"{stored.name} starts from {where}", flush=True)
    for title, lines in (("taken", init.taken), ("not taken", init.skipped)):
        for line in lines:
            print(f"  {title}: {line}", flush=True)
    return state, train_seconds


def _write_first_checkpoint(
    state: TrainState, train_seconds: float, stored: StoredRun, collection: Collection, method_digest: str
) -> None:
    """Write the checkpoint from which all workers start. Raises EnvironmentFault."""
    facts = CheckpointFacts(
        images=state.images,
        train_seconds=train_seconds,
        to_score=False,
        collection_digest=collection.digest,
        class_names=collection.class_names,
        method_digest=method_digest,
        git_commit=git_commit(),
    )
    with files.temporary_folder("init") as local:
        require_room(local, stored.checkpoints_url, state, local / METRICS)
        upload_checkpoint(local, stored.checkpoint(write_checkpoint(local, state, b"", facts)))


def ended_run(job: TrainJob, stored: StoredRun, method: dict[str, Any]) -> TrainingRun | None:
    """Return the run of this name where it has been trained to `train.kimg`; otherwise None. Raises UsageError."""
    record, summary = _own_record(job, stored, method), stored.summary()
    if record is None or summary is None or summary.images < 1000 * job.train.kimg:
        return None
    return TrainingRun(job, stored, tracking_uri(job), record, None, 0, summary)


def _own_record(job: TrainJob, stored: StoredRun, method: dict[str, Any]) -> RunRecord | None:
    """Return the record of the run of this name; None where there is no such run.

    Raises UsageError where the stored run, or the newest checkpoint of a folder without a record, has another method.
    """
    record = stored.record()
    if record is None:
        _require_own_checkpoints(stored, digest_of(method))
        return None
    if record.method == method:
        return record
    old = record.method
    lines = "\n".join(f"    {line}" for line in method_differences(old, method))
    raise UsageError(
        f"a run named {job.name} exists under {job.checkpoint.root} with another method:\n{lines}",
        "give this run another name (name=…), set the keys back to resume the existing run, "
        "or delete the existing run and start over with --fresh",
    )


def _with_newest_hours(record: RunRecord, stored: StoredRun) -> RunRecord:
    """Return the record with the device hours of `status.json`, which are newer where a driver died."""
    with contextlib.suppress(CorruptError):  # then those of the newest checkpoint count
        if (spending := stored.spending()) is not None:
            return record.model_copy(update={"device_hours": spending.device_hours})
    return record


def _require_own_checkpoints(stored: StoredRun, method_digest: str) -> None:
    """Raise UsageError where the newest checkpoint of a folder without `run.json` has another method."""
    for checkpoint in stored.checkpoints()[-1:]:
        try:
            other = checkpoint.facts().method_digest != method_digest
        except CorruptError:  # the workers skip it
            continue
        if other:
            raise UsageError(
                f"{stored.url} has no record of a run, but its checkpoint {checkpoint.name} is of another method",
                "give this run another name (name=…), or delete the folder and start over with --fresh",
            )
