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


def test_a_study_whose_driver_was_killed_trains_each_run_once(s3, ray_cluster, tmp_path):
    """SIGKILL to the driver during the second of two rows with two seeds, and SIGINT during the third run."""
    bucket, uri = s3.bucket(), f"sqlite:///{tmp_path}/mlflow.db"
    env = {**s3.env, **ray_cluster.env, "SAGAN_BUCKET": bucket, "MLFLOW_TRACKING_URI": uri}
    overrides = {key: value for key, value in TINY.items() if key != "train.kimg"}
    study = {
        "kind": "study",
        "name": "tiny",
        "base": str(JOBS / "quickstart.yaml"),
        "overrides": {**overrides, "evaluate.repeats": 1},
        "kimg": 1.6,
        "seeds": [0, 1],
        "rows": {"none": {"overrides": {"model.attention": "[]"}}, "feat16": {}},
        "compare": {"metrics": ["fd_classifier"], "reference": "none"},
    }
    job = tmp_path / "tiny.yaml"
    job.write_text(yaml.safe_dump(study, sort_keys=False).replace("'[", "[").replace("]'", "]"))
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
    assert all(stored.run(name).summary().images == 1600 for name in RUNS)

    summary = stored.summary()
    assert (summary.runs, summary.diverged, summary.images) == (4, 0, 6400)
    rows = list(csv.DictReader(files.read_bytes(stored.table_url).decode().splitlines()))
    assert [(row["row"], row["n"], row["pairs"]) for row in rows] == [("none", "2", "0"), ("feat16", "2", "2")]
    assert "minus none" in third.output
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("sagan").experiment_id
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{summary.mlflow_run_id}'")
    assert sorted(child.info.run_name for child in children) == sorted(RUNS)
    assert {child.info.status for child in children} == {"FINISHED"}
    logged = {one.path for one in client.list_artifacts(summary.mlflow_run_id)}
    assert {"curves.png", "table.csv", "report.html"} <= logged
    page = files.read_bytes(stored.report_url).decode()
    assert "<h2>Study tiny</h2>" in page
    assert "is left out" not in page

    again = Driver(tmp_path, env, job=job, tiny=False)
    again.until("4 of 4 runs have ended, 0 are to train")
    assert again.end() == 0, again.output
    assert stored.summary() == summary
