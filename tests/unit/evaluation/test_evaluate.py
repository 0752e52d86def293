from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config.schema import EvaluateJob, EvaluateSection, TrainJob
from pipeline.data.index import Collection
from pipeline.errors import EnvironmentFault, UsageError
from pipeline.evaluation import evaluate, records
from pipeline.evaluation.measure import Score
from pipeline.evaluation.models import open_model
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.records import ScoreRecord
from pipeline.storage import files, fileset
from pipeline.tracking import registry
from pipeline.tracking.tracker import client
from sagan.state import TrainState

Commit = Callable[..., str]


def with_section(job: TrainJob, **changes: object) -> TrainJob:
    return job.model_copy(update={"evaluate": job.evaluate.model_copy(update=changes)})


def unregistered(job: TrainJob) -> TrainJob:
    return job.model_copy(update={"track": job.track.model_copy(update={"register_model": False})})


def break_average(state: TrainState) -> None:
    next(iter(state.average.values())).fill_(float("nan"))


def history(job: TrainJob, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(job.track.uri or "").get_metric_history(run_id, key)]


def test_a_checkpoint_is_scored_once_and_everything_is_told(job: TrainJob, run_id: str, checkpoint: Commit) -> None:
    job = unregistered(job)
    url = checkpoint(2000)
    values = evaluate.score_checkpoint(job, url, run_id)
    assert next(iter(values)) == "fd_classifier"

    (record,) = evaluate.scores_of(job).values()
    assert (record.images, record.score.values) == (2000, values)
    key = record.score.protocol.key("fd_classifier")
    assert history(job, run_id, key) == [(2000, values["fd_classifier"])]
    artifacts = {a.path for a in client(job.track.uri or "").list_artifacts(run_id, "protocols")}
    assert artifacts == {f"protocols/{record.score.protocol.id8}.json"}
    picture = Image.open(job.folder.grid(record.checkpoint))
    assert picture.width > picture.height / 4

    fileset.remove(url)  # so that scoring once more could only fail
    assert evaluate.score_checkpoint(job, url, run_id) == values
    assert len(history(job, run_id, key)) == 1


def test_another_protocol_is_scored_anew(job: TrainJob, run_id: str, checkpoint: Commit) -> None:
    job, url = unregistered(job), checkpoint(2000)
    first = evaluate.score_checkpoint(job, url, run_id)
    second = evaluate.score_checkpoint(with_section(job, samples=100), url, run_id)
    assert first["fd_classifier"] != second["fd_classifier"]


def test_the_end_of_a_run(job: TrainJob, run_id: str, checkpoint: Commit) -> None:
    checkpoint(1000, seed=1)
    checkpoint(2000, seed=2)
    checkpoint(3000, seed=3, change=break_average)
    summary = evaluate.finalise(job, run_id)

    scores = {record.images: record.score.value for record in evaluate.scores_of(job).values()}
    assert scores.pop(3000) is None
    best = min(scores, key=lambda images: scores[images] or 0.0)
    assert summary["score"]["value"] == scores[best]
    assert f"{best:012d}" in summary["checkpoint"]
    versions = len(registry.versions(job.track.uri or "", job.name))
    assert summary["registered"] == {"model": job.name, "version": versions, "alias": "champion"}
    assert 0 <= summary["class_accuracy"] <= 1
    assert 0 < summary["fd_classifier_real"] < summary["fd_classifier"]
    assert files.exists(summary["grid"])
    assert json.loads(json.dumps(summary)) == summary

    ranked, final = summary["score"]["protocol"], summary["final"]["protocol"]
    assert final["seed"] == ranked["seed"] + 1
    assert final["extractor_digest"] != ranked["extractor_digest"]
    assert (ranked["repeats"], final["repeats"]) == (1, job.evaluate.repeats)
    assert 0 < summary["final"]["deviation"] < summary["final"]["value"]
    registered = {files.name(url) for url in registry.checkpoints(job.track.uri or "", job.name)}
    assert evaluate.protected(job) == registered | {files.name(summary["checkpoint"])}
    assert not any(name.startswith(f"{3000:012d}") for name in registered)

    again = evaluate.finalise(job, run_id)
    assert again == summary
    assert len(registry.versions(job.track.uri or "", job.name)) == versions
    key = f"fd_classifier/{ranked['id']}"
    assert [step for step, _ in history(job, run_id, key)] == [1000, 2000]


def test_a_better_checkpoint_becomes_champion_as_it_is_scored(job: TrainJob, run_id: str, checkpoint: Commit) -> None:
    uri, values = job.track.uri or "", []
    for images in (1000, 2000, 3000):
        values.append(evaluate.score_checkpoint(job, checkpoint(images, seed=images), run_id)["fd_classifier"])
    better = [i for i in range(3) if values[i] == min(values[: i + 1])]
    assert [v.tags["kimg"] for v in registry.versions(uri, job.name)] == [str(i + 1) for i in better]
    champion = registry.champion_of(uri, job.name)
    assert champion is not None
    assert champion.tags["kimg"] == str(better[-1] + 1)


