"""The searcher that Ray Tune asks for trials: what it records, and what the searcher of the next driver does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from pipeline.config.schema import TrainJob, TuneJob
from pipeline.errors import EnvironmentFault, InterruptedRun
from pipeline.runs.json_records import STOPPED_EARLY, ScoreRecord
from pipeline.runs.score_protocol import Score
from pipeline.runs.stored_run import StoredSweep
from pipeline.tuning.draw_points import read_records
from pipeline.tuning.ray_searcher import RecordedSearcher
from pipeline.tuning.ray_tune import make_scheduler, search
from pipeline.tuning.trial_plan import IndependentTrials
from tests.unit.runs.test_json_records import PROTOCOL

BASE = TrainJob.model_validate({"name": "base", "data": {"train": "/images"}, "train": {"kimg": 8, "batch": 16}})
FINISHED = "FINISHED"  # what a searcher of Ray Tune answers where there are no more trials


def sweep(trials: int, **schedule: Any) -> TuneJob:
    return TuneJob.model_validate(
        {
            "name": "s",
            "base": "base.yaml",
            "space": {"optim.lr_d": {"loguniform": [1.0e-4, 1.0e-3]}},
            "search": {"trials": trials},
            "schedule": schedule or None,
        }
    )


@pytest.fixture
def stored(tmp_path: Path) -> StoredSweep:
    return StoredSweep(f"{tmp_path}/runs/s")


def room(running: int) -> bool:
    """A cluster that holds every trial."""
    return True


def driver(stored: StoredSweep, trials: int, may_start: Callable[[int], bool] = room) -> RecordedSearcher:
    """The searcher of a driver that finds the sweep in storage."""
    job = sweep(trials)
    return RecordedSearcher(IndependentTrials(job, BASE, stored, read_records(job, stored), False), may_start)


def ended(kimg: float, score: float | None, **values: Any) -> dict[str, Any]:
    return {"kimg": kimg, "score": score, "failure": None, "done": True, **values}


def test_a_later_driver_resumes_by_name_runs_nothing_twice_and_starts_the_rest(stored: StoredSweep) -> None:
    first = driver(stored, 4)
    suggested = [first.suggest(name) for name in ("a", "b", "c")]
    assert [s["run"] for s in suggested] == ["s-a", "s-b", "s-c"]
    first.on_trial_complete("a", ended(8, 1.5))
    first.on_trial_complete("b", ended(2, 9.0))
    assert [(r.number, r.ended, r.trial.outcome) for r in stored.trial_records()] == [
        (0, True, "finished"),
        (1, True, STOPPED_EARLY),
        (2, False, "running"),
    ]

    second = driver(stored, 5)
    assert second.suggest("d") == suggested[2], "its run is resumed by its name"
    new = [second.suggest("e"), second.suggest("f")]
    assert second.suggest("g") == FINISHED
    assert [s["run"] for s in new] == ["s-e", "s-f"]
    assert len({s["point"]["optim.lr_d"] for s in [*suggested, *new]}) == 5
    for trial in ("d", "e", "f"):
        second.on_trial_complete(trial, ended(8, 2.0))
    trials = second.conclude([])
    assert [t.name for t in trials] == ["s-a", "s-b", "s-c", "s-e", "s-f"]
    assert [t.score for t in trials] == [1.5, 9.0, 2.0, 2.0, 2.0]


def test_a_trial_that_failed_for_its_values_has_ended_and_one_that_raised_has_not(stored: StoredSweep) -> None:
    first = driver(stored, 2)
    configs = {name: first.suggest(name) for name in ("a", "b")}
    first.on_trial_complete("a", ended(8, None, failure="training diverged"))
    first.on_trial_complete("b", error=True)
    error = RuntimeError("Traceback …\nEnvironmentFault: s3://u:p@host/x cannot be reached\n  → run it again\n")
    results = [
        SimpleNamespace(error=None, metrics={"trial_id": "a"}),
        SimpleNamespace(error=error, metrics={"trial_id": "b", "score": 3.0, "kimg": 2.0}),
    ]
    trials = first.conclude(results)
    assert [(t.score, t.outcome) for t in trials] == [
        (None, "training diverged"),
        (3.0, "failed: EnvironmentFault: s3://host/x cannot be reached"),
    ]
    assert [r.ended for r in stored.trial_records()] == [True, False]
    assert driver(stored, 2).suggest("c") == configs["b"]


def test_an_interrupted_search_is_no_result(stored: StoredSweep) -> None:
    first = driver(stored, 2)
    for name in ("a", "b"):
        first.suggest(name)
    first.on_trial_complete("a", ended(8, 1.0))
    first.on_trial_complete("b", {"kimg": 2, "score": 1.0})  # without "done"
    with pytest.raises(InterruptedRun, match="1 of its trials had not ended"):
        first.conclude([])


def test_an_end_that_cannot_be_recorded_ends_the_search(stored: StoredSweep) -> None:
    first = driver(stored, 2)
    first.suggest("a")
    folder = Path(stored.url, "trials")
    (folder / "s-a.json").unlink()
    folder.rmdir()
    folder.write_text("a file where the folder was")
    first.on_trial_complete("a", ended(8, 1.0))
    for call in (lambda: first.suggest("b"), lambda: first.conclude([])):
        with pytest.raises(EnvironmentFault, match="trials"):
            call()


def test_a_trial_waits_for_room_and_the_trials_that_run_are_counted(stored: StoredSweep) -> None:
    asked: list[int] = []

    def may_start(running: int) -> bool:
        asked.append(running)
        return running < 2

    first = driver(stored, 3, may_start)
    suggested = [first.suggest(name) for name in ("a", "b", "c")]
    assert suggested[2] is None
    assert [record.trial.name for record in stored.trial_records()] == ["s-a", "s-b"], "no record of one that waits"
    first.on_trial_complete("a", ended(8, 1.0))
    assert first.suggest("d")["run"] == "s-d"
    first.on_trial_complete("b", error=True)
    assert first.suggest("e") == FINISHED
    assert asked == [0, 1, 2, 1]


def test_ray_tune_can_pickle_a_searcher_that_asks_a_thread(stored: StoredSweep) -> None:
    lock = threading.Lock()
    cloudpickle.dumps(driver(stored, 1, lambda running: lock.locked()))


def test_a_sweep_that_has_all_its_trials_runs_none_and_reads_no_pickle(stored: StoredSweep, tmp_path: Path) -> None:
    first = driver(stored, 1)
    first.suggest("a")
    first.on_trial_complete("a", ended(8, 1.0))
    planted = Path(stored.url, "tune", "s", "tuner.pkl")
    planted.parent.mkdir(parents=True)
    planted.write_bytes(b"cposix\nmkdir\n(V" + str(tmp_path / "canary").encode() + b"\ntR.")

    def run_trial(_: dict[str, Any]) -> None:
        raise AssertionError("no trial is run")

    assert [t.name for t in search(sweep(1), BASE, run_trial, stored, False, room)] == ["s-a"]
    assert not (tmp_path / "canary").exists()


def test_asha_knows_the_scores_of_the_trials_that_have_ended(stored: StoredSweep) -> None:
    first = driver(stored, 3)
    for name, score in (("a", 1.0), ("b", 2.0)):
        first.suggest(name)
        first.on_trial_complete(name, ended(2, score))
        scored = Score.of(PROTOCOL, "fd_x", False, {"fd_x": score}, {})
        record = ScoreRecord(checkpoint="000000002000-0", images=2000, score=scored, seconds=1.0, time_ms=1)
        stored.trial(f"s-{name}").write_score(record)
    job = sweep(3, grace_kimg=2, reduction=2)
    scheduler = make_scheduler(job, BASE, stored, read_records(job, stored), higher_is_better=False)
    for name, score, decision in (("c", 5.0, "STOP"), ("d", 0.5, "CONTINUE")):
        trial = SimpleNamespace(trial_id=name)
        scheduler.on_trial_add(None, trial)
        assert scheduler.on_trial_result(None, trial, {"ranked": score, "kimg": 2.0}) == decision
