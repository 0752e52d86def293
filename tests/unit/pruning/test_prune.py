"""A prune lists and deletes what nobody needs, and keeps what an alias, a run or a version names."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.collection.manifest import MANIFEST, Collection
from pipeline.config.job_file import parse_job
from pipeline.config.schema import TrainJob
from pipeline.errors import EnvironmentFault, UsageError
from pipeline.pruning.prune import Prune
from pipeline.pruning.verdict import Verdict
from pipeline.runs.checkpoints import StoredCheckpoint
from pipeline.runs.json_records import (
    GenerationRecord,
    Lineage,
    Member,
    RecordedData,
    RecordedEvaluation,
    RecordedInit,
    RunRecord,
    ScoreRecord,
    StudyRecord,
    SweepRecord,
)
from pipeline.runs.owner import claim
from pipeline.runs.score_protocol import Score
from pipeline.runs.stored_run import StoredRun, StoredStudy, StoredSweep
from pipeline.storage import file_sets, files
from pipeline.tracking import registry
from pipeline.tracking.mlflow_run import MlflowRun, client
from pipeline.tracking.registry import CHAMPION
from sagan.trained_model import Model
from tests.tracker_database import tracker_database
from tests.unit.evaluation.conftest import NETWORKS, commit_checkpoint
from tests.unit.score_protocol import PROTOCOL


class Place:
    """A bucket with runs, and a tracker with its registry."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.bucket, self.uri, self._model = str(folder / "bucket"), tracker_database(folder), model
        self._artifacts = str(folder / "artifacts")

    def prune(self, **keep: int) -> Prune:
        return Prune(self.uri, self.bucket, **{"keep_versions": 1, "keep_checkpoints": 1, **keep})

    def job(self, name: str) -> TrainJob:
        values = {
            "kind": "train",
            "name": name,
            "data": {"train": "/nowhere"},
            "model": NETWORKS.to_dict(),
            "train": {"kimg": 1},
            "checkpoint": {"root": f"{self.bucket}/runs"},
        }
        job = parse_job(values, "test")
        assert isinstance(job, TrainJob)
        return job

    def run(self, name: str, *images: int, recorded: RecordedInit | None = None, **tags: str) -> list[StoredCheckpoint]:
        """Make a run with checkpoints at some positions."""
        job = self.job(name)
        tracker = MlflowRun.start(self.uri, "sagan", name, None, {}, tags, self._artifacts)
        tracker.close(timeout_s=10)
        data, evaluate = RecordedData.of(job.data), RecordedEvaluation.of(job.evaluate)
        StoredRun.of(job).write_record(
            RunRecord(name=name, method={}, mlflow_run_id=tracker.run_id, data=data, evaluate=evaluate, init=recorded)
        )
        return [commit_checkpoint(job, position, to_score=False) for position in images]

    def register(self, name: str, checkpoint: StoredCheckpoint, **tags: str) -> int:
        """Register a version whose model was exported from a checkpoint."""
        manifest, run = file_sets.read_manifest(checkpoint.url), StoredRun.of_checkpoint(checkpoint.url)
        assert manifest is not None
        assert run is not None
        record = run.record()
        assert record is not None
        own = {"metric": "fd/1", "fd/1": "1.0", "better": "lower"}
        own |= {"checkpoint": checkpoint.url, "checkpoint_sha256": manifest.digest}
        return registry.register(self.uri, name, self._model, record.mlflow_run_id, own | tags)

    def versions(self, name: str) -> list[int]:
        return [version.number for version in registry.versions(self.uri, name)]

    def files_of(self, name: str, number: int) -> Path:
        return files.local_path(client(self.uri).get_model_version(name, str(number)).source)


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty tracker's database; making one takes seconds."""
    path = tmp_path_factory.mktemp("tracker") / "mlflow.db"
    client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def exported(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is ready to register."""
    folder = tmp_path_factory.mktemp("model")
    model.save(folder)
    Image.new("RGB", (32, 32)).save(folder / "samples.png")
    return folder


@pytest.fixture
def place(tracker: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copy(tracker, tmp_path / "mlflow.db")
    place = Place(tmp_path, exported)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.uri)
    return place


def delete(prune: Prune, plan: list[Verdict] | None = None) -> list[Verdict]:
    return list(prune.delete(prune.plan() if plan is None else plan, lambda line: None))


def gone(verdicts: Iterable[Verdict]) -> set[str]:
    return {verdict.name for verdict in verdicts if verdict.goes}


def reason(verdicts: Iterable[Verdict], name: str) -> str:
    """Why something is kept."""
    (verdict,) = [verdict for verdict in verdicts if verdict.name == name]
    assert not verdict.goes
    return verdict.reason


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- versions --------------------------------------------------------------------------------------------------------


def test_old_versions_go_with_their_files_and_the_champion_stays(place: Place, tmp_path: Path) -> None:
    for checkpoint in place.run("a", 1000, 2000, 3000, 4000):
        place.register("a", checkpoint)
    client(place.uri).set_registered_model_alias("a", CHAMPION, "1")
    folders = {number: place.files_of("a", number) for number in place.versions("a")}

    plan = place.prune().plan()
    assert {"models:/a/2", "models:/a/3"} == {name for name in gone(plan) if name.startswith("models:")}
    assert (reason(plan, "models:/a/1"), reason(plan, "models:/a/4")) == (
        "alias champion",
        "one of the newest 1 versions",
    )
    sizes = {verdict.name: verdict.size for verdict in plan if verdict.goes}
    assert sizes["models:/a/2"] == size(folders[2])
    assert place.versions("a") == [1, 2, 3, 4], "a plan changes nothing"

    assert gone(delete(place.prune(), plan)) == gone(plan)
    assert place.versions("a") == [1, 4]
    assert [number for number, folder in folders.items() if folder.exists()] == [1, 4]
    assert registry.pull(place.uri, "models:/a@champion", tmp_path / "pulled")
    for number in (1, 4):
        registry.pull_checkpoint(place.uri, f"models:/a/{number}", tmp_path / f"state-{number}")
    assert gone(place.prune().plan()) == set()


def test_what_somebody_names_is_kept(place: Place) -> None:
    for checkpoint in place.run("a", 1000, 2000, 3000, 4000, 5000, 6000, 7000):
        place.register("a", checkpoint)
    init = RecordedInit(source="models:/a@old", version="1", sha256="ef" * 32, taken=[], skipped=[])
    (tuned,) = place.run("tuned", 1000, recorded=init)
    place.run("elsewhere", init="models:/a/2")  # as a run in another bucket tells the tracker
    place.register("tuned", tuned, init="models:/a/3")
    mlflow = client(place.uri)
    mlflow.copy_model_version("models:/a/4", "copies")
    mlflow.set_model_version_tag("a", "5", "withdrawn", "it shows memorised images")
    plan = place.prune().plan()
    assert {n: reason(plan, f"models:/a/{n}") for n in (1, 2, 3, 4, 7)} == {
        1: "tuned started from it",
        2: "elsewhere started from it",
        3: "models:/tuned/1 started from it",
        4: "another version has the same files",
        7: "one of the newest 1 versions",
    }
    assert "withdrawn" in reason(plan, "models:/a/5")
    delete(place.prune(), plan)
    assert place.versions("a") == [1, 2, 3, 4, 5, 7]


def test_what_a_study_starts_its_runs_from_is_kept(place: Place) -> None:
    """The next row of the study may start from it. No run has started from it yet."""
    first, *_ = checkpoints = place.run("a", 1000, 2000, 3000)
    study = StoredStudy(f"{place.bucket}/runs/studies/recipe")
    record = StudyRecord(name="recipe", mlflow_run_id="0", init_versions={f"{place.bucket}/runs/a": first.name})
    study.write_record(record)
    assert reason(place.prune().plan(), first.url) == "the study recipe started from it"
    for checkpoint in checkpoints:
        place.register("a", checkpoint)
    study.write_record(record.model_copy(update={"init_versions": {"models:/a@old": "1"}}))
    plan = place.prune().plan()
    assert reason(plan, "models:/a/1") == "the study recipe started from it"
    assert "models:/a/2" in gone(plan)


def test_a_version_that_no_run_of_sagan_registered_is_kept(place: Place) -> None:
    place.run("a")
    mlflow = client(place.uri)
    mlflow.create_registered_model("theirs")
    for _ in range(3):
        mlflow.create_model_version("theirs", place.bucket, await_creation_for=0)
    assert reason(place.prune().plan(), "models:/theirs/1") == "no run of sagan registered it"
    assert delete(place.prune()) == []


def test_a_version_that_gets_an_alias_after_the_plan_is_kept(place: Place) -> None:
    for checkpoint in place.run("a", 1000, 2000, 3000):
        place.register("a", checkpoint)
    plan = place.prune().plan()
    client(place.uri).set_registered_model_alias("a", "best", "1")
    done = delete(place.prune(), plan)
    assert reason(done, "models:/a/1") == "alias best"
    assert place.versions("a") == [1, 3]
    named = registry.versions(place.uri, "a")[0].tags["checkpoint"]
    assert reason(done, named) == "models:/a/1 names it"


def test_the_next_prune_deletes_what_an_interrupted_one_has_left(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for checkpoint in place.run("a", 1000, 2000):
        place.register("a", checkpoint)
    folder = place.files_of("a", 1)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # Ctrl-C between the version and its files
        patch.setattr(LocalArtifactRepository, "delete_artifacts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            delete(place.prune())
    assert (place.versions("a"), folder.exists()) == ([2], True)
    plan = place.prune().plan()
    (left,) = [verdict for verdict in plan if verdict.kind == "files"]
    assert left.size == size(folder)
    delete(place.prune(), plan)
    assert not folder.exists()
    assert gone(place.prune().plan()) == set()


def test_a_folder_that_is_not_one_of_a_model_is_not_deleted(place: Place, tmp_path: Path) -> None:
    """A tracker may name any folder as the place of a model's files."""
    for checkpoint in place.run("a", 1000, 2000):
        place.register("a", checkpoint)
    (tmp_path / "photos").mkdir()
    for table, column in (("logged_models", "artifact_location"), ("model_versions", "source")):
        with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
            database.execute(f"UPDATE {table} SET {column} = ?", (str(tmp_path / "photos"),))  # noqa: S608
        plan = place.prune().plan()
        assert not any(verdict.goes and verdict.kind == "version" for verdict in plan)
        delete(place.prune(), plan)
        assert (tmp_path / "photos").exists()


# --- checkpoints -----------------------------------------------------------------------------------------------------


def score(run: StoredRun, checkpoint: StoredCheckpoint, value: float) -> None:
    values = {"fd_x": value}
    record = ScoreRecord(
        checkpoint=checkpoint.name,
        images=checkpoint.images,
        score=Score.of(PROTOCOL, "fd_x", False, values),
        seconds=1.0,
        time_ms=checkpoint.images,
    )
    run.write_score(record)


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_old_checkpoints_go_and_what_the_run_or_another_needs_stays(
    place: Place, where: str, request: pytest.FixtureRequest
) -> None:
    if where == "bucket":
        place.bucket = request.getfixturevalue("s3").bucket()
    first, second, third, fourth, fifth = place.run("a", 1000, 2000, 3000, 4000, 5000)
    run = StoredRun.of(place.job("a"))
    score(run, second, 1.0)
    score(run, third, 2.0)
    source = RecordedInit(source=run.url, version=first.name, sha256="ef" * 32, taken=[], skipped=[])
    place.run("tuned", recorded=source)
    waiting = commit_checkpoint(place.job("a"), 4500)
    plan = place.prune().plan()
    assert gone(plan) == {third.url, fourth.url}
    assert reason(plan, first.url) == "tuned started from it"
    assert reason(plan, second.url) == "it has the best score"
    assert reason(plan, waiting.url) == "it waits for a score"
    assert gone(delete(place.prune(), plan)) == gone(plan)
    assert [checkpoint.url for checkpoint in run.checkpoints()] == [first.url, second.url, waiting.url, fifth.url]


def test_a_checkpoint_that_a_population_is_to_clone_stays(place: Place) -> None:
    """The clone is decided, and has not started. It is no run yet."""
    first, second, _ = place.run("pop-g0m0", 1000, 2000, 3000)
    sweep = StoredSweep(f"{place.bucket}/runs/pop")
    sweep.write_record(SweepRecord(name="pop", mlflow_run_id="0", method={}))
    parent = Lineage(run="pop-g0m0", checkpoint=second.name, generation=1)
    members = [Member(name="pop-g0m0", point={}, parent=None), Member(name="pop-g1m1", point={}, parent=parent)]
    sweep.write_generation(GenerationRecord(number=1, members=members))
    plan = place.prune().plan()
    assert gone(plan) == {first.url}
    assert reason(plan, second.url) == "pop-g1m1 starts from it"


def test_a_source_is_known_by_its_digest_wherever_it_is(place: Place) -> None:
    from pipeline.tracking.init_source import checkpoint_digest

    first, _ = place.run("a", 1000, 2000)
    manifest = file_sets.read_manifest(first.url)
    assert manifest is not None
    place.run("tuned", init="s3://elsewhere/runs/a/checkpoints/1", init_sha256=checkpoint_digest(manifest, first.url))
    assert reason(place.prune().plan(), first.url) == "tuned started from it"


def test_what_was_left_of_an_upload_goes(place: Place) -> None:
    first, _ = place.run("a", 1000, 2000)
    files.delete(files.join(first.url, file_sets.MANIFEST))
    (left,) = [verdict for verdict in delete(place.prune()) if verdict.goes]
    assert (left.name, left.reason.split(",")[0]) == (first.url, "its upload was not finished")
    assert not Path(first.url).exists()


def test_nothing_of_a_run_that_is_being_trained_is_deleted(place: Place) -> None:
    for checkpoint in place.run("a", 1000, 2000, 3000):
        place.register("a", checkpoint)
    plan = place.prune().plan()
    owner = claim(StoredRun.of(place.job("a")).owners_url, print)
    try:
        done = delete(place.prune(), plan)
        assert gone(done) == gone(place.prune().plan()) == set()
        assert "trains a" in reason(done, "models:/a/1")
        assert len(StoredRun.of(place.job("a")).checkpoints()) == 3
        owner.require()
    finally:
        owner.release()
    assert len(gone(delete(place.prune()))) == 4


def test_a_run_that_this_tracker_does_not_know_is_kept(place: Place) -> None:
    place.run("a", 1000, 2000)
    run = StoredRun.of(place.job("a"))
    record = run.record()
    assert record is not None
    run.write_record(record.model_copy(update={"mlflow_run_id": 32 * "0"}))
    assert "does not show its MLflow run" in reason(place.prune().plan(), run.url)


@pytest.mark.parametrize("damage", ["record", "score"])
def test_a_damaged_run_is_kept_and_does_not_stop_the_prune(place: Place, damage: str) -> None:
    place.run("a", 1000, 2000)
    old, _ = place.run("b", 1000, 2000)
    run = StoredRun.of(place.job("a"))
    files.write_bytes(run.record_url if damage == "record" else f"{run.url}/scores/x.json", b"{")
    plan = place.prune().plan()
    assert "is not" in reason(plan, run.url)
    assert gone(plan) == {old.url}


# --- statistics ------------------------------------------------------------------------------------------------------


def test_statistics_of_collections_that_are_gone_go(place: Place, packed: Collection, tmp_path: Path) -> None:
    def result(collection: str, digest: str) -> str:
        url = f"{place.bucket}/{collection}/evaluation/statistics-x-train-{digest[:8]}"
        (tmp_path / "tensors").mkdir(exist_ok=True)
        (tmp_path / "tensors" / "x.safetensors").write_bytes(b"x" * 100)
        file_sets.upload_set(tmp_path / "tensors", url)
        return url

    def collection(name: str) -> None:
        shutil.copytree(packed.url, f"{place.bucket}/{name}", ignore=shutil.ignore_patterns("evaluation"))

    collection("used")
    collection("unfinished")
    Path(place.bucket, "unfinished", MANIFEST).unlink()
    used, earlier = result("used", packed.digest), result("used", 8 * "0")
    deleted, unfinished = result("deleted", packed.digest), result("unfinished", packed.digest)
    Path(place.bucket, "a file").write_text("x")
    plan = place.prune().plan()
    assert gone(plan) == {earlier, deleted}
    assert all(verdict.size > 100 for verdict in plan if verdict.goes)
    assert reason(plan, used) == "its collection exists"
    assert MANIFEST in reason(plan, unfinished)
    collection("again")
    Path(place.bucket, "again").rename(Path(place.bucket, "deleted", "again"))  # somebody begins to pack there
    done = delete(place.prune(), plan)
    assert gone(done) == {earlier}
    assert "but other files: again" in reason(done, deleted)
    assert Path(used).exists()
    assert not Path(earlier).exists()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> str:
        return CliRunner().invoke(app, ["prune", *arguments], catch_exceptions=False).stdout

    return run


def test_the_command_says_what_goes_why_and_how_large_it_is(place: Place, command: Callable[..., str]) -> None:
    for checkpoint in place.run("a", 1000, 2000, 3000):
        place.register("a", checkpoint)
    client(place.uri).set_registered_model_alias("a", CHAMPION, "3")
    options = (place.bucket, "--keep-versions", "1", "--keep-checkpoints", "1")
    shown = command(*options)
    assert "alias champion" in shown
    assert "older than the newest 1 versions; no alias and no run names it" in shown
    assert "4 things" in shown.splitlines()[-1]
    assert "nothing is changed without --delete" in shown.splitlines()[-1]
    planned = json.loads(command(*options, "--json"))
    assert (planned["deleted"], len(planned["goes"]), place.versions("a")) == (False, 4, [1, 2, 3])
    shown = command(*options, "--delete")
    assert "deleted version models:/a/1 (" in shown
    assert shown.splitlines()[-1].startswith("deleted 4 things, ")
    assert json.loads(command(*options, "--json", "--delete"))["goes"] == []


def test_the_command_needs_a_bucket_and_a_tracker(
    place: Place, command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAGAN_BUCKET", raising=False)
    with pytest.raises(UsageError, match="no bucket"):
        command()
    monkeypatch.setenv("SAGAN_BUCKET", place.bucket)
    assert "0 things" in command()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with pytest.raises(EnvironmentFault, match="cannot be used"):
        command()
