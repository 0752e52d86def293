"""A sweep: a search over keys of a base job. Every trial is a separate training run with its own MLflow run.

The MLflow runs of the trials are children of the sweep's MLflow run.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.collection.manifest import Collection
from pipeline.compute.cluster import connect
from pipeline.compute.mailbox import Mailbox, Sender
from pipeline.compute.resources import require_resources, require_total
from pipeline.config.job_file import override, parse_job, trial_job
from pipeline.config.run_method import method_differences, sweep_method_of
from pipeline.config.schema import TrainJob, TuneJob
from pipeline.errors import BudgetSpent, CorruptError, Diverged, SaganError, UsageError, counted, printable
from pipeline.runs.json_records import (
    STOPPED_EARLY,
    RecordedInit,
    RunScores,
    SweepRecord,
    SweepSummary,
    SweepTrials,
    Trial,
)
from pipeline.runs.owner import Ownership, claim
from pipeline.runs.spending import Spending
from pipeline.runs.stored_run import StoredRun, StoredSweep
from pipeline.storage import files
from pipeline.tracking.init_source import find_init, pin_source
from pipeline.tracking.mlflow_run import MlflowRun, tracking_uri
from pipeline.tracking.parent_run import parent_run
from pipeline.training import worker_group
from pipeline.training.driver import train
from pipeline.training.find_or_start import complete_job, owned, pack_if_missing, start_tracking
from pipeline.training.shared_types import Evaluation
from pipeline.tuning import ray_tune
from pipeline.tuning.population import lineage_tags
from pipeline.tuning.stop_trials import stopped_by, stops_trials
from pipeline.tuning.sweep_picture import draw_plane
from pipeline.tuning.trial_plan import TrialStart
from pipeline.tuning.trial_room import TrialNeeds, TrialRoom


def tune(sweep: TuneJob, evaluation: Evaluation, *, fresh: bool = False, parent: str | None = None) -> SweepSummary:
    """Run the trials, register the model of the best trial, draw the plane and return the summary.

    The same command resumes a sweep whose driver died. Trials that ended are kept; the others resume. A larger
    `search.trials` adds trials to a sweep without `schedule.pbt`.

    Args:
        sweep: The sweep job.
        evaluation: Computes the scores.
        fresh: Whether to delete the sweep first. The runs of its trials are not deleted.
        parent: Id of the MLflow run of the study whose row the sweep tunes.

    Raises EnvironmentFault where the trials do not fit the cluster, UsageError where another driver trains the sweep,
    and SaganError where every trial failed.
    """
    base = trial_job(sweep, sweep.example)
    base = base.model_copy(update={"track": base.track.model_copy(update={"uri": tracking_uri(base)})})
    files.check_writable(base.checkpoint.root)
    pack_if_missing(base)
    stored = StoredSweep.of(base, sweep.name)
    if fresh:
        claim(stored.owners_url, print, "sweep").release()  # no driver may be training the sweep that is deleted
        stored.delete()
    with owned(stored) as owner:
        return _tune(sweep, base, stored, evaluation, owner, parent)


def _tune(
    sweep: TuneJob, base: TrainJob, stored: StoredSweep, evaluation: Evaluation, owner: Ownership, parent: str | None
) -> SweepSummary:
    """Do what `tune` does, as the owner of the sweep."""
    record, method, init = _own_record(sweep, base, stored)
    base = pin_source(base, init)
    needs = _require_room(sweep, base)
    evaluation.check(base)
    higher_is_better, mailbox = evaluation.higher_is_better(base), Mailbox()
    params = {f"space.{key}": choice.model_dump(exclude_none=True) for key, choice in sweep.space.items()}
    with parent_run(base, sweep.name, record, kind="tune", params=params, parent=parent) as mlflow_run:
        stored.write_record(
            SweepRecord(
                name=sweep.name,
                mlflow_run_id=mlflow_run.mlflow_run_id,
                earlier_mlflow_run_ids=mlflow_run.earlier_mlflow_run_ids,
                method=method,
                init=init,
            )
        )
        run = ray_tune.with_parameters(
            run_trial,
            base=base,
            evaluation=evaluation,
            parent=mlflow_run.mlflow_run_id,
            higher_is_better=higher_is_better,
            sweep=mailbox.sender,
        )
        with closing(TrialRoom(f"the sweep {sweep.name}", needs, worker_group.shown(base))) as room:

            def may_start(running: int) -> bool:
                owner.require()
                return room.may_start(running)

            with stops_trials(mailbox, sweep.name):
                trials = ray_tune.search(sweep, base, run, stored, higher_is_better, may_start)
            return _conclude(sweep, base, stored, evaluation, mlflow_run.mlflow_run_id, trials)


def job_of_trial(base: TrainJob, name: str, values: Mapping[str, Any]) -> TrainJob:
    """Return the job of one trial: the base job with other values by dotted key, such as those of its point.

    The trial registers no model, because the best trial is known only after all trials. `base` must be the job that the
    driver completed, because a trial runs in another folder with another environment.
    """
    job_values = base.model_dump(mode="json", by_alias=True)
    for key, value in {**values, "name": name, "track.register": False}.items():
        override(job_values, key, value)
    job = parse_job(job_values, name)
    assert isinstance(job, TrainJob)
    return job


def run_trial(
    trial: dict[str, Any],
    *,
    base: TrainJob,
    evaluation: Evaluation,
    parent: str,
    higher_is_better: bool,
    sweep: Sender,
) -> None:
    """Train one trial inside Ray Tune and report each score.

    Args:
        trial: Values of its `TrialStart` by name.
        base: Base job of the trials.
        evaluation: Computes the scores.
        parent: Id of the MLflow run of the sweep.
        higher_is_better: Direction of the score.
        sweep: Leads to the driver of the sweep, which may ask the trial to stop. The trial then writes a checkpoint.

    A divergence is reported as the failure of the trial. Raises all other errors: the values of the point may not be
    the cause, so the trial has not ended and can be resumed.
    """
    start = TrialStart(**trial)
    job = job_of_trial(base, start.run, {**start.point, **start.values})
    reported = [-1]

    def report(images: int, score: float | None) -> None:
        reported.append(images)
        ray_tune.report(score, images / 1000, higher_is_better)

    try:
        with stopped_by(sweep, job.name), suppress(BudgetSpent):  # such a trial ends like one that is stopped early
            train(
                job,
                evaluation,
                parent=parent,
                tags=start.tags,
                kept=start.kept,
                on_score=report,
                final=False,
                asked_to_stop=lambda: sweep.exchange(None),
            )
        for last in StoredRun.of(job).scores()[-1:]:
            if last.images > reported[-1]:  # it was computed by an earlier driver, or when training had ended
                report(last.images, last.score.value)
        if len(reported) == 1:
            report(0, None)  # the budget was spent before the first score, and Ray Tune needs a result
    except Diverged as error:
        ray_tune.report(None, job.train.kimg, higher_is_better, failure=error.message)


def _require_room(sweep: TuneJob, base: TrainJob) -> TrialNeeds:
    """Check that the cluster can hold `search.max_concurrent` trials at once. Return what each trial needs.

    What is in use counts as room. A trial starts when its room is free (`TrialRoom`). Raises EnvironmentFault.
    """
    trials = sweep.search.max_concurrent
    connect(least_cpus(sweep, base))

    def remedy(fit: int) -> str:
        return f"set search.max_concurrent={fit}" if fit else "not even one trial fits: use fewer workers or add nodes"

    needs = TrialNeeds.of(base, ray_tune.TRIAL_CPUS)
    workers, worker = needs.workers, needs.worker
    cpus, gpus = (workers * worker[name] + sum(score[name] for score in needs.scoring) for name in ("CPU", "GPU"))
    what, fitting = f"workers of {trials} trials at once", lambda fit: remedy(fit // workers)
    require_resources(trials * workers, what, worker["CPU"], worker["GPU"], fitting)
    require_total(trials, "trials at once", cpus, gpus, remedy)
    return needs


def least_cpus(sweep: TuneJob, base: TrainJob) -> float:
    """Return the CPUs of `search.max_concurrent` trials with the processes that score beside them."""
    each = worker_group.least_cpus(base) + ray_tune.TRIAL_CPUS
    return sweep.search.max_concurrent * each


def _own_record(
    sweep: TuneJob, base: TrainJob, stored: StoredSweep
) -> tuple[SweepRecord | None, dict[str, Any], RecordedInit | None]:
    """Return the record of the sweep of this name, None where there is none, the method of this sweep, and its start.

    Raises UsageError where the stored sweep has another method.
    """
    collection, record, job = Collection.open(base.data.train), stored.record(), complete_job(base)
    init = find_init(job, collection.class_names, record.init if record else None)
    method = sweep_method_of(sweep, job, collection.digest, init.sha256 if init else None)
    if record is not None and (differences := method_differences(record.method, method)):
        lines = "\n".join(f"    {line}" for line in differences)
        raise UsageError(
            f"a sweep named {sweep.name} exists under {base.checkpoint.root} with other keys:\n{lines}",
            "give this sweep another name (name=…), or set the keys back to resume the existing sweep",
        )
    return record, method, init


# --- at the end ------------------------------------------------------------------------------------------------------


def _conclude(
    sweep: TuneJob, base: TrainJob, stored: StoredSweep, evaluation: Evaluation, run_id: str, trials: list[Trial]
) -> SweepSummary:
    """Register the best trial, write the table, the picture and the summary, and log table and picture to MLflow."""
    ranked = best_first(trials, evaluation.higher_is_better(base))
    if ranked[0].score is None:
        reasons = sorted({trial.outcome for trial in trials})
        raise SaganError(
            f"all {counted(len(trials), 'trial')} of {sweep.name} failed: {'; '.join(reasons)}",
            "correct the cause, then run the same command again; it resumes all trials except those that diverged",
        )
    scores = _register(sweep, base, evaluation, ranked[0], run_id)
    assert scores.score is not None
    local = Path("runs") / sweep.name
    local.mkdir(parents=True, exist_ok=True)
    picture, table = local / "plane.png", local / "trials.json"
    draw_plane(trials, sweep.search.initial_points, scores.score.metric, picture)
    files.upload(picture, stored.picture_url)
    spending = Spending.total(stored.trial(trial.name).spending() for trial in trials).so_far
    record = SweepTrials(trials=trials)
    table.write_text(record.model_dump_json(indent=1))
    stored.write_trials(record)
    _print_table(sweep, ranked)
    summary = SweepSummary(
        name=sweep.name,
        trials=len(trials),
        stopped_early=sum(trial.outcome == STOPPED_EARLY for trial in trials),
        best=ranked[0],
        mlflow_run_id=run_id,
        picture=str(picture),
        device_hours=spending.device_hours,
        cost=spending.cost,
        **dict(scores),
    )
    (local / "summary.json").write_text(summary.model_dump_json(indent=1))
    stored.write_summary(summary)
    tracker = MlflowRun(tracking_uri(base), run_id)
    for path in (picture, table):
        tracker.log_file(path)
    for key, text in spending.tags().items():
        tracker.tag(key, text)
    tracker.close(timeout_s=60)
    return summary


def best_first(trials: list[Trial], higher_is_better: bool) -> list[Trial]:
    """Return the trials sorted by score, the best first. Trials without a score come last."""
    scored = sorted((t for t in trials if t.score is not None), key=lambda t: t.score or 0.0, reverse=higher_is_better)
    return scored + [trial for trial in trials if trial.score is None]


def _register(sweep: TuneJob, base: TrainJob, evaluation: Evaluation, best: Trial, run_id: str) -> RunScores:
    """Register the model of the best trial under the name of the sweep, and return the scores of the trial.

    No model is registered where the base job sets `track.register: false`.
    """
    job = complete_job(job_of_trial(base, best.name, best.point))
    track = job.track.model_copy(update={"model": sweep.name, "register_model": base.track.register_model})
    stored = StoredRun.of(job)
    record = stored.record()
    if record is None:
        raise CorruptError(
            f"{stored.record_url} is missing, but {best.name} is the best trial of {sweep.name}",
            f"delete {StoredSweep.of(base, sweep.name).trial_url(best.name)}; the trial is then run again",
        )
    # The trial may have ended under another tracker.
    tags = lineage_tags(best.parent) if sweep.pbt else {}
    record = start_tracking(job, stored, record, record.method, run_id, record.init, tags)
    scores = evaluation.finalise(job.model_copy(update={"track": track}), record.mlflow_run_id)
    MlflowRun(tracking_uri(base), record.mlflow_run_id).finish("FINISHED")
    return scores


def _print_table(sweep: TuneJob, trials: list[Trial]) -> None:
    table = Table(title=f"{sweep.name}: {len(trials)} trials", title_justify="left")
    for column in ("trial", "clone of") if sweep.pbt else ():
        table.add_column(column)
    for key in sweep.space:
        table.add_column(key, justify="right")
    for column in ("score", "kimg", ""):
        table.add_column(column, justify="right" if column else "left")
    for trial in trials:
        values = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in trial.point.values()]
        score = "–" if trial.score is None else f"{trial.score:.4g}"
        names = [trial.name, trial.parent.run if trial.parent else ""] if sweep.pbt else []
        short = [escape(name.removeprefix(f"{sweep.name}-")) for name in names]
        table.add_row(*short, *values, score, f"{trial.kimg:.1f}", escape(printable(trial.outcome)))
    Console(width=100).print(table)
