"""A job file is typed, completed and checked before anything starts; what is wrong is named with line and key."""

import re
import subprocess
import sys

import pytest
import yaml

from pipeline.config.job_file import load_job, parse_overrides, row_job, row_sweep, to_yaml, trial_job
from pipeline.errors import ConfigError
from tests.shipped_jobs import JOBS, STUDIES

FILES = [*sorted(JOBS.glob("*.yaml")), *STUDIES]
TRAIN = """\
kind: train
name: mine
data: {train: somewhere}
train:
  kimg: 1
  batch: 16
"""
BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{b}: &{b} [{', '.join(10 * [f'*{a}'])}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def job(tmp_path):
    def write(text):
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("budget", "hours"),
    [
        ("{}", None),
        ("{hours: 12}", 12),
        ("{cost: 100}", 40),
        ("{hours: 12, cost: 100}", 12),
        ("{hours: 50, cost: 100}", 40),
    ],
)
def test_a_budget_is_a_number_of_device_hours(job, budget, hours):
    text = f"{TRAIN}resources: {{price_per_device_hour: 2.5}}\nbudget: {budget}\n"
    assert load_job(job(text)).budget_hours == hours


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_shipped_job_is_valid_and_executable(path):
    assert load_job(path).name == path.stem
    assert path.stat().st_mode & 0o111
    assert path.read_text().startswith("#!/usr/bin/env -S python -m pipeline run\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TRAIN.replace("batch", "btach"), "job.yaml:6: train.btach is not a key; did you mean train.batch?"),
        (TRAIN + "optim: {lr_x: 1}\n", "job.yaml:7: optim.lr_x is not a key; did you mean optim.lr_"),
        (TRAIN.replace("16", "many"), "job.yaml:6: train.batch is 'many': input should be a valid integer"),
        (
            TRAIN.replace("somewhere", "x, augment: flip"),
            "job.yaml:3: data.augment is 'flip': input should be 'diffaugment'",
        ),
        (TRAIN + "  workers: 17\n", "train.workers is 17, but train.batch has only 16 images"),
        (TRAIN + "  workers: 2\n  min_workers: 3\n", "train.min_workers is 3, which is more than train.workers, 2"),
        (
            TRAIN + "  workers: 4\n  min_workers: 1\n  micro_batch: 4\nmodel: {batch_norm_group: 4}\n",
            "a batch of 16 on 3 workers cannot be split into passes",
        ),
        (TRAIN + "optim: {lr_d: -1}\n", "job.yaml:7: optim.lr_d is -1"),
        (TRAIN + "budget: {cost: 100}\n", "budget.cost needs resources.price_per_device_hour"),
        (TRAIN + "budget: {hours: 0}\n", "job.yaml:7: budget.hours is 0: input should be greater than 0"),
        (TRAIN + "resources: {price_per_device_hour: -2}\n", "job.yaml:7: resources.price_per_device_hour is -2"),
        (TRAIN + "model: {resolution: 64, channels_d: 2}\n", "job.yaml:7: model.channels_d 2 gives 2 channels at"),
        (
            TRAIN.replace("somewhere", "x, pack: {source: y, resolution: 64}") + "model: {channels_d: 2}\n",
            "model.channels_d 2 gives 2 channels at the size 32, where model.attention needs a multiple of 8",
        ),
        (TRAIN + "model: {batch_norm_group: 5}\n", "model.batch_norm_group 5 does not divide train.batch 16"),
        (TRAIN + "  micro_batch: 4\n", "set model.batch_norm_group to at most 4"),
        (TRAIN + "model: {resolution: 33}\n", "job.yaml:7: model.resolution is 33"),
        (TRAIN.replace("kimg: 1", "log_kimg: 1"), "train.kimg is missing"),
        (TRAIN.replace("train\n", "trian\n", 1), "job.yaml:1: kind is 'trian'"),
        (TRAIN + "train: {kimg: 2}\n", "job.yaml:7: train occurs twice"),
        (TRAIN + "seed: [\n", "job.yaml:8"),
        (TRAIN + "seed: ${NOT_SET_ANYWHERE}\n", "job.yaml:7: ${NOT_SET_ANYWHERE} is not set"),
        ("- a list\n", "holds no keys"),
        (TRAIN + "seed: &seed [*seed]\n", "job.yaml:7: values are nested more than 20 deep"),
        (TRAIN + "seed: &seed {again: *seed}\n", "nested more than 20 deep"),
        (TRAIN + "seed: " + 5000 * "[" + "\n", "job.yaml:7: values are nested more than 20 deep"),
        (TRAIN + BOMB, "more than 20,000 values"),
        (TRAIN + "seed: " + "1" * 1_000_001, "longer than 1,000,000 characters"),
        (TRAIN + "seed: " + "1" * 5_000, "job.yaml:7: seed: "),
        (TRAIN.replace("kimg: 1", "kimg: .inf"), "job.yaml:5: train.kimg: .inf is not a finite number"),
        (TRAIN.replace("kimg: 1", "kimg: 1e309"), "job.yaml:5: train.kimg: 1e309 is not a finite number"),
        (TRAIN.replace("kimg: 1", "kimg: 'inf'"), "job.yaml:5: train.kimg is 'inf'"),
        (TRAIN + "optim: {lr_d: -.nan}\n", "job.yaml:7"),
        (TRAIN + "optim: {lr_d: .nan}\n", "job.yaml:7: optim.lr_d: .nan is not a finite number"),
        (TRAIN + "seed: 2001-99-99\n", "job.yaml:7"),
        (TRAIN + "? [a, b]\n: 1\n", "job.yaml:7: a key is not a text"),
        (TRAIN + f"seed: {2**63 - 1}\n", "job.yaml:7: seed is 9223372036854775807"),
        (TRAIN + f"evaluate: {{seed: {2**64}}}\n", "job.yaml:7: evaluate.seed is"),
        (TRAIN + "evaluate: {standing_images: 2000000}\n", "evaluate.standing_images is 2000000"),
        (TRAIN + "evaluate: {gpus: 1.5}\n", "1.5 GPUs cannot be reserved"),
        (TRAIN.replace("mine", "mlflow"), "mlflow is the name of another folder below checkpoint.root"),
        (TRAIN.replace("mine", "studies"), "studies is the name of another folder below checkpoint.root"),
        (
            TRAIN.replace("somewhere", "x, pack: {source: y, resolution: 64}") + "model: {resolution: 32}\n",
            "model.resolution is 32, but data.pack.resolution is 64",
        ),
        (
            TRAIN.replace("somewhere", "x, pack: {source: {train: y, heldout: z}, resolution: 32}, split: val"),
            "data.split is val, but data.pack.source has train, heldout",
        ),
    ],
)
def test_mistakes_are_named_with_file_line_key_and_remedy(job, text, message):
    with pytest.raises(ConfigError) as error:
        load_job(job(text))
    assert message in str(error.value)
    assert error.value.remedy


