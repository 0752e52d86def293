"""A dry run computes the arithmetic of a job, with its collection and without."""

import json
import os
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from pipeline import cli
from pipeline.config.dry_run import CollectionFacts, dry_run
from pipeline.config.job_file import load_job, parse_overrides, row_job, trial_job
from pipeline.config.run_method import complete_model, digest_of, method_of, sweep_method_of
from pipeline.errors import UsageError
from pipeline.runs.json_records import (
    Lineage,
    RecordedData,
    RecordedEvaluation,
    RunRecord,
    RunState,
    SweepRecord,
    Trial,
    TrialRecord,
)
from pipeline.runs.stored_run import StoredRun, StoredSweep
from pipeline.tuning.population import start_of
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


def dried(*arguments):
    """The JSON of a dry run."""
    return json.loads(run_dry(*arguments, "--json"))


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


def test_the_dry_run_of_a_population_has_its_generations_and_its_images(monkeypatch, tmp_path):
    monkeypatch.setenv("SAGAN_BUCKET", str(tmp_path))
    job = JOBS / "pbt-quickstart.yaml"
    plan = json.loads(run_dry(job, "--json"))
    assert (plan["trials"], plan["generations"], plan["clones_per_generation"], plan["runs"]) == (4, 4, 1, 7)
    assert plan["images"] == 4 * plan["trial"]["images"] == 38_400
    more = ("search.trials=10", "schedule.pbt.interval_kimg=4", "schedule.pbt.fraction=0.3")
    plan = json.loads(run_dry(job, *more, "--json"))
    assert (plan["trials"], plan["generations"], plan["clones_per_generation"], plan["runs"]) == (10, 2, 3, 13)


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
    "acgan-2017": (10, 11_465_728, 2_525_563, "10.5"),
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
    assert len(notes) == 4
    rows = [line.split(maxsplit=1) for line in run_dry(JOBS / "imagenet128.yaml", *overrides, width=400).splitlines()]
    assert [value.strip() for key, *values in filter(None, rows) if key == "notes" for value in values] == notes


def test_intervals_shorter_than_a_step_give_one_score_and_one_checkpoint_a_step():
    plan = dry_run(imagenet(**{"train.kimg": 1, "evaluate.kimg": 1e-320, "checkpoint.kimg": 1e-320}), IMAGENET)
    assert plan.evaluations == plan.checkpoints == plan.steps


UNKNOWN = "the device hours are unknown: no run of this name and method has measured how long an image takes"


def told(job, collection, root, hours, images, device_s_per_image, **method):
    """Leave a run that has held `hours` device hours and has reached the position `images`."""
    complete = complete_model(job, collection.resolution, collection.num_classes)
    record = RunRecord(
        name=job.name,
        method=method_of(complete, collection.digest) | method,
        mlflow_run_id="0",
        data=RecordedData.of(job.data),
        evaluate=RecordedEvaluation.of(job.evaluate),
        device_hours=hours,
    )
    stored = StoredRun(f"{root}/{job.name}")
    stored.write_record(record)
    state = {"owner": 1, "state": "stopped", "images": images, "kimg": job.train.kimg, "time_s": 1.0}
    stored.write_state(RunState(**state, device_hours=hours, device_s_per_image=device_s_per_image))


def test_device_hours_and_cost_are_those_of_a_run_that_has_measured_its_speed(packed, tmp_path):
    keys = [f"data.train={packed.url}", f"checkpoint.root={tmp_path}", "train.kimg=7.2", "train.batch=16"]
    keys.append("resources.price_per_device_hour=2")
    path = JOBS / "cifar10.yaml"
    plan = dried(path, *keys)
    assert (plan["device_hours"], plan["expected_device_hours"], plan["cost"]) == (0, None, 0)
    assert UNKNOWN in plan["notes"]

    job = load_job(path, parse_overrides(keys))
    told(job, packed, tmp_path, 3.0, 3600, 2.0, **{"optim.lr_d": 0.5})
    assert dried(path, *keys)["expected_device_hours"] is None, "a run of another method has another speed"

    told(job, packed, tmp_path, 3.0, 3600, 2.0)
    plan = dried(path, *keys, "budget.hours=4")
    assert (plan["device_hours"], plan["expected_device_hours"]) == (3, 5)
    assert (plan["cost"], plan["expected_cost"], plan["budget_hours"]) == (6, 10, 4)
    assert UNKNOWN not in plan["notes"]
    assert "the budget, 4.00 device hours, will be spent before train.kimg" in plan["notes"]
    assert dried(path, *keys, "train.kimg=10.8", "budget.hours=8")["expected_device_hours"] == 7


