"""A search over keys of a base job: every trial is a Ray Train run like any other, a child of one MLflow run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config.load import override, parse, trial_job
from pipeline.config.schema import Choice, TrainJob, TuneJob
from pipeline.errors import EnvironmentFault, SaganError
from pipeline.storage import files
from pipeline.storage.run_folder import RunFolder
from pipeline.tracking.tracker import Tracker, tracking_uri
from pipeline.training import cluster
from pipeline.training import run as training
from pipeline.training.run import Evaluation
from pipeline.tuning.picture import draw

TRIAL_CPUS = 0.01  # Ray Tune reserves something for the function that drives a trial; Ray Train's workers do the work
WORST = 1e9  # finite stand-in for the score of a trial that diverged: searchers cannot learn from NaN
REPORTED = "score"


@dataclass(frozen=True)
class Trial:
    """How one trial ended."""

    name: str
    point: dict[str, Any]
    score: float
    kimg: float
    reason: str


def tune(sweep: TuneJob, evaluation: Evaluation, *, fresh: bool = False) -> dict[str, Any]:
    """Try the points, register the best trial's champion, draw the plane; returns the summary.

    The same command resumes a sweep whose driver died: finished trials are kept, unfinished ones go on.
    Raises EnvironmentFault where the trials do not fit the cluster, SaganError where every trial failed.
    """
    base = trial_job(sweep, sweep.example)
    base = base.model_copy(update={"track": base.track.model_copy(update={"uri": tracking_uri(base)})})
    files.check_writable(base.checkpoint.root)
    training.pack_if_missing(base)
    if fresh:
        files.delete(_folder(sweep, base).url)
    _check_room(sweep, base)
    evaluation.check(base)
    run_id = _parent_run(sweep, base)
    trials = _search(sweep, base, evaluation, run_id)
    return _conclude(sweep, base, evaluation, run_id, trials)


def trial_of(base: TrainJob, name: str, point: Mapping[str, Any]) -> TrainJob:
    """The job of one trial; it registers nothing, since the best of all is chosen later.

    Made from the base as the driver resolved it: a trial runs in another folder and environment.
    """
    values = base.model_dump(mode="json", by_alias=True)
    for key, value in {**point, "name": name, "track.register": False}.items():
        override(values, key, value)
    job = parse(values, name)
    assert isinstance(job, TrainJob)
    return job


def _folder(sweep: TuneJob, base: TrainJob) -> RunFolder:
    return RunFolder(files.join(base.checkpoint.root, sweep.name))


def _check_room(sweep: TuneJob, base: TrainJob) -> None:
    """Trials that do not fit would wait for one another in silence."""
    import ray

    cpus = TRIAL_CPUS + base.train.workers * base.resources.cpus_per_worker + base.evaluate.workers * base.evaluate.cpus
    cluster.connect(sweep.search.at_once * cpus)
    have = ray.cluster_resources()
    need = {"CPU": sweep.search.at_once * cpus}
    if cluster.uses_gpu(base):
        need["GPU"] = sweep.search.at_once * (base.train.workers + base.evaluate.workers * base.evaluate.gpus)
    for resource, wanted in need.items():
        if math.floor(wanted) > have.get(resource, 0):
            fits = int(have.get(resource, 0) // (wanted / sweep.search.at_once))
            raise EnvironmentFault(
                f"{sweep.search.at_once} trials at once need {wanted:g} {resource}s; the cluster has "
                f"{have.get(resource, 0):g}",
                f"set search.at_once={fits}" if fits else "one trial alone does not fit: fewer workers, or more nodes",
            )


def _parent_run(sweep: TuneJob, base: TrainJob) -> str:
    """The sweep's own MLflow run, begun or found again."""
    record_url = _folder(sweep, base).record
    record = files.read_json(record_url) if files.exists(record_url) else None
    tracker = Tracker.start(
        tracking_uri(base),
        base.track.experiment,
        sweep.name,
        record["mlflow_run_id"] if record else None,
        params={f"space.{key}": choice.model_dump(exclude_none=True) for key, choice in sweep.space.items()},
        tags={"kind": "tune"},
        artifacts=base.track.artifacts or training.artifacts(base),
    )
    if record is None:
        files.write_json(record_url, {"format": 1, "name": sweep.name, "mlflow_run_id": tracker.run_id})
    tracker.close(timeout_s=30)
    return tracker.run_id