def test_a_missing_file_suggests_its_neighbour(job):
    path = job(TRAIN)
    with pytest.raises(ConfigError, match="did you mean .*job.yaml"):
        load_job(path.with_name("jab.yaml"))


def test_environment_and_overrides(job, monkeypatch):
    path = job(TRAIN + "seed: ${SEED:-3}\n")
    assert load_job(path).seed == 3
    monkeypatch.setenv("SEED", "")
    assert load_job(path).seed == 3, "as in a shell"
    monkeypatch.setenv("SEED", "5")
    assert load_job(path).seed == 5
    overrides = parse_overrides(["train.workers=2", "optim.lr_d=2e-4", "model.attention=[8]", "seed=7"])
    changed = load_job(path, overrides)
    assert (changed.train.workers, changed.optim.lr_d, changed.model.attention, changed.seed) == (2, 2e-4, (8,), 7)


def test_a_resolved_job_shows_every_default_and_resolves_to_itself(job, tmp_path):
    resolved = load_job(job(TRAIN))
    text = to_yaml(resolved)
    assert yaml.safe_load(text)["optim"]["lr_d"] == 4e-4
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert load_job(again) == resolved


SPACE = "{optim.lr_d: {loguniform: [1e-4, 1e-3]}, seed: {grid: [1, 2]}, data.flip: {choice: [true, false]}}"


