from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.storage.scratch_folder import ScratchFolder

HOLD = """
import sys
from pipeline.storage.scratch_folder import ScratchFolder

folder = ScratchFolder("run-a")
(folder.path / "state").write_bytes(b"x")
print(folder.path, flush=True)
sys.stdin.read()
"""

READ = "import sys; from pipeline.storage import files; files.read_at_most(sys.argv[1], 1000)"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_a_folder_is_deleted_when_it_is_no_longer_needed(temporary: Path) -> None:
    folder = ScratchFolder("run-a")
    (folder.path / "file").write_bytes(b"x")
    folder.delete_if_empty()
    assert folder.path.is_dir(), "it is not empty"
    folder.delete()
    assert list(temporary.iterdir()) == []
    empty = ScratchFolder("run-a")
    empty.delete_if_empty()
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_is_deleted_and_what_a_living_one_has_is_kept(temporary: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())
    foreign = temporary / "sagan-run-a-thesis"
    foreign.mkdir()
    other = ScratchFolder("run-b")
    mine = ScratchFolder("run-a")
    assert (left / "state").exists(), "its process lives"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert left.is_dir()
    again = ScratchFolder("run-c")
    assert not left.exists(), "whichever run it belonged to"
    assert {path for path in temporary.iterdir() if path.is_dir()} == {foreign, other.path, mine.path, again.path}


def test_what_a_process_left_that_was_killed_while_it_read_is_deleted(temporary: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/manifest.json"
        process = subprocess.Popen([sys.executable, "-c", READ, url])
        connection, _ = server.accept()
        with connection:
            process.kill()
            process.wait()
    assert list(temporary.iterdir()), "it waited for an answer"
    mine = ScratchFolder("run-a")
    assert list(temporary.iterdir()) == [mine.path]


def test_a_link_is_not_followed(temporary: Path) -> None:
    victim = temporary / "victim"
    victim.mkdir()
    (victim / ".owner").touch()
    (temporary / "sagan-run-a-link").symlink_to(victim)
    ScratchFolder("run-a")
    assert (victim / ".owner").exists()
