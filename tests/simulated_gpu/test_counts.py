"""A training step asks no more of a GPU than it did when these bounds were set."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BOUNDS = {  # about two percent above what was counted; lower them with every change that saves something
    "launches_eager": 1920,
    "gigabytes": 179,
    "live_gib": 8.4,
    "collectives_32_per_rank": 40,
    "host_syncs": 0,
}


def test_a_step_stays_within_its_counts(tmp_path: Path) -> None:
    written = tmp_path / "counts.json"
    command = [sys.executable, "-m", "tests.benchmarks.counts", "--json", str(written)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    counted = json.loads(written.read_text())
    assert {name: counted[name] for name, bound in BOUNDS.items() if not counted[name] <= bound} == {}
