"""The project on a simulated GPU, each file in a process of its own: the simulation changes torch and the project."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("batches_and_extractors", "steps", "two_ranks", "worker_loop")


@pytest.mark.parametrize("name", FILES)
def test_on_a_simulated_gpu(name: str) -> None:
    folder, plugin = "tests/simulated_gpu", "tests.simulated_gpu.simulated_gpu"
    options = ["-q", "-p", plugin, "-p", "no:cacheprovider", "--confcutdir", folder]
    command = [sys.executable, "-m", "pytest", *options, f"{folder}/{name}.py"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
