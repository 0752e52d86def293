"""A path is made absolute where the command is given: workers, actors and tasks run in other folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config.job_file import load_job, parse_job
from pipeline.config.locations import sqlite_database
from pipeline.errors import ConfigError, UsageError
from pipeline.tracking.mlflow_run import client, default_uri

TRAIN = "kind: train\nname: t\ndata: {train: coll}\ntrain: {kimg: 1}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sqlite:///mlflow.db", "sqlite:///{here}/mlflow.db"),
        ("sqlite:///./a/../mlflow.db", "sqlite:///{here}/a/../mlflow.db"),
        ("sqlite+pysqlite:///mlflow.db", "sqlite+pysqlite:///{here}/mlflow.db"),
        ("sqlite:////abs/mlflow.db", "sqlite:////abs/mlflow.db"),
        ("./mlruns", "{here}/mlruns"),
        ("mlruns", "{here}/mlruns"),
        ("file:mlruns", "file:{here}/mlruns"),
        ("file:///abs/mlruns", "file:///abs/mlruns"),
        ("http://host:5000", "http://host:5000"),
        ("postgresql+psycopg2://host/db", "postgresql+psycopg2://host/db"),
        ("databricks", "databricks"),
        ("databricks://profile", "databricks://profile"),
    ],
)
def test_a_tracking_uri_is_absolute_in_a_job_and_in_the_environment(
    here: Path, monkeypatch: pytest.MonkeyPatch, given: str, expected: str
) -> None:
    expected = expected.format(here=here)
    (here / "job.yaml").write_text(TRAIN)
    job: Any = load_job("job.yaml", {"track.uri": given})
    assert job.track.uri == expected
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert default_uri() == expected


@pytest.mark.parametrize("name", ["50% off?", "%20", "a?b=c"])
def test_a_folder_is_quoted_in_the_uri_of_a_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In such a URI `?` begins parameters and `%` an escape: the database of another folder was used."""
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert sqlite_database(default_uri()) == tmp_path / name / "runs" / "mlflow.db"
    assert make_url(default_uri()).database == f"{tmp_path}/{name}/runs/mlflow.db"
    monkeypatch.setenv("HOME", str(tmp_path / name))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///~/mlflow.db?timeout=5")
    assert make_url(default_uri()).database == f"{tmp_path}/{name}/mlflow.db"


def test_a_question_mark_that_begins_no_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="question mark") as caught:
        client(f"sqlite:///{tmp_path}/what?/mlflow.db")
    assert "%3F" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_without_a_tracking_uri_the_database_is_below_the_current_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_uri() == f"sqlite:///{here}/runs/mlflow.db"


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("data.train", "sets/[1] #2", "{here}/sets/[1] #2"),
        ("data.train", "~/set", "/home/somebody/set"),
        ("data.train", "file://set", "file://{here}/set"),
        ("data.cache", "cache", "{here}/cache"),
        ("data.cache", "~/cache", "~/cache"),  # each node has a home folder of its own
        ("checkpoint.root", "runs", "{here}/runs"),
        ("checkpoint.root", "s3://b/runs", "s3://b/runs"),
        ("track.artifacts", "artifacts", "{here}/artifacts"),
        ("evaluate.extractor", "net.ts", "{here}/net.ts"),
        ("evaluate.extractor", "clip-vit-b-32", "clip-vit-b-32"),
        ("evaluate.extractor_weights", "weights.pth", "{here}/weights.pth"),
    ],
)
def test_a_path_of_a_training_job_is_absolute(here: Path, key: str, given: str, expected: str) -> None:
    (here / "job.yaml").write_text(TRAIN)
    section, name = key.split(".")
    job = load_job("job.yaml", {key: given})
    assert getattr(getattr(job, section), name) == expected.format(here=here)


@pytest.mark.parametrize(("given", "expected"), [("pulled", "{here}/pulled"), ("models:/m@champion",) * 2])
def test_a_path_of_other_jobs_is_absolute(here: Path, given: str, expected: str) -> None:
    job: Any = parse_job({"kind": "evaluate", "name": "e", "model": given, "reference": "set"}, "test")
    assert (job.model, job.reference) == (expected.format(here=here), f"{here}/set")


def test_the_base_of_a_sweep_is_absolute(here: Path) -> None:
    (here / "jobs").mkdir()
    (here / "jobs" / "base.yaml").write_text(TRAIN)
    (here / "jobs" / "sweep.yaml").write_text("kind: tune\nname: s\nbase: base.yaml\nspace: {seed: {grid: [1, 2]}}\n")
    job: Any = load_job("jobs/sweep.yaml")
    assert job.base == f"{here}/jobs/base.yaml"


@pytest.mark.parametrize("key", ["data.train", "init.source", "checkpoint.root", "track.uri", "track.artifacts"])
@pytest.mark.parametrize("prefix", ["", "file://", "sqlite:///"])
def test_the_home_folder_of_nobody_is_refused_by_its_key(here: Path, key: str, prefix: str) -> None:
    (here / "job.yaml").write_text(TRAIN)
    with pytest.raises(ConfigError, match=f"{key}: .* there is no user nosuchuser"):
        load_job("job.yaml", {key: f"{prefix}~nosuchuser/x"})


@pytest.mark.parametrize(
    "command",
    [
        ["prune", "~nosuchuser/x"],
        ["status", "~nosuchuser/x"],
        ["pull", "models:/m@champion", "~nosuchuser/x"],
        ["pull", "models:/m@champion", "~nosuchuser/x", "--checkpoint"],
        ["run", "job.yaml", "evaluate.extractor=~nosuchuser/x.ts"],
    ],
)
def test_the_home_folder_of_nobody_is_refused_in_commands(here: Path, command: list[str]) -> None:
    (here / "job.yaml").write_text(TRAIN)
    with pytest.raises(UsageError, match="there is no user nosuchuser") as caught:
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert caught.value.remedy


def test_the_home_folder_of_nobody_holds_no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "~nosuchuser/mlruns")
    with pytest.raises(UsageError, match="there is no user nosuchuser"):
        default_uri()
