"""The dry run's arithmetic, and which keys make a run another run."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline import cli
from pipeline.config import plan
from pipeline.config.load import load
from pipeline.errors import UsageError

JOBS = Path(__file__).parents[3] / "jobs"
IMAGENET = plan.CollectionFacts("d" * 64, 128, 1000, 1_281_167, 1_300, 3_900)


def imagenet(**overrides):
    return plan.complete(load(JOBS / "imagenet128.yaml", overrides), 128, 1000)


def test_imagenet_arithmetic():
    planned = plan.plan(imagenet(), IMAGENET)
    assert (planned.parameters_generator, planned.parameters_discriminator) == (42_017_412, 39_448_258)
    assert planned.steps == 1_000_000
    assert planned.epochs == pytest.approx(199.82, abs=0.01)
    assert planned.step_gflop_per_image == pytest.approx(154.2, abs=0.05)
    assert planned.checkpoint_bytes == 4 * (3 * (42_017_412 + 39_448_258) + 42_017_412)


@pytest.mark.parametrize("job", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_job_dry_runs_without_its_storage(job, monkeypatch, tmp_path):
    monkeypatch.setenv("SAGAN_BUCKET", str(tmp_path))
    monkeypatch.setenv("SAGAN_IMAGENET128", str(tmp_path))
    overrides = ["model.resolution=32", "model.classes=10"] if job.name == "cifar10.yaml" else []
    done = CliRunner().invoke(cli.app, ["run", str(job), *overrides, "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    planned = json.loads(done.output)
    planned = planned.get("trial", planned)
    assert {"parameters_generator", "step_gflop_per_image", "steps", "epochs", "checkpoint_bytes"} <= planned.keys()
    assert (planned["workers"], planned["global_batch"]) != (0, 0)


def test_what_decides_the_numbers_makes_another_method_and_nothing_else_does():
    reference = plan.digest(plan.method(imagenet(), IMAGENET.digest))
    for key, value in {"optim.lr_d": 1e-4, "seed": 1, "train.batch": 128, "data.flip": True, "model.z_dim": 64}.items():
        assert plan.digest(plan.method(imagenet(**{key: value}), IMAGENET.digest)) != reference, key
    for key, value in {
        "train.workers": 4,
        "train.kimg": 1,
        "data.train": "s3://elsewhere",
        "evaluate.samples": 5,
    }.items():
        assert plan.digest(plan.method(imagenet(**{key: value}), IMAGENET.digest)) == reference, key
    assert plan.digest(plan.method(imagenet(), "e" * 64)) != reference


def test_a_job_that_contradicts_its_collection_is_refused_with_both_values():
    with pytest.raises(UsageError, match="model.resolution is 128, but the collection has 64"):
        plan.complete(load(JOBS / "imagenet128.yaml"), 64, 1000)
    with pytest.raises(UsageError, match="model.classes is 10, but the collection has 0"):
        plan.complete(load(JOBS / "imagenet128.yaml", {"model.classes": 10}), 128, 0)


def test_uneven_worlds_are_said_in_the_dry_run():
    planned = plan.plan(imagenet(**{"train.workers": 3}), IMAGENET)
    assert planned.images_per_worker == "85 to 86"
    assert any("data.lanes" in note and "3900 fetches an epoch for 1300" in note for note in planned.notes)
