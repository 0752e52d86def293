from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.collection.manifest import Collection
from pipeline.config.schema import TrainJob
from pipeline.evaluation.score_checkpoints import score_checkpoint
from pipeline.runs.checkpoints import StoredCheckpoint
from pipeline.runs.json_records import RecordedData, RecordedEvaluation, RecordedInit, RunRecord
from pipeline.runs.score_protocol import ScoreProtocol
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import file_sets
from pipeline.tracking import registry


@pytest.mark.parametrize("commit", ["cd" * 20, "unknown"])
def test_a_version_names_everything_that_it_was_made_of(
    commit: str,
    job: TrainJob,
    run_id: str,
    checkpoint: Callable[..., StoredCheckpoint],
    digits: Collection,
    tmp_path: Path,
) -> None:
    stored = checkpoint(2000, git_commit=commit)
    score = score_checkpoint(job, stored, run_id)
    (version,) = registry.versions(job.track.uri or "", job.name)
    tags = dict(version.tags)
    protocol = ScoreProtocol(**json.loads(tags.pop("protocol")))
    assert protocol == score.protocol
    manifest = file_sets.read_manifest(stored.url)
    assert manifest is not None
    pulled = registry.pull(job.track.uri or "", f"models:/{job.name}@champion", tmp_path / "pulled")
    files_manifest = file_sets.read_manifest(str(pulled))
    assert files_manifest is not None
    assert tags == {
        "files_sha256": files_manifest.digest,
        "metric": f"fd_classifier/{protocol.id8}",
        f"fd_classifier/{protocol.id8}": repr(score.value),
        "better": "lower",
        "run": job.name,
        "kimg": "2",
        "checkpoint": stored.url,
        "checkpoint_sha256": manifest.digest,
        "manifest_digest": digits.digest,
        "method_digest": "ab" * 32,
        "git_commit": commit,
    }
    assert f"| git commit | {commit} |" in (pulled / "README.md").read_text()


def test_a_version_says_what_its_run_started_from(
    job: TrainJob, run_id: str, checkpoint: Callable[..., StoredCheckpoint], tmp_path: Path
) -> None:
    init = RecordedInit(
        source="models:/theirs@champion", version="3", sha256="ef" * 32, taken=["moving average"], skipped=["a", "b"]
    )
    record = RunRecord(
        name=job.name,
        method={},
        mlflow_run_id=run_id,
        data=RecordedData.of(job.data),
        evaluate=RecordedEvaluation.of(job.evaluate),
        init=init,
    )
    StoredRun.of(job).write_record(record)
    score_checkpoint(job, checkpoint(2000), run_id)
    (version,) = registry.versions(job.track.uri or "", job.name)
    assert (version.tags["init"], version.tags["init_sha256"]) == ("models:/theirs/3", "ef" * 32)
    pulled = registry.pull(job.track.uri or "", f"models:/{job.name}@champion", tmp_path / "pulled")
    card = (pulled / "README.md").read_text()
    for row in ("| init | models:/theirs/3 |", "| init taken | moving average |", "| init skipped | a; b |"):
        assert row in card
