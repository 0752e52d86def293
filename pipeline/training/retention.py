"""Retention: which checkpoints of a run are kept, and which are deleted."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from pipeline.config.schema import TrainJob
from pipeline.errors import EnvironmentFault, shown_url
from pipeline.runs.best_checkpoint import best_score
from pipeline.runs.checkpoints import StoredCheckpoint, abandoned_checkpoints
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import file_sets, files
from pipeline.tracking import registry
from pipeline.tracking.mlflow_run import tracking_uri

log = logging.getLogger(__name__)


def delete_superfluous_checkpoints(job: TrainJob, kept: Collection[str] = ()) -> None:
    """Delete the checkpoints that the job's run need not keep, and unfinished checkpoints of killed workers.

    Checkpoints with names in `kept` are kept too.

    Raises EnvironmentFault, CorruptError.
    """
    run = StoredRun.of(job)
    kept_no_more = superfluous(run.checkpoints(), job.checkpoint.keep, protected(job) | set(kept))
    for checkpoint in [*kept_no_more, *abandoned_checkpoints(run.checkpoints_url)]:
        file_sets.remove_set(checkpoint.url)


def superfluous(
    checkpoints: Sequence[StoredCheckpoint], keep: int, protected: Collection[str]
) -> list[StoredCheckpoint]:
    """Return the checkpoints to delete. The newest `keep` checkpoints and the checkpoints in `protected` are kept.

    Args:
        checkpoints: Complete checkpoints, the oldest first.
        keep: Number of the newest checkpoints to keep, at least 1.
        protected: Names of checkpoints to keep.
    """
    return [checkpoint for checkpoint in checkpoints[:-keep] if checkpoint.name not in protected]


def needed_by_run(run: StoredRun) -> dict[str, str]:
    """Return the names of the checkpoints that a run needs whatever their age, each with the reason.

    Raises CorruptError, EnvironmentFault.
    """
    scores = run.scores()
    scored = {record.checkpoint for record in scores}
    waiting = [checkpoint.name for checkpoint in run.checkpoints_to_score() if checkpoint.name not in scored]
    best = best_score(scores)
    return dict.fromkeys(waiting, "it waits for a score") | ({best.checkpoint: "it has the best score"} if best else {})


def protected(job: TrainJob) -> set[str]:
    """Return the names of the checkpoints that must be kept whatever their age.

    These are the best checkpoint, the checkpoints that wait for a score, and the checkpoints that registered versions
    name. While the registry cannot be reached, all checkpoints must be kept.
    """
    run = StoredRun.of(job)
    names = set(needed_by_run(run))
    if job.track.register_model:
        try:
            urls = registry.checkpoints(tracking_uri(job), job.registry_name)
        except EnvironmentFault as fault:
            log.warning("the registry cannot be reached, so no checkpoint is deleted now: %s", fault.message)
            return {checkpoint.name for checkpoint in run.checkpoints()}
        names |= {files.name(url) for url in urls if url == shown_url(run.checkpoint(files.name(url)).url)}
    return names