@pytest.mark.parametrize(
    ("point", "problem"),
    [
        ("{optim.lr_d: 1e-2}", "optim.lr_d: '1e-2' is not a number from 0.0001 to 0.001"),
        ("{seed: 3}", "seed: 3 is not one of [1, 2]"),
        ("{seed: true}", "seed: True is not one of [1, 2]"),
        ("{data.flip: 1}", "data.flip: 1 is not one of [True, False]"),
        ("{optim.lr_g: 1e-4}", "optim.lr_g is not a key of the space"),
    ],
)
def test_an_initial_point_is_in_the_space(job, tmp_path, point, problem):
    job(TRAIN)
    sweep = tmp_path / "sweep.yaml"
    head = f"kind: tune\nname: s\nbase: job.yaml\nspace: {SPACE}\nsearch:\n  initial_points: "
    sweep.write_text(f"{head}[{{optim.lr_d: 1e-3, seed: 2, data.flip: true}}, {{optim.lr_d: 2e-4}}]\n")
    given = [load_job(sweep).point_of(point) for point in load_job(sweep).search.initial_points]
    assert given == [{"optim.lr_d": 1e-3, "seed": 2, "data.flip": True}, {"optim.lr_d": 2e-4}]
    sweep.write_text(f"{head}[{point}]\n")
    with pytest.raises(ConfigError) as caught:
        load_job(sweep)
    assert f"search.initial_points.0: {problem}" in caught.value.message


def test_a_sweep_is_checked_down_to_the_keys_of_its_space(job, tmp_path):
    job(TRAIN)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("kind: tune\nname: s\nbase: job.yaml\nspace:\n  optim.lrd: {grid: [1.0e-3, 1.0e-4]}\n")
    with pytest.raises(ConfigError, match=r"optim\.lrd is not a key of mine\n.*did you mean optim\.lr_d"):
        load_job(sweep)


def test_overrides_of_a_sweep_or_a_study_are_set_by_their_dotted_keys(job, tmp_path):
    job(TRAIN)
    sweep, study = tmp_path / "sweep.yaml", tmp_path / "study.yaml"
    sweep.write_text(POPULATION)
    loaded = load_job(sweep, parse_overrides(["overrides.train.kimg=16", "overrides.optim.n_dis=2"]))
    assert loaded.overrides == {"train.kimg": 16, "train.batch": 16, "optim.n_dis": 2}
    assert (trial_job(loaded, {}).optim.n_dis, trial_job(loaded, {}).train.batch) == (2, 16)
    study.write_text(STUDY)
    loaded = load_job(study, parse_overrides(["rows.more.overrides.train.batch=16"]))
    assert loaded.rows["more"].overrides == {"optim.n_dis": 2, "train.batch": 16}
    with pytest.raises(ConfigError, match="train.kimg is set by the study"):
        load_job(study, parse_overrides(["overrides.train.kimg=16"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("overrides: {optim: {n_dis: 2}}", "overrides.optim is a mapping, which would replace the whole section optim"),
        ("schedule: {grace_kimg: 9}", "schedule.grace_kimg is 9, but a trial has only 8 kimg"),
        (f"name: {49 * 's'}", "name is 'sss"),
        ("name: mlflow", "mlflow is the name of another folder"),
        ("space: {}", "space is {}"),
        ("space: {optim.lr_d: {choice: []}}", "space.optim.lr_d.choice is []"),
        ("space: {optim.lr_d: {choice: [1.0e-4, banana]}}", "optim.lr_d is 'banana'"),
        ("space: {model.channels_g: {uniform: [16, 64]}}", "model.channels_g is 31."),
        ("space: {evaluate.weights: {grid: [ema, raw]}}", "space.evaluate.weights: scores of trials with different"),
        ("space: {data.train: {grid: [a, b]}}", "space.data.train: scores of trials with different values"),
    ],
)
def test_a_sweep_that_could_not_end_is_refused_at_load(job, tmp_path, text, message):
    job(TRAIN)
    head = {"kind": "tune", "name": "s", "base": "job.yaml", "overrides": {"train.kimg": 8}}
    head["space"] = {"optim.lr_d": {"choice": [1.0e-4]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**head, **yaml.safe_load(text)}))
    with pytest.raises(ConfigError) as caught:
        load_job(tmp_path / "sweep.yaml")
    assert message in caught.value.message


