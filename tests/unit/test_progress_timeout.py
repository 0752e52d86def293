"""The time-out of tests, on tests of its own in another pytest with a time-out of one second."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
TESTS = """
import subprocess, sys, threading
import pytest
from tests.progress_timeout import progress_seen

def wait(seconds):
    threading.Event().wait(seconds)

@pytest.fixture
def one():
    wait(0.6)

@pytest.fixture
def two(one):
    wait(0.6)

@pytest.fixture
def hangs():
    wait(100)

def test_passes_with_files(tmp_path):
    for n in range(8):
        wait(0.2)
        (tmp_path / str(n)).touch()

def test_passes_with_lines():
    for n in range(8):
        wait(0.2)
        progress_seen()

def test_passes_with_fixtures(two):
    wait(0.6)

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
    (tmp_path / "conftest.py").write_text(f"from tests.progress_timeout import {hooks}\n")
    report = tmp_path / "report.xml"
    options = [f"--junitxml={report}", f"--rootdir={tmp_path}", "-c", "/dev/null", "--timeout=1"]
    subprocess.run([sys.executable, "-m", "pytest", *options, tmp_path], cwd=ROOT, check=False)
    messages = {
        case.attrib["name"]: [problem.attrib["message"] for problem in case]
        for case in ElementTree.parse(report).iter("testcase")
    }
    assert len(messages) == TESTS.count("def test_")
    for name, problems in messages.items():
        assert len(problems) == name.startswith("test_fails"), (name, problems)
        assert all("Timeout" in problem for problem in problems), (name, problems)
