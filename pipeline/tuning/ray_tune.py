"""Ray Tune: search space, search algorithm, scheduler, and the results of trials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.compute.cluster import ray_storage
from pipeline.config.schema import Choice, TrainJob, TuneJob
from pipeline.runs.records import Trial

TRIAL_CPUS = 0.01  # reserved for the function that drives a trial; its Ray Train workers reserve their own CPUs
FINISHED, STOPPED_EARLY = "finished", "stopped early"

_RANKED = "ranked"  # the metric by which Ray Tune ranks trials: the score, or ±_WORST without a score
_WORST = 1e9  # value for a trial without a score, because searchers cannot learn from NaN


def with_parameters(function: Callable[..., None], **parameters: Any) -> Any:
    """Return the function with bound parameters. Ray stores the parameters once in the cluster."""
    from ray import tune

    return tune.with_parameters(function, **parameters)


def trial_id() -> str:
    """Return the id of the trial in which this process runs."""
    from ray import tune

    return str(tune.get_context().get_trial_id())


def report(run: str, score: float | None, kimg: float, higher_is_better: bool, failure: str | None = None) -> None:
    """Report a score of the current trial to Ray Tune.

    Args:
        run: Name of the trial's run.
        score: Value of the score; None without one.
        kimg: Position of the score.
        higher_is_better: Direction of the score.
        failure: Reason why the trial ends without a score.
    """
    from ray import tune

    ranked = score if score is not None else (-_WORST if higher_is_better else _WORST)
    tune.report({_RANKED: ranked, "score": score, "kimg": kimg, "run": run, "failure": failure})


def search(sweep: TuneJob, base: TrainJob, run_trial: Any, higher_is_better: bool) -> list[Trial]:
    """Run the trials of the sweep until all have ended. A sweep of this name in storage is resumed.

    Args:
        sweep: The sweep job.
        base: Base job of the trials.
        run_trial: Function that runs one trial, given its point.
        higher_is_better: Direction of the score.
    """
    from ray import tune
    from ray.tune import RunConfig, TuneConfig, Tuner

    filesystem, path = ray_storage(base.checkpoint.root)
    storage = f"{path}/{sweep.name}/tune"
    trainable = tune.with_resources(run_trial, {"CPU": TRIAL_CPUS})
    if Tuner.can_restore(f"{storage}/{sweep.name}", storage_filesystem=filesystem):
        print(f"resuming sweep {sweep.name}", flush=True)
        tuner = Tuner.restore(
            f"{storage}/{sweep.name}", trainable=trainable, storage_filesystem=filesystem, resume_errored=True
        )
    else:
        tuner = Tuner(
            trainable,
            param_space={key: _domain(choice) for key, choice in sweep.space.items()},
            tune_config=TuneConfig(
                num_samples=1 if _is_grid(sweep) else sweep.search.trials,  # every point of a grid is one trial
                max_concurrent_trials=sweep.search.max_concurrent,
                search_alg=_searcher(sweep),
                scheduler=_scheduler(sweep, base),
                metric=_RANKED,
                mode="max" if higher_is_better else "min",
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=RunConfig(name=sweep.name, storage_path=storage, storage_filesystem=filesystem, verbose=1),
        )
    return [_trial(sweep, base, result) for result in tuner.fit()]


def _domain(choice: Choice) -> Any:
    """Return the values of one key as a search space of Ray Tune."""
    from ray import tune

    if choice.grid is not None:
        return tune.grid_search(choice.grid)
    if choice.choice is not None:
        return tune.choice(choice.choice)
    if choice.loguniform is not None:
        return tune.loguniform(*choice.loguniform)
    assert choice.uniform is not None
    return tune.uniform(*choice.uniform)


def _is_grid(sweep: TuneJob) -> bool:
    return any(choice.grid is not None for choice in sweep.space.values())


def _searcher(sweep: TuneJob) -> Any:
    from ray.tune.search.basic_variant import BasicVariantGenerator
    from ray.tune.search.optuna import OptunaSearch

    points = sweep.search.initial_points or None
    if sweep.search.algorithm == "random" or _is_grid(sweep):
        return BasicVariantGenerator(points_to_evaluate=points, random_state=sweep.search.seed)
    return OptunaSearch(points_to_evaluate=points, seed=sweep.search.seed)


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
    """Return the record of a trial from its Ray Tune result."""
    metrics = result.metrics or {}
    kimg = float(metrics.get("kimg", 0.0))
    if result.error is not None:
        outcome = f"failed: {str(result.error).strip().splitlines()[-1]}"
    elif metrics.get("failure"):
        outcome = metrics["failure"]
    else:
        outcome = FINISHED if kimg >= base.train.kimg else STOPPED_EARLY
    return Trial(
        name=metrics.get("run", ""),
        point={key: result.config[key] for key in sweep.space},
        score=metrics.get("score"),
        kimg=kimg,
        outcome=outcome,
    )