POPULATION = """\
kind: tune
name: s
base: job.yaml
overrides: {train.kimg: 8, train.batch: 16}
space: {optim.lr_d: {loguniform: [1.0e-4, 1.0e-3]}, optim.beta1: {choice: [0.0, 0.5]}}
search: {trials: 5}
schedule: {pbt: {interval_kimg: 2}}
"""


def test_a_population_has_the_defaults_of_the_paper(job, tmp_path):
    job(TRAIN)
    (tmp_path / "sweep.yaml").write_text(POPULATION)
    pbt = load_job(tmp_path / "sweep.yaml").pbt
    assert (pbt.interval_kimg, pbt.fraction, pbt.factors) == (2, 0.2, (0.8, 1.2))
    given = load_job(tmp_path / "sweep.yaml", {"schedule.pbt": {"interval_kimg": 4, "factors": [0.5, 2]}}).pbt
    assert (given.interval_kimg, given.factors) == (4, (0.5, 2))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"schedule.grace_kimg": 2}, "sweep.yaml:7: schedule: give either grace_kimg, for ASHA, or pbt"),
        ({"schedule": {}}, "give either grace_kimg, for ASHA, or pbt"),
        ({"schedule.pbt.fraction": 0.6}, "schedule.pbt.fraction is 0.6"),
        ({"schedule.pbt.factors": [0.0, 1.2]}, "schedule.pbt.factors.0 is 0.0"),
        ({"schedule.pbt.interval_kimg": 5}, "interval_kimg is 5; it must be at least a step, 0.016, and at most half"),
        ({"schedule.pbt.interval_kimg": 0.01}, "interval_kimg is 0.01; it must be at least a step, 0.016"),
        ({"search.trials": 1}, "search.trials is 1; a population has at least 2 members"),
        ({"space": {"seed": {"choice": [0, 1]}}}, "space.seed: with schedule.pbt, the space has only keys of optim"),
        ({"space": {"optim.n_dis": {"choice": [1, 2]}}}, "space.optim.n_dis: with schedule.pbt, the space has only"),
        ({"space": {"optim.lr_d": {"grid": [1e-4, 1e-3]}}}, "space.optim.lr_d: with schedule.pbt, give `choice`"),
    ],
)
def test_a_population_that_cannot_be_is_refused_at_load(job, tmp_path, overrides, problem):
    job(TRAIN)
    (tmp_path / "sweep.yaml").write_text(POPULATION)
    with pytest.raises(ConfigError) as caught:
        load_job(tmp_path / "sweep.yaml", overrides)
    assert problem in caught.value.message


STUDY = """\
kind: study
name: s
base: job.yaml
seeds: [0, 1]
rows:
  none: {overrides: {model.attention: []}}
  more: {overrides: {optim.n_dis: 2}, kimg: 3, published: [{metric: fid, value: 3, source: a paper, protocol: theirs}]}
compare: {metrics: [fid], reference: none}
"""