# --- searching -------------------------------------------------------------------------------------------------------


def _search(sweep: TuneJob, base: TrainJob, evaluation: Evaluation, run_id: str) -> list[Trial]:
    from ray import tune as ray_tune
    from ray.tune import RunConfig, TuneConfig, Tuner

    filesystem, path = cluster.ray_storage(base.checkpoint.root)
    storage = f"{path}/{sweep.name}/tune"
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(run_trial, sweep=sweep.name, base=base, evaluation=evaluation, parent=run_id),
        {"CPU": TRIAL_CPUS},
    )
    if Tuner.can_restore(f"{storage}/{sweep.name}", storage_filesystem=filesystem):
        print(f"sweep {sweep.name} goes on where it stands", flush=True)
        tuner = Tuner.restore(
            f"{storage}/{sweep.name}", trainable=trainable, storage_filesystem=filesystem, resume_errored=True
        )
    else:
        tuner = Tuner(
            trainable,
            param_space={key: _domain(choice) for key, choice in sweep.space.items()},
            tune_config=TuneConfig(
                num_samples=_samples(sweep),
                max_concurrent_trials=sweep.search.at_once,
                search_alg=_searcher(sweep),
                scheduler=_scheduler(sweep, base),
                metric=REPORTED,
                mode="min",
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=RunConfig(name=sweep.name, storage_path=storage, storage_filesystem=filesystem, verbose=1),
        )
    results = tuner.fit()
    cluster.release_placement_groups()
    return [_trial(sweep, base, result) for result in results]


def run_trial(point: dict[str, Any], *, sweep: str, base: TrainJob, evaluation: Evaluation, parent: str) -> None:
    """One trial, inside Ray Tune: train, and report each score as it comes."""
    from ray import tune as ray_tune

    name = f"{sweep}-{ray_tune.get_context().get_trial_id()}".lower().replace("_", "-")
    job = trial_of(base, name, point)
    sign = -1.0 if evaluation.higher_is_better(job) else 1.0

    def report(images: int, score: float | None) -> None:
        value = WORST if score is None else sign * score
        ray_tune.report({REPORTED: value, "kimg": images / 1000, "run": name})

    try:
        training.train(job, evaluation, parent=parent, on_score=report, final=False)
    except EnvironmentFault:
        raise  # not the point's fault: Ray Tune may try again
    except SaganError as error:
        ray_tune.report({REPORTED: WORST, "kimg": job.train.kimg, "run": name, "reason": error.message})


def _domain(choice: Choice) -> Any:
    from ray import tune as ray_tune

    if choice.grid is not None:
        return ray_tune.grid_search(choice.grid)
    if choice.choice is not None:
        return ray_tune.choice(choice.choice)
    if choice.loguniform is not None:
        return ray_tune.loguniform(*choice.loguniform)
    assert choice.uniform is not None
    return ray_tune.uniform(*choice.uniform)


def _is_grid(sweep: TuneJob) -> bool:
    return any(choice.grid is not None for choice in sweep.space.values())


def _samples(sweep: TuneJob) -> int:
    """A grid is tried whole, once."""
    return 1 if _is_grid(sweep) else sweep.search.trials


def _searcher(sweep: TuneJob) -> Any:
    from ray.tune.search.basic_variant import BasicVariantGenerator
    from ray.tune.search.optuna import OptunaSearch

    search = sweep.search
    if search.algorithm == "random" or _is_grid(sweep):
        return BasicVariantGenerator(points_to_evaluate=search.first or None, random_state=search.seed)
    return OptunaSearch(points_to_evaluate=search.first or None, seed=search.seed)


def _scheduler(sweep: TuneJob, base: TrainJob) -> Any:
    from ray.tune.schedulers import ASHAScheduler

    if sweep.schedule is None:
        return None
    return ASHAScheduler(
        time_attr="kimg",
        max_t=base.train.kimg,
        grace_period=sweep.schedule.grace_kimg,
        reduction_factor=sweep.schedule.reduction,
    )


def _trial(sweep: TuneJob, base: TrainJob, result: Any) -> Trial:
    metrics = result.metrics or {}
    score, kimg = metrics.get(REPORTED, WORST), metrics.get("kimg", 0.0)
    if result.error is not None:
        reason = f"failed: {str(result.error).strip().splitlines()[-1]}"
    elif "reason" in metrics:
        reason = metrics["reason"]
    else:
        reason = "finished" if kimg >= base.train.kimg else "stopped early"
    return Trial(metrics.get("run", ""), {k: result.config[k] for k in sweep.space}, score, kimg, reason)


# --- concluding ------------------------------------------------------------------------------------------------------


def _conclude(
    sweep: TuneJob, base: TrainJob, evaluation: Evaluation, run_id: str, trials: list[Trial]
) -> dict[str, Any]:
    """The best trial becomes the registry's version; table and picture become the parent run's artifacts."""
    ranked = sorted((trial for trial in trials if trial.score < WORST), key=lambda trial: trial.score)
    if not ranked:
        reasons = sorted({trial.reason for trial in trials})
        raise SaganError(f"all {len(trials)} trials of {sweep.name} failed: {'; '.join(reasons)}")
    best = ranked[0]
    scores = _register(sweep, base, evaluation, best)
    sign = -1.0 if evaluation.higher_is_better(base) else 1.0
    local = Path("runs") / sweep.name
    local.mkdir(parents=True, exist_ok=True)
    picture = local / "plane.png"
    draw([(t.point, sign * t.score, t.kimg) for t in ranked], sweep.search.first, str(scores["score"]["key"]), picture)
    (local / "trials.json").write_text(json.dumps([trial.__dict__ for trial in trials], indent=1))
    files.upload(picture, _folder(sweep, base).plane)
    files.upload(local / "trials.json", _folder(sweep, base).trials)
    _print_table(sweep, sorted(trials, key=lambda trial: trial.score), sign)
    summary = {
        "name": sweep.name,
        "kind": "tune",
        "trials": len(trials),
        "stopped_early": sum(trial.reason == "stopped early" for trial in trials),
        "best": {"trial": best.name, **best.point},
        **scores,
        "mlflow_run_id": run_id,
        "picture": str(picture),
    }
    (local / "summary.json").write_text(json.dumps(summary, indent=1))
    files.write_json(_folder(sweep, base).summary, summary)
    tracker = Tracker(tracking_uri(base), run_id)
    for artifact in (picture, local / "trials.json"):
        tracker.artifact(artifact, "")
    tracker.close(timeout_s=60)
    tracker.finish("FINISHED")
    return summary


def _register(sweep: TuneJob, base: TrainJob, evaluation: Evaluation, best: Trial) -> dict[str, Any]:
    job = training.resolve(trial_of(base, best.name, best.point))
    track = job.track.model_copy(update={"model": sweep.name, "register_model": True})
    record = files.read_json(job.folder.record)
    return evaluation.finalise(job.model_copy(update={"track": track}), record["mlflow_run_id"])


def _print_table(sweep: TuneJob, trials: list[Trial], sign: float) -> None:
    table = Table(title=f"{sweep.name}: {len(trials)} trials", title_justify="left")
    for key in sweep.space:
        table.add_column(key, justify="right")
    for column in ("score", "kimg", ""):
        table.add_column(column, justify="right" if column else "left")
    for trial in trials:
        values = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in trial.point.values()]
        score = f"{sign * trial.score:.4g}" if trial.score < WORST else "–"
        table.add_row(*values, score, f"{trial.kimg:.1f}", trial.reason)
    Console(width=100).print(table)
