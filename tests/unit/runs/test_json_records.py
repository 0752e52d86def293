from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.errors import CorruptError
from pipeline.runs.checkpoints import StoredCheckpoint, complete_checkpoints, load_state
from pipeline.runs.json_records import (
    CheckpointFacts,
    GenerationRecord,
    Lineage,
    Member,
    Record,
    RecordedData,
    RecordedEvaluation,
    RegisteredModel,
    RunRecord,
    ScoreRecord,
    SweepRecord,
    SweepSummary,
    SweepTrials,
    TrainSummary,
    Trial,
    TrialRecord,
)
from pipeline.runs.score_protocol import Score
from pipeline.runs.stored_run import StoredSweep, open_folder
from pipeline.storage import files
from tests.unit.score_protocol import PROTOCOL

SCORE = Score.of(PROTOCOL, "fd_x", False, {"fd_x": 12.5, "isc_x": 3.0}, {"fd_x": 0.25, "isc_x": 0.125})
FACTS = CheckpointFacts(
    images=2000,
    train_seconds=1.5,
    to_score=True,
    collection_digest="cd" * 32,
    class_names=["ant", "bee"],
    method_digest="ef" * 32,
    git_commit="unknown",
)
LINEAGE = Lineage(run="sweep-a", checkpoint="000000002000-0", generation=1)
TRIAL = Trial(name="sweep-a", point={"optim.lr_d": 4e-4}, score=12.5, kimg=2.0, outcome="finished")
CONCLUSION: dict[str, Any] = {
    "score": SCORE,
    "final": SCORE,
    "class_accuracy": 0.5,
    "registered": RegisteredModel(model="m", version=3, alias=None),
    "grid": "grid.png",
    "checkpoint": "checkpoints/1",
}
RECORDS: tuple[Record, ...] = (
    RunRecord(
        name="run",
        method={"optim.lr_d": 4e-4, "model.attention": [32]},
        mlflow_run_id="0",
        starts=2,
        images_lost=64,
        device_hours=1.5,
        data=RecordedData.of(DataSection(train="/images")),
        evaluate=RecordedEvaluation.of(EvaluateSection(extractor="classifier")),
    ),
    SweepRecord(name="sweep", mlflow_run_id="0", method={}),
    FACTS,
    ScoreRecord(checkpoint="000000002000-0", images=2000, score=SCORE, seconds=1.0, time_ms=1),
    TrainSummary(
        name="run",
        images=2000,
        seconds=3.0,
        images_per_s=None,
        mlflow_run_id="0",
        resumed_from=None,
        restarts=0,
        images_lost=0,
        **CONCLUSION,
    ),
    TrialRecord(number=0, ended=True, trial=TRIAL),
    TrialRecord(number=1, ended=False, trial=TRIAL.model_copy(update={"parent": LINEAGE})),
    GenerationRecord(
        number=1,
        members=[Member(name="sweep-a", point={}, parent=None), Member(name="sweep-b", point={}, parent=LINEAGE)],
    ),
    SweepTrials(trials=[TRIAL, Trial(name="sweep-b", point={}, score=None, kimg=0.0, outcome="diverged")]),
    SweepSummary(
        name="sweep", trials=2, stopped_early=0, best=TRIAL, mlflow_run_id="0", picture="plane.png", **CONCLUSION
    ),
)


def changed(tmp_path: Path, **changes: Any) -> str:
    """Path of a file with the values of `FACTS`, these ones changed; None leaves a value out."""
    values = {name: value for name, value in (FACTS.to_dict() | changes).items() if value is not None}
    path = tmp_path / "checkpoint.json"
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_is_read_as_it_was_written(record: Record, tmp_path: Path) -> None:
    url = str(tmp_path / "folder" / "record.json")
    assert type(record).read(url) is None
    record.write(url)
    assert type(record).read(url) == record
    assert json.loads(Path(url).read_text()) == record.to_dict()


@pytest.mark.parametrize("found", [1, 3, None])
def test_another_format_is_refused_with_both_formats_and_a_remedy(found: int | None, tmp_path: Path) -> None:
    url = changed(tmp_path, format=found)
    with pytest.raises(CorruptError) as caught:
        CheckpointFacts.read(url)
    for said in (url, f"format {found or 1};", "format 2"):
        assert said in caught.value.message
    assert "use the version of sagan that wrote" in caught.value.remedy


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"images": "many"}, "images"),
        ({"class_names": ["ant", 7]}, "class_names.1"),
        ({"git_commit": None}, "git_commit"),
        ({"images": -1}, "images"),
        ({"images": 2**70}, "images"),
    ],
)
def test_a_wrong_or_missing_value_is_refused_by_the_name_of_its_field(
    change: dict[str, Any], field: str, tmp_path: Path
) -> None:
    url = changed(tmp_path, **change)
    with pytest.raises(CorruptError) as caught:
        CheckpointFacts.read(url)
    assert caught.value.message.startswith(f"{url} is not a CheckpointFacts: {field}: ")


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"a":' * 40 + b"1" + b"}" * 40])
def test_what_is_no_json_object_of_few_levels_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="is not a TrainSummary"):
        TrainSummary.read(str(path))
    path = tmp_path / "run.json"
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"run\.json"):
        open_folder(str(tmp_path))


