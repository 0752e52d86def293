"""What a study still has to train, and what it writes when all of its runs have ended."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from pipeline.collection.manifest import Collection
from pipeline.config.job_file import load_job
from pipeline.config.schema import StudyJob, TrainJob
from pipeline.errors import CorruptError, UsageError
from pipeline.evaluation.final_score import finalise, score_due
from pipeline.evaluation.score_checkpoints import check_scores, higher_is_better, score_checkpoint
from pipeline.job_runner import dry_run_job
from pipeline.runs.json_records import (
    RecordedData,
    RecordedEvaluation,
    RunRecord,
    RunState,
    ScoreRecord,
    StudyRecord,
    TrainSummary,
)
from pipeline.runs.owner import claim
from pipeline.runs.score_protocol import Score
from pipeline.runs.status_from_folder import StudyView, look_at_run
from pipeline.runs.stored_run import StoredRun, StoredStudy
from pipeline.study.run_study import RowRun, missing_runs, run_study, runs_of
from pipeline.study.settle_rows import find_versions, settled_values, sweeps_of, tuned_points
from pipeline.training.find_or_start import complete_job, start_and_method
from pipeline.training.shared_types import Evaluation
from sagan import Model, ModelConfig, OptimConfig, TrainState
from tests.unit.evaluation.conftest import NETWORKS, commit_checkpoint
from tests.unit.score_protocol import PROTOCOL

EVALUATION = Evaluation(check_scores, score_checkpoint, higher_is_better, score_due, finalise)
METRIC = "fd_classifier"
MakeStudy = Callable[..., StudyJob]


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db"


@pytest.fixture
def make(packed: Collection, tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeStudy:
    """Makes a study of two rows and two seeds, whose runs are below the current folder."""
    monkeypatch.chdir(tmp_path)
    base = {
        "kind": "train",
        "name": "base",
        "data": {"train": packed.url},
        "train": {"kimg": 1, "batch": 16},
        "checkpoint": {"root": f"{tmp_path}/stored"},
        "evaluate": {"extractor": "classifier", "samples": 60},
        "track": {"uri": tracking},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    study = {
        "kind": "study",
        "name": "s",
        "base": "base.yaml",
        "seeds": [0, 1],
        "rows": {"none": {"overrides": {"model.attention": []}}, "feat16": {}},
        "compare": {"metrics": [METRIC], "reference": "none"},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))

    def load(**overrides: Any) -> StudyJob:
        job = load_job(tmp_path / "study.yaml", overrides)
        assert isinstance(job, StudyJob)
        return job

    return load


def end(run: RowRun, values: list[float], final: float, **method: Any) -> None:
    """Leave the run as training leaves it, with a score at each kimg and a final score."""
    job = complete_job(run.job)
    stored = StoredRun.of(job)
    init, of_job = start_and_method(job, Collection.open(job.data.train), stored)
    record = RunRecord(
        name=job.name,
        method=of_job | method,
        init=init,
        mlflow_run_id="0",
        data=RecordedData.of(job.data),
        evaluate=RecordedEvaluation.of(job.evaluate),
    )
    stored.write_record(record)
    for kimg, value in enumerate(values, 1):
        score = Score.of(PROTOCOL, METRIC, False, {METRIC: value})
        checkpoint = f"{1000 * kimg:012d}"
        stored.write_score(
            ScoreRecord(checkpoint=checkpoint, images=1000 * kimg, score=score, seconds=1, time_ms=1000 * kimg)
        )
    summary = TrainSummary(
        name=job.name,
        images=int(1000 * job.train.kimg),
        seconds=1,
        images_per_s=1,
        mlflow_run_id="0",
        resumed_from=None,
        restarts=0,
        images_lost=0,
        final=Score.of(PROTOCOL.model_copy(update={"seed": 1}), METRIC, False, {METRIC: final}),
    )
    stored.write_summary(summary)


def names(runs: list[RowRun]) -> list[str]:
    return [run.job.name for run in runs]


def test_every_row_has_its_first_run_before_any_has_its_second(make: MakeStudy) -> None:
    assert names(runs_of(make())) == ["s-none-0", "s-feat16-0", "s-none-1", "s-feat16-1"]


def test_runs_that_ended_and_runs_that_diverged_are_not_trained_again(make: MakeStudy) -> None:
    study = make()
    runs = runs_of(study)
    assert names(missing_runs(study, runs, EVALUATION, set())) == names(runs)
    end(runs[1], [2.0], 2.0)
    assert names(missing_runs(study, runs, EVALUATION, {"s-none-1"})) == ["s-none-0", "s-feat16-1"]


def test_more_seeds_more_rows_and_a_longer_budget_are_missing(make: MakeStudy) -> None:
    for run in runs_of(make()):
        end(run, [2.0], 2.0)
    assert missing_runs(make(), runs_of(make()), EVALUATION, set()) == []
    more = make(**{"seeds": [0, 1, 2], "rows.other": {"overrides": {"model.z_dim": 64}}})
    expected = ["s-other-0", "s-other-1", "s-none-2", "s-feat16-2", "s-other-2"]
    assert names(missing_runs(more, runs_of(more), EVALUATION, set())) == expected
    longer = make(kimg=2)
    assert len(missing_runs(longer, runs_of(longer), EVALUATION, set())) == 4
    assert [dry_run_job(study)["ended"] for study in (make(), more, longer)] == [4, 4, 0]


def test_runs_that_start_from_a_model_are_known_when_they_have_ended(
    make: MakeStudy, packed: Collection, tmp_path: Path
) -> None:
    model = ModelConfig(channels_g=4, channels_d=4).for_collection(packed.resolution, packed.num_classes)
    Model.from_state(TrainState(model, OptimConfig(), 0), standing_images=16).save(tmp_path / "model")
    narrow = {"model.channels_g": 4, "model.channels_d": 4, "init.source": str(tmp_path / "model")}
    rows = {"none": {"overrides": {"optim.lr_d": 0.0001}}, "feat16": {}}
    study = make(overrides=narrow, rows=rows)
    runs = runs_of(study)
    assert names(missing_runs(study, runs, EVALUATION, set())) == names(runs)
    end(runs[0], [2.0], 2.0)
    assert names(missing_runs(study, runs, EVALUATION, set())) == names(runs[1:])


def test_all_rows_and_seeds_start_from_the_version_that_the_study_found_first(
    make: MakeStudy, packed: Collection, tmp_path: Path
) -> None:
    source = {"name": "source", "data": {"train": packed.url}, "train": {"kimg": 1, "batch": 16}}
    job = TrainJob.model_validate(source | {"checkpoint": {"root": f"{tmp_path}/stored"}})
    first = commit_checkpoint(job, 1000)
    record = RunRecord(
        name="source",
        method={},
        mlflow_run_id="0",
        data=RecordedData.of(job.data),
        evaluate=RecordedEvaluation.of(job.evaluate),
    )
    StoredRun.of(job).write_record(record)
    networks = {f"model.{key}": value for key, value in NETWORKS.to_dict().items() if key != "num_classes"}
    folder = StoredRun.of(job).url
    study = make(
        overrides={**networks, "init.source": folder}, rows={"none": {}, "fast": {"overrides": {"optim.lr_d": 1e-3}}}
    )

    versions = find_versions(study, {})
    assert versions == {folder: first.name}
    second = commit_checkpoint(job, 2000)
    assert find_versions(study, {}) == {folder: second.name}
    assert find_versions(study, versions) == versions
    runs = runs_of(study, settled_values(study, versions, {}))
    assert {run.job.init and run.job.init.source for run in runs} == {first.url}

    for run in runs:
        end(run, [2.0], 2.0)
    stored = StoredStudy(f"{tmp_path}/stored/studies/s")
    stored.write_record(StudyRecord(name="s", mlflow_run_id="0", init_versions=versions))
    run_study(study, EVALUATION)
    recorded = stored.record()
    assert recorded is not None
    assert recorded.init_versions == versions


TUNE = {"space": {"optim.lr_d": {"loguniform": [1e-4, 1e-3]}}, "search": {"trials": 3}, "kimg": 0.5}


def test_the_runs_of_a_tuned_row_get_the_recorded_values_and_the_table_says_them(
    make: MakeStudy, tracking: str, tmp_path: Path
) -> None:
    """The row `none` is tuned already. The row `feat16` has a space of one value, which its own sweep found too."""
    study = make(tune=TUNE, **{"rows.feat16": {"tune": {"space": {"optim.lr_g": {"choice": [2e-4]}}}}})
    points = {"none": {"optim.lr_d": 3e-4}, "feat16": {"optim.lr_g": 2e-4}}
    stored = StoredStudy(f"{tmp_path}/stored/studies/s")
    stored.write_record(StudyRecord(name="s", mlflow_run_id="0", tuned=points))
    runs = runs_of(study, settled_values(study, {}, tuned_points(study, stored.record(), stored.url)))
    rates = {run.job.name: (run.job.optim.lr_d, run.job.optim.lr_g) for run in runs}
    assert (rates["s-none-0"], rates["s-feat16-1"]) == ((3e-4, 1e-4), (4e-4, 2e-4))
    assert [
        sweeps_of(study, {"none": {}, "feat16": {}}, points),
        list(sweeps_of(study, {"none": {}}, {"feat16": {}})),
    ] == [
        {},
        ["none"],
    ]
    for run in runs:
        end(run, [2.0], 2.0)
        state = RunState(owner=1, state="finished", images=1000, kimg=1, device_hours=0.5, time_s=time.time())
        run.stored.write_state(state)
    assert dry_run_job(study)["device_hours"] == 2.0, "runs at the chosen values are runs of this method"
    summary = run_study(study, EVALUATION)
    assert summary.tuned == points
    tags = MlflowClient(tracking).get_run(summary.mlflow_run_id).data.tags
    assert json.loads(tags["tuned/none"]) == points["none"]
    assert look_at_run(stored.url).rows()["tuned none"] == "optim.lr_d 0.0003"


@pytest.mark.parametrize("point", [{"checkpoint.root": "/elsewhere"}, {"optim.lr_d": 1.0}, {}])
def test_recorded_values_outside_the_space_are_refused(make: MakeStudy, tmp_path: Path, point: dict[str, Any]) -> None:
    stored = StoredStudy(f"{tmp_path}/stored/studies/s")
    stored.write_record(StudyRecord(name="s", mlflow_run_id="0", tuned={"none": point}))
    with pytest.raises(CorruptError, match="records values for the row none that are not in its tune.space"):
        run_study(make(tune=TUNE), EVALUATION)


def test_a_row_with_runs_is_not_tuned_afterwards(make: MakeStudy) -> None:
    end(runs_of(make())[0], [2.0], 2.0)
    with pytest.raises(UsageError, match="the row none is to be tuned, but its run s-none-0 exists and was not"):
        run_study(make(tune=TUNE), EVALUATION)


def test_a_dry_run_says_what_tuning_costs(make: MakeStudy) -> None:
    plan = dry_run_job(make(tune=TUNE))
    assert plan["tuning"]["trials"] == 6
    assert plan["tuning"]["most_kimg"] == 6 * 0.512
    assert plan["tuning"]["most_nominal_exaflop"] > 0
    assert dry_run_job(make())["tuning"] is None


def test_a_run_of_another_method_is_refused_before_anything_is_trained(make: MakeStudy) -> None:
    end(runs_of(make())[-1], [2.0], 2.0, **{"optim.lr_d": 0.5})
    with pytest.raises(UsageError, match="a run named s-feat16-1 exists .*\n.*optim.lr_d: 0.5 in that run"):
        run_study(make(), EVALUATION)


def test_a_metric_that_does_not_exist_is_refused(make: MakeStudy) -> None:
    with pytest.raises(UsageError, match=r"compare\.metrics: fdi is not a metric"):
        run_study(make(**{"compare.metrics": ["fdi"]}), EVALUATION)


@pytest.mark.parametrize(("score", "none", "feat16"), [("final", 11.5, 7.5), ("best", 9.0, 5.0), ("last", 12.0, 8.0)])
def test_a_study_whose_runs_have_ended_writes_its_table(
    make: MakeStudy, tracking: str, tmp_path: Path, score: str, none: float, feat16: float
) -> None:
    study = make(**{"compare.score": score})
    for run in runs_of(study):
        by = run.seed - (4.0 if run.row == "feat16" else 0.0)
        end(run, [8.5 + by, 11.5 + by], 11.0 + by)
    summary = run_study(study, EVALUATION)
    assert (summary.runs, summary.diverged, summary.images, summary.shown) == (4, 0, 4000, "s-none-0")

    folder = tmp_path / "runs" / "studies" / "s"
    lines = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [(line["row"], float(line["mean"]), line["score"]) for line in lines] == [
        ("none", none, score),
        ("feat16", feat16, score),
    ]
    assert [lines[1][key] for key in ("difference", "difference_low", "difference_high")] == ["-4.0"] * 3
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "minus none" in (folder / "table.txt").read_text()
    assert json.loads((folder / "summary.json").read_text()) == summary.to_dict()

    stored = StoredStudy(f"{tmp_path}/stored/studies/s")
    assert stored.summary() == summary
    tables = stored.tables()
    assert tables is not None
    assert [table.metric for table in tables.tables] == [METRIC]
    client = MlflowClient(tracking)
    parent = client.get_run(summary.mlflow_run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["kind"] == "study"
    assert parent.data.tags[f"{tables.tables[0].key}/feat16/mean"] == f"{feat16:g}"
    logged = {artifact.path for artifact in client.list_artifacts(summary.mlflow_run_id)}
    assert {"curves.png", "table.csv", "table.txt"} <= logged

    assert run_study(study, EVALUATION) == summary, "the same command shows the same study"
    seen = look_at_run(stored.url)
    assert isinstance(seen, StudyView)
    assert (seen.name, seen.state, seen.runs, seen.ended, seen.next_run) == ("s", "finished", 4, 4, None)
    assert (seen.begun, seen.tuned) == ([], {})
    stored.run("s-none-1").delete()
    seen = look_at_run(stored.url)
    assert isinstance(seen, StudyView)
    assert (seen.state, seen.ended, seen.next_run) == ("not finished", 3, "s-none-1")

    now = time.time()
    state = RunState(owner=1, state="training", images=250, kimg=1, images_per_s=31, time_s=now)
    stored.run("s-none-1").write_state(state)
    owner = claim(stored.run("s-none-1").owners_url, print)
    seen = look_at_run(stored.url)
    owner.release()
    assert isinstance(seen, StudyView)
    assert seen.rows()["s-none-1"] == "training, 0.2 of 1 kimg, 31 images/s"
    assert seen.next_run is None
    assert look_at_run(stored.url).rows()["s-none-1"] == "driver died, 0.2 of 1 kimg"


def test_what_another_command_records_in_the_meantime_is_kept(make: MakeStudy, tmp_path: Path) -> None:
    stored = StoredStudy(f"{tmp_path}/stored/studies/s")
    study = make()
    for run in runs_of(study):
        end(run, [9.0], 9.0)
    run_study(study, EVALUATION)

    def check(job: TrainJob) -> list[str]:
        record = stored.record()
        assert record is not None
        stored.write_record(record.model_copy(update={"diverged": {"s-none-7": "at 1 kimg"}}))
        return [METRIC]

    run_study(study, replace(EVALUATION, check=check))
    record = stored.record()
    assert record is not None
    assert record.diverged == {"s-none-7": "at 1 kimg"}


def test_a_run_that_is_continued_has_not_ended(make: MakeStudy, tmp_path: Path) -> None:
    stored = StoredStudy(f"{tmp_path}/stored/studies/s")
    study = make()
    for run in runs_of(study):
        end(run, [9.0], 9.0)
    run_study(study, EVALUATION)
    longer = RunState(owner=1, state="training", images=1250, kimg=2, images_per_s=31, time_s=time.time())
    stored.run("s-none-1").write_state(longer)
    seen = look_at_run(stored.url)
    assert isinstance(seen, StudyView)
    assert (seen.state, seen.ended) == ("not finished", 3)
    stored.run("s-none-1").write_state(longer.model_copy(update={"kimg": 1}))
    seen = look_at_run(stored.url)
    assert isinstance(seen, StudyView)
    assert (seen.state, seen.ended) == ("finished", 4)


def test_a_diverged_run_counts_and_keeps_its_best_score(make: MakeStudy, tmp_path: Path) -> None:
    stored = StoredStudy(f"{tmp_path}/stored/studies/s")
    for score, values in (("best", {"0": 9.0, "1": 9.0}), ("last", {"0": 9.0}), ("final", {"0": 9.0})):
        study = make(**{"compare.score": score})
        for run in runs_of(study):
            end(run, [9.0], 9.0)
        diverged = runs_of(study)[-1]
        run_study(study, EVALUATION)
        record = stored.record()
        assert record is not None
        stored.write_record(record.model_copy(update={"diverged": {diverged.job.name: "at 1.5 kimg"}}))
        assert run_study(study, EVALUATION).diverged == 1
        tables = stored.tables()
        assert tables is not None
        assert tables.tables[0].rows[1].values == values
        assert tables.tables[0].rows[1].diverged == 2 - len(values)


def test_a_metric_that_no_score_will_have_is_refused_before_anything_is_trained(make: MakeStudy) -> None:
    study = make(**{"compare.metrics": [METRIC, "kid", "fid"]})
    with pytest.raises(UsageError, match="the scores of the row none have no kid and no fid; they have") as caught:
        run_study(study, EVALUATION)
    assert METRIC in caught.value.message
    assert "feature_metrics" in caught.value.remedy


def test_fresh_deletes_the_runs_of_the_study(make: MakeStudy, tmp_path: Path) -> None:
    """The study ends afterwards, because its collection has no such split. Its runs are deleted before."""
    study = make()
    for run in runs_of(study):
        end(run, [9.0], 9.0)
    other = tmp_path / "stored" / "other"
    other.mkdir()
    with pytest.raises(UsageError):
        run_study(make(overrides={"evaluate.split": "gone"}), EVALUATION, fresh=True)
    assert not list((tmp_path / "stored").glob("s-*/run.json"))
    assert other.exists()