def test_the_runs_of_a_study_are_jobs_of_their_own(job, tmp_path):
    """Study, row and seed make the name. The row's values win over those of the study, and these over the base's."""
    job(TRAIN)
    (tmp_path / "study.yaml").write_text(STUDY + "kimg: 2\noverrides: {optim.n_dis: 5, track.experiment: mine}\n")
    study = load_job(tmp_path / "study.yaml")
    none, more = row_job(study, "none", 0), row_job(study, "more", 1)
    assert (none.name, none.seed, none.train.kimg, none.optim.n_dis) == ("s-none-0", 0, 2, 5)
    assert (more.name, more.seed, more.train.kimg, more.optim.n_dis) == ("s-more-1", 1, 3, 2)
    assert (none.model.attention, more.model.attention) == ((), None)
    assert none.track.experiment == more.track.experiment == "mine"
    assert not none.track.register_model


def test_a_row_may_have_a_base_of_its_own_and_bases_are_relative_to_the_study(job, tmp_path):
    job(TRAIN)
    (tmp_path / "studies").mkdir()
    (tmp_path / "other.yaml").write_text(TRAIN.replace("16", "32"))
    path = tmp_path / "studies" / "study.yaml"
    path.write_text(
        STUDY.replace("base: job.yaml", "base: ../job.yaml").replace("none: {", "none: {base: ../other.yaml, ")
    )
    study = load_job(path)
    assert [row_job(study, row, 0).train.batch for row in study.rows] == [32, 16]


TUNING = "tune: {space: {optim.lr_d: {loguniform: [1.0e-4, 1.0e-3]}}, search: {trials: 4}, kimg: 1, seed: 7}\n"


