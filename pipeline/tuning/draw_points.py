"""Which trials a sweep still runs, and at which points. The records of its trials are the only state of the search.

A drawn point depends on the job, on the number of the trial and, with Optuna, on the results so far. A sweep that is
resumed therefore draws the points that it would have drawn without an interruption, and draws no point a second time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, product
from typing import Any

from pipeline.config.schema import Choice, TuneJob
from pipeline.errors import CorruptError
from pipeline.runs.json_records import RUNNING, Trial, TrialRecord
from pipeline.runs.stored_run import StoredSweep

WORST = 1e9
"""Magnitude of the value that ranks a trial without a score. Searchers and schedulers cannot learn from NaN."""

_ATTEMPTS = 50  # draws of a point until it differs from those of all other trials; a space may have too few points

Point = dict[str, Any]


def ranked(score: float | None, higher_is_better: bool) -> float:
    """Return the value by which a score is ranked. A trial without a score is worse than every other."""
    if score is None:
        return -WORST if higher_is_better else WORST
    return score


def read_records(sweep: TuneJob, stored: StoredSweep) -> list[TrialRecord]:
    """Return the records of the sweep's trials, by number.

    Raises EnvironmentFault, and CorruptError where a record is not valid or its point is not in the sweep's space. A
    point of other keys could set any key of the job.
    """
    records = []
    for record in stored.trial_records():
        trial = record.trial
        point = checked_point(
            sweep, trial.point, stored.trial_url(trial.name), "delete the file; the trial is then run again"
        )
        records.append(record.model_copy(update={"trial": trial.model_copy(update={"point": point})}))
    return records


def checked_point(sweep: TuneJob, given: Point, url: str, remedy: str) -> Point:
    """Return a point that was read at `url`, with values as the space has them.

    Raises CorruptError with `remedy` where it is not a point of the sweep's space.
    """
    try:
        point = sweep.point_of(given)
        if missing := sorted(sweep.space.keys() - point.keys()):
            raise ValueError(f"{missing[0]} is missing")
    except ValueError as error:
        raise CorruptError(f"{url} has a point that is not in the space of {sweep.name}: {error}", remedy) from error
    return point


def to_resume(sweep: TuneJob, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the unfinished trials, ordered by number, up to the number of trials that the sweep still needs."""
    unfinished = [record for record in records if not record.ended]
    if _grids(sweep):
        return unfinished
    return unfinished[: max(0, sweep.search.trials - (len(records) - len(unfinished)))]


def to_start(sweep: TuneJob, records: Sequence[TrialRecord]) -> list[Point]:
    """Return a point for each trial that has not started yet. The keys that a point lacks are drawn at its start.

    The initial points come first. In a space with grids, each combination of the grids that no trial has follows.
    """
    grids = _grids(sweep)
    combinations = [dict(zip(grids, values, strict=True)) for values in product(*grids.values())]
    initial = [{**grid, **sweep.point_of(point)} for point in sweep.search.initial_points for grid in combinations]
    taken = [record.trial.point for record in records]
    planned: list[Point] = []
    for point in [*initial, *(combinations if grids else [])]:
        if not any(_includes(other, point) for other in [*taken, *planned]):
            planned.append(point)
    if grids:
        return planned
    missing = max(0, sweep.search.trials - len(records))
    return [*planned, *({} for _ in range(missing))][:missing]


def start(sweep: TuneJob, records: Sequence[TrialRecord], name: str, higher_is_better: bool) -> TrialRecord:
    """Return the record of the next trial that starts.

    Args:
        sweep: The sweep job.
        records: Records of all trials so far. There must be a trial to start.
        name: Name of the run of the new trial.
        higher_is_better: Direction of the score.
    """
    numbers = {record.number for record in records}
    number = next(number for number in count() if number not in numbers)
    given = to_start(sweep, records)[0]
    for attempt in range(_ATTEMPTS):
        point = {**_draw(sweep, records, [number, attempt], higher_is_better), **given}
        if not any(_includes(record.trial.point, point) for record in records):
            break
    trial = Trial(name=name, point={key: point[key] for key in sweep.space}, score=None, kimg=0.0, outcome=RUNNING)
    return TrialRecord(number=number, ended=False, trial=trial)


def _grids(sweep: TuneJob) -> dict[str, list[Any]]:
    return {key: choice.grid for key, choice in sweep.space.items() if choice.grid is not None}


def _includes(point: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    return all(key in point and point[key] == value for key, value in part.items())


def _draw(sweep: TuneJob, records: Sequence[TrialRecord], key: list[int], higher_is_better: bool) -> Point:
    """Return values of the keys without a grid.

    Args:
        sweep: The sweep job.
        records: Records of all trials so far.
        key: Number of the trial and of the attempt. The seed of the draw is made of it and of the sweep's seed, so that
            no state of a random-number generator has to be kept.
        higher_is_better: Direction of the score.
    """
    import numpy as np
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {key: choice for key, choice in sweep.space.items() if choice.grid is None}
    distributions = {key: _distribution(choice) for key, choice in space.items()}
    seed = int(np.random.SeedSequence([sweep.search.seed, *key]).generate_state(1)[0])
    learns = sweep.search.algorithm == "optuna" and not _grids(sweep) and sweep.pbt is None
    sampler = optuna.samplers.TPESampler(seed=seed) if learns else optuna.samplers.RandomSampler(seed=seed)
    study = optuna.create_study(sampler=sampler, direction="maximize" if higher_is_better else "minimize")
    for record in records if learns else ():
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if record.ended else optuna.trial.TrialState.RUNNING,
                value=ranked(record.trial.score, higher_is_better) if record.ended else None,
                params={key: _index(choice, record.trial.point[key]) for key, choice in space.items()},
                distributions=distributions,
            )
        )
    drawn = study.ask(distributions).params
    return {key: drawn[key] if c.choice is None else c.choice[drawn[key]] for key, c in space.items()}


def _distribution(choice: Choice) -> Any:
    """Return the values of one key as a distribution of Optuna. A list is represented by its indices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if choice.choice is not None:
        return CategoricalDistribution(range(len(choice.choice)))
    if choice.loguniform is not None:
        return FloatDistribution(*choice.loguniform, log=True)
    assert choice.uniform is not None
    return FloatDistribution(*choice.uniform)


def _index(choice: Choice, value: Any) -> Any:
    return value if choice.choice is None else choice.choice.index(value)
