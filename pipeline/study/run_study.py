"""A study: rows of jobs, each trained with several seeds. Every run is a training run of its own.

The MLflow runs are children of the study's MLflow run. The runs are trained one after the other: all rows with the
first seed, then all rows with the second seed. The rows of an interrupted study can therefore be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.collection.manifest import Collection
from pipeline.compute.cluster import connect
from pipeline.config.job_file import row_job
from pipeline.config.schema import StudyJob, TrainJob
from pipeline.errors import Diverged, SaganError, UsageError
from pipeline.evaluation.metrics import metric_named
from pipeline.runs.best_checkpoint import best_score
from pipeline.runs.json_records import StudyRecord, StudySummary, StudyTable, StudyTables
from pipeline.runs.owner import claim
from pipeline.runs.score_protocol import Score
from pipeline.runs.spending import Spending
from pipeline.runs.stored_run import StoredRun, StoredStudy
from pipeline.storage import files
from pipeline.study.compare_rows import Outcome, tables_of
from pipeline.study.show_tables import as_csv, as_text, print_tables
from pipeline.study.study_picture import curves_of, draw_curves
from pipeline.tracking.mlflow_run import MlflowRun, tracking_uri
from pipeline.training.driver import train
from pipeline.training.find_or_start import (
    artifact_location,
    complete_job,
    ended_run,
    pack_if_missing,
    start_and_method,
)
from pipeline.training.shared_types import Evaluation


@dataclass(frozen=True)
class RowRun:
    """One run of a study."""

    row: str
    seed: int
    job: TrainJob

    @property
    def stored(self) -> StoredRun:
        return StoredRun.of(self.job)


def runs_of(study: StudyJob) -> list[RowRun]:
    """Return the runs of a study in the order of training. Raises ConfigError."""
    return [RowRun(row, seed, row_job(study, row, seed)) for seed in study.seeds for row in study.rows]


def run_study(
    study: StudyJob,
    evaluation: Evaluation,
    *,
    fresh: bool = False,
    on_end: Callable[[TrainJob, StoredStudy, str], None] | None = None,
) -> StudySummary:
    """Train the runs that have not ended, write the tables and the picture, and return the summary.

    The same command resumes a study whose driver died. A run that diverges has ended. More rows and seeds add runs.

    Args:
        study: The study job.
        evaluation: Computes the scores.
        fresh: Whether to delete the study and its runs first.
        on_end: Called with (job of the run `StudySummary.shown`, folder of the study, id of its MLflow run) after the
            summary is stored. It is not called where there is no such run.

    Raises UsageError where a run of one of the names has another method, EnvironmentFault, and SaganError where no run
    has a score.
    """
    higher_is_better = _directions(study)
    runs = runs_of(study)
    first = _tracked(next(run.job for run in runs if run.row == study.compare.reference))
    stored = StoredStudy.of(first, study.name)
    files.check_writable(first.checkpoint.root)
    if fresh:
        _delete(runs, stored)
    record = stored.record()
    missing = missing_runs(runs, evaluation, record.diverged if record else {})
    print(
        f"study {study.name}: {len(runs) - len(missing)} of {len(runs)} runs have ended, {len(missing)} are to train",
        flush=True,
    )
    record = _find_or_start(study, first, stored, record, [run.job.name for run in runs])
    if missing:
        connect(max(_cpus(run.job) for run in missing))
    for run in missing:
        print(f"study {study.name}: {run.job.name}", flush=True)
        try:
            train(run.job, evaluation, parent=record.mlflow_run_id)
        except Diverged as error:
            print(f"{run.job.name} has ended: {error.message}", flush=True)
            record = stored.record() or record  # another command may train other seeds of the study
            record = record.model_copy(update={"diverged": {**record.diverged, run.job.name: error.message}})
            stored.write_record(record)
    summary = _conclude(study, first, stored, record, runs, higher_is_better)
    if on_end is not None:
        for run in runs:
            if run.job.name == summary.shown:
                on_end(run.job, stored, record.mlflow_run_id)
    MlflowRun(tracking_uri(first), record.mlflow_run_id).finish("FINISHED")
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


def _delete(runs: Sequence[RowRun], stored: StoredStudy) -> None:
    for run in runs:
        claim(run.stored.owners_url, print).release()  # no driver may be training the run that is deleted
        run.stored.delete()
    stored.delete()


def missing_runs(runs: Sequence[RowRun], evaluation: Evaluation, diverged: Container[str]) -> list[RowRun]:
    """Return the runs that have not ended, after all runs have been checked.

    A run has ended where its summary says so, and where it diverged. A longer `kimg` continues a run that has ended.

    Args:
        runs: Runs of the study.
        evaluation: Checks one job of each row.
        diverged: Names of runs that diverged.

    Raises UsageError where a stored run of one of the names has another method, or where a job cannot be trained.
    """
    checked: set[str] = set()
    missing = []
    for run in runs:
        pack_if_missing(run.job)
        job = complete_job(run.job)
        if run.row not in checked:
            evaluation.check(job)
            checked.add(run.row)
        _, method = start_and_method(job, Collection.open(job.data.train), run.stored)
        ended = ended_run(job, run.stored, method)
        if ended is None and job.name not in diverged:
            missing.append(run)
    return missing


def _find_or_start(
    study: StudyJob, job: TrainJob, stored: StoredStudy, record: StudyRecord | None, runs: list[str]
) -> StudyRecord:
    """Write and return the record of the study, with the study's MLflow run, which is created where there is none."""
    tracker = MlflowRun.start(
        tracking_uri(job),
        job.track.experiment,
        study.name,
        record.mlflow_run_id if record else None,
        params={f"rows.{name}": row.overrides for name, row in study.rows.items()},
        tags={"kind": "study"},
        artifacts=job.track.artifacts or artifact_location(job),
    )
    tracker.close(timeout_s=30)
    earlier = record.earlier_mlflow_run_ids if record else []
    if record and record.mlflow_run_id != tracker.run_id:
        earlier = [*earlier, record.mlflow_run_id]
    record = StudyRecord(
        name=study.name,
        mlflow_run_id=tracker.run_id,
        earlier_mlflow_run_ids=earlier,
        runs=runs,
        diverged=record.diverged if record else {},
    )
    stored.write_record(record)
    return record