def test_a_tuned_row_has_a_sweep_with_a_budget_and_a_seed_of_its_own(job, tmp_path):
    """The sweep has the values of the row. A row's `tune` replaces the study's. Settled values win over all others."""
    job(TRAIN)
    path = tmp_path / "study.yaml"
    own = "kimg: 3, tune: {space: {optim.lr_g: {choice: [1.0e-4]}}}"
    path.write_text(STUDY.replace("kimg: 3", own) + TUNING + "overrides: {optim.n_dis: 5}\n")
    study = load_job(path)
    none, more = row_sweep(study, "none"), row_sweep(study, "more", {"model.z_dim": 64})
    trial = trial_job(none, {"optim.lr_d": 5e-4})
    assert (none.name, none.search.trials) == ("s-none-tune", 4)
    assert (trial.seed, trial.train.kimg, trial.optim.n_dis, trial.optim.lr_d) == (7, 1, 5, 5e-4)
    assert trial.model.attention == ()
    assert not trial.track.register_model
    trial = trial_job(more, more.example)
    assert (trial.seed, trial.train.kimg, trial.optim.n_dis, trial.model.z_dim) == (1000, 3, 2, 64)
    assert row_job(study, "none", 1, {"optim.lr_d": 2e-4}).optim.lr_d == 2e-4
    path.write_text(STUDY)
    assert row_sweep(load_job(path), "none") is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 7", "seed: 1", "tune.seed 1 is one of seeds; give the trials of none another seed"),
        ("optim.lr_d", "optim.lrd", "rows.none: tune.space: optim.lrd is not a key of s-none-0"),
        ("optim.lr_d", "train.kimg", "tune.space: train.kimg is set by the study"),
        ("trials: 4", "trials: 4, initial_points: [{optim.lr_d: 1}]", "search.initial_points.0: optim.lr_d: 1"),
        ("loguniform", "loguni", "tune.space.optim.lr_d.loguni is not a key"),
        ("loguniform: [", "choice: [-1, ", "optim.lr_d is -1"),
        ("kimg: 1", "kimg: 1, schedule: {grace_kimg: 2}", "rows.none: s-none-tune: schedule.grace_kimg is 2, but a"),
        (
            "kimg: 1",
            "kimg: 1, schedule: {pbt: {interval_kimg: 0.1}}",
            "tune.schedule: pbt changes the values while a trial trains",
        ),
    ],
)
def test_the_tuning_of_a_study_is_checked_before_it_starts(job, tmp_path, old, new, message):
    job(TRAIN)
    path = tmp_path / "study.yaml"
    path.write_text(STUDY + TUNING.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_job(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("reference: none", "reference: nome", "compare.reference: nome is not a row; the rows are none, more"),
        ("  more:", "  none:", "study.yaml:7: none occurs twice"),
        ("[0, 1]", "[0, 1, 0]", "seeds: 0 occurs twice"),
        ("[0, 1]", "[]", "study.yaml:4: seeds is []"),
        ("[0, 1]", "[-1]", "study.yaml:4: seeds.0 is -1"),
        ("  more:", "  More:", "rows.More"),
        ("n_dis", "n_dsi", "study.yaml: rows.more: "),
        ("n_dis", "n_dsi", "optim.n_dsi is not a key; did you mean optim.n_dis?"),
        ("optim.n_dis: 2", "optim.n_dis: 0", "rows.more: "),
        ("optim.n_dis: 2", "optim: {n_dis: 2}", "rows.more.overrides.optim is a mapping, which would replace"),
        ("optim.n_dis: 2", "seed: 2", "rows.more.overrides: seed is set by the study; remove it and use `seeds`"),
        ("optim.n_dis: 2", "train.kimg: 2", "rows.more.overrides: train.kimg is set by the study"),
        ("source: a paper, ", "", "rows.more.published.0.source is missing"),
        ("source: a paper", "source: ''", "rows.more.published.0.source is "),
        (", protocol: theirs", "", "rows.more.published.0.protocol is missing"),
        ("metric: fid, value", "metric: isc, value", "rows.more.published: isc is not one of compare.metrics"),
        ("base: job.yaml", "base: jab.yaml", "did you mean"),
        ("n_dis: 2", "n_dis: 2, checkpoint.root: s3://other", "differ in checkpoint.root"),
        ("name: s\n", f"name: {60 * 's'}\n", "rows.none: "),
    ],
)
def test_a_study_is_checked_down_to_every_run_before_it_starts(job, tmp_path, old, new, message):
    job(TRAIN)
    path = tmp_path / "study.yaml"
    assert old in STUDY
    path.write_text(STUDY.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_job(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "override",
    ["data.lanes=99999999999", "data.window=1e30", "train.kimg=1e300", "train.batch=2000000", "train.workers=99999"],
)
def test_a_number_that_would_take_all_memory_is_refused(job, override):
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load_job(job(TRAIN), parse_overrides(["train.batch=100000", override]))


def test_overrides_obey_the_same_rules(job):
    for override, message in (
        ("train.kimg=.inf", "train.kimg: .inf is not a finite number"),
        ("train.kimg=[1", "train.kimg: "),
        ("train.kimg=&a [*a]", "train.kimg: it is not YAML"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_job(job(TRAIN), parse_overrides([override]))


@pytest.mark.parametrize(
    "line",
    [
        "seed: ${PW}",
        "optim: {lr_d: '${PW}'}",
        "evaluate: {extractor: classifier, resize: '${PW}'}",
        "evaluate: {extractor: '${PW}', resize: clean}",
        "evaluate: {extractor: ['${PW}']}",
        "track: {uri: 'https://user:${PW}@host', experiment: [1]}",
        "track: {experiment: ['https://user:${PW}@host']}",
    ],
)
@pytest.mark.parametrize("secret", ["hunter2", "it's: [a\\b", "pa@ss w0rd", "&x *x"])
def test_the_value_of_a_variable_is_never_quoted(job, monkeypatch, line, secret):
    monkeypatch.setenv("PW", secret)
    with pytest.raises(ConfigError) as refused:
        load_job(job(f"{TRAIN}{line}\n"))
    text = str(refused.value)
    assert secret not in text
    assert repr(secret)[1:-1] not in text
    assert secret.split()[-1] not in text


def test_a_job_is_read_without_what_takes_seconds_to_import():
    code = (
        "import sys; import pipeline.cli; from pipeline.config.job_file import load_job; "
        "load_job('jobs/quickstart.yaml'); print({'torch', 'ray', 'mlflow'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
