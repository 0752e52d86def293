"""What is wrong in a run's folder neither blocks the run nor ends its training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.collection.manifest import Collection
from pipeline.config import run_method
from pipeline.config.run_method import digest_of, method_of
from pipeline.config.schema import TrainJob
from pipeline.errors import UsageError
from pipeline.runs.checkpoints import StoredCheckpoint, fetch_newest_checkpoint, upload_checkpoint
from pipeline.runs.owner import LostRun
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import file_sets, files
from pipeline.training import driver
from pipeline.training.driver import Housekeeping
from pipeline.training.find_or_start import complete_job
from pipeline.training.retention import delete_superfluous_checkpoints
from pipeline.training.status.run_status import Status
from tests.conftest import TestS3
from tests.faults.storage_proxy import FaultProxy, fault_proxy
from tests.unit.evaluation.conftest import commit_checkpoint
from tests.unit.training.test_lost_mlflow_run import job_in, start_run


@pytest.fixture
def job(packed: Collection, tmp_path: Path) -> TrainJob:
    return job_in(packed, tmp_path, tmp_path / "runs")


def digest(job: TrainJob) -> str:
    return digest_of(method_of(complete_job(job), Collection.open(job.data.train).digest))


def fetched(job: TrainJob, folder: Path) -> tuple[StoredCheckpoint | None, list[str]]:
    """The checkpoint that a worker would restore, and what it says."""
    said: list[str] = []
    folder.mkdir()
    url = StoredRun.of(job).checkpoints_url
    return fetch_newest_checkpoint(url, folder, digest(job), said.append, lambda: None), said


@pytest.mark.parametrize("manifest", [b"", b"{}", b"[1]", b'{"files": {"../x": {"size": 1, "sha256": "0"}}}', b"\xff"])
def test_a_checkpoint_without_a_valid_manifest_does_not_exist(job: TrainJob, tmp_path: Path, manifest: bytes) -> None:
    good = commit_checkpoint(job, 16, method_digest=digest(job))
    bad = commit_checkpoint(job, 32, method_digest=digest(job))
    Path(bad.url, file_sets.MANIFEST).write_bytes(manifest)
    assert fetched(job, tmp_path / "restored") == (good, [])
    assert StoredRun.of(job).checkpoints() == [good]
    start_run(job)

    folder = tmp_path / "again"  # a worker that reaches the position again replaces it
    folder.mkdir()
    for name in ("state.safetensors", "state.json", "metrics.jsonl", "checkpoint.json"):
        (folder / name).write_bytes(Path(bad.url, name).read_bytes())
    upload_checkpoint(folder, bad)
    assert StoredRun.of(job).checkpoints() == [good, bad]


def test_a_damaged_checkpoint_is_withdrawn_and_uploaded_again(job: TrainJob, tmp_path: Path) -> None:
    good = commit_checkpoint(job, 16, method_digest=digest(job))
    bad = commit_checkpoint(job, 32, method_digest=digest(job))
    tensors = Path(bad.url, "state.safetensors")
    sound = tensors.read_bytes()
    tensors.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    found, said = fetched(job, tmp_path / "restored")
    assert found == good
    assert [line.partition(":")[0] for line in said] == [f"checkpoint {bad.name} is damaged and is withdrawn"]
    assert StoredRun.of(job).checkpoints() == [good], "nobody scores it, and retention does not count it"

    folder = tmp_path / "again"
    folder.mkdir()
    for name in ("state.json", "metrics.jsonl", "checkpoint.json"):
        (folder / name).write_bytes(Path(bad.url, name).read_bytes())
    (folder / "state.safetensors").write_bytes(sound)
    upload_checkpoint(folder, bad)
    assert fetched(job, tmp_path / "once more") == (bad, [])


def test_a_checkpoint_is_withdrawn_only_by_the_owner_and_not_where_its_bytes_are_right(
    job: TrainJob, tmp_path: Path
) -> None:
    """A newer version of the program may have written it."""
    good = commit_checkpoint(job, 16, method_digest=digest(job))
    newer = commit_checkpoint(job, 32, method_digest=digest(job))
    folder = tmp_path / "newer"
    folder.mkdir()
    for path in Path(newer.url).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / file_sets.MANIFEST).unlink()
    (folder / "checkpoint.json").write_text('{"format": 99}')
    files.delete(newer.url)
    file_sets.upload_set(folder, newer.url)
    found, said = fetched(job, tmp_path / "restored")
    assert found == good
    assert said[0].startswith(f"checkpoint {newer.name} cannot be read and is skipped")
    assert StoredRun.of(job).checkpoints() == [good, newer]

    Path(newer.url, "state.safetensors").write_bytes(b"")

    def lost() -> None:
        raise LostRun("another driver owns the run")

    with pytest.raises(LostRun):
        fetch_newest_checkpoint(StoredRun.of(job).checkpoints_url, tmp_path, digest(job), said.append, lost)
    assert StoredRun.of(job).checkpoints() == [good, newer]


def test_a_checkpoint_of_another_method_is_not_adopted(job: TrainJob, tmp_path: Path) -> None:
    """An old driver may commit after `--fresh`, or `--fresh` may be interrupted."""
    own = commit_checkpoint(job, 16, method_digest=digest(job))
    foreign = commit_checkpoint(job, 32, method_digest="00" * 32)
    found, said = fetched(job, tmp_path / "restored")
    assert found == own
    assert said == [f"checkpoint {foreign.name} is of another method and is skipped"]
    with pytest.raises(UsageError, match=f"no record of a run, but its checkpoint {foreign.name} is of another method"):
        start_run(job)


def test_a_folder_that_lost_its_record_goes_on_from_its_own_checkpoint(job: TrainJob) -> None:
    start_run(job)
    commit_checkpoint(job, 16, method_digest=digest(job))
    stored = StoredRun.of(job)
    files.delete(stored.record_url)
    start_run(job)
    assert stored.record() is not None


def test_a_key_that_joins_the_method_later_refuses_no_older_run(
    job: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record and the checkpoint are those of code that did not know `train.batch`."""
    method = start_run(job).record.method
    old = {key: value for key, value in method.items() if key != "train.batch"}
    stored = StoredRun.of(job)
    record = stored.record()
    assert record is not None
    stored.write_record(record.model_copy(update={"method": old}))
    committed = commit_checkpoint(job, 16, method_digest=digest_of(old))
    with pytest.raises(UsageError, match=r"train.batch: absent in that run, 16 in this job"):
        start_run(job)

    monkeypatch.setitem(run_method.ADDED, "train.batch", 16)
    found = start_run(job)
    assert found.method_digest == digest_of(old)
    assert fetched(job, tmp_path / "restored") == (committed, [])
    other = job.model_copy(update={"train": job.train.model_copy(update={"batch": 32})})
    with pytest.raises(UsageError, match=r"train.batch: 16 in that run, 32 in this job"):
        start_run(other)


