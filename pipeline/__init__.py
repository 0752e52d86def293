"""The system around `sagan`: job files, shards, Ray workers, scores, registry.

import pipeline
summary = pipeline.run_job("jobs/quickstart.yaml", {"train.workers": 1, "train.kimg": 2})
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_job(job: Path | str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run a job file with dotted overrides to its end; returns its summary.

    Raises pipeline.errors.SaganError.
    """
    from pipeline import job_runner

    return job_runner.run_job(job, overrides)


__all__ = ["run_job"]