@pytest.mark.parametrize("name", ["../other", "/etc/x", ".hidden", "a/b", "\x1b[2J"])
def test_names_of_checkpoints_and_trials_lead_nowhere_else(name: str) -> None:
    record = ScoreRecord(checkpoint="c", images=1, score=SCORE, seconds=1.0, time_ms=1).to_dict()
    with pytest.raises(CorruptError, match="checkpoint: "):
        ScoreRecord.parse(json.dumps(record | {"checkpoint": name}).encode(), "score.json")
    trials = SweepTrials(trials=[TRIAL]).to_dict()
    trials["trials"][0]["name"] = name
    with pytest.raises(CorruptError, match=r"trials\.0\.name"):
        SweepTrials.parse(json.dumps(trials).encode(), "trials.json")
    for field in ("run", "checkpoint"):
        trials = SweepTrials(trials=[TRIAL.model_copy(update={"parent": LINEAGE})]).to_dict()
        trials["trials"][0]["parent"][field] = name
        with pytest.raises(CorruptError, match=rf"trials\.0\.parent\.{field}"):
            SweepTrials.parse(json.dumps(trials).encode(), "trials.json")


@pytest.mark.parametrize("data", [b"{", b"[1]", b'{"step": 1, "time_ms": 1, "metrics": {"loss": "low"}}\n'])
def test_logged_points_of_somebody_else_are_checked(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(data)
    with pytest.raises(CorruptError, match=r"metrics\.jsonl"):
        StoredCheckpoint(str(tmp_path)).last_point()


def test_folders_with_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("000000001000-0123abcd", "-1-x", "abc", "000000001000-0123abcd.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text('{"format": 1, "files": {}}')
    assert [checkpoint.images for checkpoint in complete_checkpoints(str(tmp_path))] == [1000]


@pytest.mark.parametrize(
    ("facts", "reason"), [({"format": 2}, "format 2; this version reads format 3"), ({}, "no entry 'format'")]
)
def test_a_state_of_another_version_is_refused_by_its_format(
    facts: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "state.json").write_text(json.dumps(facts))
    with pytest.raises(CorruptError, match=reason) as caught:
        load_state(tmp_path, "s3://bucket/run/checkpoints/x")
    assert caught.value.message.startswith("s3://bucket/run/checkpoints/x is not a checkpoint of this version: state")


def test_a_field_within_a_score_is_named_by_its_path(tmp_path: Path) -> None:
    record = ScoreRecord(checkpoint="c", images=1, score=SCORE, seconds=1.0, time_ms=1)
    values = record.to_dict()
    values["score"]["protocol"]["samples"] = None
    path = tmp_path / "score.json"
    path.write_text(json.dumps(values))
    with pytest.raises(CorruptError, match=r"score\.protocol\.samples"):
        ScoreRecord.read(str(path))


def test_an_unknown_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="is not a CheckpointFacts: surprise: Extra inputs"):
        CheckpointFacts.read(changed(tmp_path, surprise=1))


DEEP = '{"class_names": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '"text"', "null", "\xff", DEEP, "[" * 100_000], ids=lambda text: text[:9]
)
def test_what_is_not_an_object_of_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.json"
    path.write_text(text)
    with pytest.raises(CorruptError, match="checkpoint.json"):
        CheckpointFacts.read(str(path))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"number": -1}, "number"),
        ({"number": True}, "number"),
        ({"ended": "yes"}, "ended"),
        ({"trial": {"name": "../other"}}, "trial.name"),
        ({"trial": {"score": float("nan")}}, "trial.score"),
        ({"trial": {"kimg": -1}}, "trial.kimg"),
        ({"trial": {"kimg": float("inf")}}, "trial.kimg"),
        ({"trial": {"point": []}}, "trial.point"),
        ({"trial": {"outcome": None}}, "trial.outcome"),
    ],
)
def test_a_foreign_record_of_a_trial_is_validated(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    values = TrialRecord(number=0, ended=True, trial=TRIAL).to_dict()
    changed = values | change | {"trial": values["trial"] | change.get("trial", {})}
    with pytest.raises(CorruptError, match=f"is not a TrialRecord: {field}"):
        TrialRecord.parse(json.dumps(changed).encode(), "trials/sweep-a.json")


def test_the_records_of_trials_are_read_by_number_and_under_their_own_name(tmp_path: Path) -> None:
    sweep = StoredSweep(f"{tmp_path}/sweep")
    assert sweep.trial_records() == []
    values = TRIAL.model_dump()
    records = [
        TrialRecord(number=number, ended=False, trial=Trial(**(values | {"name": f"sweep-{name}"})))
        for number, name in enumerate("ba")
    ]
    for record in records:
        sweep.write_trial_record(record)
    (tmp_path / "sweep" / "trials" / ".sweep-c.json.0123").write_text("a write that was interrupted")
    assert sweep.trial_records() == records
    files.upload(Path(sweep.trial_url("sweep-a")), sweep.trial_url("sweep-c"))
    with pytest.raises(CorruptError, match=r"sweep-c.json is the record of another trial: sweep-a"):
        sweep.trial_records()


def test_the_record_of_a_sweep_is_not_read_as_that_of_a_run(tmp_path: Path) -> None:
    url = str(tmp_path / "run.json")
    SweepRecord(name="sweep", mlflow_run_id="0", method={}).write(url)
    with pytest.raises(CorruptError, match="not a RunRecord: kind: "):
        RunRecord.read(url)
