"""Ray Tune: it runs the trials of a sweep, and its scheduler ASHA stops the worse ones early."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from pipeline.config.schema import TrainJob, TuneJob
from pipeline.runs.json_records import Trial, TrialRecord
from pipeline.runs.stored_run import StoredSweep
from pipeline.storage import files
from pipeline.tuning.draw_points import ranked, read_records
from pipeline.tuning.population import Population
from pipeline.tuning.trial_plan import IndependentTrials, TrialPlan

TRIAL_CPUS = 0.01  # reserved for the function that drives a trial; its Ray Train workers reserve their own CPUs

TRIAL_RETRIES = 3  # a trial that raises goes on from its newest checkpoint

_RANKED = "ranked"  # the metric by which the scheduler ranks trials


def with_parameters(function: Callable[..., None], **parameters: Any) -> Any:
    """Return the function with bound parameters. Ray stores the parameters once in the cluster."""
    from ray import tune

    return tune.with_parameters(function, **parameters)


def report(score: float | None, kimg: float, higher_is_better: bool, failure: str | None = None) -> None:
    """Report a score of the current trial to Ray Tune.

    Args:
        score: Value of the score; None without one.
        kimg: Position of the score.
        higher_is_better: Direction of the score.
        failure: Reason why the trial ends without a score.
    """
    from ray import tune

    tune.report({_RANKED: ranked(score, higher_is_better), "score": score, "kimg": kimg, "failure": failure})


def search(
    sweep: TuneJob,
    base: TrainJob,
    run_trial: Any,
    stored: StoredSweep,
    higher_is_better: bool,
    may_start: Callable[[int], bool],
) -> list[Trial]:
    """Run the trials of the sweep until all have ended. Trials that have ended already are not run again.

    Ray Tune keeps its own state, which it pickles, in a temporary folder of this machine. It is never read.

    Args:
        sweep: The sweep job.
        base: Base job of the trials.
        run_trial: Function that runs one trial, given the values of its `TrialStart` by name.
        stored: Folder of the sweep.
        higher_is_better: Direction of the score.
        may_start: Returns whether another trial may start beside a number of running trials.

    Raises CorruptError, EnvironmentFault. Raises InterruptedRun where the search was stopped.
    """
    records = read_records(sweep, stored)
    plan: TrialPlan = (
        IndependentTrials(sweep, base, stored, records, higher_is_better)
        if sweep.pbt is None
        else Population(sweep, base, stored, records, higher_is_better)
    )
    if plan.line:
        print(f"sweep {sweep.name}: {plan.line}", flush=True)
    if not plan.left:
        return plan.conclude([], {})

    from ray import tune
    from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner

    from pipeline.tuning.ray_searcher import RecordedSearcher

    # Ray Tune would end normally after SIGINT, and would say that its own state resumes the sweep.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    searcher = RecordedSearcher(plan, may_start)
    with files.temporary_folder("sweep") as folder:
        tuner = Tuner(
            tune.with_resources(run_trial, {"CPU": TRIAL_CPUS}),
            tune_config=TuneConfig(
                num_samples=plan.left,
                max_concurrent_trials=sweep.search.max_concurrent,
                search_alg=searcher,
                scheduler=make_scheduler(sweep, base, stored, records, higher_is_better),
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=RunConfig(
                name=sweep.name,
                storage_path=str(folder),
                verbose=1,
                failure_config=FailureConfig(max_failures=TRIAL_RETRIES),
            ),
        )
        return searcher.conclude(tuner.fit())


def make_scheduler(
    sweep: TuneJob, base: TrainJob, stored: StoredSweep, records: Iterable[TrialRecord], higher_is_better: bool
) -> Any:
    """Return ASHA, which knows the scores of the trials that have ended already; None for a sweep without ASHA."""
    from ray.tune.schedulers import ASHAScheduler

    if sweep.schedule is None or sweep.schedule.grace_kimg is None:
        return None
    scheduler = ASHAScheduler(
        metric=_RANKED,
        mode="max" if higher_is_better else "min",
        time_attr="kimg",
        max_t=base.train.kimg,
        grace_period=sweep.schedule.grace_kimg,
        reduction_factor=sweep.schedule.reduction,
    )
    for record in records:
        if record.ended:
            trial = SimpleNamespace(trial_id=record.trial.name)
            scheduler.on_trial_add(None, trial)
            for score in stored.trial(record.trial.name).scores():
                value = ranked(score.score.value, higher_is_better)
                scheduler.on_trial_result(None, trial, {_RANKED: value, "kimg": score.images / 1000})
    return scheduler
