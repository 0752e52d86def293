"""Writes the page about a run that has ended, and an animation of its sample grids."""

from __future__ import annotations

import logging
import time

from pipeline.compute.tasks import run_as_task
from pipeline.config.schema import TrainJob
from pipeline.errors import shown_url
from pipeline.report.grids_gif import animate
from pipeline.report.runs_and_models import Reader
from pipeline.report.write_report import write_report
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import files
from pipeline.tracking.mlflow_run import MlflowRun, tracking_uri

log = logging.getLogger(__name__)

COMPARED = 2000  # largest number of generated images; a job with fewer `evaluate.samples` compares that many
DELIVERY_S = 30.0  # seconds to wait for MLflow


def publish_report(job: TrainJob, run_id: str) -> None:
    """Write the page and the animation into the run's folder and its MLflow run. A failure is logged and not raised.

    Where `evaluate.gpus` asks for a GPU, the work runs in a task of the cluster.
    """
    run, began = StoredRun.of(job), time.monotonic()
    try:
        if job.evaluate.gpus and job.evaluate.workers == 1:
            run_as_task(_publish, job, run_id, cpus=job.evaluate.cpus, gpus=job.evaluate.gpus)
        else:
            _publish(job, run_id)
    except Exception as error:
        log.warning(
            "the page about %s could not be written: %s; write it with `sagan report %s`",
            job.name,
            shown_url(str(error)),
            shown_url(run.url),
        )
    else:
        print(f"wrote the page {shown_url(run.report_url)} in {time.monotonic() - began:.0f} s", flush=True)


def _publish(job: TrainJob, run_id: str) -> None:
    run = StoredRun.of(job)
    with files.temporary_folder("report") as temp:
        page, grids = temp / files.name(run.report_url), temp / files.name(run.animation_url)
        write_report([run.url], page, min(COMPARED, job.evaluate.samples), Reader.of(job))
        files.upload(page, run.report_url)
        if animate(run, grids):
            files.upload(grids, run.animation_url)
        tracker = MlflowRun(tracking_uri(job), run_id)
        for path in (page, grids):
            if path.exists():
                tracker.log_file(path)
        tracker.close(DELIVERY_S)