def test_a_champion_of_another_protocol_is_scored_anew_before_it_is_beaten(
    job: TrainJob, run_id: str, checkpoint: Commit
) -> None:
    uri, urls = job.track.uri or "", [checkpoint(1000, seed=1), checkpoint(2000, seed=2)]
    evaluate.score_checkpoint(job, urls[0], run_id)
    other = with_section(job, samples=100).model_copy(update={"name": "other"})
    files.delete(f"{job.checkpoint.root}/other")
    Path(f"{job.checkpoint.root}/other/checkpoints").mkdir(parents=True)
    moved = f"{job.checkpoint.root}/other/checkpoints/{files.name(urls[1])}"
    Path(urls[1]).rename(moved)
    other = other.model_copy(update={"track": other.track.model_copy(update={"model": job.name})})
    summary = evaluate.finalise(other, run_id)

    versions = {v.tags["kimg"]: v for v in registry.versions(uri, job.name)}
    key = f"fd_classifier/{summary['score']['protocol']['id']}"
    scores = {kimg: float(version.tags[key]) for kimg, version in versions.items()}
    champion = registry.champion_of(uri, job.name)
    assert champion is not None
    assert champion.tags["kimg"] == min(scores, key=lambda kimg: scores[kimg])


def test_a_run_of_broken_models_ends_without_a_champion(job: TrainJob, run_id: str, checkpoint: Commit) -> None:
    url = checkpoint(1000, change=break_average)
    assert evaluate.score_checkpoint(job, url, run_id) == {"fd_classifier": None}
    summary = evaluate.finalise(job, run_id)
    assert set(summary.values()) == {None}
    assert registry.versions(job.track.uri or "", job.name) == []


def test_scores_of_several_protocols_are_not_compared() -> None:
    def record(images: int, value: float, samples: int) -> ScoreRecord:
        protocol = Protocol("x", "aa", "none", "bb", "train", samples, seed=0, weights="ema", batch_norm="standing 64")
        return ScoreRecord(f"{images:012d}", images, Score(protocol, {"fd_x": value}, "fd_x"), 1.0, time_ms=images)

    old, new, newest = record(1, 5.0, samples=10), record(2, 50.0, samples=20), record(3, 60.0, samples=20)
    assert records.best([old, new, newest]) == new
    assert records.best([]) is None


def test_what_cannot_be_scored_is_found_before_training(job: TrainJob, tmp_path: Path) -> None:
    evaluate.check(job)
    with pytest.raises(UsageError, match="no split"):
        evaluate.check(with_section(job, split="validation"))
    with pytest.raises(UsageError, match="fid"):
        evaluate.check(with_section(job, score="fid"))
    with pytest.raises(EnvironmentFault, match="missing"):
        evaluate.check(with_section(job, extractor="inception", weights=str(tmp_path / "missing.pth")))
    with pytest.raises(EnvironmentFault, match=r"nowhere\.ts"):
        evaluate.check(with_section(job, extractor=str(tmp_path / "nowhere.ts")))


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        ({}, ("ema", "standing 64")),
        ({"generator": "raw"}, ("raw", "standing 64")),
        ({"standing_images": None}, ("ema", "running")),
    ],
)
def test_a_score_names_weights_and_statistics_and_so_does_the_model_that_it_is_of(
    overrides: dict[str, Any], kind: tuple[str, str], checkpoint: Commit, digits: Collection, tmp_path: Path
) -> None:
    section = EvaluateSection.model_validate(
        {"extractor": "classifier", "samples": 50, "standing_images": 64} | overrides
    )
    url = checkpoint(1000, change=lambda state: state.average["conv.weight"].mul_(2))
    open_model(url, weights=section.generator, standing_images=section.standing_images).save(tmp_path / "folder")
    results = [
        evaluate.run(EvaluateJob(name="x", model=model, reference=digits.url, evaluate=section))
        for model in (url, str(tmp_path / "folder"))
    ]
    for result in results:
        assert (result["score"]["protocol"]["weights"], result["score"]["protocol"]["batch_norm"]) == kind
    assert results[0]["values"] == pytest.approx(results[1]["values"], rel=1e-6)


def test_a_folder_and_a_checkpoint_are_scored_alike(
    job: TrainJob, run_id: str, checkpoint: Commit, digits: Collection, tmp_path: Path
) -> None:
    url = checkpoint(1000)
    section = EvaluateSection(extractor="classifier", samples=100, standing_images=64)
    open_model(url, standing_images=64).save(tmp_path / "folder")
    results = [
        evaluate.run(EvaluateJob(name="x", model=model, reference=digits.url, evaluate=section))
        for model in (url, str(tmp_path / "folder"))
    ]
    assert results[0]["values"] == pytest.approx(results[1]["values"], rel=1e-6)
    with pytest.raises(UsageError, match="no model"):
        evaluate.run(EvaluateJob(name="x", model=str(tmp_path / "nothing"), reference=digits.url, evaluate=section))
