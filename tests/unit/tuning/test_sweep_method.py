"""A sweep of a name has one space, one set of overrides and one base; its number of trials may grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.collection.manifest import Collection
from pipeline.config.job_file import load_job, trial_job
from pipeline.config.run_method import method_differences, sweep_method_of
from pipeline.config.schema import TuneJob
from pipeline.errors import UsageError
from pipeline.job_runner import run_job
from pipeline.runs import owner
from pipeline.runs.json_records import SweepRecord
from pipeline.runs.stored_run import StoredSweep
from pipeline.training.find_or_start import complete_job

SPACE = {"optim.lr_d": {"loguniform": [1.0e-4, 1.0e-3]}}


@pytest.fixture
def sweep_file(packed: Collection, tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(
        f"kind: train\nname: base\ndata: {{train: {packed.url}}}\ntrain: {{kimg: 1, batch: 16}}\n"
        f"checkpoint: {{root: {tmp_path}/runs}}\nevaluate: {{extractor: classifier}}\n"
        f"track: {{uri: 'sqlite:///{tmp_path}/mlflow.db'}}\n"
    )
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "kind: tune\nname: s\nbase: base.yaml\nsearch: {trials: 2}\nspace: {}\noverrides: {train.kimg: 2}\n"
    )
    return path


def method(path: Path, packed: Collection, **changes: Any) -> dict[str, Any]:
    sweep = load_job(path, {"space": SPACE, **changes})
    assert isinstance(sweep, TuneJob)
    return sweep_method_of(sweep, complete_job(trial_job(sweep, sweep.example)), packed.digest)


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        (
            {"space": {"optim.lr_g": {"loguniform": [1.0e-4, 1.0e-3]}}},
            ["space.optim.lr_d: {'loguniform'", "space.optim.lr_g: absent in that run"],
        ),
        ({"space": {"optim.lr_d": {"loguniform": [1.0e-5, 1.0e-3]}}}, ["space.optim.lr_d: {'loguniform': [0.0001"]),
        ({"overrides": {"train.kimg": 2, "model.channels_d": 16}}, ["model.channels_d: 64 in that run, 16 in this"]),
        ({"overrides": {"train.kimg": 4}}, ["overrides.train.kimg: 2 in that run, 4 in this job"]),
        ({"overrides": {"train.kimg": 2, "seed": 1}}, ["seed: 0 in that run, 1 in this job"]),
    ],
)
def test_another_sweep_under_the_same_name_is_refused_with_the_keys_that_differ(
    sweep_file: Path, packed: Collection, tmp_path: Path, changes: dict[str, Any], keys: list[str]
) -> None:
    record = SweepRecord(name="s", mlflow_run_id="0", method=method(sweep_file, packed))
    StoredSweep(f"{tmp_path}/runs/s").write_record(record)
    with pytest.raises(UsageError, match="a sweep named s exists") as caught:
        run_job(sweep_file, {"space": SPACE, **changes})
    assert all(key in caught.value.message for key in keys), caught.value.message
    assert "name=" in caught.value.remedy


def test_more_trials_and_more_workers_continue_a_sweep(sweep_file: Path, packed: Collection) -> None:
    first = method(sweep_file, packed)
    more = {"search.trials": 8, "search.max_concurrent": 1}
    assert method_differences(first, method(sweep_file, packed, **more)) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"search.trials": 5}, "search.trials: 4 in that run, 5 in this job"),
        ({"search.seed": 1}, "search.seed: 0 in that run, 1 in this job"),
        ({"schedule": {"pbt": {"interval_kimg": 0.5}}}, "schedule.pbt.interval_kimg: 1.0 in that run, 0.5 in this job"),
        ({"schedule": None}, "schedule.pbt.fraction: 0.2 in that run, absent in this job"),
    ],
)
def test_what_a_population_decides_by_does_not_change(
    sweep_file: Path, packed: Collection, change: dict[str, Any], line: str
) -> None:
    population = {"schedule": {"pbt": {"interval_kimg": 1}}, "search.trials": 4}
    first = method(sweep_file, packed, **population)
    assert line in method_differences(first, method(sweep_file, packed, **{**population, **change}))
    at_once = {**population, "search.max_concurrent": 4}
    assert method_differences(first, method(sweep_file, packed, **at_once)) == []


def test_a_sweep_has_one_driver_at_a_time(sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "RENEWAL_S", 0.3)
    sweep = StoredSweep(f"{tmp_path}/runs/s")
    other = owner.claim(sweep.owners_url, print, "sweep")
    try:
        for fresh in (False, True):
            with pytest.raises(UsageError, match="is training this sweep"):
                run_job(sweep_file, {"space": SPACE}, fresh=fresh)
    finally:
        other.release()
