"""A dry run computes the arithmetic of a job, with its collection and without."""

import json
import os
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from pipeline import cli
from pipeline.config.dry_run import CollectionFacts, dry_run
from pipeline.config.job_file import load_job, row_job
from pipeline.config.run_method import digest_of, method_of
from pipeline.errors import UsageError
from tests.shipped_jobs import JOBS, STUDIES, shipped

SHIPPED = shipped()
IMAGENET = CollectionFacts(resolution=128, num_classes=1000, images=1_281_167, shards=1_300, fetches=3_900)
IMAGENET_SIZE = (42_017_412, 39_448_258)


def imagenet(**overrides):
    return load_job(JOBS / "imagenet128.yaml", overrides)


def run_dry(*arguments, width=200):
    """What `sagan run … --dry-run` prints."""
    done = CliRunner().invoke(cli.app, ["run", *map(str, arguments), "--dry-run"], env={"COLUMNS": str(width)})
    assert done.exit_code == 0, done.output
    return done.output


def planned(name, *more):
    """The arithmetic of a shipped job or variant; of a sweep, that of a trial."""
    job, overrides = SHIPPED[name]
    values = json.loads(run_dry(job, *overrides, *more, "--json"))
    return values.get("trial", values)


def test_imagenet_arithmetic():
    plan = dry_run(imagenet(), IMAGENET)
    assert (plan.parameters_generator, plan.parameters_discriminator) == IMAGENET_SIZE
    assert plan.steps == 1_000_000
    assert plan.epochs == pytest.approx(199.82, abs=0.01)
    assert plan.step_gflop_per_image == pytest.approx(154.2, abs=0.05)
    assert plan.checkpoint_bytes == 4 * (3 * sum(IMAGENET_SIZE) + IMAGENET_SIZE[0])
    assert plan.notes == ()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_job_and_variant_dry_runs_without_its_storage(name, monkeypatch, tmp_path):
    monkeypatch.setenv("SAGAN_BUCKET", str(tmp_path))
    plan = planned(name)
    assert {"parameters_generator", "step_gflop_per_image", "steps", "epochs", "checkpoint_bytes"} <= plan.keys()
    assert plan["global_batch"] % plan["workers"] == 0
    assert os.access(SHIPPED[name][0], os.X_OK)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_shipped_study_dry_runs_without_its_storage(path, monkeypatch, tmp_path):
    monkeypatch.setenv("SAGAN_BUCKET", str(tmp_path))
    study = load_job(path)
    plan = json.loads(run_dry(path, "--json"))
    assert (plan["runs"], plan["seeds"]) == (len(study.rows) * len(study.seeds), len(study.seeds))
    assert plan["ended"] == 0
    assert plan["kimg"] > 0
    assert plan["rows"].keys() == study.rows.keys()
    jobs = {row: row_job(study, row, study.seeds[0]) for row in study.rows}
    methods = [digest_of(method_of(job, "d" * 64)) for job in jobs.values()]
    assert len(set(methods)) == len(methods), "each row is another method"


def test_the_dry_run_of_a_study_has_its_totals_and_says_how_rows_differ(monkeypatch, tmp_path):
    monkeypatch.setenv("SAGAN_BUCKET", str(tmp_path))
    plan = json.loads(run_dry(JOBS / "studies" / "table1.yaml", "seeds=[0, 1]", "--json"))
    assert (plan["runs"], plan["kimg"]) == (18, 18 * 256_000)
    assert plan["run"]["steps"] == 1_000_000
    assert plan["rows"]["none"]["parameters_generator"] == 41_996_931
    assert plan["rows"]["feat32"]["parameters_generator"] == 42_078_852
    assert "steps" not in plan["rows"]["feat32"]
    gflop = sum(row["step_gflop_per_image"] for row in plan["rows"].values())
    assert plan["nominal_exaflop"] == pytest.approx(2 * 0.256 * gflop)


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
def test_every_system_has_its_published_size_without_its_collection(name):
    classes, generator, discriminator, gflop = SYSTEMS[name]
    plan = planned(name, "data.train=nowhere")
    assert plan["num_classes"] == classes
    assert (plan["parameters_generator"], plan["parameters_discriminator"]) == (generator, discriminator)
    assert f"{plan['step_gflop_per_image']:.{len(gflop.partition('.')[2])}f}" == gflop


class TestWithoutTheCollection:
    def test_a_job_of_a_named_data_set_expects_its_classes(self):
        plan = dry_run(imagenet(), None)
        assert (plan.parameters_generator, plan.parameters_discriminator) == IMAGENET_SIZE
        assert (plan.resolution, plan.num_classes) == (128, 1000)
        assert plan.epochs is None
        (note,) = plan.notes
        assert "imagenet128 cannot be read" in note

    def test_a_number_of_classes_that_the_job_gives_comes_first(self):
        assert dry_run(imagenet(**{"model.num_classes": 0}), None).num_classes == 0

    def test_an_unknown_number_of_classes_is_zero_with_a_note(self):
        plan = dry_run(imagenet(**{"data.expected_classes": None}), None)
        assert plan.num_classes == 0
        assert any("set data.expected_classes" in note for note in plan.notes)

    def test_an_unknown_resolution_is_refused(self):
        with pytest.raises(UsageError, match="does not give the resolution") as caught:
            dry_run(imagenet(**{"model.resolution": None}), None)
        assert "model.resolution=" in caught.value.remedy


class TestRehearsal:
    """A job trains on the collection of another data set."""

    def test_it_trains_the_classes_of_its_collection_and_notes_both_numbers(self):
        plan = dry_run(imagenet(**{"data.train": "s3://bucket/imagenette"}), replace(IMAGENET, num_classes=10))
        assert plan.num_classes == 10
        assert plan.notes == ("s3://bucket/imagenette has 10 classes, not 1000",)

    def test_one_override_names_another_collection(self, packed):
        plan = planned("cifar10", f"data.train={packed.url}")
        assert plan["num_classes"] == packed.num_classes == 3
        assert f"{packed.url} has 3 classes, not 10" in plan["notes"]
        assert plan["epochs"] == round(plan["images"] / 60, 2)


def test_uneven_worlds_are_noted():
    plan = dry_run(imagenet(**{"train.workers": 3}), IMAGENET)
    assert plan.images_per_worker == "85 to 86"
    assert any("data.lanes" in note and "3900 fetches of 1300 shards" in note for note in plan.notes)


def test_the_command_shows_one_note_per_line():
    overrides = ("data.train=nowhere", "train.workers=3")
    notes = planned("imagenet128", *overrides)["notes"]
    assert len(notes) == 3
    rows = [line.split(maxsplit=1) for line in run_dry(JOBS / "imagenet128.yaml", *overrides, width=400).splitlines()]
    assert [value.strip() for key, *values in filter(None, rows) if key == "notes" for value in values] == notes


def test_intervals_shorter_than_a_step_give_one_score_and_one_checkpoint_a_step():
    plan = dry_run(imagenet(**{"train.kimg": 1, "evaluate.kimg": 1e-320, "checkpoint.kimg": 1e-320}), IMAGENET)
    assert plan.evaluations == plan.checkpoints == plan.steps
