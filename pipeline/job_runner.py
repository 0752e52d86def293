"""Runs a job of any kind, for the command line and for Python."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.dry_run import CollectionFacts, DryRun, dry_run, study_dry_run
from pipeline.config.job_file import load_job, row_job, row_sweep, trial_job
from pipeline.config.run_method import complete_model, method_of, sweep_method_of
from pipeline.config.schema import EvaluateJob, Job, PackJob, StudyJob, TrainJob, TuneJob
from pipeline.errors import EnvironmentFault, SaganError, UsageError
from pipeline.runs.spending import Spending, shown_amount

if TYPE_CHECKING:
    from pipeline.collection.manifest import Collection
    from pipeline.evaluation.self_test import Finding
    from pipeline.runs.json_records import RunState, SweepRecord
    from pipeline.training.shared_types import Evaluation


def run_job(
    job: Job | Path | str, overrides: Mapping[str, Any] | None = None, *, fresh: bool = False
) -> dict[str, Any]:
    """Run a job to its end and return its summary.

    Args:
        job: A job, or the path of a job file.
        overrides: Values by dotted key. They replace values of the job file. Without a job file, they are refused.
        fresh: Whether to delete the run, the sweep or the study of this name first. For other kinds of jobs, this is
            refused.

    Returns a dict of JSON values. For a training run or a sweep, it equals `runs/<name>/summary.json`. For a study, it
    equals `runs/studies/<name>/summary.json`.
    Raises SaganError and its subclasses.
    """
    if isinstance(job, Path | str):
        job = load_job(job, overrides)
    elif overrides:
        raise UsageError(
            f"overrides are given for the job {job.name}, which has been read already: {', '.join(overrides)}",
            "give the path of the job file with them, or give them to `load_job`",
        )
    if fresh and isinstance(job, PackJob | EvaluateJob):
        raise UsageError(
            f"{job.name} is a job of kind: {job.kind}, which has no run to delete",
            "leave out --fresh",
        )
    if isinstance(job, PackJob):
        return _pack(job)
    if isinstance(job, EvaluateJob):
        from pipeline.evaluation.evaluate_model import evaluate_model

        _connect_workers(job)
        return evaluate_model(job).model_dump(mode="json")
    if isinstance(job, TuneJob):
        from pipeline.tuning.sweep import tune

        return tune(job, _evaluation(), fresh=fresh).to_dict()
    if isinstance(job, StudyJob):
        from pipeline.report.publish_report import publish_study_report
        from pipeline.study.run_study import run_study

        return run_study(job, _evaluation(), fresh=fresh, on_end=publish_study_report).to_dict()
    return _train(job, fresh)


def run_self_test(job: EvaluateJob) -> list[Finding]:
    """Test the extractor of a job on real images of the reference collection and on degraded images.

    Raises SaganError.
    """
    from pipeline.evaluation.self_test import self_test

    _connect_workers(job)
    return self_test(job.evaluate, job.reference)


def dry_run_job(job: Job) -> dict[str, Any]:
    """Return what a job would do and cost, without starting it.

    The manifest of the collection is read if it can be read, and so is what the job starts from. Raises UsageError
    where that does not fit the job or does not exist.
    """
    if isinstance(job, TuneJob):
        base = trial_job(job, job.example)
        collection = _collection(base)
        trial = _train_dry_run(base, collection)
        spending = _sweep_spending(job, base, collection)
        return {
            "name": job.name,
            "kind": "tune",
            "trials": job.search.trials,
            **_population(job, trial["images"]),
            **spending.model_dump(),
            "notes": _notes(spending),
            "trial": trial,
        }
    if isinstance(job, StudyJob):
        jobs = {row: row_job(job, row, job.seeds[0]) for row in job.rows}
        collections = {row: _collection(of_row) for row, of_row in jobs.items()}
        rows = {row: _dry_run(of_row, collections[row]) for row, of_row in jobs.items()}
        spending, tuning = _study_spending(job, collections), _tuning(job)
        notes = [*_notes(spending), *(["device hours and costs are without the trials of `tuning`"] if tuning else [])]
        return study_dry_run(job, rows, _ended_runs(job), tuning, {**spending.model_dump(), "notes": notes})
    if isinstance(job, TrainJob):
        collection = _collection(job)
        plan = _train_dry_run(job, collection)
        spending = _spending([(job.train.kimg, _recorded_state(job, collection))], job)
        notes = [*plan.pop("notes"), *_notes(spending, job.budget_hours)]
        return {**plan, **spending.model_dump(), "budget_hours": job.budget_hours, "notes": notes}
    return job.model_dump(mode="json")


def _population(sweep: TuneJob, images: int) -> dict[str, Any]:
    """Return what population-based training of a sweep does, given the images of one member; empty without it."""
    if sweep.pbt is None:
        return {}
    from pipeline.tuning.exploit_explore import generation_ends, replaced_members

    members, kimg = sweep.search.trials, trial_job(sweep, sweep.example).train.kimg
    generations = len(generation_ends(kimg, sweep.pbt.interval_kimg))
    clones = replaced_members(members, sweep.pbt.fraction)
    return {
        "generations": generations,
        "kimg_per_generation": sweep.pbt.interval_kimg,
        "clones_per_generation": clones,
        "runs": members + clones * (generations - 1),
        "images": members * images,
    }


def _connect_workers(job: EvaluateJob) -> None:
    """Connect to Ray if the job has several evaluation workers. Raises EnvironmentFault."""
    from pipeline.compute.cluster import connect

    if job.evaluate.workers > 1:
        connect(job.evaluate.workers * job.evaluate.cpus)


def _train(job: TrainJob, fresh: bool) -> dict[str, Any]:
    from pipeline.report.publish_report import publish_report
    from pipeline.runs.owner import claim
    from pipeline.runs.stored_run import StoredRun
    from pipeline.training.driver import train

    if fresh:
        stored = StoredRun.of(job)
        claim(stored.owners_url, print).release()  # no driver may be training the run that is deleted
        stored.delete()
    return train(job, _evaluation(), on_end=publish_report).to_dict()


def _pack(job: PackJob) -> dict[str, Any]:
    from pipeline.compute.cluster import join_named_cluster
    from pipeline.packing.pack import pack

    collection = pack(job.destination, job.pack, on_cluster=join_named_cluster())
    return {
        "name": job.name,
        "kind": "pack",
        "url": collection.url,
        "digest": collection.digest,
        "images": {split: collection.size(split) for split in collection.splits},
    }


def _collection(job: TrainJob) -> Collection | None:
    """Return the job's collection; None where it cannot be read."""
    from pipeline.collection.manifest import Collection

    try:
        return Collection.open(job.data.train)
    except SaganError:
        return None


