"""The system around `sagan`: job files, shards, Ray workers, scores, registry.

import pipeline
summary = pipeline.run("jobs/quickstart.yaml", **{"train.workers": 1, "train.kimg": 2})
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def run(job: Path | str, **overrides: Any) -> dict[str, Any]:
    """Run a job file with dotted overrides to its end; returns the summary. Raises pipeline.errors.SaganError."""
    from pipeline.jobs import run as run_job

    return run_job(job, overrides)


__all__ = ["run"]
