"""Writes the page about a run or a study that has ended, and an animation of a run's sample grids."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.compute.tasks import run_as_task
from pipeline.config.schema import TrainJob
from pipeline.errors import shown_url
from pipeline.report.grids_gif import animate
from pipeline.report.runs_and_models import Reader
from pipeline.report.write_report import write_report
from pipeline.runs.stored_run import StoredRun, StoredStudy
from pipeline.storage import files
from pipeline.tracking.mlflow_run import MlflowRun, tracking_uri

log = logging.getLogger(__name__)

COMPARED = 2000  # largest number of generated images; a job with fewer `evaluate.samples` compares that many
DELIVERY_S = 30.0  # seconds to wait for MLflow


def publish_report(job: TrainJob, run_id: str) -> None:
    """Write the page and the animation into the run's folder and its MLflow run. A failure is logged and not raised.

    Where `evaluate.gpus` asks for a GPU, the work runs in a task of the cluster.
    """
    run = StoredRun.of(job)
    _try(_publish_run, job, run_id, run.url, run.report_url)


def publish_study_report(job: TrainJob, study: StoredStudy, run_id: str) -> None:
    """Write the page about a study into its folder and its MLflow run, as `publish_report` does.

    Args:
        job: Job of the run that the page shows.
        study: Folder of the study.
        run_id: Id of the study's MLflow run.
    """
    _try(_publish_study, job, run_id, study.url, study.report_url)


def _try(publish: Callable[[TrainJob, str, str, str], None], job: TrainJob, run_id: str, url: str, page: str) -> None:
    """Call `publish` with the other arguments, in a task of the cluster where the job asks for a GPU."""
    began = time.monotonic()
    try:
        if job.evaluate.gpus and job.evaluate.workers == 1:
            run_as_task(publish, job, run_id, url, page, cpus=job.evaluate.cpus, gpus=job.evaluate.gpus)
        else:
            publish(job, run_id, url, page)
    except Exception as error:
        log.warning(
            "the page about %s could not be written: %s; write it with `sagan report %s`",
            files.name(url),
            shown_url(str(error)),
            shown_url(url),
        )
    else:
        print(f"wrote the page {shown_url(page)} in {time.monotonic() - began:.0f} s", flush=True)


def _publish_run(job: TrainJob, run_id: str, url: str, page_url: str) -> None:
    run = StoredRun(url)
    with files.temporary_folder("report") as temp:
        page, grids = _page(job, url, page_url, temp), temp / files.name(run.animation_url)
        if animate(run, grids):
            files.upload(grids, run.animation_url)
        _track(job, run_id, [path for path in (page, grids) if path.exists()])


def _publish_study(job: TrainJob, run_id: str, url: str, page_url: str) -> None:
    with files.temporary_folder("report") as temp:
        _track(job, run_id, [_page(job, url, page_url, temp)])


def _page(job: TrainJob, url: str, page_url: str, folder: Path) -> Path:
    """Write the page about the run or the study in the folder `url`, store it at `page_url`, and return its path."""
    page = folder / files.name(page_url)
    write_report([url], page, min(COMPARED, job.evaluate.samples), Reader.of(job))
    files.upload(page, page_url)
    return page


def _track(job: TrainJob, run_id: str, paths: Sequence[Path]) -> None:
    tracker = MlflowRun(tracking_uri(job), run_id)
    for path in paths:
        tracker.log_file(path)
    tracker.close(DELIVERY_S)