def _train_dry_run(job: TrainJob, collection: Collection | None) -> dict[str, Any]:
    """Return the dry run of a training job with what it starts from, but without device hours. Raises UsageError."""
    plan = _dry_run(job, collection)
    return {**plan.to_dict(), **_start(job, plan, collection)}


def _start(job: TrainJob, plan: DryRun, collection: Collection | None) -> dict[str, Any]:
    """Return what a job with `init` takes from where, and a note where that cannot be read. Raises UsageError."""
    from pipeline.tracking.init_source import describe, find_init

    if job.init is None:
        return {}
    complete = job.model_copy(update={"model": job.model.for_collection(plan.resolution, plan.num_classes)})
    try:
        init = find_init(complete, collection.class_names if collection else [], None)
    except EnvironmentFault as fault:
        return {"notes": (*plan.notes, f"init.source cannot be read, and may not fit: {fault.message}")}
    assert init is not None
    where = {"from": describe(init)["init"], "sha256": init.sha256}
    start: dict[str, Any] = {"init": {**where, "taken": init.taken, "not_taken": init.skipped}}
    if job.init.keep_position:
        start["notes"] = (*plan.notes, "the run goes on at the position of init.source; the figures count from 0")
    return start


def _dry_run(job: TrainJob, collection: Collection | None) -> DryRun:
    return dry_run(job, None if collection is None else _facts_of(collection, job))


def _facts_of(collection: Collection, job: TrainJob) -> CollectionFacts:
    """Return facts about the job's collection. Raises UsageError where it has no split `data.split`."""
    from pipeline.streaming.order import Order

    collection.ids(job.data.split)
    sizes = collection.shard_sizes(job.data.split)
    fetches = Order(sizes, job.seed, job.data.lanes, job.data.window).fetches(job.train.workers)
    return CollectionFacts(
        collection.resolution, collection.num_classes, collection.size(job.data.split), len(sizes), fetches
    )


def _sweep_spending(sweep: TuneJob, base: TrainJob, collection: Collection | None) -> Spending:
    """Return what the trials of a sweep have spent and are expected to spend, if no more of them is stopped early."""
    from pipeline.runs.stored_run import StoredSweep
    from pipeline.tuning.draw_points import read_records, to_start

    stored = StoredSweep.of(base, sweep.name)
    runs: list[tuple[float, RunState | None]] = []
    try:
        same = collection is not None and _is_recorded(sweep, base, collection, stored.record())
        records = read_records(sweep, stored) if same else []
        for record in records:
            kimg = record.trial.kimg if record.ended else base.train.kimg
            runs.append((kimg, stored.trial(record.trial.name).counted_state()))
    except SaganError:
        records, runs = [], []
    return _spending([*runs, *((base.train.kimg, None) for _ in to_start(sweep, records))], base)


