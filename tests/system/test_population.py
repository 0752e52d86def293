"""A small population on Ray workers, whose driver is killed when a clone starts."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient

from pipeline.runs.checkpoints import StoredCheckpoint, load_state
from pipeline.runs.stored_run import StoredSweep
from pipeline.storage import file_sets, files
from sagan import TrainState
from tests.system.command_process import JOBS, TINY, Driver

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray")]


def state_at(checkpoint: StoredCheckpoint, folder: Path) -> TrainState:
    """The state of a checkpoint, which is complete."""
    folder.mkdir()
    file_sets.fetch_set(checkpoint.url, folder)
    return load_state(folder, checkpoint.url)


@pytest.mark.timeout(1200)
def test_a_population_is_resumed_after_its_driver_was_killed_and_a_clone_begins_as_its_parent(
    s3, ray_cluster, tmp_path
):
    bucket, uri = s3.bucket(), f"sqlite:///{tmp_path}/m.db"
    env = {**s3.env, **ray_cluster.env, "SAGAN_BUCKET": bucket, "MLFLOW_TRACKING_URI": uri}
    sweep = {
        "kind": "tune",
        "name": "pop",
        "base": str(JOBS / "quickstart.yaml"),
        "overrides": {**TINY, "train.kimg": 0.64, "train.workers": 1, "evaluate.cpus": 0.5},
        "space": {"optim.lr_d": {"loguniform": [1.0e-4, 1.0e-3]}},
        "search": {
            "trials": 2,
            "max_concurrent": 2,
            "initial_points": [{"optim.lr_d": 4.0e-4}, {"optim.lr_d": 2.0e-4}],
        },
        "schedule": {"pbt": {"interval_kimg": 0.32, "fraction": 0.5, "resample": 0.0}},
    }
    (tmp_path / "pop.yaml").write_text(yaml.safe_dump(sweep).replace("'[", "[").replace("]'", "]"))

    def drive() -> Driver:
        return Driver(tmp_path, env, job=tmp_path / "pop.yaml", tiny=False)

    stored = StoredSweep(f"{bucket}/runs/pop")
    first = drive()
    first.until("generation 2 of 2 begins at 0.32 kimg")
    clone, *_, parent, _, _, _, _, loser = first.until("a clone of").replace(",", "").split()
    first.until(f"trial {clone} starts at")
    first.signal(signal.SIGKILL)
    first.end()
    decided = files.read_json(stored.generation_url(1))
    starts = stored.trial(loser).record().starts

    last = drive()
    assert last.end() == 0, last.output
    assert "sweep pop: generation 2 of 2" in last.output
    assert f"trial {loser} starts" not in last.output
    assert stored.trial(loser).record().starts == starts
    assert files.read_json(stored.generation_url(1)) == decided

    trials = {record.trial.name: record.trial for record in stored.trial_records()}
    outcomes = {name: trial.outcome for name, trial in trials.items()}
    assert outcomes == {parent: "finished", loser: "stopped early", clone: "finished"}
    lineage = trials[clone].parent
    assert (lineage.run, lineage.generation) == (parent, 1)
    rates = [trials[name].point["optim.lr_d"] for name in (parent, clone)]
    assert rates[1] / rates[0] == pytest.approx(0.8) or rates[1] / rates[0] == pytest.approx(1.2)

    source = state_at(stored.trial(parent).checkpoint(lineage.checkpoint), tmp_path / "parent")
    beginning, end = stored.trial(clone).checkpoints()
    state = state_at(beginning, tmp_path / "clone")
    assert (state.images, end.images) == (source.images, 640) == (320, 640)
    assert (state.optim.lr_d, source.optim.lr_d) == (rates[1], rates[0])
    theirs = dict(source.tensors())
    assert dict(state.tensors()).keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in state.tensors())

    client = MlflowClient(uri)
    summary = stored.summary()
    run = client.get_run(stored.trial(clone).record().mlflow_run_id)
    assert run.data.tags["mlflow.parentRunId"] == summary.mlflow_run_id
    assert run.data.tags["pbt.parent_run"] == parent
    assert run.data.tags["pbt.parent_checkpoint"] == lineage.checkpoint
    assert run.data.tags["pbt.generation"] == "1"
    assert run.data.params["optim.lr_d"] == str(rates[1])
    founder = client.get_run(stored.trial(parent).record().mlflow_run_id).data.tags
    assert founder["pbt.generation"] == "0"
    assert "pbt.parent_run" not in founder
    assert (summary.trials, summary.stopped_early, summary.registered.alias) == (3, 1, "champion")
    table = json.loads((tmp_path / "runs" / "pop" / "trials.json").read_text())["trials"]
    assert [trial["parent"] and trial["parent"]["run"] for trial in table].count(parent) == 1

    again = drive()
    assert again.end() == 0, again.output
    assert " starts at " not in again.output
    assert stored.summary() == summary
