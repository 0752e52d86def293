from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.collection.manifest import Collection
from pipeline.config.locations import sqlite_uri
from pipeline.config.schema import PackSection, TrainJob
from pipeline.errors import EnvironmentFault, UsageError
from pipeline.evaluation.extractors import classifier
from pipeline.evaluation.final_score import finalise
from pipeline.evaluation.score_checkpoints import check_scores, higher_is_better, score_checkpoint
from pipeline.packing.pack import pack
from pipeline.runs.checkpoints import StoredCheckpoint
from pipeline.runs.json_records import RegisteredModel, RunScores
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import file_sets, files
from pipeline.tracking import registry
from pipeline.tracking.mlflow_run import MlflowRun, client
from pipeline.tracking.open_model import open_model
from pipeline.training.retention import protected
from sagan.train_state import TrainState
from tests.unit.evaluation.conftest import commit_checkpoint

Commit = Callable[..., StoredCheckpoint]


def with_section(job: TrainJob, **changes: object) -> TrainJob:
    return job.model_copy(update={"evaluate": job.evaluate.model_copy(update=changes)})


def unregistered(job: TrainJob) -> TrainJob:
    return job.model_copy(update={"track": job.track.model_copy(update={"register_model": False})})


def break_average(state: TrainState) -> None:
    next(iter(state.ema.values())).fill_(float("nan"))


def history(job: TrainJob, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(job.track.uri or "").get_metric_history(run_id, key)]


def test_a_checkpoint_is_scored_once_recorded_and_logged(job: TrainJob, run_id: str, checkpoint: Commit) -> None:
    job = unregistered(job)
    stored = checkpoint(2000)
    score = score_checkpoint(job, stored, run_id)
    assert score.metric == "fd_classifier"
    assert score.value == score.values["fd_classifier"]

    run = StoredRun.of(job)
    (record,) = run.scores()
    assert (record.checkpoint, record.images, record.score) == (stored.name, 2000, score)
    assert history(job, run_id, score.key) == [(2000, score.value)]
    artifacts = {a.path for a in client(job.track.uri or "").list_artifacts(run_id, "protocols")}
    assert artifacts == {f"protocols/{score.protocol.id8}.json"}
    with Image.open(run.grid_url(record.checkpoint)) as picture:
        assert picture.width > picture.height / 4

    file_sets.remove_set(stored.url)  # so that scoring once more could only fail
    assert score_checkpoint(job, stored, run_id) == score
    assert len(history(job, run_id, score.key)) == 1


def test_another_protocol_is_scored_anew(job: TrainJob, run_id: str, checkpoint: Commit) -> None:
    job, stored = unregistered(job), checkpoint(2000)
    first = score_checkpoint(job, stored, run_id)
    second = score_checkpoint(with_section(job, samples=100), stored, run_id)
    assert first.value != second.value


def test_another_metric_of_the_same_protocol_ranks_without_a_new_score(
    job: TrainJob, run_id: str, checkpoint: Commit
) -> None:
    job, stored = unregistered(job), checkpoint(2000)
    first = score_checkpoint(job, stored, run_id)
    file_sets.remove_set(stored.url)
    second = score_checkpoint(with_section(job, score="isc_classifier"), stored, run_id)
    assert (second.metric, second.value) == ("isc_classifier", first.values["isc_classifier"])
    assert (first.higher_is_better, second.higher_is_better) == (False, True)


def test_the_end_of_a_run(job: TrainJob, run_id: str, checkpoint: Commit) -> None:
    checkpoint(1000, seed=1)
    checkpoint(2000, seed=2)
    checkpoint(3000, seed=3, change=break_average)
    found = finalise(job, run_id)

    scores = {record.images: record.score.value for record in StoredRun.of(job).scores()}
    assert scores.pop(3000) is None
    best = min(scores, key=lambda images: scores[images] or 0.0)
    assert found.score is not None
    assert found.score.value == scores[best]
    assert found.checkpoint is not None
    assert f"{best:012d}" in found.checkpoint
    versions = len(registry.versions(job.track.uri or "", job.name))
    assert found.registered == RegisteredModel(model=job.name, version=versions, alias="champion")
    assert found.class_accuracy is not None
    assert 0 <= found.class_accuracy <= 1
    assert found.fd_classifier_real is not None
    assert found.fd_classifier is not None
    assert 0 < found.fd_classifier_real < found.fd_classifier
    assert found.grid is not None
    assert files.exists(found.grid)

    assert found.final is not None
    ranked, final = found.score.protocol, found.final.protocol
    assert final.seed == ranked.seed + 1
    assert final.extractor_digest != ranked.extractor_digest
    assert (ranked.repeats, final.repeats) == (1, job.evaluate.repeats)
    assert found.final.deviation is not None
    assert found.final.value is not None
    assert 0 < found.final.deviation < found.final.value
    registered = {files.name(url) for url in registry.checkpoints(job.track.uri or "", job.name)}
    assert protected(job) == registered | {files.name(found.checkpoint)}
    assert not any(name.startswith(f"{3000:012d}") for name in registered)

    again = finalise(job, run_id)
    assert again == found
    assert len(registry.versions(job.track.uri or "", job.name)) == versions
    assert [step for step, _ in history(job, run_id, found.score.key)] == [1000, 2000]


