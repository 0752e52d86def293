"""A run starts from the champion of another run in MLflow's registry, and its model card says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from mlflow import MlflowClient

from pipeline.storage import files
from tests.system.command_process import JOBS, TINY, Driver

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray")]

SHORT = {"train.kimg": 0.64, "checkpoint.kimg": 0.16}


def sagan(folder, env, *arguments):
    command = [sys.executable, "-m", "pipeline", *arguments]
    environment = {**os.environ, **env, "PYTHONPATH": str(JOBS.parent)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_run_starts_from_a_champion_and_resumes_when_the_champion_is_gone(s3, ray_cluster, tmp_path):
    env = {**s3.env, **ray_cluster.env, "SAGAN_BUCKET": s3.bucket()}
    env["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    first = Driver(tmp_path, env, name="first", **SHORT)
    assert first.end() == 0, first.output

    start = {"init.source": "models:/first@champion", "init.optimizers": "true", "optim.lr_g": 1e-4}
    overrides = [f"{key}={value}" for key, value in start.items()]
    other = [f"{key}={value}" for key, value in TINY.items() if key not in ("model.channels_d", "model.multipliers_d")]
    refused = sagan(tmp_path, env, "run", str(JOBS / "quickstart.yaml"), "--dry-run", *overrides, *other)
    assert refused.returncode == 2
    assert "model.channels_d times model.multipliers_d" in refused.stderr

    second = Driver(tmp_path, env, name="second", **SHORT, **start)
    second.until("second starts from models:/first/1")
    second.until("taken: moving average")
    second.until("checkpoint 000000000160")
    second.signal(signal.SIGINT)
    assert second.end() == 130, second.output
    files.delete(f"{env['SAGAN_BUCKET']}/runs/first")
    MlflowClient(env["MLFLOW_TRACKING_URI"]).delete_registered_model("first")
    again = Driver(tmp_path, env, name="second", **SHORT, **start)
    assert again.end() == 0, again.output
    assert "starts from" not in again.output
    record = files.read_json(f"{env['SAGAN_BUCKET']}/runs/second/run.json")
    assert record["init"]["version"] == "1"
    assert record["method"]["init.sha256"] == record["init"]["sha256"]

    pulled = sagan(tmp_path, env, "pull", "models:/second@champion", "pulled")
    assert pulled.returncode == 0, pulled.stderr
    assert "| init | models:/first/1 |" in (tmp_path / "pulled" / "README.md").read_text()
    assert json.loads((tmp_path / "pulled" / "config.json").read_text())["class_names"] == list("0123456789")