def _tracked(job: TrainJob) -> TrainJob:
    """Return the job with its tracking URI filled in."""
    return job.model_copy(update={"track": job.track.model_copy(update={"uri": tracking_uri(job)})})


def _cpus(job: TrainJob) -> float:
    """Return the CPUs of the job's workers and of the processes that score beside them."""
    return job.train.workers * job.resources.cpus_per_worker + job.evaluate.workers * job.evaluate.cpus


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
        device_hours=spending.device_hours,
        cost=spending.cost,
    )
    (folder / "summary.json").write_text(summary.model_dump_json(indent=1))
    stored.write_summary(summary)
    _track(job, record.mlflow_run_id, tables, spending, [picture, table, text])
    return summary


def outcome_of(study: StudyJob, run: RowRun, diverged: bool) -> Outcome:
    """Return what a run that has ended came to. Raises CorruptError, EnvironmentFault."""
    score: Score | None = None
    if study.compare.score == "final":
        summary = run.stored.summary()
        score = summary.final if summary else None
    elif study.compare.score == "best":
        best = best_score(run.stored.scores())
        score = best.score if best else None
    elif not diverged:
        records = run.stored.scores()
        score = max(records, key=lambda record: (record.images, record.time_ms)).score if records else None
    return Outcome(run.row, run.seed, score if score and score.values else None, diverged, run.stored.spending())


def _track(job: TrainJob, run_id: str, tables: Sequence[StudyTable], spending: Spending, paths: Sequence[Path]) -> None:
    """Send the means of the rows, what the study has spent, and the files to the study's MLflow run.

    The means are tags and not metrics, because they change when the study gets more seeds.
    """
    tracker = MlflowRun(tracking_uri(job), run_id)
    for table in tables:
        for row in table.rows:
            values = {"mean": row.mean, "deviation": row.deviation, "difference": row.difference}
            for name, value in values.items():
                if value is not None:
                    tracker.tag(f"{table.key}/{row.row}/{name}", f"{value:.6g}")
    for key, text in spending.tags().items():
        tracker.tag(key, text)
    for path in paths:
        tracker.log_file(path)
    tracker.close(timeout_s=60)
