"""Editors check job files against jobs/schema.json: it is current, every shipped job names it, and it is right."""

import json

import pytest
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from pipeline.config.job_file import load_job, to_yaml
from pipeline.config.json_schema import job_schema
from tests.shipped_jobs import JOBS, STUDIES

FILES = [*sorted(JOBS.glob("*.yaml")), *STUDIES]
VALIDATOR = Draft202012Validator(job_schema())
TRAIN = "kind: train\nname: mine\ndata: {train: somewhere}\ntrain: {kimg: 1}\n"


def mistake(text):
    """Where the schema finds a mistake in a job file; None where there is none."""
    error = best_match(VALIDATOR.iter_errors(yaml.safe_load(text)))
    return error and error.json_path


def test_the_file_is_current():
    assert json.loads((JOBS / "schema.json").read_text()) == job_schema(), "run `make schema`"


def test_the_schema_is_a_schema():
    Draft202012Validator.check_schema(job_schema())


def test_the_schema_is_the_same_wherever_it_is_made(monkeypatch, tmp_path):
    here = job_schema()
    monkeypatch.chdir(tmp_path)
    assert job_schema() == here
    assert str(JOBS.parent) not in json.dumps(here)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_shipped_job_names_the_schema_and_satisfies_it(path):
    schema = "schema.json" if path.parent == JOBS else "../schema.json"
    assert path.read_text().splitlines()[1] == f"# yaml-language-server: $schema={schema}"
    assert mistake(path.read_text()) is None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_shipped_job_with_every_default_visible_satisfies_it(path):
    assert mistake(to_yaml(load_job(path))) is None


@pytest.mark.parametrize(
    "text",
    [
        "kind: pack\nname: p\ndestination: s3://b/p\npack: {source: {train: a.tar, heldout: b.tar}, resolution: 32}\n",
        "kind: evaluate\nname: e\nmodel: models:/m@champion\nreference: s3://b/p\nevaluate: {standing_images: null}\n",
        TRAIN + "track: {register: false, model: mine}\nresources: {env: {NCCL_DEBUG: INFO}}\n",
        TRAIN + "model: {attention: [32, 64]}\noptim: {lr_decay_kimg: [0.5, 1]}\n",
        TRAIN + "seed: ${SEED:-3}\nmodel: {attention: '${SIZES}', thin_d: '${THIN}', attention_form: '${FORM}'}\n",
        TRAIN.replace("mine", "${USER}-run"),
        "kind: tune\nname: t\nbase: b.yaml\nspace: {optim.lr_d: {grid: [1.0e-3]}, seed: {choice: [0, 1]}}\n",
        "kind: study\nname: s\nbase: b.yaml\nseeds: [0]\nrows: {a: {overrides: {model.attention: []}}}\n"
        "compare: {metrics: [fid], reference: a}\n",
    ],
)
def test_a_job_of_any_kind_with_variables_satisfies_it(text):
    assert mistake(text) is None


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (TRAIN.replace("kind: train\n", ""), "$"),
        (TRAIN.replace("kind: train", "kind: trian"), "$.kind"),
        (TRAIN + "sede: 1\n", "$"),
        (TRAIN + "seed: many\n", "$.seed"),
        (TRAIN + "seed: -1\n", "$.seed"),
        (TRAIN + "model: {classes: 10}\n", "$.model"),
        (TRAIN + "optim: {lr_decay_kimg: [1]}\n", "$.optim.lr_decay_kimg"),
        (TRAIN + "track: {register_model: false}\n", "$.track"),
        (TRAIN.replace("kimg: 1", "batch: 64"), "$.train"),
        (TRAIN.replace("mine", "Mine"), "$.name"),
    ],
)
def test_a_mistake_is_found_at_its_key(text, place):
    assert mistake(text) == place


def test_every_key_has_a_description():
    """Sections are described by their own text, and `kind` by its only value."""

    def undescribed(schema, path=""):
        for name, value in schema.get("properties", {}).items():
            described = "description" in value or "$ref" in value or "const" in value or "allOf" in value
            yield from [] if described else [f"{path}.{name}"]

    missing = [key for name, part in job_schema()["$defs"].items() for key in undescribed(part, name)]
    assert missing == []