def _is_recorded(sweep: TuneJob, base: TrainJob, collection: Collection, record: SweepRecord | None) -> bool:
    """Return whether the record of a sweep has the method of this sweep. Raises UsageError."""
    if record is None:
        return False
    complete = complete_model(base, collection.resolution, collection.num_classes)
    method = sweep_method_of(sweep, complete, collection.digest, record.init.sha256 if record.init else None)
    return record.method == method


def _study_spending(study: StudyJob, collections: Mapping[str, Collection | None]) -> Spending:
    """Return what the runs of a study have spent and are expected to spend, given the collection of each row."""
    parts, tuned = [], _tuned(study)
    for row, collection in collections.items():
        jobs = [row_job(study, row, seed, tuned.get(row)) for seed in study.seeds]
        parts.append(_spending([(job.train.kimg, _recorded_state(job, collection)) for job in jobs], jobs[0]))
    return Spending.total(parts)


def _tuned(study: StudyJob) -> dict[str, dict[str, Any]]:
    """Return the values that sweeps have chosen for the rows of a study; empty where its record cannot be read."""
    from pipeline.runs.stored_run import StoredStudy
    from pipeline.study.settle_rows import tuned_points

    stored = StoredStudy.of(row_job(study, study.compare.reference, study.seeds[0]), study.name)
    with suppress(SaganError):
        return tuned_points(study, stored.record(), stored.url)
    return {}


def _spending(runs: Sequence[tuple[float, RunState | None]], job: TrainJob) -> Spending:
    """Return what runs of one job have spent and are expected to spend.

    The expectation is known where at least one of the runs has measured how long an image takes.

    Args:
        runs: (length of a run in thousands of images, its status) of each run. The status is None for a new run.
        job: The job of the runs, for its price.
    """
    measured = [state.device_s_per_image for _, state in runs if state and state.device_s_per_image is not None]
    device_s_per_image = statistics.fmean(measured) if measured else None
    parts = []
    for kimg, state in runs:
        hours, images = (state.device_hours, state.images) if state else (0.0, 0)
        left = max(0.0, 1000 * kimg - images)
        parts.append(Spending.of(hours, left, device_s_per_image, job.resources.price_per_device_hour))
    return Spending.total(parts)


def _recorded_state(job: TrainJob, collection: Collection | None) -> RunState | None:
    """Return the status of the job's run; None where no run of this name and method can be read."""
    from pipeline.runs.stored_run import StoredRun

    if collection is None:
        return None
    stored = StoredRun.of(job)
    try:
        if (record := stored.record()) is None:
            return None
        complete = complete_model(job, collection.resolution, collection.num_classes)
        method = method_of(complete, collection.digest, record.init.sha256 if record.init else None)
        return stored.counted_state() if record.method == method else None
    except SaganError:
        return None


def _notes(spending: Spending, budget_hours: float | None = None) -> list[str]:
    """Return what a person should know about what a job will spend."""
    expected = spending.expected_device_hours
    if expected is None:
        return ["the device hours are unknown: no run of this name and method has measured how long an image takes"]
    if budget_hours is not None and expected > budget_hours:
        return [f"the budget, {shown_amount(budget_hours)} device hours, will be spent before train.kimg"]
    return []


def _tuning(study: StudyJob) -> dict[str, tuple[int, DryRun]]:
    """Return the number of trials of each row that is tuned, and the dry run of one trial, by name of the row."""
    from pipeline.tuning.draw_points import to_start

    tuning = {}
    for row in study.rows:
        if sweep := row_sweep(study, row):
            trial = trial_job(sweep, sweep.example)
            tuning[row] = len(to_start(sweep, [])), _dry_run(trial, _collection(trial))
    return tuning


def _ended_runs(study: StudyJob) -> int | None:
    """Return the number of runs of a study that have ended; None where their storage cannot be read."""
    from pipeline.runs.stored_run import StoredRun

    ended = 0
    try:
        for row, seed in itertools.product(study.rows, study.seeds):
            job = row_job(study, row, seed)
            summary = StoredRun.of(job).summary()
            ended += summary is not None and summary.images >= 1000 * job.train.kimg
    except SaganError:
        return None
    return ended


def _evaluation() -> Evaluation:
    """Return the functions of evaluation that training calls."""
    from pipeline.evaluation.final_score import finalise, score_due
    from pipeline.evaluation.score_checkpoints import check_scores, higher_is_better, score_checkpoint
    from pipeline.training.shared_types import Evaluation

    return Evaluation(check_scores, score_checkpoint, higher_is_better, score_due, finalise)
