"""Text from the command line, from variables and from job files arrives as it was written, or is refused clearly."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.job_file import load_job, parse_overrides, to_yaml
from pipeline.config.locations import absolute
from pipeline.config.schema import Job
from pipeline.errors import ConfigError
from tests.document_blocks import ROOT

TRAIN = "kind: train\nname: t\ndata: {train: coll}\ntrain: {kimg: 1, batch: 16}\n"
PACK = "kind: pack\nname: p\ndestination: out\npack: {source: digits, resolution: 32}\n"
EVALUATE = "kind: evaluate\nname: e\nmodel: m\nreference: set\n"

ODD = [*"[]*?#%+&'\"$@!{}é,:;|>`=-~\\()<^\t\n", " ", " #", ": ", "${", "{a}", "&a ", "!!int ", "*a"]
TEXTS = [
    *(f"a{odd}b" for odd in ODD),
    *(f"{odd}b" for odd in "[*?#%&'\"@!{,:|>`-"),
    *("true", "no", "1e3", "0o17", "3", "4:4:4", "2024-01-01", "'quoted'", '"quoted"', "~x", ".inf", "x: y"),
    "exp #2",
]
KEYS = [  # (job, key, whether it is a path or URL)
    (TRAIN, "data.train", True),
    (TRAIN, "data.split", False),
    (TRAIN, "data.cache", True),
    (TRAIN, "checkpoint.root", True),
    (TRAIN, "evaluate.extractor_weights", True),
    (TRAIN, "evaluate.split", False),
    (TRAIN, "evaluate.score", False),
    (TRAIN, "track.uri", True),
    (TRAIN, "track.experiment", False),
    (TRAIN, "track.artifacts", True),
    (TRAIN, "resources.env.NCCL_DEBUG", False),
    (PACK, "destination", True),
    (PACK, "pack.source", False),
    (PACK, "pack.exclude", True),
    (EVALUATE, "model", True),
    (EVALUATE, "reference", True),
]


def value_of(job: Job, key: str) -> Any:
    value: Any = job.model_dump(by_alias=True)
    for part in key.split("."):
        value = value[part]
    return value


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HOME", "/home/somebody")

    def write(text: str) -> Path:
        (tmp_path / "job.yaml").write_text(text)
        return tmp_path / "job.yaml"

    return write


@pytest.mark.parametrize(("job", "key", "is_path"), KEYS, ids=[key for _, key, _ in KEYS])
def test_a_text_is_taken_verbatim(
    write: Any, monkeypatch: pytest.MonkeyPatch, job: str, key: str, is_path: bool
) -> None:
    """On the command line, in a variable, in a part of a value, and again in the job that `sagan config` prints."""
    values = yaml.safe_load(job)
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section.setdefault(parent, {})
    for text in TEXTS:
        rooted = f"s3://bucket/{text}" if is_path else text
        given = load_job(write(job), parse_overrides([f"{key}={rooted}"]))
        assert value_of(given, key) == rooted, text

        monkeypatch.setenv("SOMETHING", text)
        section[last] = "s3://bucket/${SOMETHING}" if is_path else "${SOMETHING}"
        from_variable = load_job(write(yaml.safe_dump(values)))
        assert value_of(from_variable, key) == rooted, text

        if is_path and key not in ("data.cache", "track.uri") and "~" not in text and "://" not in text:
            relative = load_job(write(job), parse_overrides([f"{key}={text}"]))
            assert value_of(relative, key) == absolute(text), text
        if key in ("track.experiment", "data.train"):
            assert load_job(write(to_yaml(given))) == given, text


@pytest.mark.parametrize("text", ["exp #2", "[x]/y: '$HOME' é"])
def test_the_command_line_takes_a_quoted_value_verbatim(write: Any, tmp_path: Path, text: str) -> None:
    """Through a shell, as a person writes it."""
    path = write(TRAIN + "track: {experiment: '${EXPERIMENT:-x}'}\n")
    root = shlex.quote(f"checkpoint.root={tmp_path}/{text}")
    command = f"EXPERIMENT={shlex.quote(text)} {sys.executable} -m pipeline config {path} {root}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, cwd=ROOT)
    job = yaml.safe_load(done.stdout)
    assert (job["track"]["experiment"], job["checkpoint"]["root"]) == (text, f"{tmp_path}/{text}")


@pytest.mark.parametrize("text", [text for text in TEXTS if not text.isdigit() and text not in ("true", "no", "1e3")])
def test_a_name_with_an_odd_character_is_refused_with_its_key(
    write: Any, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    if set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") and text[0] not in "._-":
        assert load_job(write(TRAIN), parse_overrides([f"name={text}"])).name == text
        return
    monkeypatch.setenv("SOMETHING", text)
    for path, overrides in ((write(TRAIN), [f"name={text}"]), (write(TRAIN.replace("t\n", "${SOMETHING}\n", 1)), [])):
        if overrides:
            with pytest.raises(ConfigError, match="name is "):
                load_job(path, parse_overrides(overrides))
    with pytest.raises(ConfigError, match=r"track\.model is "):
        load_job(write(TRAIN), parse_overrides([f"track.model={text}"]))


@pytest.mark.parametrize("text", ["[", "{a", "'x", "%x", "@home", "*a", "!x y", "&a *a", "many", "a: b: c"])
@pytest.mark.parametrize("key", ["train.kimg", "model.attention", "data.flip", "data.pack", "optim.lr_d", "seed"])
def test_a_value_that_is_no_yaml_of_its_type_is_refused_with_its_key(
    write: Any, monkeypatch: pytest.MonkeyPatch, key: str, text: str
) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        load_job(write(TRAIN), parse_overrides([f"{key}={text}"]))
    monkeypatch.setenv("SOMETHING", text)
    section, _, name = key.rpartition(".")
    values = yaml.safe_load(TRAIN)
    (values.setdefault(section, {}) if section else values)[name] = "${SOMETHING}"
    with pytest.raises(ConfigError, match=rf"job\.yaml:\d+: .*{name}"):
        load_job(write(yaml.safe_dump(values)))


def test_other_types_are_yaml_and_a_scalar_of_a_job_file_is_what_its_key_takes(
    write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train.workers=2", "model.attention=[8]", "data.flip=true", "optim.lr_d=2e-4", "data.train=3"]
    arguments += ["evaluate.standing_images=null", "track.model=null", "data.pack={source: digits, chroma: '4:2:0'}"]
    job: Any = load_job(
        write(TRAIN + "track: {experiment: 3, uri: ~}\nresources: {env: {A: 1, B: no}}\n"), parse_overrides(arguments)
    )
    assert (job.train.workers, job.model.attention, job.data.flip, job.optim.lr_d) == (2, (8,), True, 2e-4)
    assert job.data.train == absolute("3")
    assert (job.evaluate.standing_images, job.track.model, job.track.uri) == (None, None, None)
    assert job.data.pack.chroma == "4:2:0"
    assert (job.track.experiment, job.resources.env) == ("3", {"A": "1", "B": "no"})
    chroma: Any = load_job(write(PACK), parse_overrides(["pack.chroma=4:2:0", "pack.source={train: a, heldout: b #2}"]))
    assert chroma.pack.chroma == "4:2:0"
    sources: Any = load_job(write(PACK), parse_overrides(["pack.source={train: a, heldout: 'b #2'}"]))
    assert sources.pack.source == {"train": "a", "heldout": "b #2"}


def test_text_in_a_sweep_has_the_type_of_the_key_of_its_base(write: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "base.yaml").write_text(TRAIN)
    monkeypatch.setenv("SOMETHING", "[x] #2")
    sweep: Any = load_job(
        write(
            "kind: tune\nname: s\nbase: base.yaml\nspace: {optim.lr_d: {grid: [1.0e-3, 2.0e-3]}}\n"
            "overrides: {track.experiment: '${SOMETHING}', track.artifacts: 3, train.kimg: 2, model.attention: [8]}\n"
        )
    )
    assert sweep.overrides["track.experiment"] == "[x] #2"
    assert sweep.overrides["track.artifacts"] == "3"
    assert (sweep.overrides["train.kimg"], sweep.overrides["model.attention"]) == (2, [8])
    assert sweep.space["optim.lr_d"].grid == [1e-3, 2e-3]
    assert json.dumps(sweep.overrides)


def test_a_job_file_that_is_not_utf8_or_has_a_foreign_tag_is_refused(write: Any) -> None:
    path = write("")
    path.write_bytes(TRAIN.replace("t\n", "\xe9\n", 1).encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_job(path)
    with pytest.raises(ConfigError, match=r"job\.yaml:\d+: could not determine a constructor"):
        load_job(write(TRAIN + "seed: !foreign 3\n"))
    with pytest.raises(ConfigError, match="holds no keys"):
        load_job(write("- a\n"), parse_overrides(["seed=3"]))
