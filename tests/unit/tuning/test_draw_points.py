"""Which trials a sweep still runs, and at which points, given the records of its trials."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.schema import TuneJob
from pipeline.errors import CorruptError
from pipeline.runs.json_records import FINISHED, RUNNING, STOPPED_EARLY, Trial, TrialRecord
from pipeline.runs.stored_run import StoredSweep
from pipeline.tuning.draw_points import read_records, start, to_resume, to_start

LR = {"optim.lr_d": {"loguniform": [1.0e-4, 1.0e-3]}}


def sweep(space: dict[str, Any] | None = None, **search: Any) -> TuneJob:
    return TuneJob.model_validate({"name": "s", "base": "base.yaml", "space": space or LR, "search": search})


def record(number: int, point: dict[str, Any], score: float | None = 1.0, outcome: str = FINISHED) -> TrialRecord:
    trial = Trial(name=f"s-{number}", point=point, score=score, kimg=1.0, outcome=outcome)
    return TrialRecord(number=number, ended=outcome != RUNNING, trial=trial)


def complete(job: TuneJob, records: list[TrialRecord]) -> list[TrialRecord]:
    """Records of the sweep after all its trials have started and ended."""
    records = [made(old.number, old.trial.point) for old in records]
    while to_start(job, records):
        new = start(job, records, "s-x", False)
        records.append(made(new.number, new.trial.point))
    return records


def made(number: int, point: dict[str, Any]) -> TrialRecord:
    return record(number, point, score=float(sum(v for v in point.values() if isinstance(v, float))))


def points(records: list[TrialRecord]) -> list[dict[str, Any]]:
    return [r.trial.point for r in records]


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
@pytest.mark.parametrize("ended", [0, 1, 5, 14])
def test_an_interrupted_search_draws_the_points_of_an_undisturbed_one(algorithm: str, ended: int) -> None:
    job = sweep(trials=16, algorithm=algorithm, initial_points=[{"optim.lr_d": 4.0e-4}], seed=3)
    undisturbed = complete(job, [])
    assert points(undisturbed)[0] == {"optim.lr_d": 4.0e-4}
    assert len({point["optim.lr_d"] for point in points(undisturbed)}) == 16, "no point twice"
    assert points(complete(job, undisturbed[:ended])) == points(undisturbed)


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_larger_number_of_trials_goes_on(algorithm: str) -> None:
    few, many = sweep(trials=4, algorithm=algorithm), sweep(trials=12, algorithm=algorithm)
    first = complete(few, [])
    assert to_start(few, first) == []
    assert points(complete(many, first)) == points(complete(many, []))


def test_another_seed_gives_other_points_and_a_lost_record_is_drawn_again() -> None:
    job = sweep(trials=6, algorithm="random")
    records = complete(job, [])
    assert not {*map(str, points(records))} & {*map(str, points(complete(sweep(trials=6, seed=1), [])))}
    again = complete(job, [*records[:2], *records[3:]])
    assert again[-1].number == 2
    assert again[-1].trial.point == records[2].trial.point


def test_optuna_learns_from_ended_trials_in_the_direction_of_the_score() -> None:
    job = sweep({"optim.lr_d": {"uniform": [0.0, 1.0]}}, trials=41)
    ended = [record(i, {"optim.lr_d": i / 40}, score=float(i)) for i in range(40)]
    low, high = (start(job, ended, "s-x", higher).trial.point["optim.lr_d"] for higher in (False, True))
    assert low < 0.3
    assert high > 0.7
    failed = [record(i, {"optim.lr_d": i / 40}, score=None if i > 20 else 1.0) for i in range(40)]
    assert start(job, failed, "s-x", True).trial.point["optim.lr_d"] < 0.6, "a trial without a score is the worst"


def test_trials_that_have_not_ended_are_resumed_and_count() -> None:
    job = sweep(trials=4)
    records = [
        record(0, {"optim.lr_d": 1.0e-4}),
        record(1, {"optim.lr_d": 2.0e-4}, outcome=RUNNING),
        record(2, {"optim.lr_d": 3.0e-4}, outcome=STOPPED_EARLY),
    ]
    assert to_resume(job, records) == [records[1]]
    assert to_start(job, records) == [{}]


def test_a_smaller_number_of_trials_starts_none_and_resumes_no_more_than_it_asks_for() -> None:
    records = [record(i, {"optim.lr_d": (i + 1) * 1.0e-4}, outcome=RUNNING if i > 1 else FINISHED) for i in range(4)]
    assert to_resume(sweep(trials=3), records) == [records[2]]
    assert to_resume(sweep(trials=1), records) == []
    assert to_start(sweep(trials=1), records) == []


def test_every_combination_of_the_grids_is_tried_once() -> None:
    space = {"seed": {"grid": [0, 1]}, "train.batch": {"grid": [16, 32, 16]}, **LR}
    job = sweep(space, trials=1, initial_points=[{"seed": 1, "train.batch": 32, "optim.lr_d": 2.0e-4}])
    records = complete(job, [])
    assert records[0].trial.point == {"seed": 1, "train.batch": 32, "optim.lr_d": 2.0e-4}
    combinations = [(p["seed"], p["train.batch"]) for p in points(records)]
    assert sorted(combinations) == [(0, 16), (0, 32), (1, 16), (1, 32)]
    for ended in range(4):
        assert points(complete(job, records[:ended])) == points(records)
    unfinished = [record(0, records[0].trial.point, outcome=RUNNING)]
    assert to_resume(job, unfinished) == unfinished
    assert len(to_start(job, unfinished)) == 3


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_no_point_of_a_finite_space_is_tried_twice_while_there_are_others(algorithm: str) -> None:
    space = {"seed": {"choice": [0, 1, 2]}, "train.batch": {"choice": [16, 32]}}
    records = complete(sweep(space, trials=8, algorithm=algorithm), [])
    assert len({str(point) for point in points(records[:6])}) == 6
    assert len(records) == 8, "the sweep ends with the number of trials that it asks for"


def test_an_initial_point_is_tried_once_and_its_missing_keys_are_drawn() -> None:
    space = {**LR, "model.multipliers_g": {"choice": [[4, 2], [2, 1], None, True]}}
    given = {"optim.lr_d": 2.0e-4}
    job = sweep(space, trials=12, algorithm="optuna", initial_points=[given, given])
    records = complete(job, [record(0, {"optim.lr_d": 3.0e-4, "model.multipliers_g": [2, 1]})])
    assert records[1].trial.point["optim.lr_d"] == 2.0e-4
    assert sum(point["optim.lr_d"] == 2.0e-4 for point in points(records)) == 1
    assert all(point["model.multipliers_g"] in [[4, 2], [2, 1], None, True] for point in points(records))


@pytest.mark.parametrize(
    ("point", "problem"),
    [
        ({"optim.lr_d": 2.0e-4, "evaluate.extractor": "/x.pt2"}, "evaluate.extractor is not a key of the space"),
        ({}, "optim.lr_d is missing"),
        ({"optim.lr_d": 2.0}, "optim.lr_d: 2.0 is not a number from 0.0001 to 0.001"),
        ({"optim.lr_d": True}, "optim.lr_d: True"),
        ({"optim.lr_d": {"a": 1}}, "optim.lr_d: {'a': 1}"),
    ],
)
def test_a_foreign_point_that_is_not_in_the_space_is_refused(
    point: dict[str, Any], problem: str, tmp_path: Any
) -> None:
    stored = StoredSweep(f"{tmp_path}/s")
    stored.write_trial_record(record(0, {"optim.lr_d": 2.0e-4}))
    assert points(read_records(sweep(), stored)) == [{"optim.lr_d": 2.0e-4}]
    stored.write_trial_record(record(1, point))
    with pytest.raises(CorruptError) as caught:
        read_records(sweep(), stored)
    assert problem in caught.value.message
    assert stored.trial_url("s-1") in caught.value.message
    assert "delete the file" in caught.value.remedy