# --- the driver's housekeeping ---------------------------------------------------------------------------------------


def test_a_checkpoint_from_which_another_run_starts_is_kept(packed: Collection, tmp_path: Path) -> None:
    job = job_in(packed, tmp_path, tmp_path / "runs")
    job = job.model_copy(
        update={"checkpoint": job.checkpoint.model_copy(update={"keep": 1}),
                "track": job.track.model_copy(update={"register_model": False})}
    )  # fmt: skip
    run = start_run(job)
    old, cloned, new = (commit_checkpoint(job, images, to_score=False) for images in (16, 32, 48))
    Housekeeping(run, [cloned.name]).follow(Status(uploaded=[old.name, cloned.name, new.name]))
    assert run.stored.checkpoints() == [cloned, new]
    Housekeeping(run).follow(Status(uploaded=[new.name]))
    assert run.stored.checkpoints() == [new]


@pytest.fixture
def proxy(s3: TestS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with fault_proxy(s3.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url())
        yield proxy


def test_a_fault_of_storage_is_said_and_the_work_is_done_later(
    packed: Collection, tmp_path: Path, s3: TestS3, proxy: FaultProxy, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    job = job_in(packed, tmp_path, tmp_path / "runs").model_copy()
    root = s3.bucket()
    job = job.model_copy(
        update={"checkpoint": job.checkpoint.model_copy(update={"root": root, "keep": 1}),
                "track": job.track.model_copy(update={"register_model": False})}
    )  # fmt: skip
    run = start_run(job)
    old, new = (commit_checkpoint(job, images, to_score=False) for images in (16, 32))
    monkeypatch.setattr(driver, "HOUSEKEEPING_PAUSE_S", 0.0)
    housekeeping, seen = Housekeeping(run), Status(starts=1, uploaded=[old.name, new.name])
    proxy.inject("credentials_revoked", times=math.inf)
    housekeeping.follow(seen)
    assert "training continues" in capsys.readouterr().out
    proxy.clear()
    housekeeping.follow(seen)
    assert run.stored.checkpoints() == [new]
    record = run.stored.record()
    assert record is not None
    assert record.starts == 1


def test_what_killed_workers_left_of_a_checkpoint_is_deleted_later(job: TrainJob) -> None:
    run = StoredRun.of(job)
    left, old, newest, uploading = (commit_checkpoint(job, images, to_score=False) for images in (16, 32, 48, 64))
    for unfinished in (left, uploading):
        files.delete(files.join(unfinished.url, file_sets.MANIFEST))
    # On a GPU, a repeated step may have other bits, and then its checkpoint has another digest in its name.
    files.write_bytes(f"{run.checkpoints_url}/{newest.images:012}-00000000/metrics.jsonl", b"")
    delete_superfluous_checkpoints(
        job.model_copy(update={"track": job.track.model_copy(update={"register_model": False})})
    )
    assert files.list_names(run.checkpoints_url) == [checkpoint.name for checkpoint in (old, newest, uploading)]


def test_storage_that_does_not_answer_hides_no_reason(
    packed: Collection, tmp_path: Path, s3: TestS3, proxy: FaultProxy
) -> None:
    job = job_in(packed, tmp_path, tmp_path / "runs")
    root = s3.bucket()
    job = job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update={"root": root})})
    run = start_run(job)
    proxy.refuse(30.0)
    assert "storage does not answer" in driver._newest_checkpoint(run)
