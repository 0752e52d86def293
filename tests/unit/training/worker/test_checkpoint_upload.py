"""An upload outlives an outage of storage, and training is not held up before its next checkpoint."""

from __future__ import annotations

import math
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import LastingFault
from pipeline.runs.checkpoints import StoredCheckpoint
from pipeline.runs.owner import LostRun, lost_run
from pipeline.storage import files
from pipeline.training.status.messages import Message, Waits, WentOn
from pipeline.training.worker import checkpoint_upload
from pipeline.training.worker.checkpoint_upload import CheckpointUpload
from tests.conftest import TestS3
from tests.faults.storage_proxy import fault_proxy


@pytest.fixture
def written(tmp_path: Path) -> Path:
    folder = tmp_path / "written"
    folder.mkdir()
    (folder / "state.safetensors").write_bytes(b"state")
    return folder


def written_as(checkpoint: StoredCheckpoint) -> StoredCheckpoint:
    """Stands in for the function that writes a checkpoint."""
    return checkpoint


def mine() -> None:
    """The run belongs to this process's driver."""


def test_it_goes_on_after_an_outage(s3: TestS3, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_upload, "FIRST_PAUSE_S", 0.1)
    checkpoint = StoredCheckpoint(f"{s3.bucket()}/000000000032-00000000")
    said: list[Message] = []
    done: list[str] = []
    with fault_proxy(s3.url) as proxy, closing(CheckpointUpload(said.append, mine)) as upload:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url())
        proxy.inject("burst_503", times=math.inf)
        upload.start(written, lambda: checkpoint, lambda complete: done.append(complete.name))
        assert proxy.wait_for("burst_503", times=9)
        assert not done
        assert not upload.ended(within_s=0.0)
        proxy.clear()
        upload.wait()
        assert upload.ended(within_s=0.0)
        assert checkpoint.is_complete()
    assert done == [checkpoint.name]
    assert isinstance(said[0], Waits)
    assert said[0].what.startswith("storage: ")
    assert said[0].until.startswith("it is sent again in ")
    assert said[-1] == WentOn(said[0].who)
    assert not written.exists(), "the local copy is deleted"


def test_a_lasting_fault_is_raised_at_the_next_checkpoint(
    s3: TestS3, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = StoredCheckpoint(f"{s3.bucket()}/000000000032-00000000")
    with fault_proxy(s3.url) as proxy, closing(CheckpointUpload(print, mine)) as upload:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url())
        proxy.inject("credentials_revoked", times=math.inf)
        upload.start(written, lambda: checkpoint, print)
        with pytest.raises(LastingFault):
            upload.start(written, lambda: checkpoint, print)


def test_uploads_follow_each_other(tmp_path: Path, written: Path) -> None:
    done: list[str] = []
    with closing(CheckpointUpload(print, mine)) as upload:
        for images in (32, 64, 96):
            name = f"{images:012d}-00000000"
            folder = Path(shutil.copytree(written, tmp_path / name))
            checkpoint = StoredCheckpoint(str(tmp_path / "run" / name))
            upload.start(folder, partial(written_as, checkpoint), lambda complete: done.append(complete.name))
            assert upload.ended(within_s=60)
            assert upload.last == checkpoint
        upload.wait()
    assert done == files.list_names(str(tmp_path / "run"))


def test_files_that_cannot_be_written_are_an_error_at_the_next_checkpoint(written: Path) -> None:
    def write() -> StoredCheckpoint:
        raise OSError("no space left on device")

    with closing(CheckpointUpload(print, mine)) as upload:
        upload.start(written, write, print)
        with pytest.raises(OSError, match="no space left"):
            upload.start(written, write, print)
    assert not written.exists()


def test_nothing_is_uploaded_for_a_driver_that_lost_the_run(tmp_path: Path, written: Path) -> None:
    checkpoint = StoredCheckpoint(str(tmp_path / "run" / "000000000032-00000000"))

    def lost() -> None:
        raise lost_run("runs/x/owners")

    with closing(CheckpointUpload(print, lost)) as upload:
        upload.start(written, lambda: checkpoint, print)
        with pytest.raises(LostRun):
            upload.wait()
    assert not checkpoint.is_complete()
