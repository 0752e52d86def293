"""Storage that fails at random changes nothing that two workers learn."""

from __future__ import annotations

import json

import pytest

from pipeline.storage import files
from tests.faults.storage_proxy import fault_proxy
from tests.system.command_process import Driver

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray")]


def test_a_run_whose_storage_fails_at_random_ends_in_the_same_state(s3, ray_cluster, test_data, tmp_path):
    """Two reads of shards in five fail in some way, damaged bytes among them, and one other request in twenty."""
    assert test_data is not None, "set SAGAN_TEST_DATA to the folder of real collections"
    bucket = s3.bucket()
    env = {**s3.env, **ray_cluster.env, "SAGAN_BUCKET": bucket}
    env["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    sources = {part: str(test_data / f"imagenette128-{part}.tar") for part in ("train-1500", "val-250")}
    overrides = {
        "data.train": f"{bucket}/imagenette",
        "data.pack.source": json.dumps({"train": sources["train-1500"], "heldout": sources["val-250"]}),
        "data.pack.shard_images": 50,
        "train.workers": 2,
        "train.kimg": 0.96,
        "evaluate.extractor": test_data / "resnet20-cifar10.ts",  # a classifier would have to be trained first
        "evaluate.trust_extractor": True,
    }

    clean = Driver(tmp_path, env, name="clean", **overrides, **{"data.cache": tmp_path / "clean"})
    assert clean.end() == 0, clean.output
    with fault_proxy(s3.url) as proxy:
        proxy.random(0.4, seed=1, object="*.tar")
        proxy.random(0.05, seed=2, faults=("refused", "burst_500", "burst_503"))
        behind = {"AWS_ENDPOINT_URL": proxy.url()}
        where = {"data.cache": tmp_path / "disturbed", "resources.env": json.dumps(behind)}
        disturbed = Driver(tmp_path, env | behind, name="disturbed", **overrides, **where)
        assert disturbed.end() == 0, disturbed.output
        met = proxy.counts()

    print(met)
    assert {"refused", "burst_500", "burst_503", "reset_mid_body", "truncated_body", "flipped_byte"} <= met.keys()
    names = [files.name(run.summary(name)["checkpoint"]) for run, name in ((clean, "clean"), (disturbed, "disturbed"))]
    assert names[0] == names[1], "the name of a checkpoint holds the digest of its state"