def test_a_better_checkpoint_becomes_champion_as_it_is_scored(job: TrainJob, run_id: str, checkpoint: Commit) -> None:
    uri, values = job.track.uri or "", []
    for images in (1000, 2000, 3000):
        value = score_checkpoint(job, checkpoint(images, seed=images), run_id).value
        assert value is not None
        values.append(value)
    better = [i for i in range(3) if values[i] == min(values[: i + 1])]
    assert [v.tags["kimg"] for v in registry.versions(uri, job.name)] == [str(i + 1) for i in better]
    champion = registry.champion_of(uri, job.name)
    assert champion is not None
    assert champion.tags["kimg"] == str(better[-1] + 1)


def test_a_champion_of_another_protocol_is_scored_anew_before_it_is_beaten(
    job: TrainJob, run_id: str, checkpoint: Commit
) -> None:
    uri = job.track.uri or ""
    score_checkpoint(job, checkpoint(1000, seed=1), run_id)
    track = job.track.model_copy(update={"model": job.name})
    other = with_section(job, samples=100).model_copy(update={"name": "other", "track": track})
    commit_checkpoint(other, 2000, seed=2)
    found = finalise(other, run_id)

    assert found.score is not None
    versions = {v.tags["kimg"]: v for v in registry.versions(uri, job.name)}
    scores = {kimg: float(version.tags[found.score.key]) for kimg, version in versions.items()}
    champion = registry.champion_of(uri, job.name)
    assert champion is not None
    assert champion.tags["kimg"] == min(scores, key=lambda kimg: scores[kimg])


def test_a_run_of_broken_models_ends_without_a_champion(job: TrainJob, run_id: str, checkpoint: Commit) -> None:
    score = score_checkpoint(job, checkpoint(1000, change=break_average), run_id)
    assert (score.metric, score.value, score.values) == ("fd_classifier", None, {})
    assert finalise(job, run_id) == RunScores()
    assert registry.versions(job.track.uri or "", job.name) == []


@pytest.mark.parametrize(
    ("score", "higher"), [("auto", False), ("kid_classifier", False), ("isc_classifier", True), ("coverage", True)]
)
def test_the_direction_of_a_jobs_score_is_that_of_its_metric(score: str, higher: bool, job: TrainJob) -> None:
    assert higher_is_better(with_section(job, score=score)) is higher


def test_what_cannot_be_scored_is_found_before_training(job: TrainJob, tmp_path: Path) -> None:
    check_scores(job)
    with pytest.raises(UsageError, match="no split"):
        check_scores(with_section(job, split="validation"))
    with pytest.raises(UsageError, match="fid"):
        check_scores(with_section(job, score="fid"))
    with pytest.raises(EnvironmentFault, match="missing"):
        check_scores(with_section(job, extractor="inception", extractor_weights=str(tmp_path / "missing.pth")))
    with pytest.raises(EnvironmentFault, match=r"nowhere\.ts"):
        check_scores(with_section(job, extractor=str(tmp_path / "nowhere.ts")))


# --- images and extractors that cannot be scored ---------------------------------------------------------------------


def of_grey(job: TrainJob, folder: Path, count: int, **other_splits: int) -> TrainJob:
    """The job on a collection of `count` grey images in two classes, and of other splits with their counts."""
    for split, size in {"train": count, **other_splits}.items():
        for i in range(size):
            path = folder / "source" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (20 * i,) * 3).save(path)
    collection = pack(str(folder / "set"), PackSection(source=str(folder / "source"), resolution=32))
    return job.model_copy(update={"data": job.data.model_copy(update={"train": collection.url})})


def test_the_classifier_needs_the_split_that_it_learns_from(job: TrainJob, tmp_path: Path) -> None:
    for i in range(8):
        path = tmp_path / "source" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (20 * i,) * 3).save(path)
    source = PackSection(source={"val": str(tmp_path / "source")}, resolution=32)
    changes = {"train": pack(str(tmp_path / "set"), source).url, "split": "val"}
    job = with_section(job.model_copy(update={"data": job.data.model_copy(update=changes)}), split="val")
    with pytest.raises(UsageError, match="learns from the split train, but .* has only val"):
        check_scores(job)


