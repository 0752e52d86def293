"""A small study as its user starts it, killed on the way: each run is trained once, and the table has all of them."""

from __future__ import annotations

import csv
import signal

import pytest
import yaml
from mlflow import MlflowClient

from pipeline.runs.stored_run import StoredStudy
from pipeline.storage import files
from tests.system.command_process import JOBS, TINY, Driver

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray")]

RUNS = ["tiny-none-0", "tiny-feat16-0", "tiny-none-1", "tiny-feat16-1"]


@pytest.fixture
def place(s3, ray_cluster, tmp_path):
    """(folder of the commands, bucket, environment)."""
    bucket = s3.bucket()
    env = {**s3.env, **ray_cluster.env, "SAGAN_BUCKET": bucket, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db"}
    return tmp_path, bucket, env


def write(folder, rows, seeds):
    """Write the job file of a study of the tiny quickstart; return its path."""
    overrides = {key: value for key, value in TINY.items() if key != "train.kimg"}
    study = {
        "kind": "study",
        "name": "tiny",
        "base": str(JOBS / "quickstart.yaml"),
        "overrides": {**overrides, "evaluate.repeats": 1},
        "kimg": 0.96,
        "seeds": seeds,
        "rows": {row: {"overrides": of_row} for row, of_row in rows.items()},
        "compare": {"metrics": ["fd_classifier"], "reference": "none"},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False).replace("'[", "[").replace("]'", "]"))
    return path


def test_a_study_whose_driver_was_killed_trains_each_run_once(place):
    """SIGKILL to the driver during the second of two rows with two seeds, and SIGINT during the third run."""
    tmp_path, bucket, env = place
    job = write(tmp_path, {"none": {"model.attention": "[]"}, "feat16": {}}, [0, 1])
    stored = StoredStudy(f"{bucket}/runs/studies/tiny")

    first = Driver(tmp_path, env, job=job, tiny=False)
    first.until("4 are to train")
    first.until(RUNS[1])
    first.until("checkpoint 0")
    first.signal(signal.SIGKILL)
    first.end()
    assert stored.summary() is None

    second = Driver(tmp_path, env, job=job, tiny=False)
    second.until("1 of 4 runs have ended, 3 are to train")
    second.until(RUNS[2])
    second.until("checkpoint 0")
    second.signal(signal.SIGINT)
    assert second.end() == 130, second.output
    assert RUNS[0] not in second.output
    assert "resumed from" in second.output

    third = Driver(tmp_path, env, job=job, tiny=False)
    third.until("2 of 4 runs have ended, 2 are to train")
    assert third.end() == 0, third.output
    records = {name: stored.run(name).record() for name in RUNS}
    assert [record.starts for record in records.values()] == [1, 2, 2, 1]
    assert all(stored.run(name).summary().images == 960 for name in RUNS)

    summary = stored.summary()
    assert (summary.runs, summary.diverged, summary.images) == (4, 0, 3840)
    rows = list(csv.DictReader(files.read_bytes(stored.table_url).decode().splitlines()))
    assert [(row["row"], row["n"], row["pairs"]) for row in rows] == [("none", "2", "0"), ("feat16", "2", "2")]
    assert "minus none" in third.output
    client = MlflowClient(env["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("sagan").experiment_id
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{summary.mlflow_run_id}'")
    assert sorted(child.info.run_name for child in children) == sorted(RUNS)
    assert {child.info.status for child in children} == {"FINISHED"}
    logged = {one.path for one in client.list_artifacts(summary.mlflow_run_id)}
    assert {"curves.png", "table.csv", "report.html"} <= logged
    page = files.read_bytes(stored.report_url).decode()
    assert "<h2>Study tiny</h2>" in page
    assert "is left out" not in page


def test_a_run_that_diverges_is_counted_and_the_study_goes_on(place):
    tmp_path, bucket, env = place
    job = write(tmp_path, {"wild": {"optim.lr_d": 1e30, "optim.lr_g": 1e30}, "none": {"model.attention": "[]"}}, [0])
    study = Driver(tmp_path, env, job=job, tiny=False)
    assert study.end() == 0, study.output
    assert "tiny-wild-0 has ended: training diverged" in study.output
    stored = StoredStudy(f"{bucket}/runs/studies/tiny")
    assert stored.summary().diverged == 1
    (table,) = stored.tables().tables
    assert [(row.row, len(row.values), row.diverged) for row in table.rows] == [("wild", 0, 1), ("none", 1, 0)]

    again = Driver(tmp_path, env, job=job, tiny=False)
    again.until("2 of 2 runs have ended, 0 are to train")
    assert again.end() == 0, again.output
