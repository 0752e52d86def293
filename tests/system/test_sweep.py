"""The small sweep as its user submits it: trials on Ray workers, some stopped early, the best in the registry."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from infra.local.server_process import BIN
from pipeline.report.write_report import write_report
from pipeline.runs.stored_run import StoredSweep
from pipeline.storage import files
from tests.system.command_process import JOBS, TINY, Driver, ray_workers
from tests.system.ray_node import cpus_in_use

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("ray")]


@pytest.mark.slow
def test_the_digits_sweep(s3, ray_cluster, tmp_path):
    bucket, uri = s3.bucket(), f"sqlite:///{tmp_path}/mlflow.db"
    environment = {**os.environ, **ray_cluster.env}
    variables = {"env_vars": {"SAGAN_BUCKET": bucket, "MLFLOW_TRACKING_URI": uri}}
    submit = [str(BIN / "ray"), "job", "submit", f"--runtime-env-json={json.dumps(variables)}"]
    subprocess.run([*submit, "jobs/ttur-quickstart.yaml"], env=environment, check=True)

    summary = files.read_json(f"{bucket}/runs/ttur-quickstart/summary.json")
    assert summary["trials"] == 6
    assert 1 <= summary["stopped_early"] < 6
    assert summary["registered"]["alias"] == "champion"
    client = MlflowClient(uri)
    assert client.get_model_version_by_alias("ttur-quickstart", "champion")
    experiment = client.get_experiment_by_name("sagan")
    parent = f"tags.mlflow.parentRunId = '{summary['mlflow_run_id']}'"
    assert len(client.search_runs([experiment.experiment_id], parent)) == 6
    picture = client.list_artifacts(summary["mlflow_run_id"])
    assert "plane.png" in [artifact.path for artifact in picture]

    write_report([f"{bucket}/runs/ttur-quickstart"], tmp_path / "sweep.html", compared=200)
    page = (tmp_path / "sweep.html").read_text()
    assert "<h2>Sweep ttur-quickstart</h2>" in page
    assert page.count(f"{summary['best']['name']}") >= 3

    listing = [str(BIN / "ray"), "list", "placement-groups", "--format=json"]
    groups = json.loads(subprocess.run(listing, env=environment, capture_output=True, text=True, check=True).stdout)
    assert [group for group in groups if group["state"] != "REMOVED"] == []


class Planted:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_whose_driver_was_killed_goes_on_from_its_records(s3, ray_cluster, tmp_path):
    """SIGKILL to the driver when one trial has ended. The next commands ask for one trial more; one is interrupted."""
    bucket, canary = s3.bucket(), tmp_path / "canary"
    env = {**s3.env, **ray_cluster.env, "SAGAN_BUCKET": bucket, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db"}
    sweep = {
        "kind": "tune",
        "name": "small",
        "base": str(JOBS / "quickstart.yaml"),
        "overrides": {**TINY, "train.kimg": 0.64, "train.workers": 1, "evaluate.cpus": 0.5},
        "space": {"optim.lr_d": {"loguniform": [1.0e-4, 1.0e-3]}},
        "search": {"trials": 3, "max_concurrent": 2},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(sweep).replace("'[", "[").replace("]'", "]"))
    for place in ("tuner.pkl", "tune/small/tuner.pkl"):  # Ray Tune's state was in the second place
        files.write_bytes(f"{bucket}/runs/small/{place}", pickle.dumps(Planted(canary)))

    def drive(**overrides):
        return Driver(tmp_path, env, job=tmp_path / "small.yaml", tiny=False, **overrides)

    first = drive()
    ended = first.until(" has ended").split()[1]
    first.signal(signal.SIGKILL)
    first.end()
    stored = StoredSweep(f"{bucket}/runs/small")
    before = {record.trial.name: record.trial.point for record in stored.trial_records()}
    starts = stored.trial(ended).record()

    stopped = drive(**{"search.trials": 4})
    stopped.until(" starts at ")
    stopped.signal(signal.SIGINT)
    assert stopped.end() == 130, stopped.output

    last = drive(**{"search.trials": 4})
    assert last.end() == 0, last.output
    assert f"trial {ended} starts" not in stopped.output + last.output
    assert stored.trial(ended).record().starts == starts.starts
    records = stored.trial_records()
    assert all(record.ended and record.trial.score is not None for record in records)
    after = {record.trial.name: record.trial.point for record in records}
    assert before.items() <= after.items()
    assert len(after) == len({point["optim.lr_d"] for point in after.values()}) == 4
    assert stored.summary().trials == 4

    other = drive(space='{"optim.lr_d": {"uniform": [0.0001, 0.001]}}')
    assert other.end() == 2, other.output
    assert "space.optim.lr_d" in other.output
    assert not canary.exists()
    rays = [name for name in files.list_files(f"{bucket}/runs/small") if name.endswith((".pkl", ".pickle"))]
    assert rays == ["tune/small/tuner.pkl", "tuner.pkl"], "only those that were planted"


@pytest.mark.slow
def test_a_stopped_sweep_has_a_checkpoint_of_each_running_trial(s3, ray_cluster, tmp_path):
    """SIGTERM to the driver while two trials train, of which no checkpoint is due."""
    bucket = s3.bucket()
    env = {**s3.env, **ray_cluster.env, "SAGAN_BUCKET": bucket, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db"}
    long = {**TINY, "train.workers": 1, "train.kimg": 1000, "checkpoint.kimg": 1000, "evaluate.cpus": 0.5}
    sweep = {
        "kind": "tune",
        "name": "two",
        "base": str(JOBS / "quickstart.yaml"),
        "overrides": {**long, "evaluate.kimg": 1000},
        "space": {"optim.lr_d": {"loguniform": [1.0e-4, 1.0e-3]}},
        "search": {"trials": 2, "max_concurrent": 2},
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(sweep).replace("'[", "[").replace("]'", "]"))
    run = Driver(tmp_path, env, job=tmp_path / "two.yaml", tiny=False)
    names = [run.until(" starts at ").split()[1] for _ in range(2)]
    stored = StoredSweep(f"{bucket}/runs/two")
    while any((state := stored.trial(name).state()) is None or state.images == 0 for name in names):
        time.sleep(0.2)
    run.signal(signal.SIGTERM)
    assert run.end() == 130, run.output
    assert "the sweep two was stopped" in run.output
    for name in names:
        (checkpoint,) = stored.trial(name).checkpoints()
        assert checkpoint.images > 0
    assert [record.ended for record in stored.trial_records()] == [False, False]


@pytest.mark.slow
def test_a_trial_waits_for_the_room_that_another_job_holds(s3, ray_cluster, tmp_path):
    """Of four CPUs, another job holds two. Two trials of one worker and a score would need three."""
    env = {
        **s3.env,
        **ray_cluster.env,
        "SAGAN_BUCKET": s3.bucket(),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db",
    }
    sweep = {
        "kind": "tune",
        "name": "patient",
        "base": str(JOBS / "quickstart.yaml"),
        "overrides": {**TINY, "train.workers": 1, "train.kimg": 1000, "evaluate.kimg": 1000, "evaluate.cpus": 0.5},
        "space": {"optim.lr_d": {"loguniform": [1.0e-4, 1.0e-3]}},
        "search": {"trials": 2, "max_concurrent": 2},
    }
    (tmp_path / "patient.yaml").write_text(yaml.safe_dump(sweep).replace("'[", "[").replace("]'", "]"))
    with cpus_in_use(ray_cluster, 2):
        run = Driver(tmp_path, env, job=tmp_path / "patient.yaml", tiny=False)
        run.until("waits for room for another trial beside 1")
        assert run.output.count(" starts at ") == 1
    run.until(" starts at ")
    run.signal(signal.SIGTERM)
    assert run.end() == 130, run.output


@pytest.mark.slow
def test_a_trial_whose_process_was_killed_goes_on_in_the_same_sweep(s3, ray_cluster, tmp_path):
    """Its worker has three of four CPUs. So the trial goes on only after its placement group was given back."""
    bucket = s3.bucket()
    env = {**s3.env, **ray_cluster.env, "SAGAN_BUCKET": bucket, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db"}
    sweep = {
        "kind": "tune",
        "name": "one",
        "base": str(JOBS / "quickstart.yaml"),
        "overrides": {**TINY, "train.workers": 1, "resources.cpus_per_worker": 3, "evaluate.cpus": 0.5},
        "space": {"optim.lr_d": {"loguniform": [1.0e-4, 1.0e-3]}},
        "search": {"trials": 1, "max_concurrent": 1},
    }
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(sweep).replace("'[", "[").replace("]'", "]"))
    run = Driver(tmp_path, env, job=tmp_path / "one.yaml", tiny=False)
    name = run.until(" starts at ").split()[1]
    while not files.list_names(f"{bucket}/runs/{name}/checkpoints"):
        time.sleep(0.2)
    (process,) = ray_workers("ImplicitFunc", env["RAY_ADDRESS"])
    os.kill(process, signal.SIGKILL)
    assert run.end() == 0, run.output
    (record,) = StoredSweep(f"{bucket}/runs/one").trial_records()
    assert (record.ended, record.trial.outcome) == (True, "finished")
    assert StoredSweep(f"{bucket}/runs/one").trial(name).record().starts == 2


@pytest.mark.slow
def test_a_sweep_over_values_that_are_no_numbers_ends_and_counts_the_points_that_diverged(s3, ray_cluster, tmp_path):
    bucket = s3.bucket()
    env = {**s3.env, **ray_cluster.env, "SAGAN_BUCKET": bucket, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db"}
    sweep = {
        "kind": "tune",
        "name": "losses",
        "base": str(JOBS / "quickstart.yaml"),
        "overrides": {**TINY, "train.workers": 1, "evaluate.kimg": 0.96, "evaluate.cpus": 0.5},
        "space": {"optim.loss": {"grid": ["hinge", "bce"]}, "optim.lr_d": {"grid": [4.0e-4, 1.0e30]}},
        "search": {"max_concurrent": 2},
    }
    (tmp_path / "losses.yaml").write_text(yaml.safe_dump(sweep).replace("'[", "[").replace("]'", "]"))
    run = Driver(tmp_path, env, job=tmp_path / "losses.yaml", tiny=False)
    assert run.end() == 0, run.output
    records = StoredSweep(f"{bucket}/runs/losses").trial_records()
    assert [record.ended for record in records] == [True] * 4
    for trial in (record.trial for record in records):
        if trial.point["optim.lr_d"] > 1:
            assert trial.outcome.startswith("training diverged"), trial
        else:
            assert trial.score is not None, trial
    assert (tmp_path / "runs" / "losses" / "plane.png").exists()