class Ratio(torch.nn.Module):
    """Mean and inverse deviation of each image: not finite for an image of one colour."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.float().flatten(1)
        return torch.stack([x.mean(1), x.std(1) / x.std(1)], 1), x[:, :2]


class Nan(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.float().mean((2, 3))
        return x * float("nan"), x


class Overflows(torch.nn.Module):
    """Logits that are infinite."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.float().mean((2, 3))
        return x, torch.exp(x * 10)


class Mean(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.float().mean((2, 3))
        return x, x


def with_extractor(job: TrainJob, folder: Path, network: torch.nn.Module, **changes: object) -> TrainJob:
    torch.jit.script(network).save(f"{folder}/net.ts")
    return with_section(job, extractor=f"{folder}/net.ts", trust_extractor=True, **changes)


@pytest.mark.parametrize("network", [Nan, Overflows], ids=lambda kind: kind.__name__)
def test_an_extractor_that_is_not_finite_is_found_before_training(
    network: type[torch.nn.Module], job: TrainJob, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"extractor net gives features or logits that are not finite"):
        check_scores(with_extractor(job, tmp_path, network()))


def test_an_extractor_that_is_not_finite_on_some_images_only_is_an_error_of_the_score(
    job: TrainJob, run_id: str, checkpoint: Commit, tmp_path: Path
) -> None:
    """The first images of the digits are finite, and an image of one colour is not."""
    check_scores(with_extractor(job, tmp_path, Ratio()))
    grey = with_extractor(of_grey(job, tmp_path, 6), tmp_path, Ratio())
    with pytest.raises(UsageError, match="not finite"):
        check_scores(grey)
    with pytest.raises(UsageError, match="not finite"):
        score_checkpoint(unregistered(grey), checkpoint(1000), run_id)


@pytest.mark.parametrize(
    ("images", "changes", "message"),
    [
        (1, {}, "fd_net needs at least 2 real images, but split 'train' of .* has 1"),
        (3, {"feature_metrics": True}, "precision needs at least 4 real images, .* has 3"),
        (8, {"feature_metrics": True, "samples": 5}, "density needs at least 6 generated images, but there are 5"),
        (8, {"feature_metrics": True, "final_samples": 3}, "precision needs at least 4 generated images"),
    ],
)
def test_too_few_images_for_a_metric_are_found_before_training(
    images: int, changes: dict[str, Any], message: str, job: TrainJob, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        check_scores(with_extractor(of_grey(job, tmp_path, images), tmp_path, Mean(), **changes))


def test_the_least_number_of_images_is_scored(job: TrainJob, run_id: str, checkpoint: Commit, tmp_path: Path) -> None:
    few = unregistered(with_extractor(of_grey(job, tmp_path, 6), tmp_path, Mean(), feature_metrics=True, samples=6))
    check_scores(few)
    assert score_checkpoint(few, checkpoint(1000), run_id).value is not None


def test_one_held_out_image_has_no_distance_to_the_others(
    job: TrainJob, run_id: str, checkpoint: Commit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "LEAST_IMAGES", 640)  # how well the classifier is trained does not matter here
    few = unregistered(of_grey(job, tmp_path, 10, heldout=1))
    assert Collection.open(few.data.train).size("heldout") == 1
    checkpoint(1000)
    found = finalise(with_section(few, samples=8), run_id)
    assert found.final is not None
    assert found.fd_classifier_real is None


# --- odd characters --------------------------------------------------------------------------------------------------

ODD = "[a]*?#%20+&'\"$X@!{b} é\n"


def test_odd_characters_in_every_path_of_a_run(
    job: TrainJob, digits: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores, champion and pulled model of a run whose folders and experiment have such names."""
    here = tmp_path / ODD
    shutil.copytree(digits.url, here / "set", ignore=shutil.ignore_patterns("statistics-*"))
    data = job.data.model_copy(update={"train": f"{here}/set", "cache": f"{here}/cache"})
    track = job.track.model_copy(update={"uri": sqlite_uri(here / "mlflow.db"), "experiment": ODD})
    root = job.checkpoint.model_copy(update={"root": f"{here}/runs"})
    job = job.model_copy(update={"data": data, "track": track, "checkpoint": root})
    assert track.uri is not None
    tracker = MlflowRun.start(track.uri, ODD, job.name, None, {}, {}, f"{here}/artifacts")
    tracker.close(timeout_s=60)
    commit_checkpoint(job, 1000)
    found = finalise(job, tracker.run_id)
    assert found.registered is not None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", track.uri)
    monkeypatch.chdir(here)
    pulled = CliRunner().invoke(app, ["pull", f"models:/{job.name}@champion", "pulled"], catch_exceptions=False)
    assert pulled.exit_code == 0
    assert open_model(f"{here}/pulled").config == open_model(found.checkpoint or "", section=job.evaluate).config
