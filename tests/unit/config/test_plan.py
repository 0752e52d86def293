"""The dry run's arithmetic, and which keys make a run another run."""

import json
import os

import pytest
from typer.testing import CliRunner

from pipeline import cli
from pipeline.config import plan
from pipeline.config.load import load, parse_overrides
from pipeline.errors import UsageError
from tests.jobs import JOBS, shipped

SHIPPED = shipped()
IMAGENET = plan.CollectionFacts("d" * 64, 128, 1000, 1_281_167)


def imagenet(**overrides):
    return plan.complete(load(JOBS / "imagenet128.yaml", overrides), 128, 1000)


def test_imagenet_arithmetic():
    planned = plan.plan(imagenet(), IMAGENET)
    assert (planned.parameters_generator, planned.parameters_discriminator) == (42_017_412, 39_448_258)
    assert planned.steps == 1_000_000
    assert planned.epochs == pytest.approx(199.82, abs=0.01)
    assert planned.step_gflop_per_image == pytest.approx(154.2, abs=0.05)
    assert planned.checkpoint_bytes == 4 * (3 * (42_017_412 + 39_448_258) + 42_017_412)


def dry_run(name, *more):
    job, overrides = SHIPPED[name]
    done = CliRunner().invoke(cli.app, ["run", str(job), *overrides, *more, "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    planned = json.loads(done.output)
    return planned.get("trial", planned)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_job_and_variant_dry_runs_without_its_storage(name, monkeypatch, tmp_path):
    monkeypatch.setenv("SAGAN_BUCKET", str(tmp_path))
    planned = dry_run(name)
    assert {"parameters_generator", "step_gflop_per_image", "steps", "epochs", "checkpoint_bytes"} <= planned.keys()
    assert planned["global_batch"] % planned["workers"] == 0
    assert os.access(SHIPPED[name][0], os.X_OK)


@pytest.mark.parametrize("name", [name for name, (_, overrides) in SHIPPED.items() if overrides])
def test_a_variant_is_another_method_in_three_keys_or_fewer(name):
    job, overrides = SHIPPED[name]
    assert len(overrides) <= 3
    methods = [plan.method(load(job, parse_overrides(given)), "d" * 64) for given in ([], overrides)]
    differing = {key for key in methods[0] if methods[0][key] != methods[1][key]}
    assert differing == {override.partition("=")[0] for override in overrides}


# Classes, parameters of generator and discriminator, and GFLOP of a step per image to the digits that are known, as
# counted from the published networks.
SYSTEMS = {
    "cifar10": (10, 4_386_308, 1_075_586, "18.1"),
    "tiny-imagenet": (200, 13_387_396, 19_752_642, "33.8"),
    "imagenet64": (1000, 17_995_396, 20_571_842, "33.8"),
    "imagenet64 biggan": (1000, 41_577_732, 20_571_842, "75.9"),
    "imagenet128": (1000, 42_017_412, 39_448_258, "154.2"),
    "imagenet128 mmgeneration": (1000, 42_017_412, 39_448_258, "154.2"),
    "imagenet256": (1000, 49_354_884, 44_507_330, "521"),
    "imagenet256 feat64": (1000, 49_109_124, 44_445_890, "530"),
    "celeba64": (0, 12_241_156, 19_547_842, "33.8"),
    "celeba128": (0, 32_232_708, 38_439_618, "149.5"),
    "celeba128 slope-0.2": (0, 32_232_708, 38_439_618, "149.5"),
    "lsun128": (0, 32_232_708, 38_439_618, "149.5"),
    "lsun256": (0, 37_462_788, 43_483_330, "521"),
    "sagan128": (1000, 42_078_852, 39_463_618, "149.5"),
    "sagan128 none": (1000, 41_996_931, 39_443_137, "147.8"),
    "sagan128 feat8": (1000, 43_307_652, 39_770_818, "148.8"),
    "sagan128 feat16": (1000, 42_324_612, 39_525_058, "148.9"),
    "sagan128 feat64": (1000, 42_017_412, 39_448_258, "154.2"),
    "sagan128 several": (1000, 42_078_852 + 20_481, 39_463_618 + 5_121, "155.9"),
    "stabilisation": (1000, 41_996_931, 39_443_137, "147.8"),
    "stabilisation both": (1000, 41_996_931, 39_443_137, "147.8"),
    "stabilisation ttur": (1000, 41_996_931, 39_443_137, "147.8"),
    "sngan-projection": (1000, 41_996_931, 30_041_857, "66.0"),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_has_its_published_size(name):
    classes, generator, discriminator, gflop = SYSTEMS[name]
    planned = dry_run(name, "data.train=nowhere", *([f"model.classes={classes}"] if classes else []))
    assert (planned["parameters_generator"], planned["parameters_discriminator"]) == (generator, discriminator)
    assert f"{planned['step_gflop_per_image']:.{len(gflop.partition('.')[2])}f}" == gflop


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
    assert any("data.lanes" in note for note in planned.notes)
