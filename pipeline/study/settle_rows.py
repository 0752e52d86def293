"""What a study settles once for all runs of a row, and records: where they start from, and their tuned parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.collection.manifest import Collection
from pipeline.config.job_file import row_job, row_sweep
from pipeline.config.schema import StudyJob, TuneJob, point_in
from pipeline.errors import CorruptError, shown_url
from pipeline.runs.json_records import StudyRecord
from pipeline.runs.stored_run import StoredRun
from pipeline.tracking.init_source import find_init, location
from pipeline.training.find_or_start import complete_job, pack_if_missing

Point = dict[str, Any]
"""Values by dotted key of a job."""


def find_versions(study: StudyJob, known: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return the version of each source that a row's `init` names, by the source without secrets.

    All rows and seeds that name a source start from one version of it, also where the alias names another version later
    or the run there has gone on. A source is looked at once.

    Args:
        study: The study.
        known: Versions that the study has recorded.

    Raises UsageError where there is no source or where it does not fit the row. Raises CorruptError, EnvironmentFault.
    """
    versions = dict(known)
    for row in study.rows:
        job = row_job(study, row, study.seeds[0])
        if job.init is None or shown_url(job.init.source) in versions:
            continue
        pack_if_missing(job)
        record = StoredRun.of(job).record()
        known_init = record.init if record else None
        init = find_init(complete_job(job), Collection.open(job.data.train).class_names, known_init)
        assert init is not None
        versions[init.source] = init.version
    return versions


def tuned_points(study: StudyJob, record: StudyRecord | None, url: str) -> dict[str, Point]:
    """Return the recorded points of the rows that are tuned, by row.

    `url` is the folder of the study. Raises CorruptError where a point is not in the row's space: a point of other keys
    could set any key of the job.
    """
    points = {}
    for row, recorded in (record.tuned if record else {}).items():
        if row in study.rows and (tuning := study.tuning(row)):
            try:
                points[row] = point_in(tuning.space, recorded)
                if missing := sorted(tuning.space.keys() - recorded.keys()):
                    raise ValueError(f"{missing[0]} is missing")
            except ValueError as error:
                raise CorruptError(
                    f"{url} records values for the row {row} that are not in its tune.space: {error}",
                    "set tune.space back, or give the study another name (name=…) to tune again",
                ) from error
    return points


def settled_values(
    study: StudyJob, versions: Mapping[str, str | None], points: Mapping[str, Point]
) -> dict[str, Point]:
    """Return the values that are settled for the jobs of each row, by row and dotted key."""
    values = {}
    for row in study.rows:
        init = row_job(study, row, study.seeds[0]).init
        version = versions.get(shown_url(init.source)) if init else None
        source = {"init.source": location(init.source, version)} if init and version else {}
        values[row] = {**source, **points.get(row, {})}
    return values


def sweeps_of(study: StudyJob, settled: Mapping[str, Point], points: Mapping[str, Point]) -> dict[str, TuneJob]:
    """Return the sweeps of the rows that are still to be tuned, by row."""
    sweeps = {row: row_sweep(study, row, settled[row]) for row in study.rows if row not in points}
    return {row: sweep for row, sweep in sweeps.items() if sweep is not None}
