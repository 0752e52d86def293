"""The time-out of tests, on tests of its own in another pytest with a time-out of two seconds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = """
import subprocess, sys, threading
import pytest
from tests.silence import progress_seen

def wait(seconds):
    threading.Event().wait(seconds)

@pytest.fixture
def one():
    wait(1.6)

@pytest.fixture
def two(one):
    wait(1.6)

@pytest.fixture
def hangs():
    wait(100)

def test_passes_with_files(tmp_path):
    for n in range(8):
        wait(0.4)
        (tmp_path / str(n)).touch()

def test_passes_with_lines():
    for n in range(8):
        wait(0.4)
        progress_seen()

def test_passes_with_fixtures(two):
    wait(1.6)

def test_fails_where_it_waits(tmp_path):
    (tmp_path / "first").touch()
    wait(100)

def test_fails_where_a_fixture_waits(hangs):
    pass

def test_fails_where_a_process_waits():
    subprocess.run([sys.executable, "-c", "import threading; threading.Event().wait(100)"])

def test_fails_where_it_computes_for_ever():
    while True:
        pass
"""


def test_silence_fails_a_test_and_progress_does_not(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    hooks = "pytest_fixture_setup, pytest_timeout_cancel_timer, pytest_timeout_set_timer"
    (tmp_path / "conftest.py").write_text(f"from tests.silence import {hooks}\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", f"--rootdir={tmp_path}", "-c", "/dev/null", "--timeout=2", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"^(PASSED|FAILED|ERROR) \S*::(\w+)", done.stdout, re.MULTILINE)
    outcomes = {name: outcome for outcome, name in found}
    assert len(outcomes) == TESTS.count("def test_"), done.stdout
    for name, outcome in outcomes.items():
        assert (outcome == "PASSED") == name.startswith("test_passes"), done.stdout
    assert done.stdout.count("Failed: Timeout") == TESTS.count("def test_fails"), done.stdout
