from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipeline.runs.git_commit import PACKAGES, git_commit


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A committed checkout that holds this code's packages, each with one file."""
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    git(tmp_path, "init", "--quiet")
    (tmp_path / ".gitignore").write_text(".venv\n__pycache__\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=x", "-c", "user.email=x@example.com", "commit", "--quiet", "-m", "first")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_a_checkout_says_its_commit_and_whether_its_code_was_changed(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    (checkout / "notes.txt").write_text("no code")
    (checkout / "sagan" / "__pycache__").mkdir()
    (checkout / "sagan" / "__pycache__" / "x.pyc").touch()
    assert git_commit(checkout) == head
    (checkout / "sagan" / "new.py").touch()
    assert git_commit(checkout) == f"{head}-dirty"
    (checkout / "sagan" / "new.py").unlink()
    (checkout / "pipeline" / "__init__.py").write_text("changed = True")
    assert git_commit(checkout) == f"{head}-dirty"


def test_code_that_is_not_of_a_checkout_has_the_commit_that_it_is_given(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    installed = checkout / ".venv" / "site-packages"  # inside a checkout, but not of it
    (installed / "sagan").mkdir(parents=True)
    submitted = tmp_path_factory.mktemp("submitted")
    assert git_commit(installed) == git_commit(submitted) == "unknown"
    (submitted / "COMMIT").write_text(f"{'ab' * 20}\n")
    assert git_commit(submitted) == "ab" * 20
