"""A small study as its user starts it, killed on the way: each run is trained once, and the table has all of them."""

from __future__ import annotations

import csv
import os
import signal
import time

import pytest
import yaml
from mlflow import MlflowClient

from pipeline.runs.status_from_folder import look_at_run
from pipeline.runs.stored_run import StoredStudy
from pipeline.storage import files
from tests.system.command_process import JOBS, TINY, Driver, ray_workers

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray")]

RUNS = ["tiny-none-0", "tiny-feat16-0", "tiny-none-1", "tiny-feat16-1"]


@pytest.fixture
def place(s3, ray_cluster, tmp_path):
    """(folder of the commands, bucket, environment)."""
    bucket = s3.bucket()
    env = {**s3.env, **ray_cluster.env, "SAGAN_BUCKET": bucket, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db"}
    return tmp_path, bucket, env


def write(folder, rows, seeds, lengths=None, **more):
    """Write the job file of a study of the tiny quickstart with `more` keys; return its path.

    `lengths` has the length of each row in thousands of images, where they differ.
    """
    overrides = {key: value for key, value in TINY.items() if key != "train.kimg"}
    study = {
        "kind": "study",
        "name": "tiny",
        "base": str(JOBS / "quickstart.yaml"),
        "kimg": 0.96,
        "seeds": seeds,
        "rows": {
            row: {"overrides": of_row, **({"kimg": lengths[row]} if lengths else {})} for row, of_row in rows.items()
        },
        "compare": {"metrics": ["fd_classifier"], "reference": "none"},
        **more,
    }
    study["overrides"] = {**overrides, "evaluate.repeats": 1, **more.get("overrides", {})}
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


def statuses(env):
    """Status of each MLflow run of the experiment, by name."""
    client = MlflowClient(env["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("sagan").experiment_id
    return {run.info.run_name: run.info.status for run in client.search_runs([experiment])}


def test_runs_train_side_by_side_and_one_signal_stops_all_of_them(place):
    """Two runs fit into the four CPUs of the cluster: a worker takes one and a half, and a process that scores one."""
    tmp_path, bucket, env = place
    rows = {"none": {"model.attention": "[]"}, "feat16": {}, "feat8": {"model.attention": "[8]"}}
    one_worker = {"train.workers": 1, "resources.cpus_per_worker": 1.5}
    job = write(tmp_path, rows, [0], kimg=1000, overrides=one_worker)  # none of the runs ends before the signal
    stored = StoredStudy(f"{bucket}/runs/studies/tiny")

    first = Driver(tmp_path, env, job=job, tiny=False)
    first.until("3 are to train")
    for text in ("tiny-none-0: checkpoint 0", "tiny-feat16-0: checkpoint 0"):
        if text not in first.output:
            first.until(text)
    first.signal(signal.SIGINT)
    assert first.end() == 130, first.output
    assert "the study tiny was stopped; its runs have kept their checkpoints" in first.output
    assert "tiny-feat8-0 starts" not in first.output, "a third run has no room"
    assert statuses(env) == {"tiny": "KILLED", "tiny-none-0": "KILLED", "tiny-feat16-0": "KILLED"}
    begun = look_at_run(stored.url).begun
    assert {(run.name, run.state) for run in begun} == {("tiny-none-0", "stopped"), ("tiny-feat16-0", "stopped")}

    reached = {run.name: run.kimg for run in begun}  # the first run trains while the second starts
    lengths = {row: reached.get(f"tiny-{row}-0", 0) + 0.64 for row in rows}
    job = write(tmp_path, rows, [0], lengths, overrides=one_worker)
    second = Driver(tmp_path, env, job=job, tiny=False)
    second.until("0 of 3 runs have ended, 3 are to train")
    second.until("tiny-none-0: resumed from")
    assert statuses(env)["tiny"] == "RUNNING"
    assert second.end() == 0, second.output
    assert set(statuses(env).values()) == {"FINISHED"}
    starts = {name: stored.run(name).record().starts for name in ("tiny-none-0", "tiny-feat16-0", "tiny-feat8-0")}
    assert starts == {"tiny-none-0": 2, "tiny-feat16-0": 2, "tiny-feat8-0": 1}
    assert [len(row.values) for row in stored.tables().tables[0].rows] == [1, 1, 1]


def test_a_study_tunes_a_row_and_trains_it_at_the_values_of_the_best_trial(place):
    tmp_path, bucket, env = place
    space = {"optim.lr_d": {"grid": [0.0004, 0.0008]}}
    tune = {"space": space, "search": {"max_concurrent": 1}, "kimg": 0.64}
    job = write(tmp_path, {"none": {"model.attention": "[]"}}, [0], tune=tune)
    stored = StoredStudy(f"{bucket}/runs/studies/tiny")

    first = Driver(tmp_path, env, job=job, tiny=False)
    first.until("tiny-none-tune tunes optim.lr_d of the row none")
    first.until("has ended at 0.64 kimg")
    first.signal(signal.SIGINT)
    assert first.end() == 130, first.output
    assert (statuses(env)["tiny"], statuses(env)["tiny-none-tune"]) == ("KILLED", "KILLED")

    second = Driver(tmp_path, env, job=job, tiny=False)
    assert second.end() == 0, second.output
    best = stored.sweep("tiny-none-tune").summary().best
    assert stored.record().tuned == {"none": best.point}
    assert stored.run("tiny-none-0").record().method["optim.lr_d"] == best.point["optim.lr_d"]
    assert stored.sweep("tiny-none-tune").summary().registered is None
    trials = stored.sweep("tiny-none-tune").trials().trials
    assert sorted(trial.point["optim.lr_d"] for trial in trials) == [0.0004, 0.0008]
    assert {stored.run(trial.name).record().method["seed"] for trial in trials} == {1000}
    assert set(statuses(env).values()) == {"FINISHED"}

    third = Driver(tmp_path, env, job=job, tiny=False)
    third.until("1 of 1 runs have ended, 0 are to train")
    assert third.end() == 0, third.output
    assert "tunes" not in third.output


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


def test_a_final_score_whose_process_was_killed_is_computed_by_another(place):
    """SIGKILL to the process. The study goes on, and the command ends as if nothing had happened."""
    tmp_path, bucket, env = place
    job = write(tmp_path, {"none": {"model.attention": "[]"}}, [0])
    study = Driver(tmp_path, env, job=job, tiny=False)
    study.until("score at")  # of the last checkpoint, in a process that has the same name
    while ray_workers("_call", env["RAY_ADDRESS"]):
        time.sleep(0.02)
    while not (found := ray_workers("_call", env["RAY_ADDRESS"])):
        assert study.process.poll() is None, study.output
        time.sleep(0.02)
    for process in found:
        os.kill(process, signal.SIGKILL)
    assert study.end() == 0, study.output
    assert "tiny-none-0: the final score is computed once more: a process of the cluster died" in study.output
    assert StoredStudy(f"{bucket}/runs/studies/tiny").run("tiny-none-0").summary().final is not None
