"""A trial of a sweep ends with its last score where it has spent the budget. It has not ended where it raises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.collection.manifest import Collection
from pipeline.errors import UsageError
from pipeline.job_runner import _evaluation
from pipeline.runs.json_records import ScoreRecord
from pipeline.runs.score_protocol import Score
from pipeline.tuning import ray_tune
from pipeline.tuning.sweep import job_of_trial, run_trial
from tests.faults.kills import FileSender
from tests.unit.score_protocol import PROTOCOL
from tests.unit.training.test_lost_mlflow_run import job_in, start_run

METRIC = "fd_classifier"


@pytest.mark.parametrize(
    ("scores", "reported"), [([(320, 9.0), (640, 7.0)], [(7.0, 0.64)]), ([], [(None, 0.0)])], ids=["scored", "unscored"]
)
def test_a_trial_without_budget_left_reports_its_last_score_and_starts_no_worker(
    scores: list[tuple[int, float]],
    reported: list[tuple[float | None, float]],
    packed: Collection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = job_in(packed, tmp_path, tmp_path / "runs")
    base = base.model_copy(update={"budget": base.budget.model_copy(update={"hours": 2.0})})
    run = start_run(job_of_trial(base, "s-1", {"optim.lr_d": 1e-4}))
    run.stored.write_record(run.record.model_copy(update={"device_hours": 2.5}))
    for images, value in scores:
        score = Score.of(PROTOCOL, METRIC, False, {METRIC: value})
        run.stored.write_score(
            ScoreRecord(checkpoint=f"{images:012d}", images=images, score=score, seconds=1, time_ms=images)
        )
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(ray_tune, "report", lambda score, kimg, *rest, **more: told.append((score, kimg, more)))
    driver = FileSender(tmp_path / "mailbox")
    trial = {"run": "s-1", "point": {"optim.lr_d": 1e-4}}
    run_trial(
        trial,
        base=base,
        evaluation=_evaluation(),
        parent=run.mlflow_run_id,
        higher_is_better=False,
        sweep=driver,  # type: ignore[arg-type]
    )
    assert told == [(*one, {}) for one in reported], "no failure is reported"
    assert [message.trains for message in driver.received()] == [True, False]


def test_a_trial_that_fails_for_another_reason_than_its_point_has_not_ended(
    packed: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here its run has another method. The error reaches Ray Tune, which does not take the trial for one that ended."""
    base = job_in(packed, tmp_path, tmp_path / "runs")
    run = start_run(job_of_trial(base, "s-1", {"optim.lr_d": 1e-4}))
    told: list[Any] = []
    monkeypatch.setattr(ray_tune, "report", lambda *values, **more: told.append(values))
    with pytest.raises(UsageError, match="with another method"):
        run_trial(
            {"run": "s-1", "point": {"optim.lr_d": 2e-4}},
            base=base,
            evaluation=_evaluation(),
            parent=run.mlflow_run_id,
            higher_is_better=False,
            sweep=FileSender(tmp_path / "mailbox"),  # type: ignore[arg-type]
        )
    assert told == []
