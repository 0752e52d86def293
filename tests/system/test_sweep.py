"""The small sweep as its user submits it: trials on Ray workers, some stopped early, the best in the registry."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import ray
from mlflow import MlflowClient
from ray.util.placement_group import placement_group, placement_group_table

from infra.local.server_process import BIN
from pipeline.compute.resources import release_placement_groups
from pipeline.report.write_report import write_report
from pipeline.storage import files

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("ray")]


def test_placement_groups_that_stopped_trials_left_are_given_back():
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        ray.get(placement_group([{"CPU": 1}]).ready())
        assert [group["state"] for group in placement_group_table().values()] == ["CREATED"]
        release_placement_groups()
        assert [group["state"] for group in placement_group_table().values()] == ["REMOVED"]
    finally:
        ray.shutdown()


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