def test_device_hours_of_a_study_are_known_when_each_row_has_a_run(packed, tmp_path):
    (tmp_path / "base.yaml").write_text(
        f"kind: train\nname: base\ndata: {{train: {packed.url}}}\ntrain: {{kimg: 3.6, batch: 16}}\n"
        f"checkpoint: {{root: {tmp_path}}}\nresources: {{price_per_device_hour: 10}}\n"
    )
    path = tmp_path / "study.yaml"
    path.write_text(
        "kind: study\nname: s\nbase: base.yaml\nseeds: [0, 1]\nrows: {a: {}, b: {overrides: {model.attention: []}}}\n"
        "compare: {metrics: [fid], reference: a}\n"
    )
    study = load_job(path)
    told(row_job(study, "a", 0), packed, tmp_path, 1.0, 3600, 1.0)
    plan = dried(path)
    assert (plan["device_hours"], plan["expected_device_hours"], plan["cost"]) == (1, None, 10)
    assert plan["notes"] == [UNKNOWN]

    told(row_job(study, "b", 1), packed, tmp_path, 0.5, 1800, 2.0)
    plan = dried(path)
    assert plan["expected_device_hours"] == 1 + 1 + 1.5 + 2, "a run with another seed takes as long"
    assert (plan["device_hours"], plan["expected_cost"], plan["notes"]) == (1.5, 55, [])


def test_device_hours_of_a_sweep_are_known_when_a_trial_has_measured_them(packed, tmp_path):
    (tmp_path / "base.yaml").write_text(
        f"kind: train\nname: base\ndata: {{train: {packed.url}}}\ntrain: {{kimg: 3.6, batch: 16}}\n"
        f"checkpoint: {{root: {tmp_path}}}\n"
    )
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "kind: tune\nname: s\nbase: base.yaml\nspace: {optim.lr_d: {choice: [1.0e-4, 4.0e-4]}}\nsearch: {trials: 4}\n"
    )
    assert dried(path)["notes"] == [UNKNOWN]
    sweep, stored = load_job(path), StoredSweep(f"{tmp_path}/s")
    complete = complete_model(trial_job(sweep, sweep.example), packed.resolution, packed.num_classes)
    method = sweep_method_of(sweep, complete, packed.digest)
    stored.write_record(SweepRecord(name="s", mlflow_run_id="0", method=method))
    for number, (kimg, ended) in enumerate([(1.8, True), (0.9, False)]):
        trial = Trial(name=f"s-{number}", point={"optim.lr_d": 1e-4}, score=None, kimg=kimg, outcome="stopped early")
        stored.write_trial_record(TrialRecord(number=number, ended=ended, trial=trial))
        job = trial_job(sweep, trial.point).model_copy(update={"name": trial.name})
        told(job, packed, tmp_path, 1.0, int(1000 * kimg), 2.0)
    plan = dried(path)
    assert (plan["device_hours"], plan["cost"]) == (2, None)
    assert plan["expected_device_hours"] == 1 + (1 + 1.5) + 2 + 2, "a trial that was stopped early needs no more"
    assert dried(path, "overrides={optim.lr_g: 1.0e-5}")["device_hours"] == 0, "another sweep"


def test_the_device_hours_of_a_population_count_a_clone_from_the_position_of_its_parent(packed, tmp_path):
    (tmp_path / "base.yaml").write_text(
        f"kind: train\nname: base\ndata: {{train: {packed.url}}}\ntrain: {{kimg: 3.6, batch: 16}}\n"
        f"checkpoint: {{root: {tmp_path}}}\n"
    )
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "kind: tune\nname: s\nbase: base.yaml\nspace: {optim.lr_d: {choice: [1.0e-4, 4.0e-4]}}\n"
        "search: {trials: 2}\nschedule: {pbt: {interval_kimg: 1.8}}\n"
    )
    sweep, stored = load_job(path), StoredSweep(f"{tmp_path}/s")
    complete = complete_model(trial_job(sweep, sweep.example), packed.resolution, packed.num_classes)
    method = sweep_method_of(sweep, complete, packed.digest)
    stored.write_record(SweepRecord(name="s", mlflow_run_id="0", method=method))
    lineage = Lineage(run="s-0", checkpoint="000000001800-0", generation=1)
    for number, ended, parent, images, hours in [
        (0, False, None, 1800, 1.0),
        (1, True, None, 1800, 1.0),
        (2, False, lineage, 2700, 0.5),
    ]:
        point = {"optim.lr_d": 1e-4}
        trial = Trial(name=f"s-{number}", point=point, score=None, kimg=1.8, outcome="running", parent=parent)
        stored.write_trial_record(TrialRecord(number=number, ended=ended, trial=trial))
        job = trial_job(sweep, {**point, "name": trial.name, **start_of(stored, parent)})
        told(job, packed, tmp_path, hours, images, 2.0)
    plan = dried(path)
    assert plan["device_hours"] == 2.5
    assert plan["expected_device_hours"] == (1 + 1) + 1 + (0.5 + 0.5)
