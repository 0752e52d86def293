"""A study: rows of jobs, each trained with several seeds. Every run is a training run of its own.

The MLflow runs are children of the study's MLflow run. As many runs train at the same time as fit into the cluster.
They start in one order: all rows with the first seed, then all rows with the second seed. The rows of an interrupted
study can therefore be compared.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.collection.manifest import Collection
from pipeline.compute.cluster import connect
from pipeline.compute.resources import fits, node_resources
from pipeline.compute.tasks import BackgroundTask
from pipeline.config.job_file import row_job, row_sweep, trial_job
from pipeline.config.schema import EvaluateSection, StudyJob, TrainJob, TuneJob
from pipeline.errors import Diverged, InterruptedRun, ProcessDied, SaganError, UsageError, counted
from pipeline.evaluation.metrics import metric_named
from pipeline.runs.best_checkpoint import best_score
from pipeline.runs.json_records import RunScores, StudyRecord, StudySummary, StudyTable, StudyTables
from pipeline.runs.owner import claim
from pipeline.runs.score_protocol import Score
from pipeline.runs.spending import Spending
from pipeline.runs.stored_run import StoredRun, StoredStudy
from pipeline.storage import files
from pipeline.study.compare_rows import Outcome, tables_of
from pipeline.study.settle_rows import find_versions, settled_values, sweeps_of, tuned_points
from pipeline.study.show_tables import as_csv, as_text, print_tables
from pipeline.study.side_by_side import StopRequest, run_side_by_side
from pipeline.study.study_picture import curves_of, draw_curves
from pipeline.tracking.mlflow_run import MlflowRun, tracking_uri
from pipeline.tracking.parent_run import parent_run
from pipeline.training import worker_group
from pipeline.training.driver import train
from pipeline.training.find_or_start import complete_job, ended_run, pack_if_missing, start_and_method
from pipeline.training.shared_types import Evaluation
from pipeline.training.status.training_progress import Screen
from pipeline.tuning import sweep as sweeps
from pipeline.tuning.trial_room import TrialNeeds, TrialRoom

_POLL_S = 0.2
_SAID_S = 30.0  # seconds of waiting for room after which it is said
_FINAL_ATTEMPTS = 3  # processes that may compute the final score of a run


@dataclass(frozen=True)
class RowRun:
    """One run of a study."""

    row: str
    seed: int
    job: TrainJob

    @property
    def stored(self) -> StoredRun:
        return StoredRun.of(self.job)


def runs_of(study: StudyJob, settled: Mapping[str, Mapping[str, Any]] | None = None) -> list[RowRun]:
    """Return the runs of a study in the order in which they start. Raises ConfigError.

    `settled` has the values that the study has found for its rows, by row and dotted key.
    """
    values = settled or {}
    return [RowRun(row, seed, row_job(study, row, seed, values.get(row))) for seed in study.seeds for row in study.rows]


def run_study(
    study: StudyJob,
    evaluation: Evaluation,
    *,
    fresh: bool = False,
    on_end: Callable[[TrainJob, StoredStudy, str], None] | None = None,
) -> StudySummary:
    """Tune the rows, train the runs that have not ended, write the tables and the picture, and return the summary.

    The same command resumes a study whose driver died. A run that diverges has ended. More rows and seeds add runs.

    Args:
        study: The study job.
        evaluation: Computes the scores.
        fresh: Whether to delete the study, its sweeps and its runs first. The runs of trials are not deleted.
        on_end: Called with (job of the run `StudySummary.shown`, folder of the study, id of its MLflow run) after the
            summary is stored. It is not called where there is no such run.

    Raises UsageError where a run of one of the names has another method, EnvironmentFault, and SaganError where no run
    has a score. Raises InterruptedRun after SIGINT or SIGTERM.
    """
    higher_is_better = _directions(study)
    first = _tracked(row_job(study, study.compare.reference, study.seeds[0]))
    stored = StoredStudy.of(first, study.name)
    files.check_writable(first.checkpoint.root)
    if fresh:
        _delete(study, stored)
    record = stored.record()
    versions = find_versions(study, record.init_versions if record else {})
    points = tuned_points(study, record, stored.url)
    settled = settled_values(study, versions, points)
    to_tune = sweeps_of(study, settled, points)
    runs = runs_of(study, settled)
    _require_untrained([run for run in runs if run.row in to_tune])
    untuned = [run for run in runs if run.row not in to_tune]
    missing = missing_runs(study, untuned, evaluation, record.diverged if record else {})
    left = len(missing) + len(to_tune) * len(study.seeds)
    print(f"study {study.name}: {len(runs) - left} of {len(runs)} runs have ended, {left} are to train", flush=True)
    params = {f"rows.{name}": row.overrides for name, row in study.rows.items()}
    with parent_run(first, study.name, record, kind="study", params=params) as mlflow_run:
        known = stored.record()  # another command may have trained other seeds of the study in the meantime
        record = StudyRecord(
            name=study.name,
            mlflow_run_id=mlflow_run.mlflow_run_id,
            earlier_mlflow_run_ids=mlflow_run.earlier_mlflow_run_ids,
            runs=[run.job.name for run in runs],
            diverged=known.diverged if known else {},
            init_versions={**(known.init_versions if known else {}), **versions},
            tuned=known.tuned if known else {},
        )
        stored.write_record(record)
        if left:
            bases = [trial_job(sweep, sweep.example) for sweep in to_tune.values()]
            trials = [sweeps.least_cpus(sweep, base) for sweep, base in zip(to_tune.values(), bases, strict=True)]
            connect(max([*trials, *(worker_group.least_cpus(run.job) for run in runs)]))
        if to_tune:
            record = _tune(study, to_tune, evaluation, stored, record)
            runs = runs_of(study, settled_values(study, versions, tuned_points(study, record, stored.url)))
            missing = missing_runs(study, runs, evaluation, record.diverged)
        if missing:
            _train(study, missing, evaluation, stored, record)
        record = stored.record() or record
        summary = _conclude(study, first, stored, record, runs, higher_is_better)
        if on_end is not None:
            for run in runs:
                if run.job.name == summary.shown:
                    on_end(run.job, stored, record.mlflow_run_id)
    return summary


def _directions(study: StudyJob) -> dict[str, bool]:
    """Return whether higher values are better, by metric. Raises UsageError where a metric does not exist."""
    directions = {}
    for name in study.compare.metrics:
        metric = metric_named(name)
        if metric is None:
            raise UsageError(
                f"compare.metrics: {name} is not a metric", "pipeline/evaluation/README.md lists the metrics"
            )
        directions[name] = metric.higher_is_better
    return directions


def _delete(study: StudyJob, stored: StoredStudy) -> None:
    for run in runs_of(study):
        claim(run.stored.owners_url, print).release()  # no driver may be training the run that is deleted
        run.stored.delete()
    for row in study.rows:
        if sweep := row_sweep(study, row):
            claim(stored.sweep(sweep.name).owners_url, print, "sweep").release()
            stored.sweep(sweep.name).delete()
    stored.delete()


def missing_runs(
    study: StudyJob, runs: Sequence[RowRun], evaluation: Evaluation, diverged: Container[str]
) -> list[RowRun]:
    """Return the runs that have not ended, after all runs have been checked.

    A run has ended where its summary says so, and where it diverged. A longer `kimg` continues a run that has ended.

    Args:
        study: The study.
        runs: Runs of the study.
        evaluation: Checks one job of each row.
        diverged: Names of runs that diverged.

    Raises UsageError where a stored run of one of the names has another method, where a job cannot be trained, or where
    its scores have no metric of `compare.metrics`.
    """
    checked: set[str] = set()
    missing = []
    for run in runs:
        pack_if_missing(run.job)
        job = complete_job(run.job)
        if run.row not in checked:
            _require_metrics(study, run.row, evaluation.check(job))
            checked.add(run.row)
        _, method = start_and_method(job, Collection.open(job.data.train), run.stored)
        ended = ended_run(job, run.stored, method)
        if ended is None and job.name not in diverged:
            missing.append(run)
    return missing


def _require_metrics(study: StudyJob, row: str, computed: Sequence[str]) -> None:
    """Raise UsageError where the scores of a row lack a metric that the study compares."""
    if missing := [metric for metric in study.compare.metrics if metric not in computed]:
        raise UsageError(
            f"compare.metrics: the scores of the row {row} have no {' and no '.join(missing)}; they have "
            f"{', '.join(computed)}",
            "correct compare.metrics, or the keys of `evaluate` (feature_metrics, extractor) in the row's job",
        )


def _require_untrained(runs: Sequence[RowRun]) -> None:
    """Raise UsageError where a run of a row that is to be tuned exists: it was trained at other values."""
    for run in runs:
        if run.stored.record() is not None:
            raise UsageError(
                f"the row {run.row} is to be tuned, but its run {run.job.name} exists and was not",
                "give the study another name (name=…), remove `tune`, or start over with --fresh",
            )


def _tune(
    study: StudyJob, to_tune: Mapping[str, TuneJob], evaluation: Evaluation, stored: StoredStudy, record: StudyRecord
) -> StudyRecord:
    """Run the sweeps of rows, one after the other, and return the record with the values of their best trials."""
    for row, sweep in to_tune.items():
        print(f"study {study.name}: {sweep.name} tunes {', '.join(sweep.space)} of the row {row}", flush=True)
        best = sweeps.tune(sweep, evaluation, parent=record.mlflow_run_id).best
        known = stored.record() or record  # another command may train other seeds of the study
        record = known.model_copy(update={"tuned": {**known.tuned, row: best.point}})
        stored.write_record(record)
    return record


def _train(
    study: StudyJob, missing: Sequence[RowRun], evaluation: Evaluation, stored: StoredStudy, record: StudyRecord
) -> None:
    """Train runs, as many at the same time as fit into the cluster. Record those that diverge."""
    recording = threading.Lock()

    def train_one(run: RowRun, stop: StopRequest) -> None:
        name = run.job.name
        print(f"study {study.name}: {name} starts", flush=True)
        mine = replace(evaluation, check=_checked, finalise=partial(_finalise, evaluation, stop))
        try:
            train(run.job, mine, parent=record.mlflow_run_id, asked_to_stop=stop, screen=screen)
        except Diverged as error:
            print(f"{name} has ended: {error.message}", flush=True)
            with recording:
                known = stored.record() or record  # another command may train other seeds of the study
                stored.write_record(known.model_copy(update={"diverged": {**known.diverged, name: error.message}}))

    ended = 0

    def on_end(name: str, running: int) -> None:
        nonlocal ended
        ended += 1
        print(f"study {study.name}: {name} has ended, {running} train, {len(missing) - ended} are left", flush=True)

    jobs = list({run.row: run.job for run in missing}.values())
    needs = TrialNeeds.greatest([TrialNeeds.of(job) for job in jobs])
    shown = worker_group.shown(max(jobs, key=worker_group.least_cpus))
    most = study.max_concurrent or len(missing)
    with closing(TrialRoom(f"the study {study.name}", needs, shown, "run")) as room, Screen(several=True) as screen:
        run_side_by_side(
            f"the study {study.name}",
            {run.job.name: partial(train_one, run) for run in missing},
            lambda running: running < most and room.may_start(running),
            on_end,
        )


def _checked(job: TrainJob) -> list[str]:
    """Check nothing. `missing_runs` has checked a job of each row."""
    return []


def _finalise(evaluation: Evaluation, stop: StopRequest, job: TrainJob, run_id: str) -> RunScores:
    """Compute the final score in a process of its own, which a stop request ends.

    torch's random numbers and its threads belong to a process, and other runs of the study are in this one. If the
    process dies, for example with its node, another one computes the score. Raises ProcessDied where
    `_FINAL_ATTEMPTS` of them die, InterruptedRun, and what `evaluation.finalise` raises.
    """
    for _ in range(_FINAL_ATTEMPTS - 1):
        try:
            return _final_scores(evaluation, stop, job, run_id)
        except ProcessDied as error:
            print(f"{job.name}: the final score is computed once more: {error.message}", flush=True)
    return _final_scores(evaluation, stop, job, run_id)


def _final_scores(evaluation: Evaluation, stop: StopRequest, job: TrainJob, run_id: str) -> RunScores:
    """Compute the final score in a process. Raises ProcessDied, and what `_finalise` raises."""
    cpus = _final_cpus(job.evaluate)
    task = BackgroundTask(evaluation.finalise, job, run_id, cpus=cpus, gpus=0.0)
    says_at = time.monotonic() + _SAID_S
    while not task.is_done(_POLL_S):
        if time.monotonic() > says_at and not task.has_begun():
            says_at = math.inf
            said = (
                f"{job.name}: the final score waits for {counted(cpus, 'CPU')}; Ray starts it when the cluster has room"
            )
            print(said, flush=True)
        if stop():
            task.cancel()
            raise InterruptedRun(
                f"{job.name} was stopped before its final score", "run the same command again to resume"
            )
    scores: RunScores = task.result()
    return scores


def _final_cpus(score: EvaluateSection) -> float:
    """Return the CPUs that the process of a final score reserves.

    It reserves none where its own tasks and actors compute the score, and where no node has as many as it asks for.
    """
    if score.workers > 1 or score.gpus or not score.cpus:
        return 0.0
    return score.cpus if fits(node_resources(), 1, {"CPU": score.cpus, "GPU": 0.0}) else 0.0


def _tracked(job: TrainJob) -> TrainJob:
    """Return the job with its tracking URI filled in."""
    return job.model_copy(update={"track": job.track.model_copy(update={"uri": tracking_uri(job)})})


# --- at the end ------------------------------------------------------------------------------------------------------


def _conclude(
    study: StudyJob,
    job: TrainJob,
    stored: StoredStudy,
    record: StudyRecord,
    runs: Sequence[RowRun],
    higher_is_better: dict[str, bool],
) -> StudySummary:
    """Write the tables, the picture and the summary, and log them to MLflow. Raises SaganError without any score."""
    outcomes = [outcome_of(study, run, run.job.name in record.diverged) for run in runs]
    tables = tables_of(study, outcomes, higher_is_better)
    if not tables:
        known = sorted({metric for outcome in outcomes if outcome.score for metric in outcome.score.values})
        raise SaganError(
            f"no run of {study.name} has a score with {', '.join(study.compare.metrics)}",
            f"their scores have {', '.join(known)}: correct compare.metrics and run the same command again"
            if known
            else "all runs diverged: use lower learning rates under another name",
        )
    folder = Path("runs") / "studies" / study.name
    folder.mkdir(parents=True, exist_ok=True)
    picture, table, text = folder / "curves.png", folder / "table.csv", folder / "table.txt"
    scores = {row: [s for run in runs if run.row == row for s in run.stored.scores()] for row in study.rows}
    draw_curves(curves_of(scores, study.compare.metrics), picture)
    table.write_text(as_csv(tables))
    text.write_text(as_text(tables))
    files.upload(picture, stored.picture_url)
    files.upload(table, stored.table_url)
    stored.write_tables(StudyTables(tables=tables))
    print_tables(tables)
    spending = Spending.total(outcome.spending for outcome in outcomes).so_far
    ended = [(run, run.stored.summary()) for run in runs]
    shown = [run.job.name for run, summary in ended if run.row == study.compare.reference and summary is not None]
    summary = StudySummary(
        name=study.name,
        runs=len(runs),
        diverged=sum(run.job.name in record.diverged for run in runs),
        images=sum(summary.images for _, summary in ended if summary is not None),
        shown=shown[0] if shown else None,
        mlflow_run_id=record.mlflow_run_id,
        table=str(table),
        picture=str(picture),
        tuned={row: point for row, point in record.tuned.items() if study.rows.get(row) and study.tuning(row)},
        device_hours=spending.device_hours,
        cost=spending.cost,
    )
    (folder / "summary.json").write_text(summary.model_dump_json(indent=1))
    stored.write_summary(summary)
    _track(job, record.mlflow_run_id, tables, summary.tuned, spending, [picture, table, text])
    return summary


def outcome_of(study: StudyJob, run: RowRun, diverged: bool) -> Outcome:
    """Return what a run that has ended came to. Raises CorruptError, EnvironmentFault."""
    score: Score | None = None
    if study.compare.score == "final":
        summary = run.stored.summary()  # that of an earlier, shorter `kimg` where the run has diverged since
        score = summary.final if summary and not diverged else None
    elif study.compare.score == "best":
        best = best_score(run.stored.scores())
        score = best.score if best else None
    elif not diverged:
        records = run.stored.scores()
        score = max(records, key=lambda record: (record.images, record.time_ms)).score if records else None
    return Outcome(run.row, run.seed, score if score and score.values else None, diverged, run.stored.spending())


def _track(
    job: TrainJob,
    run_id: str,
    tables: Sequence[StudyTable],
    tuned: Mapping[str, Mapping[str, Any]],
    spending: Spending,
    paths: Sequence[Path],
) -> None:
    """Send the means of the rows, their tuned values, what the study has spent, and the files to its MLflow run.

    The means are tags and not metrics, because they change when the study gets more seeds.
    """
    tracker = MlflowRun(tracking_uri(job), run_id)
    for table in tables:
        for row in table.rows:
            values = {"mean": row.mean, "deviation": row.deviation, "difference": row.difference}
            for name, value in values.items():
                if value is not None:
                    tracker.tag(f"{table.key}/{row.row}/{name}", f"{value:.6g}")
    for name, point in tuned.items():
        tracker.tag(f"tuned/{name}", json.dumps(point))
    for key, text in spending.tags().items():
        tracker.tag(key, text)
    for path in paths:
        tracker.log_file(path)
    tracker.close(timeout_s=60)
